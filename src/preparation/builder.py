"""A dataset on disk: splits of shards with a tokenizer, written whole or not at all. `src.prepare` runs them.

OUT/index.json  OUT/tokenizer/  OUT/{train,val,test}/{index.json, train-000000.tar, ...}

Everything is written into OUT.partial, which takes its name at the end.
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
from src.io.files import naming, publish, read_json, write_json
from src.io.lock import locked
from src.io.shards import DATASET, FORMAT, INDEX, write_shards
from src.preparation.counts import table
from src.text.tokenizer import Codec

SPLITS = ("train", "val", "test")
log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Dataset(ABC):
    """A folder with splits, written whole or not at all. A subclass makes the samples.

    overwrite: replace `out`; otherwise it is kept if it was made with the same settings, and refused if not
    """

    out: str
    response_length: int
    tokenizer: str | None = None
    seed: int = 0
    per_shard: int = 512
    overwrite: bool = False

    @property
    def settings(self) -> dict:
        """What the content depends on."""
        return {name: value for name, value in asdict(self).items() if name not in ("out", "overwrite")}

    def run(self) -> dict:
        """Write the dataset, unless it is there, and return its index.json."""
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
            with naming(partial):
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
        """The files and folders that the samples come from."""
        return ()

    @abstractmethod
    def write(self, folder: Path) -> dict:
        """Write splits and tokenizer into a folder; the result goes into index.json."""

    def _existing(self, out: Path) -> dict | None:
        """The index of the dataset that is there; None where it is to be replaced."""
        if out.is_dir() and not any(out.iterdir()):
            return None
        if not (out / INDEX).is_file():
            raise UserError(f"{out} exists but is no finished dataset; remove it, or choose another `out`")
        index = read_json(out / INDEX)
        if index.get("kind") != DATASET:
            raise UserError(f"{out} exists but is no dataset of `src.prepare`; remove it, or choose another `out`")
        if self.overwrite:
            return None
        old, new = index.get("settings", {}), self.settings
        changed = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        if changed:
            raise UserError(
                f"{out} was made with other settings ({', '.join(changed)}); "
                "set overwrite=true to make it again, or choose another `out`"
            )
        log.info("%s is finished already: nothing to do", out)
        return index


def check_splits(
    counts: Mapping[str, Mapping[str, int]],
    examples: Mapping[str, Mapping[str, str]],
    *,
    noun: str,
    remedy: tuple[str, str],
) -> None:
    """Raise UserError where there is nothing to train on; warn where there is nothing to validate or to test on.

    noun: what a sample is; remedy: what else helps, without and with something to train on
    """
    empty = [split for split in SPLITS if not counts[split]["written"]]
    if len(empty) == 3:
        raise UserError(f"nothing could be used; why, by reason:\n{table(counts, examples)}")
    if "train" in empty:
        told = table(counts, examples)
        raise UserError(f"no {noun} is left for train; add some, or {remedy[0]}\n{told}")
    if empty:
        log.warning("no %s is in %s; give more, or %s", noun, " and in ".join(empty), remedy[1])


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
    """Write one split and return its counts, `written` among them."""
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
