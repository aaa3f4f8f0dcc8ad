"""Locks between real processes, and what a verb says when it ends for a reason outside of it: signals, full disks."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import src.draft
from src.io.errors import UserError
from src.io.lock import locked
from testing.scenes import BASE, write_scenes
from tests.ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# Holds a lock, and so does not the child that outlives it.
HOLDING = """
import os, sys, time
from src.io.lock import locked

with locked(sys.argv[1]):
    if not os.fork():
        print("held", flush=True)  # by the child, as it lets go of what it inherits when it starts
        time.sleep(60)
        os._exit(0)
    sys.stdin.read()
"""


def start_holder(path: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLDING, str(path)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_lock_is_held_by_one_process_and_given_up_when_that_is_killed(tmp_path):
    """It is of the folder, not of its name."""
    path = tmp_path / "deep" / "run"
    path.mkdir(parents=True)
    (tmp_path / "link").symlink_to(path)
    process = start_holder(tmp_path / "link")
    try:
        with pytest.raises(UserError, match=rf"run is in use by process {process.pid},"), locked(path):
            raise AssertionError("not reached")
        process.kill()
        process.wait()
        with locked(path):  # although the child lives on
            assert (path.parent / ".run.lock").read_text() == f"{os.getpid()}\n"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as server:
        yield server


def run(ranks: Ranks, verb: str, argv: list[str], out: Path, **options) -> tuple[int, list[str]]:
    """Exit code and the printed lines of a verb in a process of its own."""
    done = ranks.run(argv, verb=verb, out=out, world=1, **options)
    return done.codes[0], [line for line in done.printed[0].replace("\r", "\n").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("data") / "scenes", **SIZES)


SIZES = {
    "image_size": 48, "vocab_size": 300, "response_length": 64, "num_train": 8, "num_val": 1, "num_test": 1,
    "captions_per_image": 1, "objects": [1, 1],
}  # fmt: skip


@pytest.fixture(scope="module")
def drafts(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("drafts") / "drafts"
    src.draft.main(arguments("draft", data, out, out))
    return out


def arguments(verb: str, data: Path, drafts: Path, out: Path) -> list[str]:
    """A small command of each verb that writes to `out`."""
    if verb == "prepare":
        sizes = [f"prepare.{name}={value}" for name, value in SIZES.items()]
        return ["conf=scenes", f"prepare.out={out}", *sizes]
    if verb == "draft":
        return ["conf=draft", f"model.path={BASE}", f"data.path={data}", f"out={out}", "tokens_per_step=[32]"]
    if verb == "revise":
        return ["conf=revise", f"drafts={drafts}", f"out={out}", f"tokenizer={BASE}"]
    more = ["data.batch_size=4", "data.workers=0", "trainer.max_steps=2", "callbacks.checkpoint.every_n_train_steps=1"]
    more += ["optim.warmup_steps=1", "callbacks.samples=null", f"model.path={BASE}", f"tokenizer={BASE}"]
    return ["conf=mask", f"data.path={data}", f"run_dir={out}", "trainer.accelerator=cpu", *more]


@pytest.mark.parametrize("verb", ["prepare", "train", "draft", "revise"])
def test_a_verb_leaves_alone_what_another_process_writes(data, drafts, tmp_path, capsys, verb):
    out = tmp_path / "out"
    with locked(out), pytest.raises(SystemExit) as ended:
        importlib.import_module(f"src.{verb}").main(arguments(verb, data, drafts, out))
    assert ended.value.code == 2
    assert f"error: {out} is in use by process {os.getpid()}," in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("verb", "size", "file"),
    [
        ("prepare", 4000, "scenes.partial"),
        ("train", 40000, ".ckpt"),
        ("draft", 4000, "drafts-000000-00.tar"),
        ("revise", 1200, "journal-rank-0000.jsonl"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_in_one_line(ranks, data, drafts, tmp_path, verb, size, file):
    """A limit on the size of files acts as a full disk does. The same command goes on without it."""
    argv = arguments(verb, data, drafts, tmp_path / "scenes")
    code, lines = run(ranks, verb, argv, tmp_path, file_limit={0: size})
    assert code == 1, lines
    assert lines[-1].startswith("error: "), lines
    assert file in lines[-1]
    assert lines[-1].endswith("; once that is fixed, the same command continues")
    assert not any("Traceback" in line for line in lines)
    importlib.import_module(f"src.{verb}").main(argv)


@pytest.mark.parametrize(
    ("verb", "where", "number"),
    [
        ("prepare", "src.preparation.scenes/render", signal.SIGINT),
        ("draft", "src.rounds.drafts:Drafter/draw", signal.SIGTERM),
        ("revise", "src.rounds.round/write_shards", signal.SIGINT),
        ("train", "src.training.build/check_layout", signal.SIGTERM),  # before the training begins
    ],
)
def test_a_signal_ends_a_verb_in_one_line(ranks, data, drafts, tmp_path, verb, where, number):
    argv = arguments(verb, data, drafts, tmp_path / "scenes")
    patch = {"patches": ["tests.test_stop:signals_itself"], "environment": {"SIGNALLED": f"{where}/1/{int(number)}"}}
    code, lines = run(ranks, verb, argv, tmp_path, **patch)
    assert code == 128 + number
    assert lines[-1] == f"stopped by {number.name}; the same command continues"
    assert not any("Traceback" in line for line in lines)
    importlib.import_module(f"src.{verb}").main(argv)


def test_a_signal_during_the_imports_ends_in_one_line(tmp_path):
    number = int(signal.SIGTERM)
    (tmp_path / "lightning.py").write_text(f"import os, time\nos.kill(os.getpid(), {number})\ntime.sleep(60)\n")
    env = {**ENV, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "src.train", "conf=mask"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    message = "stopped by SIGTERM before it started; the same command starts it"
    assert (done.returncode, done.stderr.strip()) == (128 + number, message)
