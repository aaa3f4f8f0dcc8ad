"""A source of photographs: annotation files, and the folder that the image names in them are relative to.

read_entries -> records in a known format (`formats.py`) -> Source.read: with the file of each image (`images.py`)
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import nsmallest
from itertools import islice
from pathlib import Path, PurePosixPath

from src.io.errors import UserError
from src.preparation.counts import Counts, Skip
from src.preparation.records import clean, matching_files, read_records
from src.preparation.sources import coco
from src.preparation.sources.formats import (
    ANSWER_KEYS,
    CAPTION_KEYS,
    IMAGE_KEYS,
    TURN_KEYS,
    Entry,
    image_of,
    question_text,
    read_captions,
)  # fmt: skip
from src.preparation.sources.images import Images, Match
from src.preparation.splits import hashed_share, split_named
from src.preparation.tables import read_table

READERS = {".txt": read_table, ".token": read_table}  # files of annotations only


@dataclass(kw_only=True)
class Source:
    """One source of a dataset.

    annotations: one file or several; a name with * stands for all files that match
    images:      folder that image names are relative to; null: the images are in the annotations (Parquet, base64)
    prompt:      for records without a question; null: that of the dataset
    weight:      in training, relative to other sources: 2 reads each sample twice in a pass
    max:         use only so many of the usable records, chosen by a hash; null: all
    captions:    fields that hold the captions, if they have other names than those that are known
    licence, origin: for the manifest
    """

    name: str = ""
    annotations: str | Sequence[str]
    images: str | None = None
    prompt: str | None = None
    weight: float = 1.0
    max: int | None = None
    captions: str | Sequence[str] = ()
    licence: str | None = None
    origin: str | None = None

    def files(self) -> list[str]:
        return matching_files(self.annotations)

    def read(self, counts: Counts, seed: int) -> Iterator[tuple[Entry, Path | None]]:
        """The usable records, each with its image file; None if the record holds the image."""
        if self.images is not None and not Path(self.images).is_dir():
            raise UserError(f"no image folder {self.images}")
        counts.source = self.name
        if self.max is None:
            yield from self._found(counts)
            return
        share = lambda number: hashed_share(f"{self.name}#{number}", seed)  # noqa: E731
        least = nsmallest(self.max, (share(number) for number, _ in enumerate(self._found(Counts()))))
        for number, found in enumerate(self._found(counts)):
            if least and share(number) <= least[-1]:
                yield found
            else:
                counts.skip("over_max", found[0].place)

    def _found(self, counts: Counts) -> Iterator[tuple[Entry, Path | None]]:
        """The records whose image is there.

        Image names may be relative to another folder than `images`: `x/a.jpg` may be its `a.jpg`, unless some name is
        right as it is, or another record of the source names that file differently. This is known at the end of the
        files, which are then read again.
        """
        # 1. what is certain
        images, is_exact, num_open = Images(Path(self.images or ".")), False, 0
        folders: dict[Path, str | None] = {}  # file -> folder in the only name for it; None: there are several names
        for entry in self._entries(counts):
            if entry.data is not None:
                yield entry, None
            elif match := self._find(images, entry, counts):
                if match.is_certain:
                    is_exact |= match.is_exact
                    yield entry, match.path
                elif is_exact:
                    counts.skip("missing_image", f"{entry.image} ({match.path} is in another folder)")
                else:
                    num_open += 1
                    folder = str(PurePosixPath(entry.image).parent)
                    if folders.setdefault(match.path, folder) != folder:
                        folders[match.path] = None
        if not num_open:
            return
        # 2. the names that were open until now
        matches = ((entry, self._find(images, entry, Counts())) for entry in self._entries(Counts()) if not entry.data)
        uncertain = ((entry, match.path) for entry, match in matches if match and not match.is_certain)
        for entry, path in islice(uncertain, num_open):
            if is_exact or folders[path] is None:
                counts.skip("missing_image", f"{entry.image} ({path} is in another folder)")
            else:
                yield entry, path

    def _entries(self, counts: Counts) -> Iterator[Entry]:
        columns = [self.captions] if isinstance(self.captions, str) else self.captions
        first, is_inside = None, False
        for file in self.files():
            for entry in read_entries(Path(file), counts, columns):
                first, is_inside = first or entry, is_inside or entry.data is not None
                yield entry
        if first and self.images is None and not is_inside:
            raise UserError(f"{first.place} names the image file {first.image[:80]}: set `images` to its folder")

    def _find(self, images: Images, entry: Entry, counts: Counts) -> Match | None:
        """The image of an entry; None, counted, if it is not there."""
        if self.images is None:  # of a Parquet file, whose other rows hold their images
            counts.skip("no_image", entry.place)
            return None
        try:
            match = images.find(entry.image)
            if match is None and (named := re.fullmatch(r"(.+\.\w+)#\d+", entry.image)):  # Flickr8k: a.jpg#0
                match = images.find(named[1])
        except Skip as reason:
            counts.skip(reason, entry.image)
            return None
        if match is None:
            counts.skip("missing_image", entry.image)
        return match


def read_entries(path: Path, counts: Counts, columns: Sequence[str] = ()) -> Iterator[Entry]:
    """Yield the usable records of an annotation file. columns: that hold the captions; empty: those that are known.

    Raises UserError if no record has a known format.
    """
    keys, is_known = "", False
    for place, record in read_records(path, counts, READERS.get(path.suffix.lower())):
        keys = keys or ", ".join(map(str, list(record)[:12]))
        try:
            entry = to_entry(record, place, counts, columns)
        except Skip as reason:
            counts.skip(reason, place)
            is_known |= str(reason) != "unknown_format"
        else:
            is_known = True
            yield entry
    if not is_known:
        why = (f"; {reason}: {at}" for reason, at in counts.examples.items() if not keys and at.startswith(path.name))
        raise UserError(
            f"{path} has no known annotation format: "
            f"{f'the first record has the keys {keys[:300]}' if keys else 'it holds no records'}{next(why, '')}. "
            f"A record needs an image (one of {', '.join(IMAGE_KEYS)}) and a caption ({', '.join(CAPTION_KEYS)}), "
            f"{' or '.join(TURN_KEYS)}, or original_caption and changed_caption; one with an answer is "
            "read if prepare.sources.NAME.captions names the field to train; "
            "`python -m src.prepare --help` shows every format"
        )


def to_entry(record: dict, place: str, counts: Counts, columns: Sequence[str] = ()) -> Entry:
    """The entry of one record. Raises Skip if it is unusable."""
    # 1. its keys, in any case and with any blanks around them; NaN is null, as Pandas writes it
    record = {**{str(key).strip().lower(): value for key, value in record.items()}, **record}
    record = {key: None if isinstance(value, float) and value != value else value for key, value in record.items()}
    if columns:
        if not (present := [record[name] for name in columns if name in record]):
            raise Skip("unknown_format")
        record = {key: value for key, value in record.items() if key not in (*CAPTION_KEYS, *ANSWER_KEYS)}
        record["captions"] = present
    if "sentences" in record:
        record = coco.flatten(record)
    # 2. its captions and its question, by format
    texts, question = read_captions(record, place, counts)
    prompt = question_text(question)
    for swap in (swap for caption in texts for swap in caption.swaps):
        clean(swap.wrong)
    # 3. its only image, and its split
    image, data = image_of(record)
    if data is not None and not coco.is_coco(image):  # names of images in Parquet files need not differ
        image = hashlib.blake2b(data, digest_size=16).hexdigest()
    return Entry(image, texts, prompt, split_named(record.get("split")), place, data)
