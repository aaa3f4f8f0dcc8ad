"""A dataset on disk: splits of shards and a tokenizer, written atomically. `src.prepare` runs a `Dataset`.

OUT/index.json  OUT/tokenizer/  OUT/{train,val,test}/{index.json, train-000000.tar, ...}

The dataset is written into OUT.partial, which is renamed to OUT at the end.
"""

from __future__ import annotations

import logging
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from src.io.errors import UserError
from src.io.files import publish, read_json, with_filename, write_json
from src.io.lock import locked
from src.io.shards import DATASET, FORMAT, INDEX, write_shards
from src.preparation.counts import table
from src.text.tokenizer import Codec

SPLITS = ("train", "val", "test")
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Dataset(ABC):
    """Base of all datasets: writes a folder with splits atomically. Subclasses make the samples in `write`.

    overwrite: replace `out`; if false, `out` is kept when its settings are the same, else a UserError is raised
    """

    out: str
    response_length: int
    tokenizer: str | None = None
    seed: int = 0
    per_shard: int = 512
    overwrite: bool = False

    @property
    def settings(self) -> dict:
        """The settings that the content depends on; stored in index.json."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "overwrite")}

    def run(self) -> dict:
        """Write the dataset unless it exists; return its index.json."""
        out = Path(self.out)
        with locked(out):
            return self._run(out, out.with_name(f"{out.name}.partial"))

    def _run(self, out: Path, partial: Path) -> dict:
        for path in self.sources:
            if any(Path(path).resolve().is_relative_to(folder.resolve()) for folder in (out, partial)):
                raise UserError(f"prepare.out={out} would take the place of {path}, which is read: choose another one")
        if out.exists():
            index = self._existing(out)
            if index:
                return index
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with with_filename(partial):
                index = {"format": FORMAT, "kind": DATASET, "settings": self.settings, **self.write(partial)}
                write_json(partial / INDEX, index)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        if out.exists():
            shutil.rmtree(out)
        publish(partial, out)
        return index

    @property
    def sources(self) -> Sequence[str]:
        """The files and folders that are read."""
        return ()

    @abstractmethod
    def write(self, folder: Path) -> dict:
        """Write splits and tokenizer into a folder; the returned mapping goes into index.json."""

    def _existing(self, out: Path) -> dict | None:
        """The index of the dataset in `out`; None if it is to be replaced or the folder is empty."""
        if out.is_dir() and not any(out.iterdir()):
            return None
        if not (out / INDEX).is_file():
            raise UserError(f"{out} exists but is no finished dataset; remove it or choose another prepare.out")
        index = read_json(out / INDEX)
        if index.get("kind") != DATASET:
            raise UserError(f"{out} exists but is no dataset of `src.prepare`; remove it or choose another prepare.out")
        if self.overwrite:
            return None
        if (form := index.get("format")) != FORMAT:
            raise UserError(f"{out} has format {form}, not {FORMAT}; set prepare.overwrite=true to make it again")
        old, new = index.get("settings", {}), self.settings
        changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        if changed:
            raise UserError(
                f"{out} was made with other settings ({', '.join(changed)}); "
                "set prepare.overwrite=true to make it again, or choose another prepare.out"
            )
        log.info("%s is already complete: nothing to do", out)
        return index


def check_splits(
    counts: Mapping[str, Mapping[str, int]],
    examples: Mapping[str, Mapping[str, str]],
    *,
    noun: str,
    remedy: tuple[str, str],
) -> None:
    """Raise UserError if train is empty; warn if val or test is empty.

    noun: a sample, in words; remedy: what else the user can do if train is empty, and if only val or test is
    """
    empty = [split for split in SPLITS if not counts[split]["written"]]
    if len(empty) == 3:
        raise UserError(f"nothing could be used; reasons:\n{table(counts, examples)}")
    if "train" in empty:
        raise UserError(f"no {noun} is left for train; add some, or {remedy[0]}\n{table(counts, examples)}")
    if empty:
        log.warning("no %s is in %s; add more, or %s", noun, " and in ".join(empty), remedy[1])


def write_split(
    folder: Path,
    split: str,
    samples: Iterable[dict],
    codec: Codec,
    per_shard: int,
    counts: Counter[str],
    *,
    kind: str = "captions",
    extra: Mapping[str, Any] | None = None,
) -> dict:
    """Write one split and return its counts, including `written`."""
    index = write_shards(
        folder / split,
        samples,
        prefix=split,
        per_shard=per_shard,
        kind=kind,
        tokenizer=codec.fingerprint,
        counts=counts,
        extra=extra,
    )
    return index["counts"]
