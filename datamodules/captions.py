"""Images with captions, and online rounds, as `Batch`es.

    data = CaptionData(path="data/scenes", codec=codec, batch_size=64, canvas=64, image_size=48)
    data.add_round("runs/x/rounds/round-0001")      the next train_dataloader() trains on its drafts as well
    for batch in data.train_dataloader(): ...

    shards -> Loader (which samples) -> Collate (ids, spans, pixels) -> Batch

Without rounds every training row is a caption; with rounds a share `data_share` of each batch is, and the
rest are drafts with their corrections. Training takes one of the captions of an image by a hash of (seed,
epoch, key), evaluation the first.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.loader import Loader, Notes, Part
from datamodules.shards import Index, Sample, Stream, read_index
from src.batch import Batch
from src.tiling import AnyRes, Layout, Square
from src.tokenizer import Codec

SPLITS = ("train", "val", "test")
log = logging.getLogger(__name__)


class CaptionData(L.LightningDataModule):
    """Caption shards under `path` (train, val, test, as `src.prepare` writes them), mixed with online rounds.

    canvas:        response length in tokens: filled with end of text behind eot; longer responses are cut
    image_size:    pixels on the side of what the vision tower sees; images are resized to it
    tiling:        cuts each image into tiles of `image_size` pixels instead, so that it keeps shape and resolution
    rounds:        folders of online rounds; more come by `add_round`
    data_share:    with rounds, the share of captions in each training batch
    limit:         use only the first so many samples of a split: a number for all, or {split: number}
    epoch_batches: batches per training epoch and rank; null: one pass over the data (with rounds, over these)
    """

    def __init__(
        self,
        *,
        path: str,
        codec: Codec,
        batch_size: int,
        canvas: int,
        image_size: int,
        tiling: AnyRes | None = None,
        seed: int = 0,
        workers: int = 0,
        rounds: Sequence[str] = (),
        data_share: float = 0.25,
        limit: int | Mapping[str, int] | None = None,
        epoch_batches: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "canvas": canvas, "image_size": image_size}
        sizes["epoch_batches"] = 1 if epoch_batches is None else epoch_batches
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= data_share < 1:
            raise ValueError(f"data_share must be at least 0 and less than 1, got {data_share}")
        self.path, self.codec, self.batch_size, self.seed = Path(path), codec, batch_size, seed
        self.workers, self.data_share, self.epoch_batches = workers, data_share, epoch_batches
        self.limit: dict[str, int] = dict.fromkeys(SPLITS, limit) if isinstance(limit, int) else dict(limit or {})
        if unknown := set(self.limit) - set(SPLITS):
            raise ValueError(f"limit names {sorted(unknown)}; the splits are {', '.join(SPLITS)}")
        if tiling and tiling.size != image_size:
            raise ValueError(f"image_size {image_size} and tiling.size {tiling.size} must be equal")
        self.layout: Layout = tiling or Square(image_size)
        self.collate = Collate(codec, canvas=canvas, layout=self.layout, seed=seed)
        self.rounds: list[Index] = []
        self._told = False  # that there is nothing to validate on
        self.notes: Notes = Counter()  # damaged samples and cut responses, as (where, reason) -> how many
        for folder in rounds:
            self.add_round(folder)

    def add_round(self, path: str | Path) -> None:
        """Train on a finished round from the next train_dataloader() on; adding it again changes nothing."""
        index = _filled(self._checked(read_index(path), kind="round"))
        if index.digest not in {known.digest for known in self.rounds}:
            self.rounds.append(index)

    def state_dict(self) -> dict[str, Any]:
        """The rounds trained on. The place in the epoch is in the loader's state, saved by Lightning."""
        return {"rounds": [{"path": str(index.path), "digest": index.digest} for index in self.rounds]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rounds = []
        for saved in state_dict["rounds"]:
            self.add_round(saved["path"])
            if self.rounds[-1].digest != saved["digest"]:
                raise ValueError(f"{saved['path']} is not the round that the checkpoint knows: its index.json differs")

    def train_dataloader(self) -> Loader:
        """Cheap and lazy, as Lightning calls it twice on resume; the epoch is read at the first batch."""
        base = self.index("train")
        world, rows = self._place()[1], self._rows()
        streams = {"data": [base], "rounds": self.rounds}
        built = {name: Stream(streams[name], seed=self.seed) for name in rows if rows[name]}
        batches = self.epoch_batches or self._one_pass(built[self._leading], rows[self._leading] * world)
        parts = []
        for name, stream in built.items():
            used = batches * rows[name] * world
            passes = self.epoch_batches is None and name == self._leading and used <= stream.count
            parts.append(Part(stream, rows[name], stream.count if passes else used, batches * rows[name]))
        return self._loader(parts, batches, self.collate, self._epoch)

    def val_dataloader(self) -> Loader | list:
        """No loader where the split is empty, as that of a small data set may be: Lightning then does not validate."""
        index = self._read("val")
        if index.count:
            return self._eval_loader(index)
        if not self._told:
            self._told = True
            log.warning("%s holds no samples: training goes on without validation", index.path)
        return []

    def test_dataloader(self) -> Loader:
        return self._eval_loader(self.index("test"))

    def draft_dataloader(self, round_number: int, num: int) -> Loader:
        """The `num` training samples that a round (1, 2, ...) drafts for, none twice.

        Rounds take turns through the data: no image comes again before the others have been drafted for.
        """
        index = self.index("train")
        if not 1 <= num <= index.count:
            raise ValueError(f"a round can draft for 1 to {index.count} images, got {num}")
        turn, place = divmod(round_number - 1, index.count // num)
        return self._in_order(Stream([index], seed=self.seed + turn), num, advance=num, epoch=lambda: place)

    def draft_settings(self) -> dict[str, Any]:
        """What drafts for these data depend on, beside the number of the round; kept with them."""
        index, layout = self.index("train"), self.layout
        return {
            "data": index.digest,
            "data_count": index.count,
            "data_seed": self.seed,
            "batch_size": self.batch_size,
            "canvas": self.collate.canvas,
            "image_size": layout.size,
            "tiling": layout.to_dict() if isinstance(layout, AnyRes) else None,
        }

    def index(self, split: str) -> Index:
        """The data folder of a split, cut to `limit`. Raises ValueError where it is empty."""
        return _filled(self._read(split))

    def _read(self, split: str) -> Index:
        return self._checked(read_index(self.path / split), kind="captions").first(self.limit.get(split))

    def _eval_loader(self, index: Index) -> Loader:
        stream = Stream([index], seed=self.seed, shuffle=False)
        return self._in_order(stream, index.count, advance=0, epoch=lambda: 0)

    def _in_order(self, stream: Stream, num: int, *, advance: int, epoch: Callable[[], int]) -> Loader:
        """`num` samples with their first captions, without damaged ones.

        Ranks get equal shares; the last reads on to fill up.
        """
        per_rank = -(-num // self._place()[1])
        part = Part(stream, self.batch_size, advance, per_rank, stand_in=False)
        batches = -(-per_rank // self.batch_size)
        return self._loader([part], batches, self.collate.with_first_caption(), epoch)

    def _loader(self, parts: list[Part], batches: int, collate: Collate, epoch: Callable[[], int]) -> Loader:
        if self.workers:  # must be set before the fork, or the tokenizer warns in every worker
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        rank, world = self._place()
        settings = {"notes": self.notes, "workers": self.workers, "rank": rank, "world": world}
        return Loader(parts, collate, batches=batches, epoch=epoch, **settings)

    @property
    def _leading(self) -> str:
        """The stream that decides how long an epoch is."""
        return "rounds" if self.rounds else "data"

    def _rows(self) -> dict[str, int]:
        """Rows of a training batch per stream."""
        if not self.rounds:
            return {"data": self.batch_size, "rounds": 0}
        data = min(round(self.batch_size * self.data_share), self.batch_size - 1)
        return {"data": data, "rounds": self.batch_size - data}

    def _one_pass(self, stream: Stream, rows: int) -> int:
        """Batches in one pass over a stream, `rows` being what all ranks together take for one."""
        if stream.count < rows and not self.rounds:
            raise ValueError(
                f"{stream.count} training samples do not fill one batch of {rows} rows on all ranks; "
                "lower batch_size, or set epoch_batches to go round the data"
            )
        return max(1, stream.count // rows)  # a small round is cycled: its drafts are paid for

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _checked(self, index: Index, *, kind: str) -> Index:
        if index.kind != kind:
            raise ValueError(f"{index.path} holds {index.kind!r}, expected {kind!r}")
        if index.tokenizer != self.codec.fingerprint:
            again = "src.prepare" if kind == "captions" else "src.draft and src.revise"
            raise ValueError(
                f"{index.path} was made with tokenizer {index.tokenizer}, but the model has "
                f"{self.codec.fingerprint}; make it again by {again} with this tokenizer"
            )
        return index


def _filled(index: Index) -> Index:
    if not index.count:
        raise ValueError(f"{index.path} holds no samples")
    return index


@dataclass
class Row:
    """The token side of a sample, as equally long lists: right ids, flawed ids, span number (0: none)."""

    response: list[int]
    flawed: list[int]
    span: list[int]

    @classmethod
    def of(cls, right: Sequence[int], spans: Sequence[tuple[int, int, Sequence[int], Sequence[int]]]) -> Row:
        """Spans are (start, end, right ids, wrong ids); one that overlaps an earlier one is left out."""
        row = cls(list(right), list(right), [0] * len(right))
        number = 0
        for start, end, good, bad in spans:
            if any(row.span[start:end]):
                continue
            number += 1
            row.response[start:end], row.flawed[start:end] = good, bad
            row.span[start:end] = [number] * (end - start)
        return row

    def fit(self, canvas: int, fill: int) -> Row:
        """Cut or filled to `canvas` tokens; spans that the cut goes through count no more."""
        cut = set(self.span[canvas - 1 : canvas]) & set(self.span[canvas : canvas + 1]) - {0}
        span = [0 if number in cut else number for number in self.span]
        flawed = [w if number else r for r, w, number in zip(self.response, self.flawed, span, strict=True)]
        more = canvas - len(span)
        filled = lambda ids: ids[:canvas] + [fill] * more  # noqa: E731
        return Row(filled(self.response), filled(flawed), span[:canvas] + [0] * more)


class Collate:
    """Samples of one batch -> (`Batch`, notes). A pure function of the samples and the epoch.

    layout: how images are cut into tiles, which has to be the model's layout; None for samples without images
    first:  take the first caption of every image instead of one by hash
    """

    def __init__(self, codec: Codec, *, canvas: int, layout: Layout | None, seed: int, first: bool = False) -> None:
        self.codec, self.canvas, self.layout = codec, canvas, layout
        self.seed, self.first = seed, first

    def with_first_caption(self) -> Collate:
        return Collate(self.codec, canvas=self.canvas, layout=self.layout, seed=self.seed, first=True)

    def __call__(self, samples: list[Sample], epoch: int) -> tuple[Batch, Notes]:
        full = [self._row(sample, epoch) for sample in samples]
        rows = [row.fit(self.canvas, self.codec.eos_id) for row in full]
        cut = sum(len(row.span) > self.canvas for row in full)
        response = torch.tensor([row.response for row in rows])  # (B, L)
        batch = Batch(
            prefix=self._prefix(samples),
            response=response,
            editable=torch.ones_like(response, dtype=torch.bool),
            flawed=torch.tensor([row.flawed for row in rows]),
            span=torch.tensor([row.span for row in rows]),
            drafted=torch.tensor(["draft_ids" in sample.record for sample in samples]),
            keys=[sample.key for sample in samples],
            epoch=epoch,
            records=[sample.record for sample in samples],
            images=[sample.data for sample in samples],
        )
        return batch, Counter({(str(self.canvas), "cut"): cut} if cut else {})

    def _row(self, sample: Sample, epoch: int) -> Row:
        if "draft_ids" in sample.record:
            return draft_row(sample.record)
        captions = sample.record["captions"]
        number = 0 if self.first else choice(f"{self.seed}/{epoch}/{sample.key}/caption", len(captions))
        return caption_row(captions[number], self.codec)

    def _prefix(self, samples: list[Sample]) -> dict[str, Tensor]:
        images = [[] if sample.image is None else [sample.image] for sample in samples]
        asked = [sample.record["prompt"] for sample in samples]
        prompts = [self.codec.prompt_ids(text, images=len(some)) for text, some in zip(asked, images, strict=True)]
        longest = max(map(len, prompts))
        filled = [ids + [self.codec.eos_id] * (longest - len(ids)) for ids in prompts]
        prefix = {"prompt_ids": torch.tensor(filled)}
        if self.layout and any(images):
            prefix |= image_inputs(images, self.layout)
        if any(len(ids) < longest for ids in prompts):
            lengths = torch.tensor([len(ids) for ids in prompts])
            prefix["prompt_mask"] = torch.arange(longest) < lengths[:, None]  # (B, T)
        return prefix


def caption_row(caption: dict, codec: Codec) -> Row:
    """A true caption, with all its swaps that do not overlap as false spans."""
    ids = [*codec.encode(caption["text"])[0], codec.eot_id]
    places = [swap["tokens"] for swap in caption.get("swaps", ())]
    return Row.of(ids, [(start, end, ids[start:end], wrong) for start, end, wrong in places])


def draft_row(record: dict) -> Row:
    """A model's draft, right where the expert corrected it."""
    ids = record["draft_ids"]
    spans = [(s["start"], s["end"], s["target_ids"], ids[s["start"] : s["end"]]) for s in record["spans"]]
    return Row.of(ids, spans)


def choice(name: str, count: int) -> int:
    """A number below `count` that depends on the name only."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") % count


def image_inputs(images: Sequence[Sequence[Image.Image]], layout: Layout) -> dict[str, Tensor]:
    """What a backbone takes of the images of each row (none, one or several); short rows end in empty tiles.

    pixel_values (B, T, 3, S, S) uint8, num_tiles (B, M) int64, image_sizes (B, M, 2) int64 (width, height).
    """
    shape = len(images), max(map(len, images))
    num_tiles, image_sizes = np.zeros(shape, dtype=np.int64), np.zeros((*shape, 2), dtype=np.int64)
    for row, pictures in enumerate(images):
        for place, picture in enumerate(pictures):
            num_tiles[row, place], image_sizes[row, place] = layout.num_tiles(picture.size), picture.size
    longest = num_tiles.sum(1).max()
    pixels = np.zeros((len(images), longest, 3, layout.size, layout.size), dtype=np.uint8)
    for row, pictures in enumerate(images):
        if pictures:
            tiles = np.concatenate([layout.tiles(picture) for picture in pictures])  # (., S, S, 3)
            pixels[row, : len(tiles)] = tiles.transpose(0, 3, 1, 2)
    found = {"pixel_values": pixels, "num_tiles": num_tiles, "image_sizes": image_sizes}
    return {name: torch.from_numpy(array) for name, array in found.items()}
