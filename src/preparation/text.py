"""Datasets of texts without images: packed plain text, prompts with responses, molecules with a class label.

    Packed   files of documents       -> rows of exactly `response_length` tokens, documents joined by end-of-text
    Pairs    records with two fields  -> a prompt and the response to it
    Smiles   records with a SMILES    -> "1" or "0" for many or few rings as the prompt, the SMILES as the response

    files -> items, each once -> tokenizer -> items that fit -> splits -> shards (kind `text`, read by `TextData`)

A sample has only its JSON: {"key", "source", "prompt", "captions": [{"text": ..., "ids": ...}], ...}; `captions[0]` is
the reference of metrics, and `ids` are there where encoding the text again might give others.
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
from src.preparation.jsonl import note, read_documents, read_records, text_of
from src.preparation.splits import fill_splits, hashed_share, split_of
from src.text.prompt_format import IMAGE
from src.text.tokenizer import Codec

KIND = "text"
OWN = ("key", "source", "prompt", "captions")  # of a sample
log = logging.getLogger(__name__)
Files = str | Sequence[str]


@dataclass
class Item:
    """A text on its way into a split. share: the hash of its name in 0..1, None where its file decides the split."""

    key: str
    source: str
    split: str
    share: float | None
    prompt: str
    text: str
    more: dict

    @property
    def name(self) -> str:
        return self.key


@dataclass(kw_only=True)
class Texts(Dataset):
    """What the datasets of texts share.

    files:         one file, several, or {train: ..., val: ..., test: ...}; without that mapping, texts are split by a
        hash of their content, 90 % train, 5 % val, 5 % test
    tokenizer:     folder of a tokenizer, which gets the special tokens that it lacks; null trains one
    vocab_size:    upper limit of a new tokenizer; 0: as many as its alphabet and the special tokens
    prompt_format: a file in src/text/prompts; null: what the folder of the tokenizer says, or `tiny` for a new one
    """

    remedy: ClassVar[str] = "name files for them"  # where a split has no row
    alphabet: ClassVar[str] = "bytes"  # of a new tokenizer: any text can be written
    words: ClassVar[Sequence[str]] = ("system", "user", "assistant")  # what prompts hold beside those of the texts

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
        given = self.files.values() if isinstance(self.files, Mapping) else [self.files]
        return [path for files in given for path in ([files] if isinstance(files, str) else files or ())]

    def write(self, folder: Path) -> dict:
        skipped = Counts()
        items = self._collect(skipped)
        codec = self._codec(items)
        codec.save(folder / "tokenizer")
        items = [item for item in items if self._fits(item, codec, skipped)]
        fill_splits(items, lambda item: True)
        found = {split: Counts() for split in SPLITS}
        samples, extra = self.divide(items, codec, found)
        counts, examples = {"records": dict(skipped)}, {"records": skipped.examples}
        for split in SPLITS:
            shown = tqdm(samples[split], desc=split, unit="row", disable=None)
            counts[split] = write_split(
                folder, split, shown, codec, self.per_shard, found[split], kind=KIND, extra=extra
            )
        check_splits(counts, examples, noun="row", remedy=("name a file for it", self.remedy))
        return {"tokenizer": codec.fingerprint, "counts": counts, "examples": examples, **extra}

    @abstractmethod
    def read(self, path: Path, skipped: Counts) -> Iterator[tuple[str, str, str, dict]]:
        """The usable records of a file: (place, prompt, text, what else to keep)."""

    def check(self, item: Item, codec: Codec) -> None:
        """Raises `Skip` where an item cannot be used with the tokenizer."""
        if lacks(codec, item.text):
            raise Skip("not_in_vocabulary")

    def divide(
        self, items: Sequence[Item], codec: Codec, counts: Mapping[str, Counts]
    ) -> tuple[dict[str, Iterable[dict]], dict]:
        """The samples of each split, and what their index.json says besides the counts. One sample for each item."""
        return {split: samples([item for item in items if item.split == split], split) for split in SPLITS}, {}

    def _collect(self, skipped: Counts) -> list[Item]:
        """Items of all files, each once. Those of test and val come first: training does not get what repeats them."""
        named = dict(self.files) if isinstance(self.files, Mapping) else {"": self.files}
        if unknown := set(named) - {*SPLITS, ""}:
            raise UserError(f"files names {sorted(unknown)}; the splits are {', '.join(SPLITS)}")
        items: dict[str, Item] = {}
        for split in ("test", "val", "train", ""):
            given = named.get(split) or []
            for file in [given] if isinstance(given, str) else given:
                for source, prompt, text, more in self.read(Path(file), skipped):
                    key = hashlib.blake2b(f"{prompt}\0{text}".encode(), digest_size=16).hexdigest()
                    share = hashed_share(key, self.seed)
                    item = Item(key, source, split or split_of(share), None if split else share, prompt, text, more)
                    if items.setdefault(key, item) is not item:
                        skipped.note("duplicate_text", source)
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

    def _fits(self, item: Item, codec: Codec, skipped: Counts) -> bool:
        try:
            self.check(item, codec)
        except Skip as reason:
            skipped.note(str(reason), item.source)
            return False
        return True


@dataclass(kw_only=True)
class Packed(Texts):
    """Plain text without prompts. The documents of a split, each with end-of-text behind it, are one long sequence of
    tokens, which is cut into rows of `response_length`; what fills no row is left out.

    field: of a record that holds the text, where a file is no .txt
    split: `documents` puts whole documents into splits; `rows` cuts the one sequence of all documents, as of a single
        book: its first 90 % are train, the next 5 % val, the last 5 % test. Files that name their split keep it
    """

    remedy: ClassVar[str] = "name files for them; with few documents prepare.split=rows cuts their text instead"

    field: str = "text"
    split: str = "documents"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split not in ("documents", "rows"):
            raise UserError(f"split must be 'documents' or 'rows', got {self.split!r}")
        if self.split == "rows" and isinstance(self.files, Mapping):
            raise UserError("split=rows is for files without a split of their own")

    def read(self, path: Path, skipped: Counts) -> Iterator[tuple[str, str, str, dict]]:
        for place, text in read_documents(path, self.field, skipped):
            yield place, "", text, {}

    def divide(
        self, items: Sequence[Item], codec: Codec, counts: Mapping[str, Counts]
    ) -> tuple[dict[str, Iterable[dict]], dict]:
        if self.split == "rows":
            rows, left = pack(items, codec, self.response_length)
            counts["test"]["tokens_left"] = left
            first, second = round(0.90 * len(rows)), round(0.95 * len(rows))
            parts = {"train": rows[:first], "val": rows[first:second], "test": rows[second:]}
        else:
            parts = {}
            for split in SPLITS:
                mine = [item for item in items if item.split == split]
                parts[split], counts[split]["tokens_left"] = pack(mine, codec, self.response_length)
        return {split: self._rows(parts[split], split, codec) for split in SPLITS}, {"row": self.response_length}

    def _rows(self, rows: np.ndarray, split: str, codec: Codec) -> Iterator[dict]:
        for number, ids in enumerate(rows.tolist()):
            yield sample(f"{split}-{number:06d}", "", {"text": codec.decode(ids), "ids": ids})


@dataclass(kw_only=True)
class Pairs(Texts):
    """Prompts with responses, for supervised fine-tuning.

    prompt, response: the fields of a record that hold them; keep: fields to keep in the sample, for metrics
    max_prompt:       tokens; records with a longer prompt are left out, as are those whose response has more than
        response_length - 1 tokens, so that eot fits
    """

    prompt: str
    response: str
    keep: Sequence[str] = ()
    max_prompt: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.keep:
            check_name("prepare.keep", name)

    def _collect(self, skipped: Counts) -> list[Item]:
        items = super()._collect(skipped)
        if items and (unknown := [name for name in self.keep if not any(name in item.more for item in items)]):
            raise UserError(f"prepare.keep: no record has a field {unknown[0]!r}")
        return items

    def read(self, path: Path, skipped: Counts) -> Iterator[tuple[str, str, str, dict]]:
        for place, record in read_records(path, skipped):
            try:
                prompt, response = text_of(record, self.prompt), text_of(record, self.response)
                if IMAGE in prompt:
                    raise Skip("image_mark")
            except Skip as reason:
                note(skipped, reason, place, record)
                continue
            if "\r" in record[self.prompt] + record[self.response]:
                skipped.note("carriage_returns", place)
            yield place, prompt, response, {name: record[name] for name in self.keep if name in record}

    def check(self, item: Item, codec: Codec) -> None:
        if any(token in item.prompt for token in codec.controls):
            raise Skip("special_token")
        if lacks(codec, item.prompt):
            raise Skip("not_in_vocabulary")
        super().check(item, codec)
        if self.max_prompt is not None and len(codec.prompt_ids(item.prompt, images=0)) > self.max_prompt:
            raise Skip("prompts too long")
        if len(codec.encode(item.text)[0]) >= self.response_length:
            raise Skip("responses too long")


def pack(items: Sequence[Item], codec: Codec, size: int) -> tuple[np.ndarray, int]:
    """(rows, size) ids of all texts with end-of-text behind each, and how many tokens fill no row."""
    joined = [token for item in items for token in (*codec.encode(item.text)[0], codec.eos_id)]
    full = len(joined) // size * size
    return np.array(joined[:full], dtype=np.int32).reshape(-1, size), len(joined) - full


def samples(items: Iterable[Item], split: str) -> Iterator[dict]:
    """A sample for each item."""
    for number, item in enumerate(items):
        yield sample(f"{split}-{number:06d}", item.prompt, {"text": item.text}, source=item.source, **item.more)


def sample(key: str, prompt: str, caption: dict, **more: object) -> dict:
    """What `write_shards` takes."""
    return {"__key__": key, "json": {**more, "key": key, "prompt": prompt, "captions": [caption]}}


def check_name(place: str, name: str) -> None:
    """Refuse a field to keep whose name a sample has for something else."""
    if name in OWN:
        raise UserError(f"{place}: a sample has {name!r} of its own; give the field another name in the file")


def lacks(codec: Codec, text: str) -> bool:
    """Whether the tokenizer loses some of a text, blanks and the Unicode form aside: it drops characters it lacks,
    or makes them one token for all that is unknown."""
    bare = lambda some: "".join(unicodedata.normalize("NFC", some).split())  # noqa: E731
    return bare(codec.decode(codec.encode(text)[0])) != bare(text)
