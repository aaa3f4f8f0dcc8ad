"""Shards: written whole or not at all, read in a pure order, resumed exactly, and read on past damage."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from datamodules.loader import Loader, Part
from datamodules.shards import Reader, Sample
from datamodules.stream import Stream, read_index
from src.io.errors import UserError
from src.io.shards import write_shards
from src.types import Batch
from testing.child import in_child
from testing.files import contents


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (2, 2), (value % 256, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def sample(number: int) -> dict:
    return {"__key__": f"s{number:03d}", "json": {"number": number}, "png": png(number)}


def make(folder: Path, count: int, *, per_shard: int = 10) -> Path:
    samples = (sample(number) for number in range(count))
    write_shards(folder, samples, prefix="train", per_shard=per_shard, kind="captions", tokenizer="t")
    return folder


class Numbers:
    """Batches of what the samples of this file hold."""

    def __call__(self, samples: list) -> tuple[Batch, Counter]:
        rows = torch.tensor([[s.record["number"], s.image.getpixel((0, 0))[0]] for s in samples])
        editable = torch.ones_like(rows, dtype=torch.bool)
        drafted = torch.zeros(len(samples), dtype=torch.bool)
        return Batch({}, rows, editable, rows, rows, drafted, [s.key for s in samples]), Counter()

    def misfit(self, sample: Sample) -> str | None:
        return None


collate = Numbers()


def loader(stream: Stream, *, rows: int = 4, epoch: int = 0, **place: int) -> Loader:
    """place: workers, rank, world"""
    batches = stream.count // (rows * place.get("world", 1))
    part = Part(stream, rows, batches * rows)
    return Loader([part], collate, batches=batches, epoch=lambda: epoch, notes=Counter(), **place)


def keys(batches) -> list[list[str]]:
    return [batch.keys for batch in batches]


def positions(stream: Stream, start: int, stop: int) -> list[tuple[str, int]]:
    return [(place.shard.path.name, place.index) for place in stream.places(start, stop)]


def test_index_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data folder"):
        read_index(tmp_path / "none")
    with pytest.raises(ValueError, match=r"has no index\.json"):
        read_index(tmp_path)
    folder = make(tmp_path / "d", 25)
    index = read_index(folder)
    assert [s.count for s in index.shards] == [10, 10, 5]
    assert (index.count, index.kind, index.tokenizer) == (25, "captions", "t")
    (folder / "train-000002.tar").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 3 shards, such as train-000002\.tar"):
        read_index(folder)
    (folder / "index.json").write_text('{"format": 99, "kind": "captions", "tokenizer": null, "shards": []}')
    with pytest.raises(ValueError, match="format 99"):
        read_index(folder)
    (folder / "index.json").write_text('{"format": 1')
    with pytest.raises(ValueError, match="damaged"):
        read_index(folder)


def test_a_pass_holds_every_sample_once_and_passes_differ(tmp_path: Path) -> None:
    stream = Stream([read_index(make(tmp_path / "d", 25))], seed=3)
    first, second = positions(stream, 0, 25), positions(stream, 25, 50)
    assert sorted(first) == sorted(second) == sorted(set(first))
    assert first != second
    assert first != positions(Stream([read_index(tmp_path / "d")], seed=4), 0, 25)
    plain = positions(Stream([read_index(tmp_path / "d")], seed=3, shuffle=False), 0, 25)
    assert plain == [(f"train-{n // 10:06d}.tar", n % 10) for n in range(25)]


def test_order_does_not_depend_on_where_it_is_cut(tmp_path: Path) -> None:
    stream = Stream([read_index(make(tmp_path / "d", 25))], seed=3)
    whole = positions(stream, 7, 61)
    assert len(whole) == 61 - 7
    for cut in (8, 24, 25, 26, 50, 60):
        assert positions(stream, 7, cut) + positions(stream, cut, 61) == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_repeats_nothing_and_loses_nothing(tmp_path: Path, workers: int) -> None:
    stream = Stream([read_index(make(tmp_path / "d", 30))], seed=1)
    whole = keys(loader(stream, workers=workers, epoch=2))
    assert len(whole) == 7
    for stop in (0, 3, 7):
        first = loader(stream, workers=workers, epoch=2)
        iterator = iter(first)
        begun = [next(iterator).keys for _ in range(stop)]
        second = loader(stream, workers=workers, epoch=2)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.state_dict() == first.state_dict()  # a checkpoint before the first batch forgets nothing
        iter(second)  # a trainer may ask for an iterator that it never uses
        assert begun + keys(second) == whole
        assert keys(second) == whole  # the next pass starts anew


def test_resume_with_other_data_is_refused_with_the_values(tmp_path: Path) -> None:
    stream = Stream([read_index(make(tmp_path / "d", 30))], seed=1)
    state = {**loader(stream).state_dict(), "batches": 3}
    other = loader(Stream([read_index(make(tmp_path / "e", 34))], seed=2), rows=5)
    other.load_state_dict(state)
    with pytest.raises(
        UserError,
        match=r"middle of epoch 0, .*samples \[\[30\]\] -> \[\[34\]\]; seed \[1\] -> \[2\]; rows \[4\] -> \[5\]",
    ):
        next(iter(other))
    later = loader(stream, epoch=1)
    later.load_state_dict(state)
    assert len(keys(later)) == len(later)


def damage(folder: Path) -> None:
    """Shard 0 ends in the middle, shard 1 has a broken image and a broken JSON; shard 2 is good."""
    first, second = folder / "train-000000.tar", folder / "train-000001.tar"
    first.write_bytes(first.read_bytes()[: 512 * 2 * 9 + 100])  # 4 whole samples of 2 members, half of the fifth
    broken = second.read_bytes().replace(png(12), b"\x00" * len(png(12)))
    second.write_bytes(broken.replace(b'{"number": 15}', b'{"number": 15['))


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_survived_counted_and_named_once(tmp_path, caplog, workers):
    folder = make(tmp_path / "d", 30)
    damage(folder)
    stream = Stream([read_index(folder)], seed=1)
    broken = loader(stream, rows=5, workers=workers)
    with caplog.at_level(logging.WARNING):
        whole = [*keys(broken), *keys(broken)]
    assert [len(k) for k in whole] == [5] * 12
    lost = {f"s{n:03d}" for n in (*range(4, 10), 12, 15)}
    assert {k for ks in whole for k in ks} == {f"s{n:03d}" for n in range(30)} - lost
    messages = [r.getMessage() for r in caplog.records]
    assert sum("train-000000.tar is truncated" in m for m in messages) == 1
    assert sum("train-000001.tar holds damaged samples" in m for m in messages) == 1
    assert sum(broken.notes.values()) == 16  # 6 and 2 samples in each of two passes
    resumed = loader(stream, rows=5, workers=workers)
    resumed.load_state_dict({**broken.state_dict(), "batches": 2})
    assert keys(resumed) == whole[2:6]


@pytest.mark.parametrize("workers", [0, 2])
def test_damage_is_left_out_where_nothing_may_stand_in(tmp_path: Path, workers: int) -> None:
    folder = make(tmp_path / "d", 30)
    damage(folder)
    part = Part(Stream([read_index(folder)], seed=1, shuffle=False), 3, 30, stand_in=False)
    careful = Loader([part], collate, batches=10, epoch=lambda: 0, notes=Counter(), workers=workers)
    read = sorted(key for batch in careful for key in batch.keys)
    assert read == [f"s{n:03d}" for n in (*range(4), 10, 11, 13, 14, *range(16, 30))]
    assert sum(careful.notes.values()) == 8


def test_an_unreadable_shard_is_replaced_by_another_and_all_of_them_are_an_error(tmp_path: Path) -> None:
    folder = make(tmp_path / "d", 20)
    (folder / "train-000000.tar").write_bytes(b"\xff" * 5000)
    stream = Stream([read_index(folder)], seed=1)
    samples = list(Reader(stream).samples(stream.places(0, 20)))
    assert len(samples) == 20
    assert {s.record["number"] for s in samples} == set(range(10, 20))
    (folder / "train-000001.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="no readable sample"):
        list(Reader(stream).samples(stream.places(0, 20)))


def test_shards_are_plain_tars_and_equal_samples_make_equal_bytes(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a", 12), make(tmp_path / "b", 12)
    for name in ("train-000000.tar", "train-000001.tar", "index.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    with tarfile.open(one / "train-000001.tar") as tar:
        assert sorted(tar.getnames()) == ["s010.json", "s010.png", "s011.json", "s011.png"]
        assert {member.mtime for member in tar} == {0}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of os.fork
def test_a_killed_writer_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    folder = tmp_path / "d"

    def samples() -> Iterator[dict]:
        for number in range(25):
            if number == 15:
                os.kill(os.getpid(), signal.SIGKILL)
            yield sample(number)

    options = {"prefix": "train", "per_shard": 10, "kind": "captions", "tokenizer": "t"}
    assert in_child(lambda: write_shards(folder, samples(), **options)) == -signal.SIGKILL
    assert sorted(p.name for p in folder.glob("*.tar")) == ["train-000000.tar"]
    with pytest.raises(ValueError, match="not a finished data folder"):
        read_index(folder)
    make(folder, 25)
    assert contents(folder) == contents(make(tmp_path / "e", 25))
