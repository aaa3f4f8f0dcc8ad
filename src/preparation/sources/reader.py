"""Captions of images in the records of annotation files. For their formats see `formats.py`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from src.io.errors import UserError
from src.preparation.counts import Counts, Skip
from src.preparation.records import clean, read_records
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
from src.preparation.splits import split_named
from src.preparation.tables import read_table

READERS = {".txt": read_table, ".token": read_table}  # files of annotations only


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
