"""A dataset on disk: splits of shards and a tokenizer, written atomically. `src.prepare` runs a `Dataset`.

OUT/index.json  OUT/tokenizer/  OUT/{train,val,test}/{index.json, train-000000.tar, ...}

    read -> items -> tokenizer -> divide -> items of each split -> samples -> shards

A dataset of your own is one file and one yaml that names it as `target:` (docs/data.md has one).
"""

from __future__ import annotations

import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm

from src.io.errors import UserError
from src.io.files import publish, read_json, with_filename, write_json
from src.io.lock import locked
from src.io.shards import DATASET, FORMAT, INDEX, write_shards
from src.preparation.counts import Counts, table
from src.preparation.splits import SPLITS, fill_splits
from src.text.tokenizer import Codec

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Dataset(ABC):
    """Base of all datasets: a subclass reads items and makes samples of them.

    response_length: in tokens; texts of more than response_length - 1 tokens are left out, so that end-of-turn fits
    tokenizer:     folder of a tokenizer, to which missing special tokens are added; null trains one
    vocab_size:    upper limit for a new tokenizer; 0 means only its alphabet and the special tokens
    prompt_format: a file in src/text/prompts; null uses that of the tokenizer's folder, or `tiny` for a new tokenizer
    overwrite:     replace `out`; if false, `out` is kept when its settings are the same, else a UserError is raised
    """

    kind: ClassVar[str] = "captions"  # of the split folders
    alphabet: ClassVar[str] = "bytes"  # of a new tokenizer, which can then encode any text; or "seen"

    out: str
    response_length: int
    tokenizer: str | None = None
    vocab_size: int = 0
    prompt_format: str | None = None
    seed: int = 0
    per_shard: int = 512
    overwrite: bool = False

    @property
    def sources(self) -> Sequence[str]:
        """The files and folders that are read."""
        return ()

    @abstractmethod
    def read(self, counts: Counts) -> Iterable[Any]:
        """All items, each an `Item` with its split."""

    @abstractmethod
    def texts(self, items: Sequence[Any]) -> Iterable[str]:
        """Texts that a new tokenizer is trained on."""

    def is_usable(self, item: Any, codec: Codec) -> bool:
        """Whether `samples` will make a sample of an item; asked where a split might stay empty."""
        return True

    def divide(
        self, items: Sequence[Any], codec: Codec, counts: Mapping[str, Counts]
    ) -> tuple[dict[str, Sequence[Any]], dict]:
        """The items of each split, and further entries for index.json."""
        fill_splits(items, lambda item: self.is_usable(item, codec))
        return {split: [item for item in items if item.split == split] for split in SPLITS}, {}

    @abstractmethod
    def samples(self, items: Iterable[Any], codec: Codec, counts: Counts) -> Iterator[dict]:
        """Samples for `write_shards` of consecutive items of a split. A sample depends on its own item only."""

    def run(self) -> dict:
        """Write the dataset unless it exists; return its index.json."""
        out = Path(self.out)
        partial = out.with_name(f"{out.name}.partial")
        settings = {name: value for name, value in asdict(self).items() if name not in ("out", "overwrite")}
        with locked(out):
            # 1. never replace what is read, nor what is no dataset
            for path in self.sources:
                if any(Path(path).resolve().is_relative_to(folder.resolve()) for folder in (out, partial)):
                    raise UserError(
                        f"prepare.out={out} would take the place of {path}, which is read: choose another one"
                    )
            if out.exists() and not (out.is_dir() and not any(out.iterdir())):
                index = read_json(out / INDEX) if (out / INDEX).is_file() else {}
                if index.get("kind") != DATASET:
                    raise UserError(f"{out} exists but is no finished dataset; remove it or choose another prepare.out")
                if not self.overwrite:
                    return _same(out, index, settings)
            # 2. write, and rename
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                with with_filename(partial):  # of the tokenizer's files, too, whose library names none
                    index = self._write(partial, settings)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            if out.exists():
                shutil.rmtree(out)
            publish(partial, out)
        return index

    def _write(self, folder: Path, settings: dict) -> dict:
        """Write tokenizer, splits and index.json into a folder; return the index."""
        # 1. items and tokenizer
        counts = {part: Counts() for part in ("records", *SPLITS)}
        items = list(self.read(counts["records"]))
        if self.tokenizer:
            codec = Codec.adopt(self.tokenizer, prompt_format=self.prompt_format)
        else:
            codec = Codec.train(
                self.texts(items),
                vocab_size=self.vocab_size,
                alphabet=self.alphabet,
                prompt_format=self.prompt_format or "tiny",
            )
            if 0 < self.vocab_size < codec.vocab_size:
                raise UserError(
                    f"prepare.vocab_size={self.vocab_size} is too small: the alphabet and the special tokens alone "
                    f"take {codec.vocab_size}"
                )
        codec.save(folder / "tokenizer")
        # 2. samples of each split
        parts, extra = self.divide(items, codec, counts)
        for split in SPLITS:
            progress = tqdm(parts[split], desc=split, unit="sample", disable=None)
            samples = self.samples(progress, codec, counts[split])
            common = {"kind": self.kind, "tokenizer": codec.fingerprint, "counts": counts[split], "extra": extra}
            index = write_shards(folder / split, samples, prefix=split, per_shard=self.per_shard, **common)
            counts[split]["written"] = index["counts"]["written"]
        # 3. index.json
        index = {
            "format": FORMAT,
            "kind": DATASET,
            "settings": settings,
            "tokenizer": codec.fingerprint,
            "counts": {part: numbers if part in SPLITS else +numbers for part, numbers in counts.items() if numbers},
            "examples": {part: numbers.examples for part, numbers in counts.items() if numbers.examples},
            **extra,
        }
        empty = [split for split in SPLITS if not counts[split]["written"]]
        if "train" in empty:
            reasons = table(index["counts"], index["examples"])
            raise UserError(f"nothing could be used for train; reasons:\n{reasons}")
        if empty:
            log.warning(
                "no sample is in %s; add more, or name them (images: `split` in the records; texts: "
                "prepare.files={val: FILE}, or prepare.split=rows to cut a single one)",
                " and in ".join(empty),
            )
        write_json(folder / INDEX, index)
        return index


def _same(out: Path, index: dict, settings: dict) -> dict:
    """The index of a finished dataset. Raises UserError if it was made with other settings."""
    if (form := index.get("format")) != FORMAT:
        raise UserError(f"{out} has format {form}, not {FORMAT}; set prepare.overwrite=true to make it again")
    old = index["settings"]
    if changed := sorted(name for name in {*old, *settings} if old.get(name) != settings.get(name)):
        raise UserError(
            f"{out} was made with other settings ({', '.join(changed)}); "
            "set prepare.overwrite=true to make it again, or choose another prepare.out"
        )
    log.info("%s is already complete: nothing to do", out)
    return index
