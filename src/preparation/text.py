"""Datasets of texts without images: packed plain text, and prompts with responses (`conf=text`, `conf=sft`).

    Packed   files of documents       -> rows of exactly `response_length` tokens, documents joined by end-of-text
    Pairs    records with two fields  -> a prompt and its response
    Smiles   in smiles.py             -> a class label as the prompt, a molecule as the response

A sample has only JSON: {"key", "source", "prompt", "captions": [{"text": ..., "ids": ...}], ...}. `captions[0]` is the
reference for metrics; `ids` are stored only if encoding the text again might give other ids.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from src.io.errors import UserError
from src.preparation.builder import Dataset
from src.preparation.counts import Counts, Skip
from src.preparation.items import Items
from src.preparation.records import check_turns, clean, matching_files, read_records, text_of, value_of, with_input
from src.preparation.splits import SPLITS, Item, hashed_share, split_named, split_of
from src.text.prompt_format import IMAGE
from src.text.tokenizer import Codec

RESERVED = {"key", "source", "prompt", "captions"}  # what every sample has of its own
Files = str | Sequence[str]


@dataclass(kw_only=True)
class Text(Item):
    """A text of one record. name: a hash of its content; extra: further fields of the sample."""

    prompt: str
    text: str
    extra: dict


@dataclass(kw_only=True)
class Texts(Dataset):
    """Base of the text datasets. A subclass says in `parse` what a record means.

    files: one file, several, or {train: ..., val: ..., test: ...}; a name with * stands for all files that match.
        Without the mapping, texts are split by a hash of their content, 90 % train, 5 % val, 5 % test
    """

    kind = "text"
    order = "read"
    words: ClassVar[Sequence[str]] = ("system", "user", "assistant")  # training texts besides those of the items

    files: Files | Mapping[str, Files | None]

    @property
    def inputs(self) -> Sequence[str]:
        return [path for _, path in self._split_files()]

    def _split_files(self) -> list[tuple[str, str]]:
        """(split, file). Test and val come first, so that train holds no copies of their texts; "": by hash."""
        by_split = self.files if isinstance(self.files, Mapping) else {"": self.files}
        if unknown := set(by_split) - {*SPLITS, ""}:
            raise UserError(f"files names {sorted(unknown)}; the splits are {', '.join(SPLITS)}")
        groups = {split: by_split.get(split) or [] for split in ("test", "val", "train", "")}
        return [(split, file) for split, names in groups.items() for file in matching_files(names)]

    @abstractmethod
    def parse(self, record: dict) -> tuple[str, str, dict]:
        """(prompt, text, extra fields of the sample) of a record. Raises Skip if it cannot be used."""

    def check(self, item: Text, codec: Codec) -> None:
        """Raises `Skip` if the item does not fit the tokenizer or the settings."""
        if codec.loses(item.text):
            raise Skip("not_in_vocabulary")

    def read(self, counts: Counts) -> Iterator[Text]:
        """The texts of all files."""
        for split, file in self._split_files():
            for source, record in read_records(Path(file), counts):
                try:
                    prompt, text, extra = self.parse(record)
                    given = split or split_named(value_of(record, "split"))
                except Skip as reason:
                    counts.skip(reason, source)
                    continue
                if taken := RESERVED & extra.keys():
                    raise UserError(f"a sample has {taken.pop()!r} of its own; rename the field in {file}")
                name = hashlib.blake2b(f"{prompt}\0{text}".encode(), digest_size=16).hexdigest()
                share = hashed_share(name, self.seed)
                placed = {"split": given, "share": None} if given else {"split": split_of(share), "share": share}
                yield Text(key=name, name=name, source=source, prompt=prompt, text=text, extra=extra, **placed)

    def merge(self, item: Text, other: Text, counts: Counts) -> None:
        counts.skip("duplicate_text", other.source)

    def texts(self, items: Iterable[Text]) -> Iterator[str]:
        yield from self.words
        for item in items:
            yield item.prompt
            yield item.text

    def divide(self, items: Items, codec: Codec, counts: Mapping[str, Counts]) -> dict:
        for item in items:
            try:
                self.check(item, codec)
            except Skip as reason:
                counts["records"].skip(reason, item.source)
                items.remove(item)
        return super().divide(items, codec, counts)

    def samples(self, items: Iterable[Any], codec: Codec, counts: Counts) -> Iterator[dict]:
        for item in items:
            key = f"{item.split}-{item.number:06d}"
            own = {"key": key, "prompt": item.prompt, "captions": [{"text": item.text}]}
            yield {"__key__": key, "json": {"source": item.source, **item.extra, **own}}


@dataclass(kw_only=True)
class Row(Item):
    """A row of packed text. ids: its tokens"""

    ids: list[int]


@dataclass(kw_only=True)
class Packed(Texts):
    """Plain text without prompts. The documents of a split, each followed by end-of-text, form one sequence of tokens,
    which is cut into rows of `response_length`; tokens at the end that do not fill a row are left out.

    field: the field of a record that holds the text; `text` for .txt files
    split: `documents` assigns whole documents to splits; `rows` cuts the sequence of all documents, such as a single
        book: the first 90 % are train, the next 5 % val, the last 5 % test. Needs `files` without a mapping
    """

    field: str = "text"
    split: Literal["documents", "rows"] = "documents"

    @property
    def training(self) -> str:
        return "conf=mask,task/text"

    def parse(self, record: dict) -> tuple[str, str, dict]:
        return "", text_of(record, self.field), {}

    def divide(self, items: Items, codec: Codec, counts: Mapping[str, Counts]) -> dict:
        """Put rows in place of the documents."""
        size, book = self.response_length, self.split == "rows"
        if book:
            if isinstance(self.files, Mapping):
                raise UserError("prepare.split=rows needs prepare.files without {train: ..., val: ..., test: ...}")
            for item in items:
                item.split, item.share = "train", None  # all of them, in order: the rows are split instead
                items.update(item)
        super().divide(items, codec, counts)
        num_rows = 0
        for split in ("train",) if book else SPLITS:
            ids: list[int] = []
            for document in items.of(split):
                ids += [*codec.encode(document.text)[0], codec.eos_id]
                for start in range(0, len(ids) - size + 1, size):
                    key = f"row-{num_rows}"
                    items.add(
                        Row(key=key, name=key, source=document.source, split=split, ids=ids[start : start + size])
                    )
                    num_rows += 1
                ids = ids[len(ids) // size * size :]
                items.remove(document)
            counts["test" if book else split]["tokens_left"] = len(ids)
        if book:
            first, second = round(0.90 * num_rows), round(0.95 * num_rows)
            for number in range(first, num_rows):
                items.move(f"row-{number}", "val" if number < second else "test")
        return {"row": size}

    def samples(self, items: Iterable[Any], codec: Codec, counts: Counts) -> Iterator[dict]:
        for item in items:
            key = f"{item.split}-{item.number:06d}"
            record = {"key": key, "prompt": "", "captions": [{"text": codec.decode(item.ids), "ids": item.ids}]}
            yield {"__key__": key, "json": record}


@dataclass(kw_only=True)
class Pairs(Texts):
    """Prompts with responses, for supervised fine-tuning.

    prompt, response: the fields of a record that hold them; `input` is added to the prompt `instruction`, as in Alpaca
    keep:             fields to copy into the sample, for metrics
    max_prompt:       in tokens; records with a longer prompt are left out, as are those whose response has more than
        response_length - 1 tokens, so that end-of-turn fits
    """

    prompt: str
    response: str
    keep: Sequence[str] = ()
    max_prompt: int | None = None

    @property
    def training(self) -> str:
        return "conf=proseco,task/sft"

    def parse(self, record: dict) -> tuple[str, str, dict]:
        prompt, response = text_of(record, self.prompt), text_of(record, self.response)
        check_turns(record)
        if self.prompt.strip().casefold() == "instruction":
            prompt = with_input(prompt, record)
        if IMAGE in prompt:
            raise Skip("image_mark")
        extra = {name: record[name] for name in self.keep if name in record}
        clean(json.dumps(extra, ensure_ascii=False))
        return prompt, response, extra

    def read(self, counts: Counts) -> Iterator[Text]:
        known: set[str] | None = None  # fields of any record
        for item in super().read(counts):
            known = (known or set()) | item.extra.keys()
            yield item
        if known is not None and (unknown := [name for name in self.keep if name not in known]):
            raise UserError(f"prepare.keep: no record has a field {unknown[0]!r}")

    def check(self, item: Text, codec: Codec) -> None:
        if codec.loses(item.prompt):
            raise Skip("not_in_vocabulary")
        if self.max_prompt is not None and len(codec.prompt_ids(item.prompt, images=0)) > self.max_prompt:
            raise Skip("prompts too long")
        self.check_response(item.text, codec)
