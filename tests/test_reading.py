"""Samples read by seeking: what a fault in a shard costs, and what a reader holds in memory."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image

from datamodules.shards import Reader, Sample, decode
from datamodules.stream import Place, Stream, read_index
from src.io.shards import read_tar
from tests.test_shards import make


def read_all(reader: Reader) -> list[Sample]:
    """What a reader gives for the samples of its stream, shard by shard."""
    return list(reader.samples(all_places(reader.stream)))


def all_places(stream: Stream) -> Iterator[Place]:
    for shard in stream.shards:
        for index in range(shard.count):
            yield Place(0, shard, index, 0, 0)


def header_of(tar: bytes, name: str) -> int:
    """Where the header of a member starts."""
    return next(n for n in range(0, len(tar), 512) if tar[n : n + len(name) + 1] == f"{name}\0".encode())


@pytest.mark.parametrize(
    ("hurt", "lost"),
    [
        ("a byte of a header", {13}),
        ("zeros over a header", {13}),
        ("zeros over three samples", {13, 14, 15}),
        ("garbage behind the end", set()),
        ("no end", set()),
    ],
)
def test_a_fault_in_the_middle_costs_only_the_samples_that_it_hits(tmp_path: Path, hurt: str, lost: set[int]) -> None:
    folder = make(tmp_path / "d", 30)
    path = folder / "train-000001.tar"
    tar = bytearray(path.read_bytes())
    at = header_of(tar, "s013.png")
    if hurt == "a byte of a header":
        tar[at + 100] ^= 1  # the checksum is wrong now
    elif hurt == "zeros over a header":
        tar[at : at + 512] = bytes(512)
    elif hurt == "zeros over three samples":
        start, end = header_of(tar, "s013.json") + 512, header_of(tar, "s016.json")
        tar[start:end] = bytes(end - start)
    elif hurt == "garbage behind the end":
        tar += b"\xa5" * 3000
    else:
        del tar[header_of(tar, "s019.png") + 1024 :]
    path.write_bytes(tar)
    reader = Reader(Stream([read_index(folder)], seed=1), stand_in=False)
    assert [s.record["number"] for s in read_all(reader)] == [n for n in range(30) if n not in lost]
    assert sum(reader.damage.values()) == len(lost)


def test_an_image_that_claims_to_be_huge_is_damaged() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (20, 10), (200, 10, 30)).save(stream, "JPEG")
    whole = stream.getvalue()
    raw = {"__key__": "k", "json": b"{}", "jpg": whole}
    sample = decode(raw)
    assert sample and sample.image and sample.image.size == (20, 10)
    assert sample.image.tobytes() == Image.open(io.BytesIO(whole)).convert("RGB").tobytes()
    at = whole.index(bytes([0, 10, 0, 20]))  # height and width
    assert decode({**raw, "jpg": whole[:at] + b"\xff" * 4 + whole[at + 4 :]}) is None


def test_members_with_odd_names_are_grouped_as_webdataset_does(tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    names = ["a/b.c.JSON", "a/b.c.png", "__meta__/a.json", "noextension", "ünï.json", "x" * 150 + ".json", "ünï.json"]
    directory = tarfile.TarInfo("folder.json")
    directory.type = tarfile.DIRTYPE
    with tarfile.open(path, "w") as tar:
        tar.addfile(directory)
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = number
            tar.addfile(member, io.BytesIO(b"x" * number))
    ours = list(read_tar(path))
    theirs = wds.WebDataset(str(path), shardshuffle=False)
    assert ours == [{k: v for k, v in raw.items() if k not in ("__url__", "__local_path__")} for raw in theirs]
    assert [raw["__key__"] for raw in ours] == ["a/b", "ünï", "x" * 150, "ünï"]


def test_a_shard_that_disappears_is_asked_for_once(tmp_path: Path) -> None:
    folder = make(tmp_path / "d", 30)
    stream = Stream([read_index(folder)], seed=1)
    gone = folder / "train-000001.tar"
    gone.unlink()
    reader = Reader(stream)
    whole = read_all(reader)
    assert len(whole) == 30
    assert reader.damage == {(str(gone), "unreadable"): 10}
    make(folder.parent / "again", 30)
    (folder.parent / "again" / gone.name).rename(gone)  # back again: only the next reader asks for it
    assert [s.key for s in read_all(reader)] == [s.key for s in whole]
    assert {s.key for s in read_all(Reader(stream))} == {f"s{n:03d}" for n in range(30)}


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file whose reading fails")
def test_read_errors_of_the_disk_are_counted_and_the_file_is_opened_again(tmp_path: Path) -> None:
    """Reading the first pages of /proc/self/mem is EIO, by the kernel itself."""
    folder = make(tmp_path / "d", 30)
    stream = Stream([read_index(folder)], seed=1)
    path = folder / "train-000001.tar"
    reader = Reader(stream)
    samples = reader.samples(all_places(stream))
    read = [sample.key for sample in islice(samples, 15)]
    (handle,) = [fd for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and os.readlink(fd) == str(path)]
    memory = os.open("/proc/self/mem", os.O_RDONLY)
    os.dup2(memory, int(handle.name))
    read += [sample.key for sample in samples]
    assert reader.damage == {(str(path), "unreadable"): 1}
    assert len(read) == 30
    assert set(read) == {f"s{n:03d}" for n in range(30)} - {"s015"} | {read[15]}
    path.unlink()
    path.symlink_to("/proc/self/mem")  # not even the headers
    reader = Reader(stream)
    assert len(read_all(reader)) == 30
    assert reader.damage == {(str(path), "unreadable"): 10}
    os.close(memory)


PEAK = """
import random, resource, sys
from datamodules.shards import Reader
from datamodules.stream import Stream, read_index
from src.io.shards import read_tar, write_shards
folder, mega, text = sys.argv[1], int(sys.argv[2]), "x" * (1 << 20)
samples = ({"__key__": f"k{n:04}", "json": {"n": n}, "txt": text.encode()} for n in range(mega))
write_shards(folder, samples, prefix="train", per_shard=mega, kind="captions", tokenizer="t")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
reader = Reader(Stream([read_index(folder, image=False)], seed=0))
(shard,) = reader.stream.shards
order = random.Random(0).sample(range(mega), mega)
assert [reader.read(shard, n).record["n"] for n in order] == order
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("mega", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_a_reader_holds_one_sample_and_not_a_shard(tmp_path: Path, mega: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", PEAK, str(tmp_path / "d"), str(mega)]
    growth = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    assert int(growth) < 8 << 10  # KiB
