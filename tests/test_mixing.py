"""Mixing, buckets and resume of the loader: by brute force over its places, and with real processes."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from datamodules.captions import CaptionData
from datamodules.collate import Collate
from datamodules.loader import Deal, Part
from datamodules.stream import Index, Place, Shard, Stream
from src.io.errors import UserError
from src.io.files import read_json, write_json
from src.models.tiling import Square, anyres
from src.text.tokenizer import Codec
from tests.test_captions import CANVAS, WORDS, draft, record, write

ROOT = Path(__file__).parents[1]
SOURCES = [{"name": "vicrit", "weight": 2}, {"name": "sharegpt4v", "weight": 0.5}, {"name": "llava"}]


@pytest.fixture(scope="module")
def codec() -> Codec:
    return Codec.train([WORDS] * 3, vocab_size=400, alphabet="bytes")


def index(counts: Sequence[int], *, num_sources: int = 1, seed: int = 0) -> Index:
    """Shards of so many samples, without files; their samples are of sources at random."""
    draws = np.random.default_rng(seed)
    shards = [
        Shard(Path(f"s{n}"), count, source=draws.integers(0, num_sources, count).astype(np.uint8))
        for n, count in enumerate(counts)
    ]
    return Index(Path("d"), "captions", None, tuple(shards), "", {"sources": SOURCES[:num_sources]})


def name(place: Place) -> tuple[str, int]:
    return place.shard.path.name, place.index


def source(place: Place) -> int:
    assert place.shard.source is not None
    return int(place.shard.source[place.index])


def one_pass(stream: Stream, number: int) -> list[Place]:
    return list(stream.places(number * stream.count, (number + 1) * stream.count))


# --- weights ------------------------------------------------------------------------------------------------------


def test_weights_are_exact_in_each_pass_and_even_over_passes() -> None:
    data = index([40, 33, 7, 21], num_sources=3)
    sizes = Counter(int(s) for shard in data.shards for s in shard.source)  # type: ignore[union-attr]
    stream = Stream([data], seed=3, weights={"llava": 1.3})
    weights = [2, 0.5, 1.3]
    seen: Counter[tuple[str, int]] = Counter()
    noises: list[tuple[tuple[str, int], int]] = []
    of = {(shard.path.name, i): int(s) for shard in data.shards for i, s in enumerate(shard.source)}  # type: ignore[arg-type]
    for number in range(12):
        places = one_pass(stream, number)
        in_pass = Counter(source(place) for place in places)
        assert all(0 <= in_pass[s] - weights[s] * sizes[s] < 1 for s in range(3))
        seen.update(map(name, places))
        noises += [(name(place), place.passes) for place in places]
        shares = {s: in_pass[s] / sizes[s] for s in range(3)}
        assert all(abs(seen[key] - (number + 1) * shares[s]) <= 1 for key, s in of.items())
        if number == 1:
            assert all(seen[key] >= 1 for key in of)
    assert len(set(noises)) == len(noises)  # new noise each time


def test_two_copies_of_a_shard_come_in_orders_of_their_own() -> None:
    stream = Stream([index([30, 30], num_sources=1)], seed=1, weights={})  # vicrit: 2
    places = one_pass(stream, 0)
    copies = [[name(place) for place in places[n : n + 30]] for n in range(0, 120, 30)]
    assert sorted(copies[0]) != copies[0]
    assert len({tuple(copy) for copy in copies}) == 4
    assert sorted(key for copy in copies for key in copy) == sorted(
        2 * [(f"s{s}", i) for s in (0, 1) for i in range(30)]
    )
    assert all(len({shard for shard, _ in copy}) == 1 for copy in copies)
    once = Stream([index([30, 30])], seed=1)  # as for drafts, whatever the weights
    assert dict.fromkeys((name(place) for place in places), 1) == Counter(name(place) for place in one_pass(once, 0))


def test_weighted_order_does_not_depend_on_where_it_is_cut() -> None:
    settings: dict[str, Any] = {"seed": 3, "weights": {}}
    whole = list(Stream([index([40, 33, 7, 21], num_sources=3)], **settings).places(11, 400))
    for cut in (12, 50, 130, 131, 399):
        stream = Stream([index([40, 33, 7, 21], num_sources=3)], **settings)
        assert [*stream.places(cut, 400), *stream.places(11, cut)] == [*whole[cut - 11 :], *whole[: cut - 11]]


def test_a_wrong_name_or_weight_is_an_error() -> None:
    data = index([9, 9], num_sources=3)
    with pytest.raises(UserError, match=r"data.weights: d has no source 'sharegpt'; did you mean 'sharegpt4v'\?"):
        Stream([data], seed=0, weights={"sharegpt": 1})
    with pytest.raises(UserError, match="no samples with weights"):
        Stream([data], seed=0, weights={"vicrit": 0, "llava": 0, "sharegpt4v": 0})
    for weight in (-1, math.inf, math.nan):
        with pytest.raises(UserError, match=f"finite and at least 0, got {weight}"):
            Stream([data], seed=0, weights={"vicrit": weight})
    prepared = replace(data, content={"sources": [{"name": name, "weight": math.nan} for name in "abc"]})
    with pytest.raises(UserError, match="finite and at least 0, got nan"):
        Stream([prepared], seed=0, weights={})


def test_what_does_not_fill_a_batch_is_other_samples_in_each_pass() -> None:
    stream = Stream([index([10, 11, 12])], seed=0).resized(28)  # 5 are left out
    taken = [Counter(name(place) for place in one_pass(stream, number)) for number in range(33)]
    assert all(len(places) == 28 and set(places.values()) == {1} for places in taken)
    left_out = [{(f"s{s}", i) for s in range(3) for i in range(10 + s)} - set(places) for places in taken]
    assert not any(one & other for one, other in pairwise(left_out))
    assert set(Counter(key for keys in left_out for key in keys).values()) == {5}  # evenly: 33 x 5 / 33


# --- buckets ------------------------------------------------------------------------------------------------------


def drawn(rng: np.random.Generator, quantiles: Mapping[float, float], count: int) -> np.ndarray:
    return np.interp(rng.random(count), list(quantiles), list(quantiles.values()))


def described(count: int, *, tiled: bool) -> tuple[Index, list[int]]:
    """Samples with the prompts and images of spec/data.md, section 3, and the lengths of their prefixes in LLaDA-V."""
    rng = np.random.default_rng(0)
    questions = {0: 10, 0.05: 23, 0.25: 33, 0.5: 42, 0.75: 54, 0.95: 79, 0.99: 100, 1: 183}  # words of GSM8K
    tokens = drawn(rng, questions, count).astype(int)
    ratios = drawn(rng, {0: 0.38, 0.5: 1.33, 1: 3.9}, count)
    sizes = np.stack([np.where(ratios < 1, 640 * ratios, 640), np.where(ratios < 1, 640, 640 / ratios)], 1).astype(int)
    layout = anyres(384)
    images = [layout.num_tokens((w, h), side=27) if tiled else 27 * 27 for w, h in sizes.tolist()]
    per_shard = 500
    shards = [
        Shard(Path(f"s{n}"), per_shard, prompt_tokens=tokens[n : n + per_shard], sizes=sizes[n : n + per_shard])
        for n in range(0, count, per_shard)
    ]
    return Index(Path("d"), "captions", None, tuple(shards), "", {}), [
        a + b for a, b in zip(tokens, images, strict=True)
    ]


def stage(stream: Stream, *, rows: int, world: int, bucket: int, length: Any) -> Deal:
    batches = stream.count // (rows * world)
    unread = [[range(sys.maxsize)]]
    return Deal([Part(stream, rows, batches * rows)], unread, world, 0, 0, bucket, length)


def places_of(stage: Deal, rank: int) -> list[list[Place]]:
    batches = []
    while stage.first + len(batches) < stage.stop:
        batches += [batch[0] for batch in stage.window(rank, stage.first + len(batches))[1]]
    return batches


@pytest.mark.parametrize(("tiled", "rows"), [(True, 4), (True, 16), (False, 16)])
def test_padding_of_prefixes(codec: Codec, tiled: bool, rows: int) -> None:
    data, lengths = described(6000, tiled=tiled)
    collate = Collate(codec, response_length=CANVAS, layout=anyres(384) if tiled else Square(384), seed=0)
    padded = {}
    for bucket in (1, 16):
        batches = places_of(stage(Stream([data], seed=0), rows=rows, world=2, bucket=bucket, length=collate.length), 1)
        assert len(batches) == 6000 // (2 * rows)
        of = [[lengths[int(place.shard.path.name[1:]) + place.index] for place in batch] for batch in batches]
        padded[bucket] = sum(max(row) * rows - sum(row) for row in of) / sum(max(row) * rows for row in of)
    assert padded[16] <= 0.05
    assert padded[1] > (0.2 if tiled else 0.03)


def test_a_bucket_holds_the_samples_of_its_window_and_ranks_get_like_lengths() -> None:
    data = index([50, 60, 70])
    length = {(shard.path.name, i): (i * 37) % 23 for shard in data.shards for i in range(shard.count)}
    settings: dict[str, Any] = {"rows": 3, "world": 2}
    plain, sorted_, even = (
        stage(Stream([data], seed=0), **settings, bucket=bucket, length=of)
        for bucket, of in (
            (1, None),
            (8, lambda shard, i: length[shard.path.name, i]),
            (8, lambda shard, i: 7),
        )
    )
    longest = []
    for rank in (0, 1):
        before, after = places_of(plain, rank), places_of(sorted_, rank)
        assert len(before) == len(after) == 30
        assert places_of(even, rank) == before
        for n in range(0, 30, 8):  # the last window is shorter
            one, other = (sorted(name(p) for batch in batches[n : n + 8] for p in batch) for batches in (before, after))
            assert one == other
            ends = sorted((min(of), max(of)) for of in ([length[name(p)] for p in batch] for batch in after[n : n + 8]))
            assert all(high <= low for (_, high), (low, _) in pairwise(ends))
        assert [p.turn for batch in after for p in batch] == [p.position for batch in before for p in batch]
        longest.append([max(length[name(p)] for p in batch) for batch in after])
        assert longest[-1][:8] != sorted(longest[-1][:8])
    assert sum(abs(a - b) for a, b in zip(*longest, strict=True)) / 30 < 2  # of lengths up to 22


# --- ranks, workers, resume ---------------------------------------------------------------------------------------


def describe(folder: Path, columns: dict[str, Any], **more: Any) -> None:
    """Add columns to the index of a folder, as `src.prepare` writes them."""
    content, begin = read_json(folder / "index.json"), 0
    for shard in content["shards"]:
        for column, values in columns.items():
            shard[column] = values[begin : begin + shard["count"]]
        begin += shard["count"]
    write_json(folder / "index.json", {**content, **more})


@pytest.fixture
def folder(tmp_path: Path, codec: Codec) -> Path:
    """61 images of three sources and 8 lengths, and a round of 21 drafts."""
    for split, count in (("train", 61), ("val", 10)):
        write(tmp_path / "data" / split, codec, [record(codec, n) for n in range(count)], "captions")
    columns = {
        "prompt_tokens": [5 + n * 7 % 8 for n in range(61)],
        "sizes": [[4, 4]] * 61,
        "source": [n % 3 for n in range(61)],
    }
    describe(tmp_path / "data" / "train", columns, sources=SOURCES)
    write(tmp_path / "round-0001", codec, [draft(codec, n) for n in range(21)], "round")
    describe(tmp_path / "round-0001", {"prompt_tokens": [n % 4 for n in range(21)], "sizes": [[4, 4]] * 21})
    return tmp_path / "data"


def module(
    folder: Path, codec: Codec, *, place: tuple[int, int] = (0, 1), epoch: int = 0, **changed: Any
) -> CaptionData:
    settings: dict[str, Any] = {"batch_size": 2, "response_length": CANVAS, "image_size": 4, "seed": 5, "bucket": 3}
    made = CaptionData(path=str(folder), codec=codec, **{**settings, **changed})
    made.trainer = SimpleNamespace(current_epoch=epoch, global_rank=place[0], world_size=place[1])  # type: ignore[assignment]
    return made


def keys(batches: Any) -> list[list[str]]:
    return [batch.keys for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rounds", [False, True])
def test_a_resumed_rank_reads_the_very_batches_that_are_left(folder, codec, workers, rounds):
    """With weights, buckets and a round; the number of workers may change."""
    settings: dict[str, Any] = {"place": (1, 2), "epoch": 1}
    settings |= {"rounds": [str(folder.parent / "round-0001")], "data_share": 0.5, "batch_size": 4} if rounds else {}
    whole = list(module(folder, codec, **settings).train_dataloader())
    for stop in (1, 4, len(whole) - 1):
        first = module(folder, codec, **settings)
        batches = iter(first.train_dataloader())
        for _ in range(stop):
            next(batches)
        second = module(folder, codec, workers=workers, **settings)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        loader = second.train_dataloader()
        assert len(loader) == len(whole)
        for batch, expected in zip(loader, whole[stop:], strict=True):
            assert (batch.keys, batch.passes, batch.order) == (expected.keys, expected.passes, expected.order)
            assert torch.equal(batch.response, expected.response)


class Counting(L.LightningModule):
    """Counts the validation batches of each epoch, and saves after step `save_at`."""

    def __init__(self, path: Path, save_at: int = -1) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.path, self.save_at = path, save_at
        self.validated: list[tuple[int, int]] = []  # (step, batches)

    def training_step(self, *_: Any) -> torch.Tensor:
        return self.weight.sum()

    def on_validation_epoch_start(self) -> None:
        self.validated.append((self.global_step, 0))

    def validation_step(self, *_: Any) -> None:
        step, num = self.validated[-1]
        self.validated[-1] = step, num + 1

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        if self.global_step == self.save_at:
            self.trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("save_at", "every"), [(10, None), (13, None), (5, 5), (13, 5)])
def test_validation_is_whole_after_a_resume(tmp_path, folder, codec, save_at, every):
    """Epochs of 10 steps, 5 validation batches after each of them or after 5 steps.

    What was due right after a checkpoint that a callback has saved in a step is lost: Lightning goes on behind it.
    """
    interval = {"val_check_interval": every, "check_val_every_n_epoch": None} if every else {}
    trainer = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer |= {"enable_model_summary": False, "reload_dataloaders_every_n_epochs": 1, "num_sanity_val_steps": 0}
    settings: dict[str, Any] = {"limit": {"train": 21}, "weights": {"vicrit": 1, "sharegpt4v": 1}}
    runs = []
    for save, ckpt in ((save_at, None), (-1, tmp_path / "saved.ckpt")):
        data, counting = module(folder, codec, **settings), Counting(tmp_path / "saved.ckpt", save)
        L.Trainer(max_epochs=3, **trainer, **interval).fit(counting, datamodule=data, ckpt_path=ckpt, weights_only=True)
        runs.append(counting.validated)
    steps = list(range(every or 10, 31, every or 10))
    assert runs[0] == [(step, 5) for step in steps]
    assert runs[1] == [(step, 5) for step in steps if step > save_at]
