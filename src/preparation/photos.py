"""Photographs with annotation files (`conf=photos`).

A photo is one image under one prompt, with the captions of all its records. All photos of an image are in the same
split, even if the image has two names (`COCO_val2014_000000000042.jpg` is `000000000042.jpg`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Literal

from src.io.errors import UserError
from src.io.images import ImageProblem, convert, load
from src.preparation.annotations import Caption, read_entries
from src.preparation.builder import Dataset
from src.preparation.counts import Counts
from src.preparation.splits import SPLIT_NAMES, Item, hashed_share, split_of
from src.preparation.swaps import locate_swaps
from src.text.prompt_format import IMAGE
from src.text.tokenizer import Codec

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_COCO_PREFIX = re.compile(r"^COCO_(train|val|test)\d{4}_")
_ID_DIGITS = 12  # COCO file names pad ids with zeros


@dataclass(kw_only=True)
class Photo(Item):
    """An image under one prompt. name: of the image, without COCO's prefix; captions: by text."""

    path: Path
    prompt: str
    captions: dict[str, Caption] = field(default_factory=dict)


@dataclass(kw_only=True)
class Photos(Dataset):
    """Photographs with captions, from annotation files in any format that `src.preparation.annotations` reads.

    images:      folder that the image names in the annotations are relative to
    annotations: one file or several: JSON, JSONL, CSV or TSV
    image_size:  pixels, side of the stored square image: the whole picture, padded with grey
    square:      false keeps the shape of images, the longer side at most `image_size`, for training with tiles
    prompt:      for records without a question
    max_images:  use only the first `max_images` photos; null uses all
    """

    image_size: int
    prompt: str
    images: str
    annotations: str | Sequence[str]
    encoding: Literal["jpg", "png"] = "jpg"
    square: bool = True
    max_images: int | None = None

    @property
    def sources(self) -> Sequence[str]:
        return [self.images, *([self.annotations] if isinstance(self.annotations, str) else self.annotations)]

    def read(self, counts: Counts) -> list[Photo]:
        """The photos of all records whose image is there. The first record of an image sets its split."""
        folder = Path(self.images)
        if not folder.is_dir():
            raise UserError(f"no image folder {folder}")
        photos: dict[tuple[Path, str], Photo] = {}
        splits: dict[str, tuple[str, float | None]] = {}
        entries = (entry for file in self.sources[1:] for entry in read_entries(Path(file), counts))
        for entry in entries:
            # 1. the image, and its split
            path = find_image(folder, entry.image)
            if path is None:
                counts.skip("missing_image", entry.image)
                continue
            name, source = _COCO_PREFIX.sub("", path.stem), path.relative_to(folder).as_posix()
            if name not in splits:
                given, share = SPLIT_NAMES.get((entry.split or "").lower()), hashed_share(name, self.seed)
                splits[name] = (given, None) if given else (split_of(share), share)
            # 2. the photo, unless another record has made it
            prompt = entry.prompt or self.prompt
            if (path, prompt) in photos:
                counts["merged"] += 1
            else:
                counts["unknown_split"] += bool(entry.split) and entry.split.lower() not in SPLIT_NAMES
                digest = hashlib.blake2b(f"{source}\n{prompt}".encode(), digest_size=4).hexdigest()
                key = f"{re.sub(r'[^A-Za-z0-9_-]+', '_', path.stem)[:60]}-{digest}"
                split, share = splits[name]
                common = {"key": key, "name": name, "source": source, "split": split, "share": share}
                photos[path, prompt] = Photo(path=path, prompt=prompt, **common)
            # 3. its captions; one that the photo has already may bring new swaps
            captions = photos[path, prompt].captions
            for caption in entry.captions:
                existing = captions.setdefault(caption.text, caption)
                if existing is not caption:
                    new = [swap for swap in caption.swaps if swap not in existing.swaps]
                    existing.swaps.extend(new)
                    counts["duplicate_caption"] += not new
        return list(photos.values())[: self.max_images]

    def texts(self, items: Sequence[Photo]) -> Iterator[str]:
        yield f"{self.prompt} system user assistant"  # the roles of the chat template
        for photo in items:
            yield photo.prompt
            for caption in photo.captions.values():
                yield caption.text
                yield from (swap.wrong for swap in caption.swaps)

    def is_usable(self, item: Photo, codec: Codec) -> bool:
        """Whether the photo has a caption that fits and an image that can be decoded."""
        fits = lambda text: len(codec.encode(text)[0]) < self.response_length and not codec.loses(text)  # noqa: E731
        if codec.loses(item.prompt) or not any(map(fits, item.captions)):
            return False
        try:
            load(item.path, size=self.image_size)
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
                if codec.loses(caption.text):
                    counts.skip("not_in_vocabulary", photo.source)
                elif len(codec.encode(caption.text)[0]) >= self.response_length:
                    counts.skip("captions too long", photo.source)
                else:
                    swaps = locate_swaps(codec, caption.text, caption.swaps, counts)
                    captions.append({"text": caption.text, "swaps": swaps})
            if not captions:
                counts.skip("no_usable_caption", photo.source)
                continue
            try:
                data = convert(photo.path, size=self.image_size, encoding=self.encoding, square=self.square)
            except ImageProblem as reason:
                counts.skip(reason, photo.source)
                continue
            counts["image marks read as text"] += photo.prompt.count(IMAGE) > 1  # see `Codec.prompt_ids`
            record = {"key": photo.key, "prompt": photo.prompt, "captions": captions}
            yield {"__key__": photo.key, "json": record, self.encoding: data}


def find_image(folder: Path, name: str) -> Path | None:
    """The image file of a name, trying it with fewer and fewer leading folders, in COCO's other spelling (without the
    prefix, with padding), and with each image suffix if it has none."""
    parts = [p for p in PurePosixPath(name.replace("\\", "/")).parts if p not in ("/", ".", "..")]
    for first in range(len(parts)):
        path = folder.joinpath(*parts[first:])
        plain = path.with_name(_COCO_PREFIX.sub("", path.name))
        if path.name.isdecimal():
            plain = plain.with_name(plain.name.zfill(_ID_DIGITS))
        spellings = [path, plain]
        if path.suffix.lower() not in SUFFIXES:
            spellings += [p.with_name(p.name + suffix) for p in (path, plain) for suffix in SUFFIXES]
        for candidate in spellings:
            if os.path.isfile(candidate):  # unlike Path.is_file, False for invalid names
                return candidate
    return None
