"""`Batch`es of images with captions, and of online rounds. For text without images see `datamodules/text.py`.

    data = CaptionData(path="data/scenes", codec=codec, batch_size=64, response_length=64, image_size=48)
    data.add_round("runs/x/rounds/round-0001")      the next train_dataloader() adds its drafts
    for batch in data.train_dataloader(): ...

    shards -> Loader (chooses samples) -> Collate (ids, spans, pixels) -> Batch

Without rounds every training row is a caption; with rounds a fraction `data_share` of each batch is, and the
other rows are corrected drafts. Training chooses a caption of each image by a hash of (seed, pass, key), evaluation
takes the first.
"""

from __future__ import annotations

import logging
import os
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import lightning as L

from datamodules.collate import Collate
from datamodules.loader import Loader, Notes, Part
from datamodules.stream import Index, Stream, read_index
from src.io.errors import UserError
from src.io.remote import Cache, join
from src.models.tiling import RESIZES, AnyRes, Layout, Square
from src.text.align import RESIZED
from src.text.tokenizer import Codec
from src.types import Batch

SPLITS = ("train", "val", "test")
NEW_ROUND = 1_000_000  # passes that a loader could make before the next round
log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False, repr=False)
class ShardData(L.LightningDataModule):
    """Shards under `path` (train, val, test), mixed with online rounds; a subclass defines their samples.

    path:            a folder, a URL, or `pipe:COMMAND` (src/io/remote.py)
    response_length: in tokens; shorter responses are filled with eos behind eot, longer ones are cut
    workers:         processes that read shards, per rank
    rounds:          folders of online rounds, which become `Index`es; `add_round` adds more
    data_share:      with rounds, the fraction of each training batch that comes from the data
    limit:           use only the first `limit` samples of a split: a number for all, or {split: number}
    epoch_batches:   batches per training epoch and rank; null: one pass over the data, or over the rounds if any
    weights:         {source: how often a pass takes its samples}, where it differs from the prepared data
    bucket:          so many consecutive batches are sorted by length, so that prefixes are padded less; null: none
    max_skipped:     unusable samples with which a run goes on: a share (float) of those read or of an epoch, and at
                     least 100; or a number (int). See `callbacks.skipped`
    cache:           where shards are kept that come from a URL, and how many
    """

    kind: ClassVar[str]  # of the split folders, as in their index.json
    image: ClassVar[bool]  # whether samples have an image

    path: str
    codec: Codec
    batch_size: int
    response_length: int
    seed: int = 0
    workers: int = 0
    rounds: list[Any] = field(default_factory=list)
    data_share: float = 0.25
    limit: int | Mapping[str, int] | None = None
    epoch_batches: int | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    bucket: int | None = 16
    max_skipped: float | int = 0.01
    cache: Cache | None = None

    def __post_init__(self) -> None:
        super().__init__()
        if self.workers:  # must be set before the fork, or the tokenizer warns in every worker
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        # a response: a token and eot
        least = {"batch_size": 1, "response_length": 2, "epoch_batches": 1, "workers": 0, "bucket": 1}
        for name, minimum in least.items():
            if (value := getattr(self, name)) is not None and value < minimum:
                raise UserError(f"data.{name} must be at least {minimum}, got {value}")
        if not 0 <= self.data_share < 1:
            raise UserError(f"data_share must be at least 0 and less than 1, got {self.data_share}")
        if self.max_skipped < 0 or (isinstance(self.max_skipped, float) and self.max_skipped > 1):
            raise UserError(f"data.max_skipped is a share such as 0.01, or a whole number, got {self.max_skipped}")
        limit = self.limit
        self.limits: dict[str, int] = dict.fromkeys(SPLITS, limit) if isinstance(limit, int) else dict(limit or {})
        if unknown := set(self.limits) - set(SPLITS):
            raise UserError(f"limit names {sorted(unknown)}; the splits are {', '.join(SPLITS)}")
        if (least_limit := min(self.limits.values(), default=0)) < 0:
            raise UserError(f"data.limit must be at least 0, got {least_limit}")
        self.place = (0, 1)  # (rank, world size) without a trainer
        self.collate = self.make_collate()
        self.notes: Notes = Counter()  # of training: (place, reason) -> number of damaged samples or cut responses
        self.other_notes: Notes = Counter()  # of validation, evaluation and drafts
        self._warned_empty_val = False
        self._loader_of_epoch: Loader | None = None
        self._loader_state: dict[str, Any] | None = None
        self._indexes: dict[str, Index] = {}  # by folder or URL
        folders, self.rounds = self.rounds, []
        for folder in folders:
            self.add_round(folder)

    @abstractmethod
    def make_collate(self) -> Collate:
        """What turns samples into training batches."""

    def add_round(self, path: str | Path) -> None:
        """Train on a finished round from the next train_dataloader() on; adding it twice has no effect."""
        if not Path(path).is_dir():
            raise UserError(f"data.rounds: no folder {path}; make a round with `python -m src.revise`")
        index = self._read(path, kind="round")
        if index.digest not in {added.digest for added in self.rounds}:
            self.rounds.append(index)

    def setup(self, stage: str) -> None:
        """Forget the position of an earlier run; Lightning loads the state of a checkpoint after this."""
        self._loader_of_epoch = self._loader_state = None

    def state_dict(self) -> dict[str, Any]:
        """The rounds trained on, and the position in the epoch.

        Lightning saves and loads the position too, but only after it has asked for the length of the epoch, which
        depends on it.
        """
        rounds = [{"path": str(index.path), "digest": index.digest} for index in self.rounds]
        loader = self._loader_of_epoch
        return {"rounds": rounds, "loader": loader.state_dict() if loader else self._loader_state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rounds, self._loader_state, self._loader_of_epoch = [], state_dict.get("loader"), None
        for saved in state_dict["rounds"]:
            self.add_round(saved["path"])
            if self.rounds[-1].digest != saved["digest"]:
                raise UserError(f"{saved['path']} is not the round of the checkpoint: its index.json differs")

    def train_dataloader(self) -> Loader:
        """Lazy, as Lightning calls it twice on resume: the epoch number is read at the first batch."""
        rank, world = self._place()
        is_first = self._loader_of_epoch is None and not rank
        if self._loader_of_epoch:  # an epoch goes on where the last one has ended, also if other ranks had begun that
            self._loader_state = self._loader_of_epoch.state_dict()
        # 1. rows of each stream in a batch; the last stream determines the length of an epoch
        rows = {"data": self.batch_size}
        if self.rounds:
            rows["data"] = min(round(self.batch_size * self.data_share), self.batch_size - 1)
            rows["rounds"] = self.batch_size - rows["data"]
        folders = {"data": [self.index("train")], "rounds": self.rounds}
        # NOTE: a further round changes all positions; numbers of passes that no loader had before keep the noise new.
        first = len(self.rounds) * NEW_ROUND
        weights = {"data": self.weights}
        streams = {
            name: Stream(folders[name], seed=self.seed, first_pass=first, weights=weights.get(name))
            for name in rows
            if rows[name]
        }
        main = streams[name := next(reversed(streams))]
        # 2. batches in an epoch
        step = rows[name] * world  # samples of the main stream in a step
        batches = self.epoch_batches or max(1, main.count // step)  # a small round is repeated
        if not self.rounds and main.count < step and is_first:
            log.warning(
                "a step has %d rows, but there %s: samples repeat within a step, each time with other noise; a smaller "
                "data.batch_size repeats fewer",
                step,
                "is 1 training sample" if main.count == 1 else f"are {main.count} training samples",
            )
        # 3. An epoch of one pass leaves out the samples that do not fill a batch on every rank, other ones in each
        # epoch. Any other epoch begins where the one before has ended, so that every sample is seen equally often.
        if self.epoch_batches is None and batches * step <= main.count:
            streams[name] = main.resized(batches * step)
            if (tail := main.count - batches * step) and is_first:
                message = "each epoch leaves out %d of %s: they do not fill a step of %d, and are others each time"
                log.info(message, tail, main.summary, step)
        parts = [Part(stream, rows[name], batches * rows[name]) for name, stream in streams.items()]
        epoch = lambda: self.trainer.current_epoch if self.trainer else 0  # noqa: E731
        settings = {"fixed": self.epoch_batches is not None, "bucket": self.bucket or 1, "length": self.collate.length}
        settings |= {"batches": batches, "epoch": epoch, "rank": rank, "world": world, "notes": self.notes}
        loader = self._loader(parts, self.collate, **settings)
        if self._loader_state:
            loader.load_state_dict(self._loader_state)
        self._loader_of_epoch = loader
        return loader

    def val_dataloader(self) -> Loader | list:
        """Empty if the split is, as in a small dataset: Lightning then skips validation."""
        index = self.read_split("val")
        if index.count:
            return self._eval_loader(index)
        if not self._warned_empty_val:
            self._warned_empty_val = True
            log.warning("%s holds no samples: training runs without validation", index.path)
        return []

    def test_dataloader(self) -> Loader:
        return self.eval_dataloader("test")

    def eval_dataloader(self, split: str) -> Loader:
        """All samples of any split, as in `test_dataloader`."""
        return self._eval_loader(self.index(split))

    def round_dataloader(self, path: str | Path) -> Loader:
        """The corrected drafts of a finished round, in order."""
        return self._eval_loader(self._read(path, kind="round"))

    def _eval_loader(self, index: Index) -> Loader:
        """All readable samples with their first captions, in order.

        One rank leaves damaged samples out. Several ranks need equally many batches: each gets an equal share, the
        last one reads on to fill its share, and other samples replace damaged ones.
        """
        rank, world = self._place()
        per_rank = -(-index.count // world)
        part = Part(Stream([index], seed=self.seed, shuffle=False), self.batch_size, per_rank, stand_in=world > 1)
        batches, collate = -(-per_rank // self.batch_size), replace(self.collate, first=True)
        place = {"rank": rank, "world": world, "notes": self.other_notes}
        return self._loader([part], collate, batches=batches, epoch=lambda: 0, **place)

    def draft_dataloader(self, round_number: int, num: int) -> Iterator[tuple[int, Batch]]:
        """The `num` distinct training samples that a round (1, 2, ...) drafts for, as (number, batch).

        Successive rounds go through the data: no image repeats before all others have been drafted for. Each rank gets
        a range of the batches; their numbers and samples do not depend on the number of ranks.
        """
        index = self.index("train")
        if not 1 <= num <= index.count:
            raise UserError(f"a round can draft for 1 to {index.count} images, got {num}")
        cycle, slot = divmod(round_number - 1, index.count // num)
        rank, world = self._place()
        batches = -(-num // self.batch_size)
        first, last = (batches * number // world for number in (rank, rank + 1))
        start, stop = (min(num, number * self.batch_size) for number in (first, last))
        stream = Stream([index], seed=self.seed + cycle)
        part = Part(stream, self.batch_size, stop - start, stand_in=False, start=slot * num + start)
        collate = replace(self.collate, first=True)
        settings = {"batches": last - first, "epoch": lambda: 0, "notes": self.other_notes}
        return self._loader([part], collate, **settings).numbered(first)

    def _loader(self, parts: list[Part], collate: Collate, **settings: Any) -> Loader:
        return Loader(parts, collate, workers=self.workers, **settings)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else self.place

    def draft_settings(self) -> dict[str, Any]:
        """Settings of the data that the drafts depend on; stored with the drafts."""
        index = self.index("train")
        own = {"data": index.digest, "data_count": index.count, "data_seed": self.seed}
        return {**own, "batch_size": self.batch_size, "response_length": self.response_length}

    def index(self, split: str) -> Index:
        """The data folder of a split, cut to `limit`. Raises UserError if it is empty."""
        index = self.read_split(split)
        if not index.count:
            raise UserError(f"{index.path} holds no samples")
        return index

    def read_split(self, split: str) -> Index:
        return self._read(join(self.path, split), kind=self.kind).first(self.limits.get(split))

    def _read(self, folder: str | Path, *, kind: str) -> Index:
        """A data folder. Raises UserError if it is of another kind, or made with another tokenizer or a gap token."""
        index = self._indexes.get(str(folder)) or read_index(folder, image=self.image, cache=self.cache)
        if kind != "round":  # read once, so that a run keeps its data; that of a round still gets its numbers
            self._indexes[str(folder)] = index
        if index.kind != kind:
            raise UserError(f"{index.path} holds {index.kind!r}, expected {kind!r}")
        if index.tokenizer != self.codec.fingerprint:
            verbs = "src.draft and src.revise" if kind == "round" else "src.prepare"
            own = Path(self.path) / "tokenizer"
            fresh = f", or set tokenizer={own} if the model has fresh weights" if own.is_dir() else ""
            raise UserError(
                f"{index.path} was made with tokenizer {index.tokenizer}, but the tokenizer of the model is "
                f"{self.codec.fingerprint}; make it again by {verbs} with this tokenizer{fresh}"
            )
        if self.codec.gap_id is None and any(index.content.get("counts", {}).get(name) for name in RESIZED):
            raise UserError(f"{index.path} was made with a gap token, but this run has none: set gap=TOKEN")
        return index


@dataclass(kw_only=True, eq=False, repr=False)
class CaptionData(ShardData):
    """Images with captions, as `src.prepare` writes them.

    image_size: input size of the vision tower in pixels; images are resized to this square. Verbs that read a model
                replace null by the model's (`with_layout` in src/models/inference.py)
    tiling:     cut images into tiles of `image_size` pixels instead, which keeps aspect ratio and resolution
    resize:     torch, or pillow as the released models were trained; null: torch, and pillow with `join: upstream`
    Other arguments: see `ShardData`.
    """

    kind: ClassVar[str] = "captions"
    image: ClassVar[bool] = True

    image_size: int | None
    tiling: AnyRes | None = None
    resize: str | None = None

    def make_collate(self) -> Collate:
        if self.image_size is None:
            raise UserError("data.image_size must be set: the side in pixels of the images that the model takes")
        if self.tiling and self.tiling.size != self.image_size:
            raise UserError(f"image_size {self.image_size} and tiling.size {self.tiling.size} must be equal")
        self.layout: Layout = self.tiling or Square(self.image_size)
        self.resize = self.resize or ("pillow" if self.codec.prompt_format.join == "upstream" else "torch")
        if self.resize not in RESIZES:
            raise UserError(f"data.resize must be one of {', '.join(RESIZES)}, got {self.resize!r}")
        length, layout = self.response_length, self.layout
        return Collate(self.codec, response_length=length, layout=layout, seed=self.seed, resize=self.resize)

    def train_dataloader(self) -> Loader:
        sizes = self.index("train").shards[0].sizes
        if sizes is not None and isinstance(self.layout, Square) and self._loader_of_epoch is None:
            (width, height), side = sizes[0].tolist(), self.layout.size
            if width == height != side and (sizes == width).all() and not self._place()[0]:
                log.warning(
                    "%s holds images of %d pixels, which are resized to data.image_size=%d: set data.image_size=%d, "
                    "with a model that takes it, or prepare the data with prepare.image_size=%d",
                    *(self.path, width, side, width, side),
                )
        return super().train_dataloader()

    def draft_settings(self) -> dict[str, Any]:
        tiling = self.layout.to_dict() if isinstance(self.layout, AnyRes) else None
        return {**super().draft_settings(), "image_size": self.layout.size, "tiling": tiling, "resize": self.resize}
