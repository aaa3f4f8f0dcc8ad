"""Locks between real processes, and what a verb says when it ends for a reason outside of it: signals, full disks."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import src.draft
from src.io.errors import UserError
from src.io.lock import locked
from src.preparation.scenes import Scenes

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "assets" / "base"
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
# Runs a verb with a limit on the size of files, or with signals to itself within a call of a function.
VERB = """
import importlib, os, resource, signal, sys

verb, where, *argv = sys.argv[1:]
main = importlib.import_module(f"src.{verb}").main
if where.startswith("bytes="):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(where[6:]), resource.RLIM_INFINITY))
else:
    module, name, number = where.split("/")
    module, _, owner = module.partition(":")
    holder = importlib.import_module(module)
    holder = getattr(holder, owner) if owner else holder
    plain = getattr(holder, name)

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), int(number))
        return plain(*args, **kwargs)

    setattr(holder, name, signalled)
main(argv)
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


def run(command: list[str], **env: str) -> tuple[int, list[str]]:
    """Exit code and the lines of stderr."""
    done = subprocess.run(
        command, cwd=ROOT, env={**ENV, **env}, capture_output=True, text=True, timeout=300, check=False
    )
    return done.returncode, [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("data") / "scenes"
    Scenes(out=str(out), **SIZES, prompt="Describe.", noise=2.0, tokenizer=str(BASE)).run()
    return out


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


def slow(*case: object) -> object:
    return pytest.param(*case, marks=pytest.mark.slow)


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
        slow("prepare", 4000, "scenes.partial"),
        ("train", 40000, ".ckpt"),
        slow("draft", 4000, "drafts-000000-00.tar"),
        ("revise", 300, "journal-rank-0000.jsonl"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_in_one_line(data, drafts, tmp_path, verb, size, file):
    """A limit on the size of files acts as a full disk does. The same command goes on without it."""
    argv = arguments(verb, data, drafts, tmp_path / "scenes")
    code, lines = run([sys.executable, "-c", VERB, verb, f"bytes={size}", *argv])
    assert code == 1, lines
    assert lines[-1].startswith("error: "), lines
    assert file in lines[-1]
    assert lines[-1].endswith("; once that is fixed, the same command continues")
    assert not any("Traceback" in line for line in lines)
    importlib.import_module(f"src.{verb}").main(argv)


@pytest.mark.parametrize(
    ("verb", "where", "number"),
    [
        slow("prepare", "src.preparation.scenes/render", signal.SIGINT),
        slow("draft", "src.rounds.drafts:Drafter/draw", signal.SIGTERM),
        ("revise", "src.rounds.round/write_shards", signal.SIGINT),
        ("train", "src.training.build/check_layout", signal.SIGTERM),  # before the training begins
    ],
)
def test_a_signal_ends_a_verb_in_one_line(data, drafts, tmp_path, verb, where, number):
    argv = arguments(verb, data, drafts, tmp_path / "scenes")
    code, lines = run([sys.executable, "-c", VERB, verb, f"{where}/{int(number)}", *argv])
    assert code == 128 + number
    assert lines[-1] == f"stopped by {number.name}; the same command continues"
    assert not any("Traceback" in line for line in lines)
    importlib.import_module(f"src.{verb}").main(argv)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_ends_in_one_line(tmp_path, number):
    (tmp_path / "lightning.py").write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    code, lines = run([sys.executable, "-m", "src.train", "conf=mask"], PYTHONPATH=path)
    assert (code, lines) == (128 + number, [f"stopped by {number.name} before it started; the same command starts it"])
