"""Signals in real processes: what a stopped training leaves, how it goes on, and who is left when it is killed."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from datamodules.captions import CaptionData
from src.cli.signals import Stop, Stopped
from src.text.tokenizer import Codec
from src.train import main
from tests.ranks import Ranks
from tests.test_train import arguments as small_run
from tests.test_train import same_weights

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of os.fork
STEP = "src.objectives.revision:RevisionObjective/training_step"


def signals_itself(rank: int) -> None:
    """Patch of a rank: at the nth call of a method, signals to itself and its workers, or to rank 1, or a stop file."""
    place, method, nth, *numbers = os.environ["SIGNALLED"].split("/")
    os.setpgid(0, 0)
    module, _, owner = place.partition(":")
    holder = importlib.import_module(module)
    holder = getattr(holder, owner) if owner else holder
    plain, calls = getattr(holder, method), []

    def signalled(*args, **kwargs):
        calls.append(method)
        if len(calls) == int(nth) and numbers[0] == "touch":
            Path("/", *numbers[1:]).touch()
            time.sleep(3)  # the drafts are drawn in less time than the file is looked for
        elif len(calls) == int(nth) and numbers[0] == "rank1":
            if rank == 1:
                subprocess.run(["kill", f"-{numbers[1]}", str(os.getpid())])
        elif len(calls) == int(nth):
            for number in numbers:
                subprocess.run(
                    ["kill", f"-{number}", "--", f"-{os.getpgrp()}"]
                )  # what it sends itself is another thing
        return plain(*args, **kwargs)

    setattr(holder, method, signalled)


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks() as server:
        yield server


def arguments(scenes: Path, run_dir: Path, *more: str, conf: str = "stage1") -> list[str]:
    steps = ["trainer.max_steps=16", "callbacks.checkpoint.every_n_train_steps=6", "trainer.limit_val_batches=2"]
    return small_run(scenes, run_dir, *steps, "data.batch_size=4", "data.workers=1", *more, conf=conf)


def stage_two(scenes: Path, run_dir: Path) -> list[str]:
    settings = ["drafts_per_round=12", "tokens_per_step=[8,40]", "allow_empty=true", "rounds=2"]
    loop = [f"callbacks.self_correction.{setting}" for setting in settings]
    return arguments(scenes, run_dir, *loop, "data.epoch_batches=10", conf="stage2")


@pytest.fixture
def signalled(ranks, tmp_path):
    """Exit code and the last line of a training that sends itself signals."""

    def run(where: str, argv: list[str], world: int = 1) -> tuple[int, str]:
        patches = ["tests.test_stop:signals_itself"] if where else []
        done = ranks.run(argv, out=tmp_path, world=world, patches=patches, environment={"SIGNALLED": where})
        return done.codes[0], (done.printed[0].strip().splitlines() or [""])[-1]

    return run


def step_of(run_dir: Path) -> int:
    """The step of the checkpoint that a stop has left, to which `last.ckpt` leads."""
    (path,) = (run_dir / "checkpoints").glob("stopped-step=*.ckpt")
    step = steps(path)
    assert steps(run_dir / "checkpoints" / "last.ckpt") == step == max(map(steps, path.parent.glob("*=*.ckpt")))
    return step


def steps(path: Path) -> int:
    return torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)["global_step"]


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole")
    main(arguments(scenes, run_dir))
    return run_dir


@pytest.mark.parametrize(
    ("where", "number", "step"),
    [
        (f"{STEP}/12", signal.SIGINT, 12),  # the last step of an epoch
        pytest.param(f"{STEP}/16", signal.SIGTERM, 16, marks=pytest.mark.slow),  # the last of all
        ("src.objectives.revision:RevisionObjective/validation_step/1", signal.SIGTERM, 12),  # the first of two batches
        ("callbacks.checkpoint:Checkpoint/on_train_epoch_end/1", signal.SIGTERM, 13),  # too late for the step before
    ],
)
def test_a_signal_saves_the_step_and_the_same_command_continues(
    signalled, scenes, whole, tmp_path, where, number, step
):
    argv = arguments(scenes, tmp_path / "run")
    code, line = signalled(f"{where}/{int(number)}", argv)
    assert line == f"stopped at step {step} of 16 by {number.name}; the same command continues"
    assert code == 128 + number
    assert step_of(tmp_path / "run") == step
    assert not (tmp_path / "run" / "model").exists()
    main(argv)
    assert same_weights(whole, tmp_path / "run")


def test_a_second_signal_does_not_wait(signalled, scenes, tmp_path):
    code, _ = signalled(f"{STEP}/3/{int(signal.SIGTERM)}/{int(signal.SIGTERM)}", arguments(scenes, tmp_path / "run"))
    assert code == -signal.SIGTERM
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_file_stops_once_and_the_same_command_continues(signalled, scenes, whole, tmp_path):
    """By a file before the first step, then by the signal for which it stands; workers get that too."""
    run_dir = tmp_path / "run"
    argv, stop = arguments(scenes, run_dir), run_dir / "STOP"
    code, line = signalled(f"src.train/rendezvous/1/touch/{stop}", argv)
    assert (code, line) == (138, f"stopped at step 0 of 16 by SIGUSR1 ({stop}); the same command continues")
    assert stop.exists() and not list(run_dir.glob("checkpoints/*"))
    code, line = signalled(f"{STEP}/3/{int(signal.SIGUSR1)}", argv)
    assert (code, line) == (138, f"stopped at step 3 of 16 by SIGUSR1 ({stop}); the same command continues")
    assert not stop.exists() and step_of(run_dir) == 3  # of the one before
    main(argv)
    assert not list(run_dir.glob("checkpoints/stopped*"))
    assert same_weights(whole, run_dir)


def test_a_file_ends_drafting_within_seconds(signalled, scenes, tmp_path):
    argv = stage_two(scenes, tmp_path / "run")
    stop = tmp_path / "run" / "STOP"
    code, line = signalled(f"src.rounds.drafts:Drafter/draw/3/touch/{stop}", argv)
    assert (code, line) == (138, f"stopped at step 0 of 16 by SIGUSR1 ({stop}); the same command continues")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "number"), [("ddp", signal.SIGTERM), ("fsdp2", signal.SIGUSR1)])
def test_one_rank_gets_a_signal_and_all_stop_at_the_same_step(signalled, scenes, tmp_path, parallel, number):
    def command(run_dir: str) -> list[str]:
        two = ["trainer.devices=2", "trainer.accelerator=cpu", "data.batch_size=2"]
        return arguments(scenes, tmp_path / run_dir, *two, conf=f"stage1,parallel/{parallel}")

    code, line = signalled(f"{STEP}/3/rank1/{int(number)}", command("run"), 2)
    file = f" ({tmp_path}/run/STOP)" if number == signal.SIGUSR1 else ""
    assert line == f"stopped at step 3 of 16 by {number.name}{file}; the same command continues"
    assert code == 128 + number
    assert step_of(tmp_path / "run") == 3
    for run_dir in ("run", "whole"):
        code, _ = signalled("", command(run_dir), 2)
        assert code == 0
    assert same_weights(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(("nth", "step"), [pytest.param(3, 0, marks=pytest.mark.slow), (9, 10)])
def test_drafting_stops_at_once_and_keeps_what_is_drawn(signalled, scenes, tmp_path, nth, step):
    """Six shards a round; in the first round and in the second."""
    argv = stage_two(scenes, tmp_path / "run")
    code, line = signalled(f"src.rounds.drafts:Drafter/draw/{nth}/{int(signal.SIGTERM)}", argv)
    assert (code, line) == (143, f"stopped at step {step} of 16 by SIGTERM; the same command continues")
    drawn = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "rounds").glob(".round*/drafts/*.tar")}
    assert len(drawn) == 2
    assert steps(tmp_path / "run" / "checkpoints" / "last.ckpt") == step  # saved before the round
    main(argv)
    assert steps(tmp_path / "run" / "checkpoints" / "last.ckpt") == 16
    kept = tmp_path / "run" / "rounds" / f"round-000{1 + (step > 0)}" / "drafts"
    assert all((kept / path.name).stat().st_mtime_ns == stamp for path, stamp in drawn.items())
    main(stage_two(scenes, tmp_path / "whole"))
    assert same_weights(tmp_path / "whole", tmp_path / "run")


def test_workers_end_with_a_parent_that_was_killed(scenes):
    readable, writable = os.pipe()
    parent = os.fork()
    if not parent:
        with contextlib.suppress(BaseException):
            sizes = {"batch_size": 16, "response_length": 40, "image_size": 48, "workers": 1}
            data = CaptionData(path=str(scenes), codec=Codec.load(scenes / "tokenizer"), **sizes)
            batches = iter(data.train_dataloader())
            next(batches)
            os.write(writable, str(multiprocessing.active_children()[0].pid).encode())
            time.sleep(600)
        os._exit(1)
    worker = os.read(readable, 20).decode()
    assert runs(worker)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 20
    while runs(worker):
        assert time.monotonic() < deadline, "the worker outlives its parent"
        time.sleep(0.05)


def runs(process: str) -> bool:
    """Whether a process is there and no zombie."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", process], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


def test_where_a_signal_raises():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"), Stop():
        signal.raise_signal(signal.SIGTERM)
    with Stop() as stop:
        stop.deferred = True
        signal.raise_signal(signal.SIGINT)
        assert stop.received is signal.SIGINT
        with pytest.raises(Stopped, match="SIGINT"), stop.at_once():
            raise AssertionError("not reached")
        assert stop.deferred
    with Stop() as stop:
        stop.deferred = True
        with pytest.raises(Stopped, match="SIGTERM"), stop.at_once():
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
