"""How a dataset is built: in several processes, killed and continued, refused, and what it says of itself."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from src.io.errors import UserError
from src.preparation import builder, items, workers
from src.preparation.photos import Photos
from src.prepare import main
from src.text.tokenizer import Codec
from testing.child import in_child
from testing.files import contents, read_jsonl
from tests.test_structure import check_verb

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of os.fork
SPLITS = ("train", "val", "test")
SETTINGS: dict[str, Any] = {"image_size": 24, "vocab_size": 263, "response_length": 24, "prompt": "What?"}


def tars(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the tars below a folder: a shard that is written again has others."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*.tar")}


def pictures(folder: Path, count: int = 30) -> Path:
    """Photographs of different sizes with captions and false captions; every tenth is no image, one is missing."""
    folder.mkdir()
    records = []
    for number in range(count):
        name = f"p{number}.png"
        if number % 10:
            noise = np.random.default_rng(number).integers(0, 256, (8 + number, 20, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name)
        else:
            (folder / name).write_text("no image")
        text, wrong = f"A red box, number {number}.", ("tan", "very pale green")[number % 2]
        false = {"original_caption": text, "changed_caption": text.replace("red", wrong)}
        spans = {**false, "solution_original": "red", "solution_target": wrong}
        records.append({"image": name, **(spans if number % 10 else {"caption": text})})
    records.append({"image": "none.png", "caption": "x"})
    (folder / "a.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("photos") / "images")


def dataset(photos: Path, out: Path, **more: Any) -> Photos:
    settings = {**SETTINGS, "per_shard": 4, "square": False, "encoding": "png", **more}
    return Photos(out=str(out), images=str(photos), annotations=str(photos / "a.json"), **settings)


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset as one process writes it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    dataset(photos, out, processes=1).run()
    return out


def samples(folder: Path) -> Iterator[tuple[dict, dict]]:
    """(index entry, sample) of a split, read with tarfile; the entry is of that sample alone."""
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        with tarfile.open(folder / shard["name"]) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        keys = list(dict.fromkeys(name.partition(".")[0] for name in files))
        assert len(keys) == shard["count"]
        for number, key in enumerate(keys):
            own = {name: values[number] for name, values in shard.items() if isinstance(values, list)}
            yield own, {name.partition(".")[2]: data for name, data in files.items() if name.startswith(f"{key}.")}


# --- processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_bytes_do_not_depend_on_the_number_of_processes(photos, whole, tmp_path, processes):
    dataset(photos, tmp_path / "out", processes=processes).run()
    assert contents(tmp_path / "out") == contents(whole)
    assert not (tmp_path / "out.partial").exists()


def test_items_of_a_split_lie_in_a_seeded_order_that_does_not_depend_on_their_records(photos, whole, tmp_path):
    def keys(folder: Path) -> list[str]:
        return [json.loads(sample["json"])["key"] for _, sample in samples(folder / "train")]

    shutil.copytree(photos, tmp_path / "images")
    records = json.loads((photos / "a.json").read_text())
    (tmp_path / "images" / "a.json").write_text(json.dumps(records[::-1]))
    dataset(tmp_path / "images", tmp_path / "reversed", tokenizer=str(whole / "tokenizer")).run()
    assert keys(tmp_path / "reversed") == keys(whole) != sorted(keys(whole))
    dataset(photos, tmp_path / "seed", seed=1).run()
    assert keys(tmp_path / "seed") != keys(whole)


@pytest.mark.parametrize(
    ("name", "least"),
    {"per_shard": 1, "processes": 1, "image_size": 1, "max_images": 1, "response_length": 2, "vocab_size": 0}.items(),
)
def test_numbers_that_are_too_small_are_refused(photos: Path, tmp_path: Path, name: str, least: int) -> None:
    with pytest.raises(UserError, match=rf"^prepare\.{name} must be at least {least}, got {least - 1}$"):
        dataset(photos, tmp_path / "out", **{name: least - 1}).run()
    assert not list(tmp_path.iterdir())


def test_a_link_stays_and_what_it_points_to_is_written(photos: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for overwrite in (False, True):
        dataset(photos, tmp_path / "out", overwrite=overwrite).run()
        assert (tmp_path / "out").is_symlink()
        assert contents(tmp_path / "disk") == {f"out/{name}": data for name, data in contents(whole).items()}


@pytest.mark.parametrize("out", [".", "..", "/", "{here}"])
def test_the_folder_that_it_runs_in_is_refused(photos, tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="is the folder that this runs in, or one above it"):
        dataset(photos, Path(out.format(here=Path.cwd()))).run()
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


# --- kills -------------------------------------------------------------------------------------------


def kill_at(place: Any, name: str, number: int = 1) -> None:
    """SIGKILL of this process instead of the call with that number."""
    calls, function = [], getattr(place, name)

    @functools.wraps(function)
    def killed(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(place, name, killed)


def killed(place: Any, name: str, run: Callable[[], object], number: int = 1) -> None:
    """Run in a process that is killed at that call of a function."""
    assert in_child(lambda: (kill_at(place, name, number), run())) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("place", "name", "number", "num_kept"),
    [
        (items.Items, "add", 20, 0),  # while the records are read
        (items.Items, "number", 1, 0),  # while the splits are filled
        (workers, "write_shard", 3, 2),  # in the middle of the shards
        (workers, "write_json", 3, 2),  # between a tar and its report
        (builder, "publish", 1, 9),  # before the rename
    ],
    ids=["scan", "splits", "shards", "report", "rename"],
)
def test_the_same_command_continues_what_was_killed(photos, whole, tmp_path, caplog, place, name, number, num_kept):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    killed(place, name, dataset(photos, out, processes=1).run, number)
    assert not out.exists()
    reports = sorted(path.stem for path in (partial / "reports").glob("*.json"))
    before = {name: tar for name, tar in tars(partial).items() if Path(name).stem in reports}
    assert len(before) == num_kept
    dataset(photos, out, processes=1).run()
    assert contents(out) == contents(whole)
    assert tars(out).items() >= before.items(), "a finished shard was written again"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_after_the_rename_leaves_a_complete_dataset(photos: Path, whole: Path, tmp_path: Path) -> None:
    killed(builder.shutil, "rmtree", dataset(photos, tmp_path / "out").run)
    assert contents(tmp_path / "out") == contents(whole)
    before = tars(tmp_path / "out")
    dataset(photos, tmp_path / "out").run()
    assert tars(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("place", "name", "number", "overwrite"),
    [(os, "unlink", 2, False), (os, "unlink", 6, True), (builder, "publish", 1, True)],
)
def test_a_kill_while_a_dataset_is_replaced_costs_nothing(photos, whole, tmp_path, place, name, number, overwrite):
    """A kill in the removal of the old dataset, or before the rename; then the same command, or without overwrite."""
    out = tmp_path / "out"
    dataset(photos, out, seed=7).run()
    killed(place, name, dataset(photos, out, overwrite=True).run, number)
    dataset(photos, out, overwrite=overwrite).run()
    assert contents(out) == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("change", ["size", "time"])
def test_the_shard_of_an_image_that_changed_after_a_kill_is_written_again(photos, tmp_path, change):
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(photos, images)
    killed(builder, "publish", dataset(images, out).run)
    before, modified = tars(tmp_path / "out.partial"), (images / "p3.png").stat().st_mtime_ns
    if change == "size":
        shutil.copyfile(images / "p4.png", images / "p3.png")
    os.utime(images / "p3.png", ns=(0, modified + (change == "time")))
    dataset(images, out).run()
    assert len(tars(out).items() & before.items()) == len(before) - 1
    dataset(images, tmp_path / "fresh").run()
    assert contents(out) == contents(tmp_path / "fresh")


@pytest.mark.parametrize(
    ("name", "damaged"),
    [
        ("dataset/train/train-000000.tar", lambda data: data[:-600]),
        ("reports/train-000000.json", lambda data: b"{}"),
        ("reports/train-000000.json", lambda data: b"{"),
        ("items.db", lambda data: b"x" * 5000),
    ],
)
def test_a_damaged_file_of_a_killed_run_costs_its_part(photos, whole, tmp_path, name, damaged):
    out, file = tmp_path / "out", tmp_path / "out.partial" / name
    killed(builder, "publish", dataset(photos, out).run)
    file.write_bytes(damaged(file.read_bytes()))
    dataset(photos, out).run()
    assert contents(out) == contents(whole)


def test_an_image_that_comes_after_a_kill_is_used_and_one_that_goes_leaves_no_shard(photos: Path, tmp_path: Path):
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(photos, images)
    (images / "p3.png").rename(tmp_path / "p3.png")
    killed(builder, "publish", dataset(images, out, per_shard=1).run)
    (tmp_path / "p3.png").rename(images / "p3.png")
    for name in ("p4.png", "p5.png"):
        (images / name).unlink()
    dataset(images, out, per_shard=1).run()
    dataset(images, tmp_path / "fresh", per_shard=1).run()
    assert contents(out) == contents(tmp_path / "fresh")


def test_what_was_begun_with_other_settings_is_started_over(photos: Path, whole: Path, tmp_path: Path, caplog) -> None:
    out = tmp_path / "out"
    killed(builder, "publish", dataset(photos, out, image_size=16).run)
    with caplog.at_level(logging.INFO):
        dataset(photos, out).run()
    assert f"starting over: {out}.partial was begun with other settings or files (image_size)" in caplog.text
    assert contents(out) == contents(whole)


def descendants(pid: int) -> list[int]:
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").glob("*/children") for child in task.read_text().split()
    ]
    return [*children, *(pid for child in children for pid in descendants(child))]


def wait_for(done: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> Any:
    deadline = time.monotonic() + 120
    while not (result := done()):
        assert time.monotonic() < deadline, "it takes too long"
        assert process is None or process.poll() is None, process and process.communicate()
        time.sleep(0.005)
    return result


def is_running(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.slow
@pytest.mark.parametrize("end", ["SIGKILL", "SIGINT", "worker"])
def test_real_processes_that_end_early(tmp_path: Path, end: str) -> None:
    """The main process is killed or interrupted, or a worker is killed, as where memory runs out."""
    sizes = {"num_train": 600, "num_val": 1, "num_test": 1, "captions_per_image": 1, "image_size": 64}
    argv = [f"prepare.{name}={value}" for name, value in {**sizes, "per_shard": 20, "processes": 2}.items()]
    command = [sys.executable, "-m", "src.prepare", "conf=scenes", f"prepare.out={tmp_path / 'out'}", *argv]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "out.partial"
    wait_for(lambda: len(list((partial / "reports").glob("*.json"))) >= 3, process)
    family = descendants(process.pid)
    # fork server, resource tracker, two workers
    victims = [pid for pid in family if len(descendants(pid)) == 0 and b"forkserver" in cmdline(pid)]
    if end == "worker":
        os.kill(victims[-1], signal.SIGKILL)
    else:
        os.kill(process.pid, getattr(signal, end))
    _, errors = process.communicate(timeout=60)
    wait_for(lambda: not any(map(is_running, family)))
    if end == "worker":
        assert process.returncode == 2
        assert errors.splitlines()[-1].startswith("error: a worker process was killed, often because memory ran out")
        assert "Traceback" not in errors
    elif end == "SIGINT":
        assert process.returncode == 130
        assert errors.splitlines()[-1] == "stopped by SIGINT; the same command continues"
    reports = [path.stem for path in (partial / "reports").glob("*.json")]
    finished = {name: tar for name, tar in tars(partial).items() if Path(name).stem in reports}
    begun = [path for path in partial.rglob("*train-*") if path.stem.lstrip(".").partition(".")[0] not in reports]
    assert 3 <= len(finished) < 32
    assert len(begun) <= 2, "more than one shard a process is lost"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"continuing in {partial}: {len(finished)} of 32 shards are there" in done.stderr
    assert tars(tmp_path / "out").items() >= finished.items()
    main(["conf=scenes", f"prepare.out={tmp_path / 'whole'}", *argv[:-1], "prepare.processes=1"])
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def cmdline(pid: int) -> bytes:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


# --- disks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [20_000, 90_000], ids=["items", "shards"])
def test_a_full_disk_is_one_line_and_the_same_command_continues(photos, whole, tmp_path, capsys, limit):
    """No file may grow beyond a size for a while: the system refuses as where a disk is full."""
    names = {**SETTINGS, "per_shard": 40, "encoding": "png", "images": photos, "annotations": photos / "a.json"}
    argv = ["conf=photos", *(f"prepare.{name}={value}" for name, value in {**names, "image_size": 64}.items())]
    out = tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(SystemExit) as stop:
            main([*argv, f"prepare.out={out}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert stop.value.code == 1
    assert f"error: {out}.partial" in error
    assert error.endswith("; once that is fixed, the same command continues\n")
    assert "Traceback" not in error
    before = tars(tmp_path / "out.partial")
    main([*argv, f"prepare.out={out}"])
    main([*argv, f"prepare.out={tmp_path / 'again'}"])
    assert contents(out) == contents(tmp_path / "again")
    assert tars(out).items() >= before.items()


# --- what was read before ----------------------------------------------------------------------------


def test_edited_annotations_are_refused(photos: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(photos, images)
    annotations = images / "a.json"
    text = annotations.read_text()
    index = dataset(images, out).run()
    assert list(index["files"]) == [str(annotations)]
    before = tars(out)
    os.utime(annotations, (1, 1))  # the content counts, not the time
    assert dataset(images, out).run() == index
    annotations.write_text(text.replace("number 3.", "number 4."))  # of the same size
    with pytest.raises(UserError, match=rf"made before {annotations} changed; set prepare\.overwrite=true"):
        dataset(images, out).run()
    assert tars(out) == before
    dataset(images, out, overwrite=True).run()
    captions = [json.loads(sample["json"])["captions"] for split in SPLITS for _, sample in samples(out / split)]
    assert sum(caption[0]["text"] == "A red box, number 4." for caption in captions) == 2
    annotations.unlink()  # moved away to save space
    dataset(images, out).run()


# --- what a dataset says of itself -------------------------------------------------------------------


def test_the_index_has_the_prompt_tokens_and_image_sizes_of_each_sample(photos: Path, whole: Path) -> None:
    codec, checked = Codec.load(whole / "tokenizer"), 0
    for split in SPLITS:
        for entry, sample in samples(whole / split):
            with Image.open(io.BytesIO(sample["png"])) as image:
                image.load()
                assert entry["sizes"] == list(image.size)
            ids = codec.prompt_ids(json.loads(sample["json"])["prompt"], images=1)
            assert entry["prompt_tokens"] == len(ids) - 1  # the image mark
            assert set(entry) == {"sizes", "prompt_tokens"}
            checked += 1
    assert checked == 27


def test_the_manifest_and_the_list_of_rejects(whole: Path) -> None:
    manifest, index = (json.loads((whole / f"{name}.json").read_text()) for name in ("manifest", "index"))
    codec = Codec.load(whole / "tokenizer")
    # everything that was left out, in a fixed order, and each kind counted with its first example
    rejects = read_jsonl(whole / "rejects.jsonl")
    assert rejects[0] == {"part": "records", "source": "", "reason": "missing_image", "place": "none.png"}
    assert [(line["part"], line["reason"]) for line in rejects[1:]] == [("train", "undecodable_image")] * 3
    assert {line["place"] for line in rejects[1:]} == {"p0.png", "p10.png", "p20.png"}
    (source,) = manifest["sources"]
    example = rejects[1]["place"]
    assert source["left_out"]["train"] == {"undecodable_image": {"count": 3, "example": example}}
    assert index["examples"]["train"] == {"undecodable_image": example}
    assert source["samples"] == 27
    # lengths and spans, by what the shards hold
    lengths, unequal = [], 0
    for split in SPLITS:
        own = [json.loads(sample["json"])["captions"] for _, sample in samples(whole / split)]
        texts = [len(codec.encode(caption["text"])[0]) for captions in own for caption in captions]
        unequal += sum(not caption["swaps"] for captions in own for caption in captions)
        stated = manifest["caption_tokens"][split]
        assert (stated["count"], stated["max"]) == (len(texts), max(texts))
        for q in (5, 50, 95):
            assert stated[f"p{q}"] == np.percentile(texts, q, method="inverted_cdf")
        lengths += texts
    assert len(lengths) == 27
    equal = 27 - unequal
    assert equal == 12  # one token a byte: the spans of even numbers
    assert manifest["hallucinated_spans"] == {
        "equal_length": equal, "unequal_length": unequal, "share_equal": round(equal / 27, 4),
    }  # fmt: skip
    # shards
    for split in SPLITS:
        shards = manifest["splits"][split]["shards"]
        assert sum(shard["count"] for shard in shards) == manifest["splits"][split]["samples"]
        for shard in shards:
            assert shard["bytes"] == (whole / split / shard["name"]).stat().st_size
    assert manifest["counts"] == index["counts"]


def test_prepare_ends_with_the_folder_and_a_command_that_fits(photos, tmp_path, capsys):
    names = {**SETTINGS, "images": photos, "annotations": photos / "a.json", "out": tmp_path / "my photos"}
    main(["conf=photos", *(f"prepare.{name}={value}" for name, value in names.items())])
    *_, wrote, look, command = capsys.readouterr().out.splitlines()
    num_bytes = sum(path.stat().st_size for path in (tmp_path / "my photos").rglob("*.tar"))
    assert wrote == f"wrote 27 images in 3 shards ({num_bytes / 1000:.1f} KB) to {tmp_path / 'my photos'}"
    assert look == f"to look at it: python -m src.prepare show='{tmp_path / 'my photos'}'"
    assert command.startswith("next: ")
    assert f"'data.path={tmp_path / 'my photos'}'" in command
    assert "data.response_length=24 data.image_size=24" in command
    check_verb(command)
