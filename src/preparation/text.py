"""Datasets of texts without images: packed plain text, and prompts with responses (`conf=text`, `conf=sft`).

    Packed   files of documents       -> rows of exactly `response_length` tokens, documents joined by end-of-text
    Pairs    records with two fields  -> a prompt and its response
    Smiles   in smiles.py             -> a class label as the prompt, a molecule as the response

    files -> items without duplicates -> tokenizer -> items that fit -> splits -> shards (kind `text`, for `TextData`)

A sample has only JSON: {"key", "source", "prompt", "captions": [{"text": ..., "ids": ...}], ...}. `captions[0]` is the
reference for metrics; `ids` are stored only if encoding the text again might give other ids.
"""

from __future__ import annotations

import hashlib
import logging
import unicodedata
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import ClassVar

import numpy as np
from tqdm import tqdm

from src.io.errors import UserError
from src.preparation.annotations import Skip
from src.preparation.builder import SPLITS, Dataset, check_splits, write_split
from src.preparation.counts import Counts
from src.preparation.jsonl import count_skipped, read_documents, read_records, text_of
from src.preparation.splits import fill_splits, hashed_share, split_of
from src.text.prompt_format import IMAGE
from src.text.tokenizer import Codec

KIND = "text"
RESERVED_KEYS = ("key", "source", "prompt", "captions")  # keys of a sample that `extra` may not have
log = logging.getLogger(__name__)
Files = str | Sequence[str]


@dataclass
class Item:
    """A text before it is written.

    source: file and line or number, for messages and samples
    share:  hash of the key in 0..1; None if its file sets the split
    extra:  further fields of the sample
    """

    key: str
    source: str
    split: str
    share: float | None
    prompt: str
    text: str
    extra: dict

    @property
    def name(self) -> str:
        return self.key


@dataclass(kw_only=True)
class Texts(Dataset):
    """Base of the text datasets.

    files:         one file, several, or {train: ..., val: ..., test: ...}; without the mapping, texts are split by a
        hash of their content, 90 % train, 5 % val, 5 % test
    tokenizer:     folder of a tokenizer, to which missing special tokens are added; null trains one
    vocab_size:    upper limit for a new tokenizer; 0 means only its alphabet and the special tokens
    prompt_format: a file in src/text/prompts; null uses that of the tokenizer's folder, or `tiny` for a new tokenizer
    """

    remedy: ClassVar[str] = "name files for them"  # advice if val or test is empty
    alphabet: ClassVar[str] = "bytes"  # of a new tokenizer, which can then encode any text
    words: ClassVar[Sequence[str]] = ("system", "user", "assistant")  # training texts besides those of the items

    files: Files | Mapping[str, Files | None]
    vocab_size: int = 0
    prompt_format: str | None = None

    def __post_init__(self) -> None:
        if self.response_length < 2:
            raise UserError(f"prepare.response_length must be at least 2, got {self.response_length}")
        if self.vocab_size < 0:
            raise UserError(f"prepare.vocab_size must be at least 0, got {self.vocab_size}")

    @property
    def sources(self) -> Sequence[str]:
        groups = self.files.values() if isinstance(self.files, Mapping) else [self.files]
        return [path for files in groups for path in ([files] if isinstance(files, str) else files or ())]

    def write(self, folder: Path) -> dict:
        read_counts = Counts()
        items = self._collect(read_counts)
        codec = self._codec(items)
        codec.save(folder / "tokenizer")
        items = [item for item in items if self._fits(item, codec, read_counts)]
        fill_splits(items, lambda item: True)
        split_counts = {split: Counts() for split in SPLITS}
        samples, extra = self.divide(items, codec, split_counts)
        counts, examples = {"records": dict(read_counts)}, {"records": read_counts.examples}
        for split in SPLITS:
            rows = tqdm(samples[split], desc=split, unit="row", disable=None)
            counts[split] = write_split(
                folder, split, rows, codec, self.per_shard, split_counts[split], kind=KIND, extra=extra
            )
        check_splits(counts, examples, noun="row", remedy=("name a file for it", self.remedy))
        return {"tokenizer": codec.fingerprint, "counts": counts, "examples": examples, **extra}

    @abstractmethod
    def read(self, path: Path, counts: Counts) -> Iterator[tuple[str, str, str, dict]]:
        """Yield (place, prompt, text, extra fields of the sample) for each usable record of a file."""

    def check(self, item: Item, codec: Codec) -> None:
        """Raises `Skip` if the item does not fit the tokenizer or the settings."""
        if is_lossy(codec, item.text):
            raise Skip("not_in_vocabulary")

    def divide(
        self, items: Sequence[Item], codec: Codec, counts: Mapping[str, Counts]
    ) -> tuple[dict[str, Iterable[dict]], dict]:
        """The samples of each split, one per item by default, and extra entries for index.json."""
        return {split: samples([item for item in items if item.split == split], split) for split in SPLITS}, {}

    def _collect(self, counts: Counts) -> list[Item]:
        """Items of all files without duplicates. Test and val come first, so train holds no copies of their items."""
        by_split = dict(self.files) if isinstance(self.files, Mapping) else {"": self.files}
        if unknown := set(by_split) - {*SPLITS, ""}:
            raise UserError(f"files names {sorted(unknown)}; the splits are {', '.join(SPLITS)}")
        items: dict[str, Item] = {}
        for split in ("test", "val", "train", ""):
            files = by_split.get(split) or []
            for file in [files] if isinstance(files, str) else files:
                for source, prompt, text, extra in self.read(Path(file), counts):
                    key = hashlib.blake2b(f"{prompt}\0{text}".encode(), digest_size=16).hexdigest()
                    share = hashed_share(key, self.seed)
                    item = Item(key, source, split or split_of(share), None if split else share, prompt, text, extra)
                    if items.setdefault(key, item) is not item:
                        counts.note("duplicate_text", source)
        return list(items.values())

    def _codec(self, items: Sequence[Item]) -> Codec:
        if self.tokenizer:
            return Codec.adopt(self.tokenizer, prompt_format=self.prompt_format)
        texts = chain(self.words, (text for item in items for text in (item.prompt, item.text)))
        codec = Codec.train(
            texts, vocab_size=self.vocab_size, alphabet=self.alphabet, prompt_format=self.prompt_format or "tiny"
        )
        if 0 < self.vocab_size < codec.vocab_size:
            raise UserError(
                f"prepare.vocab_size={self.vocab_size} is too small: the alphabet and the special tokens alone take "
                f"{codec.vocab_size}"
            )
        return codec

    def _fits(self, item: Item, codec: Codec, counts: Counts) -> bool:
        try:
            self.check(item, codec)
        except Skip as reason:
            counts.note(str(reason), item.source)
            return False
        return True


@dataclass(kw_only=True)
class Packed(Texts):
    """Plain text without prompts. The documents of a split, each followed by end-of-text, form one sequence of tokens,
    which is cut into rows of `response_length`; tokens at the end that do not fill a row are left out.

    field: the field of a record that holds the text, for files other than .txt
    split: `documents` assigns whole documents to splits; `rows` cuts the sequence of all documents, such as a single
        book: the first 90 % are train, the next 5 % val, the last 5 % test. Needs `files` without a mapping
    """

    remedy: ClassVar[str] = "name files for them; with few documents prepare.split=rows cuts their text instead"

    field: str = "text"
    split: str = "documents"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in ("documents", "rows"):
            raise UserError(f"prepare.split must be 'documents' or 'rows', got {self.split!r}")
        if self.split == "rows" and isinstance(self.files, Mapping):
            raise UserError("prepare.split=rows needs prepare.files without {train: ..., val: ..., test: ...}")

    def read(self, path: Path, counts: Counts) -> Iterator[tuple[str, str, str, dict]]:
        for place, text in read_documents(path, self.field, counts):
            yield place, "", text, {}

    def divide(
        self, items: Sequence[Item], codec: Codec, counts: Mapping[str, Counts]
    ) -> tuple[dict[str, Iterable[dict]], dict]:
        if self.split == "rows":
            rows, counts["test"]["tokens_left"] = pack(items, codec, self.response_length)
            first, second = round(0.90 * len(rows)), round(0.95 * len(rows))
            parts = {"train": rows[:first], "val": rows[first:second], "test": rows[second:]}
        else:
            parts = {}
            for split in SPLITS:
                split_items = [item for item in items if item.split == split]
                parts[split], counts[split]["tokens_left"] = pack(split_items, codec, self.response_length)
        return {split: self._rows(parts[split], split, codec) for split in SPLITS}, {"row": self.response_length}

    def _rows(self, rows: np.ndarray, split: str, codec: Codec) -> Iterator[dict]:
        for index, ids in enumerate(rows.tolist()):
            yield sample(f"{split}-{index:06d}", "", {"text": codec.decode(ids), "ids": ids})


@dataclass(kw_only=True)
class Pairs(Texts):
    """Prompts with responses, for supervised fine-tuning.

    prompt, response: the fields of a record that hold them
    keep:             fields to copy into the sample, for metrics
    max_prompt:       in tokens; records with a longer prompt are left out, as are those whose response has more than
        response_length - 1 tokens, so that end-of-turn fits
    """

    prompt: str
    response: str
    keep: Sequence[str] = ()
    max_prompt: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.keep:
            check_field_name("prepare.keep", name)

    def _collect(self, counts: Counts) -> list[Item]:
        items = super()._collect(counts)
        if items and (unknown := [name for name in self.keep if not any(name in item.extra for item in items)]):
            raise UserError(f"prepare.keep: no record has a field {unknown[0]!r}")
        return items

    def read(self, path: Path, counts: Counts) -> Iterator[tuple[str, str, str, dict]]:
        for place, record in read_records(path, counts):
            try:
                prompt, response = text_of(record, self.prompt), text_of(record, self.response)
                if IMAGE in prompt:
                    raise Skip("image_mark")
            except Skip as reason:
                count_skipped(counts, reason, place, record)
                continue
            if "\r" in record[self.prompt] + record[self.response]:
                counts.note("carriage_returns", place)
            yield place, prompt, response, {name: record[name] for name in self.keep if name in record}

    def check(self, item: Item, codec: Codec) -> None:
        if any(token in item.prompt for token in codec.controls):
            raise Skip("special_token")
        if is_lossy(codec, item.prompt):
            raise Skip("not_in_vocabulary")
        super().check(item, codec)
        if self.max_prompt is not None and len(codec.prompt_ids(item.prompt, images=0)) > self.max_prompt:
            raise Skip("prompts too long")
        if len(codec.encode(item.text)[0]) >= self.response_length:
            raise Skip("responses too long")


def pack(items: Sequence[Item], codec: Codec, size: int) -> tuple[np.ndarray, int]:
    """(rows, size) ids of all texts, each followed by end-of-text, and the number of tokens left at the end."""
    ids = [token for item in items for token in (*codec.encode(item.text)[0], codec.eos_id)]
    full = len(ids) // size * size
    return np.array(ids[:full], dtype=np.int32).reshape(-1, size), len(ids) - full


def samples(items: Iterable[Item], split: str) -> Iterator[dict]:
    """Yield one sample per item."""
    for index, item in enumerate(items):
        yield sample(f"{split}-{index:06d}", item.prompt, {"text": item.text}, source=item.source, **item.extra)


def sample(key: str, prompt: str, caption: dict, **extra: object) -> dict:
    """A sample as `write_shards` takes it."""
    return {"__key__": key, "json": {**extra, "key": key, "prompt": prompt, "captions": [caption]}}


def check_field_name(setting: str, name: str) -> None:
    """Raise UserError if a sample uses the name of a kept field itself."""
    if name in RESERVED_KEYS:
        raise UserError(f"{setting}: a sample has {name!r} of its own; rename the field in the file")


def is_lossy(codec: Codec, text: str) -> bool:
    """Whether encoding drops characters or maps them to the unknown token; whitespace and Unicode form may change."""
    normalize = lambda string: "".join(unicodedata.normalize("NFC", string).split())  # noqa: E731
    return normalize(codec.decode(codec.encode(text)[0])) != normalize(text)
