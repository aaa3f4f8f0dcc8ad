"""A dataset on disk: splits of shards and a tokenizer, written atomically. `src.prepare` runs a `Dataset`.

OUT/index.json  OUT/manifest.json  OUT/rejects.jsonl  OUT/tokenizer/  OUT/{train,val,test}/{index.json, *.tar}

    read -> items, on disk -> tokenizer -> divide -> shards of each split, over several processes -> indexes -> rename

Until the rename everything is in OUT.partial, which a kill, Ctrl-C or a full disk leaves: the same command continues
there. A dataset of your own is one file and one yaml that names it as `target:` (docs/data.md has one).
"""

from __future__ import annotations

import logging
import shlex
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from src.io.errors import UserError
from src.io.files import atomic, publish, read_json, sha256, with_filename, write_json
from src.io.lock import locked
from src.io.progress import Bar
from src.io.settings import as_json, changes, differences
from src.io.shards import DATASET, FORMAT, INDEX, write_index
from src.io.words import counted, data_size
from src.preparation.counts import Counts, Skip, table
from src.preparation.items import Items, fill_splits, new_items
from src.preparation.manifest import MANIFEST, REJECTS, Manifest
from src.preparation.splits import SPLITS
from src.preparation.workers import DATA, ITEMS, REPORTS, Job, is_finished, num_processes, write, write_in_processes
from src.text.tokenizer import NEEDED, Codec

log = logging.getLogger(__name__)
OLD = "old"  # the dataset that is replaced
PLAN = "plan.json"  # what an unfinished dataset is made of
MAX_SIDE = 8192  # pixels of an image
PARTS = ("records", *SPLITS)  # of the counts: what is read, and the samples of each split


@dataclass(kw_only=True)
class Dataset(ABC):
    """Base of all datasets: a subclass reads items and makes samples of them.

    response_length: in tokens; `samples` leaves out what `check_response` refuses
    tokenizer:     folder of a tokenizer, to which missing special tokens are added; null trains one
    vocab_size:    upper limit for a new tokenizer; 0 means only its alphabet (single bytes) and the special tokens
    prompt_format: a file in src/text/prompts; null uses that of the tokenizer's folder, or `tiny` for a new tokenizer
    per_shard:     items of one shard
    processes:     that write shards; null: one per core, fewer for small datasets. The bytes do not depend on it
    overwrite:     replace `out`; if false, `out` is kept when its settings and source files are the same, else a
        UserError is raised
    """

    LEAST: ClassVar[dict[str, int]] = {"response_length": 2, "vocab_size": 0, "per_shard": 1, "processes": 1}
    kind: ClassVar[str] = "captions"  # of the split folders
    alphabet: ClassVar[str] = "bytes"  # of a new tokenizer, which can then encode any text; or "seen"
    order: ClassVar[Literal["hash", "read"]] = "hash"  # of the items of a split: by a hash of seed and key, or as read

    out: str
    response_length: int
    tokenizer: str | None = None
    vocab_size: int = 0
    prompt_format: str | None = None
    seed: int = 0
    per_shard: int = 512
    processes: int | None = None
    overwrite: bool = False

    @property
    def inputs(self) -> Sequence[str]:
        """The files and folders that are read."""
        return ()

    @property
    def mixture(self) -> Sequence[Mapping[str, Any]]:
        """Where the items come from: name (as in `Item.origin`), weight in training, licence, origin."""
        return [{"name": "", "weight": 1.0, "licence": None, "origin": None}]

    @abstractmethod
    def read(self, counts: Counts) -> Iterable[Any]:
        """All items, each an `Item` with its split. `counts.source` names the source that is read."""

    def merge(self, item: Any, other: Any, counts: Counts) -> None:
        """Add a later item of the same key to the first one."""
        raise ValueError(f"two items have the key {item.key!r}: {item.source} and {other.source}")

    @abstractmethod
    def texts(self, items: Iterable[Any]) -> Iterable[str]:
        """Texts that a new tokenizer is trained on."""

    def file_of(self, item: Any) -> Path | None:
        """The file that the sample of an item is read from, if there is one: a shard of a run that was killed is
        written again if it has changed since."""
        return None

    def is_usable(self, item: Any, codec: Codec) -> bool:
        """Whether `samples` will make a sample of an item; asked where a split might stay empty."""
        return True

    def divide(self, items: Items, codec: Codec, counts: Mapping[str, Counts]) -> dict:
        """Set the split of every item, and remove those that cannot be used. Returns further entries of index.json."""
        fill_splits(items, lambda item: self.is_usable(item, codec))
        return {}

    @abstractmethod
    def samples(self, items: Iterable[Any], codec: Codec, counts: Counts) -> Iterator[dict]:
        """Samples for `write_shard` of items of a split. A sample depends on its own item only."""

    def check_response(self, text: str, codec: Codec) -> None:
        """Raises `Skip` if the tokenizer cannot give a response back, or it leaves no room for end-of-turn."""
        if codec.loses(text):
            raise Skip("not_in_vocabulary")
        if (num_tokens := len(codec.encode(text)[0])) >= self.response_length:
            limit = f"prepare.response_length={self.response_length} holds {self.response_length - 1}"
            reason = "captions too long" if self.kind == "captions" else "responses too long"
            raise Skip(reason, f": {num_tokens} tokens, and {limit}")

    def run(self) -> dict:
        """Write the dataset unless it exists; return its index.json."""
        for name, least in self.LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"prepare.{name} must be at least {least}, got {value}")
        if (side := getattr(self, "image_size", 1)) > MAX_SIDE:
            raise UserError(f"prepare.image_size must be at most {MAX_SIDE} pixels, got {side}")
        out = Path(self.out)
        if Path.cwd().is_relative_to(out.resolve()):
            raise UserError(f"prepare.out={out} is the folder that this runs in, or one above it: choose another one")
        if out.is_symlink():  # what it points to is replaced, and the link stays
            out = out.resolve()
        folder = out.with_name(f"{out.name}.partial")
        with locked(out):
            # 1. never replace what is read, nor what is no dataset
            finished, plan = self._finished(out, folder), self._plan()
            if finished and not self.overwrite:
                index = _same(out, finished, plan)
                shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed after its rename
                return index
            # 2. write, or continue what was begun with the same plan, and rename
            _begin(folder, plan)
            try:
                with with_filename(folder):  # also of the tokenizer's files
                    index = self._write(folder, plan)
            except UserError as error:
                if not isinstance(error.__cause__, BrokenProcessPool):  # nothing is wrong with the dataset
                    shutil.rmtree(folder)
                raise
            if out.exists():  # at once, as a half of it might pass for a dataset after a kill
                out.rename(folder / OLD)
            publish(folder / DATA, out)
            shutil.rmtree(folder / OLD, ignore_errors=True)
            shutil.rmtree(folder)
        return index

    def _finished(self, out: Path, folder: Path) -> dict | None:
        """The index of the dataset in `out`, if there is one. Raises UserError if something else would be replaced."""
        for path in self.inputs:
            if any(Path(path).resolve().is_relative_to(place.resolve()) for place in (out, folder)):
                raise UserError(f"prepare.out={out} would take the place of {path}, which is read: choose another one")
        if not out.exists() or (out.is_dir() and not any(out.iterdir())):
            return None
        index = read_json(out / INDEX) if (out / INDEX).is_file() else {}
        if index.get("kind") != DATASET:
            raise UserError(f"{out} exists but is no finished dataset; remove it or choose another prepare.out")
        return index

    def _plan(self) -> dict:
        """The settings, and size and hash of the source files: with an equal plan a dataset is the same."""
        others = ("out", "overwrite", "processes")
        settings = {name: value for name, value in asdict(self).items() if name not in others}
        paths = list(self.inputs)
        if self.tokenizer:
            paths += sorted({str(path) for pattern in NEEDED for path in Path(self.tokenizer).glob(pattern)})
        files = [Path(path) for path in paths if Path(path).is_file()]
        digests = {str(path): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files}
        return as_json({"format": FORMAT, "settings": settings, "files": digests})

    def _write(self, folder: Path, plan: dict) -> dict:
        """Write tokenizer, splits and index.json into a folder; return the index."""
        data, manifest = folder / DATA, Manifest(self.mixture)
        with new_items(folder / ITEMS) as items, atomic(data / REJECTS) as rejects:
            # 1. items, tokenizer, splits
            counts = {part: Counts(partial(manifest.reject, part, rejects)) for part in PARTS}
            records = counts["records"]
            for item in Bar(self.read(records), desc="read", unit="record"):
                if not items.add(item):
                    first = items[item.key]
                    self.merge(first, item, records)
                    items.update(first)
            kept, num_counted = len(items), records.total()
            codec = self._make_tokenizer(items, data / "tokenizer")
            extra = self.divide(items, codec, counts)
            kept -= records.total() - num_counted
            sizes = {**dict.fromkeys(SPLITS, 0), **items.number(self.seed if self.order == "hash" else None)}
            # 2. shards
            jobs = [
                Job(split, number, start, min(start + self.per_shard, sizes[split]))
                for split in SPLITS
                for number, start in enumerate(range(0, sizes[split], self.per_shard))
            ]
            self._write_shards(jobs, folder, codec, items)
            # 3. an index for each split
            for split in SPLITS:
                shards = []
                for job in (job for job in jobs if job.split == split):
                    report = read_json(job.report(folder))
                    counts[split].add(report)
                    for reject in report["rejects"]:
                        manifest.reject(split, rejects, reject)
                    manifest.lengths[split].update(dict(report["lengths"]))
                    if report["entry"]:
                        shards.append(report["entry"])
                        manifest.shard(split, report["entry"])
                common = {"kind": self.kind, "tokenizer": codec.fingerprint, "counts": counts[split]}
                write_index(data / split, shards, **common, extra={"sources": manifest.sources, **extra})
                counts[split]["written"] = sum(shard["count"] for shard in shards)
        # 4. what became of all of it
        index = {
            "format": FORMAT,
            "kind": DATASET,
            **plan,
            "tokenizer": codec.fingerprint,
            "counts": {part: numbers if part in SPLITS else +numbers for part, numbers in counts.items() if numbers},
            "examples": {part: numbers.examples for part, numbers in counts.items() if numbers.examples},
            "sources": manifest.sources,
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
        content = manifest.content(index, kept=kept, sizes=sizes)
        if without := [source["name"] for source in content["sources"] if not source["samples"]]:
            names = f"source{'s'[: len(without) > 1]} {' and '.join(without)}"
            log.warning("nothing of the %s could be used; %s says why of each record", names, REJECTS)
        write_json(data / MANIFEST, content)
        write_json(data / INDEX, index)
        return index

    def _make_tokenizer(self, items: Items, folder: Path) -> Codec:
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
        codec.save(folder)
        return Codec.load(folder)

    def _write_shards(self, jobs: Sequence[Job], folder: Path, codec: Codec, items: Items) -> None:
        """Write the shards that are not there yet."""
        for place in (folder / REPORTS, *(folder / DATA / split for split in SPLITS)):
            place.mkdir(exist_ok=True)
        open_jobs = [job for job in jobs if not is_finished(job, self, codec, items, folder)]
        if num_kept := len(jobs) - len(open_jobs):
            log.info("continuing in %s: %d of %d shards are there", folder, num_kept, len(jobs))
        for tar in {*(folder / DATA).glob("*/*.tar")} - {job.tar(folder) for job in jobs}:
            tar.unlink()  # of more items: an image was there when a killed run began
        sizes = [sum(job.stop - job.start for job in some) for some in (jobs, open_jobs)]
        unit = "image" if self.kind == "captions" else "text"
        processes = num_processes(self.processes, open_jobs)
        # smoothing: shards of several processes end in bursts
        with Bar(total=sizes[0], initial=sizes[0] - sizes[1], desc="write", unit=unit, smoothing=0) as bar:
            if processes > 1:
                write_in_processes(open_jobs, self, folder, processes=processes, advance=bar.update)
            else:
                for job in open_jobs:
                    write(job, self, codec, items, folder, bar.update)

    @property
    def training(self) -> str:
        """The configuration in the command that `src.prepare` suggests at its end."""
        return "conf=mask,model/tiny" if self.kind == "captions" else "conf=mask,task/sft"

    def summary(self) -> str:
        """What was written and where, and a command that trains on it."""
        out = Path(self.out)
        shards = [shard for split in SPLITS for shard in read_json(out / split / INDEX)["shards"]]
        samples = counted(sum(shard["count"] for shard in shards), "image" if self.kind == "captions" else "text")
        amount = data_size(sum(shard["bytes"] for shard in shards))
        settings = [self.training, f"run_dir=runs/{out.name}", f"data.path={out}", f"tokenizer={out / 'tokenizer'}"]
        settings += [f"data.response_length={self.response_length}"]
        settings += [f"data.image_size={side}"] if (side := getattr(self, "image_size", None)) else []
        command = shlex.join(["python", "-m", "src.train", *settings])
        wrote = f"wrote {samples} in {counted(len(shards), 'shard')} ({amount}) to {out}"
        return f"{wrote}\nto look at it: python -m src.prepare show={shlex.quote(str(out))}\nnext: {command}"


def _same(out: Path, index: dict, plan: dict) -> dict:
    """The index of a finished dataset. Raises UserError if it was made of other settings or files.

    A source file that is no longer there is not compared.
    """
    if (form := index.get("format")) != FORMAT:
        raise UserError(f"{out} has format {form}, not {FORMAT}; set prepare.overwrite=true to make it again")
    again = "set prepare.overwrite=true to make it again, or choose another prepare.out"
    if differing := changes(index["settings"], plan["settings"], "before"):
        raise UserError(f"{out} was made with other settings ({differing}); {again}")
    old = index.get("files", {})
    if changed := [path for path, file in plan["files"].items() if old.get(path) != file]:
        raise UserError(f"{out} was made before {', '.join(changed)} changed; {again}")
    log.info("%s is already complete: nothing to do", out)
    return index


def _begin(folder: Path, plan: dict) -> None:
    """Make the folder of an unfinished dataset, unless it is there and was begun with the same plan."""
    if folder.exists() and any(folder.iterdir()):
        if not (folder / PLAN).is_file():
            raise UserError(f"{folder} is no unfinished dataset: remove it, or choose another prepare.out")
        begun = read_json(folder / PLAN)
        if begun == plan and (folder / DATA).is_dir():
            return
        if begun != plan:  # else it was killed after its rename
            names = differences(begun.get("settings", {}), plan["settings"])
            names += differences(begun.get("files", {}), plan["files"])
            log.info("starting over: %s was begun with other settings or files (%s)", folder, ", ".join(names))
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN, plan)
    (folder / DATA).mkdir()
