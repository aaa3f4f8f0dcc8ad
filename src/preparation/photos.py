"""Photographs with annotation files (`conf=photos`), from one source or several.

    sources -> entries of each, with image files -> a photo for each -> photos of one image and prompt are merged

A photo is one image under one prompt, with the captions of all its records in one source. All photos of an image are
in the same split, even if the image has two names (`COCO_val2014_000000000042.jpg` is `000000000042.jpg`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from src.io.errors import UserError
from src.io.images import ImageProblem, convert, load
from src.models.tiling import resizer
from src.preparation.builder import Dataset
from src.preparation.counts import Counts, Skip
from src.preparation.items import Items
from src.preparation.sources import coco
from src.preparation.sources.formats import Caption
from src.preparation.sources.source import Source
from src.preparation.splits import Item, hashed_share, split_of
from src.preparation.swaps import locate_swaps
from src.text.prompt_format import IMAGE
from src.text.tokenizer import Codec


@dataclass(kw_only=True)
class Photo(Item):
    """An image under one prompt. name: of the image, without COCO's prefix; image: its file, or the bytes of one;
    captions: by text."""

    image: Path | bytes
    prompt: str
    captions: dict[str, Caption] = field(default_factory=dict)


@dataclass(kw_only=True)
class Photos(Dataset):
    """Photographs with captions, from annotation files in any format that `src.preparation.sources` reads.

    images, annotations: of the only source, see `Source`
    sources:     {name: {annotations, images, prompt, weight, max, captions, licence, origin}} instead, see `Source`
    image_size:  pixels, side of the stored square image: the whole picture, padded with grey
    square:      false keeps the shape of images, the longer side at most `image_size`, for training with tiles
    resize:      torch, or pillow
    prompt:      for records without a question
    max_images:  use only the first `max_images` photos; null uses all. The records of others count as over_max
    """

    LEAST: ClassVar[dict[str, int]] = {**Dataset.LEAST, "image_size": 1, "max_images": 1}

    image_size: int
    prompt: str
    images: str | None = None
    annotations: str | Sequence[str] | None = None
    sources: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)
    encoding: Literal["jpg", "png"] = "jpg"
    square: bool = True
    max_images: int | None = None
    resize: Literal["torch", "pillow"] = "torch"

    @cached_property
    def source_list(self) -> list[Source]:
        """Raises UserError for a source that is not as `Source` says."""
        if bool(self.sources) == bool(self.annotations) or (self.sources and self.images):
            raise UserError(
                "give either prepare.annotations=FILE with prepare.images=DIR, or prepare.sources, each with its images"
            )
        if self.annotations:
            return [Source(annotations=self.annotations, images=self.images)]
        names, sources = [known.name for known in fields(Source)][1:], []
        for name, values in self.sources.items():
            if values is None:  # takes a source of another layer out
                continue
            if unknown := set(values) - set(names):
                raise UserError(f"prepare.sources.{name} has no key {unknown.pop()!r}; it may have {', '.join(names)}")
            if not values.get("annotations"):
                raise UserError(f"prepare.sources.{name}.annotations must be given")
            source = Source(name=str(name), **values)
            if not (isinstance(source.weight, int | float) and 0 < source.weight < math.inf):
                raise UserError(f"prepare.sources.{name}.weight must be a positive number, got {source.weight!r}")
            if source.max is not None and not (isinstance(source.max, int) and source.max > 0):
                raise UserError(f"prepare.sources.{name}.max must be a positive whole number, got {source.max!r}")
            sources.append(source)
        return sources

    @property
    def inputs(self) -> Sequence[str]:
        return [path for source in self.source_list for path in (source.images, *source.files()) if path]

    @property
    def mixture(self) -> Sequence[Mapping[str, Any]]:
        keys = ("name", "weight", "licence", "origin")
        return [{key: getattr(source, key) for key in keys} for source in self.source_list]

    def read(self, counts: Counts) -> Iterator[Photo]:
        """A photo for each record whose image is there."""
        keys: set[str] = set()  # of the photos, where their number is limited
        for source in self.source_list:
            for entry, path in source.read(counts, self.seed):
                # 1. the image
                if path is not None:
                    image, stem = path, path.stem
                    place = identity = path.relative_to(source.images or ".").as_posix()
                else:
                    image, place = entry.data or b"", entry.place
                    identity = hashlib.blake2b(image, digest_size=16).hexdigest()
                    stem = Path(entry.image).stem or identity
                # 2. its split
                name = coco.PREFIX.sub("", stem)
                share = hashed_share(name, self.seed)
                placed = {"split": entry.split or split_of(share), "share": None if entry.split else share}
                # 3. the photo
                prompt = entry.prompt or source.prompt or self.prompt
                parts = [source.name, identity, prompt] if source.name else [identity, prompt]
                digest = hashlib.blake2b("\n".join(parts).encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
                key = f"{re.sub(r'[^A-Za-z0-9_-]+', '_', stem)[:60]}-{digest}"
                if self.max_images is not None and key not in keys:
                    if len(keys) >= self.max_images:
                        counts.skip("over_max", entry.place)
                        continue
                    keys.add(key)
                common = {"key": key, "name": name, "source": place, "origin": source.name, **placed}
                photo = Photo(image=image, prompt=prompt, **common)
                _add(photo, entry.captions, counts)
                yield photo

    def merge(self, item: Photo, other: Photo, counts: Counts) -> None:
        """Add the captions of a later record of an image and prompt."""
        if item.share is None and other.share is None and item.split != other.split:
            counts.skip("image_in_two_splits", f"{other.source} ({item.split} and {other.split})")
            return
        if other.share is None:  # a split that is given counts more than a hash
            item.split, item.share = other.split, None
        counts["merged"] += 1
        _add(item, other.captions.values(), counts)

    def divide(self, items: Items, codec: Codec, counts: Mapping[str, Counts]) -> dict:
        items.unite()
        splits: dict[Path | str, str] = {}  # of each image, which may have several prompts and sources
        for photo in items.in_several_splits():  # names of files may be those of other images, too, in other folders
            file = self.file_of(photo)
            image = photo.name if file is None or coco.is_coco(file.as_posix()) else file
            if photo.split != (kept := splits.setdefault(image, photo.split)):
                counts["records"].source = photo.origin
                counts["records"].skip("image_in_two_splits", f"{photo.source} ({kept} and {photo.split})")
                items.remove(photo)
        return super().divide(items, codec, counts)

    def texts(self, items: Iterable[Photo]) -> Iterator[str]:
        yield f"{self.prompt} system user assistant"  # the roles of the chat template
        for photo in items:
            yield photo.prompt
            for caption in photo.captions.values():
                yield caption.text
                yield from (swap.wrong for swap in caption.swaps)

    def file_of(self, item: Photo) -> Path | None:
        return item.image if isinstance(item.image, Path) else None

    def is_usable(self, item: Photo, codec: Codec) -> bool:
        """Whether the photo has a caption that fits and an image that can be decoded."""
        fits = lambda text: len(codec.encode(text)[0]) < self.response_length and not codec.loses(text)  # noqa: E731
        if codec.loses(item.prompt) or not any(map(fits, item.captions)):
            return False
        try:
            load(item.image, size=self.image_size)
        except ImageProblem:
            return False
        return True

    def samples(self, items: Iterable[Photo], codec: Codec, counts: Counts) -> Iterator[dict]:
        for photo in items:
            if codec.loses(photo.prompt):
                counts.skip("prompt_not_in_vocabulary", f"{photo.source}: {photo.prompt}")
                continue
            captions = []
            for caption in photo.captions.values():
                try:
                    self.check_response(caption.text, codec)
                except Skip as reason:
                    counts.skip(reason, photo.source)
                    continue
                swaps = locate_swaps(codec, caption.text, caption.swaps, counts)
                captions.append({"text": caption.text, "swaps": swaps})
            if not captions:
                counts.skip("no_usable_caption", photo.source)
                continue
            try:
                form = {"encoding": self.encoding, "square": self.square, "resize": resizer(self.resize)}
                data = convert(photo.image, size=self.image_size, **form)
            except ImageProblem as reason:
                counts.skip(reason, photo.source)
                continue
            counts["image marks read as text"] += photo.prompt.count(IMAGE) > 1  # see `Codec.prompt_ids`
            record = {"key": photo.key, "prompt": photo.prompt, "captions": captions}
            yield {"__key__": photo.key, "json": record, self.encoding: data}


def _add(photo: Photo, captions: Iterable[Caption], counts: Counts) -> None:
    """Add captions to a photo; one that it has already may bring new swaps."""
    for caption in captions:
        existing = photo.captions.setdefault(caption.text, caption)
        if existing is not caption:
            new = [swap for swap in caption.swaps if swap not in existing.swaps]
            existing.swaps.extend(new)
            counts["duplicate_caption"] += not new
