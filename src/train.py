"""Train: build the data, the objective and its callbacks from a config, fit, and write a model folder.

    python -m src.train conf=mask
    python -m src.train conf=stage2 seed=1 trainer.max_steps=500 resume=false
    python -m src.train conf=stage2,parallel/fsdp2 trainer.devices=8        docs/cluster.md
    python -m src.train conf=runs/stage1/config.yaml run_dir=runs/again
    python -m src.train conf=stage1 plan.gpus=8         prints what memory it takes, and trains nothing

    RUN/config.yaml      repeats the run          RUN/checkpoints/  to resume from
    RUN/inputs.json      hashes of what it reads  RUN/model/        the result, written last
    RUN/tensorboard/     logs                     RUN/rounds/       online rounds (Stage II)

A rerun of the same command resumes where the run stopped, and does nothing when it is finished; `resume=false` removes
what is there and starts afresh. A rerun with other settings, or after a change of the model it starts from or of its
data, is refused. SIGTERM and Ctrl-C save a checkpoint at the end of the step first (exit code 143 and 130), a second
one does not wait. So does a file RUN/STOP (138), which a batch job makes (src/submit.py). In a job the exit code is 0,
and RUN/REQUEUE tells the job that there is more to do.

Several processes (`trainer.devices`, `srun`, `torchrun`) run the same command. Rank 0 writes all files of the run.
"""

from __future__ import annotations

import logging
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Event
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig

from src.cli.config import load_config, path_of
from src.cli.entrypoint import main_guard
from src.cli.instantiate import check
from src.cli.signals import BY_FILE, SIGNALLED, Stop, Stopped
from src.io.errors import UserError
from src.io.files import write_json
from src.io.lock import locked
from src.models.hf.folder import save_pretrained
from src.text.tokenizer import Codec
from src.training.build import (
    OFFERS,
    assemble,
    check_stops,
    codec_of,
    quiet,
)
from src.training.launch import check_started, end_now, explained, is_lost, launched_first, leave_with_parent, meet
from src.training.memory_plan import plan
from src.training.run_dir import (
    FINISHED,
    MODEL,
    REQUEUE,
    STOP,
    begin,
    check_folder,
    checkpoints,
    forget,
    is_complete,
    newest,
    restore,
)
from src.training.strategy import FSDP2
from src.types import FailedRound

BEGAN = time.time()
log = logging.getLogger(__name__)


@main_guard
def main(argv: list[str]) -> None:
    """Train as the config says, or plan what memory it takes."""
    cfg = load_config(argv, verb="src.train", needs=["objective", "trainer", "callbacks", "plan"])
    check(cfg, offers=OFFERS, sections=["callbacks"])
    if cfg.plan.gpus is not None:
        sys.stdout.write(plan(cfg, gpus=cfg.plan.gpus))
        return
    first = launched_first()
    leave_with_parent()
    with locked(path_of(cfg, "run_dir")) if first else nullcontext(), explained():
        train(cfg, first=first)


def train(cfg: DictConfig, *, first: bool = True) -> None:
    """Build everything, fit from the last checkpoint if there is one, and export the model.

    first: whether this process prepares the folder of the run
    """
    run_dir = path_of(cfg, "run_dir")
    stop, began = Stop(run_dir / STOP), Event()
    quiet()
    if first:
        check_folder(cfg, run_dir)
    if cfg.resume and is_complete(run_dir):
        log.info("%s is finished already; resume=false would start it afresh", run_dir)
        return
    codec, data, objective, trainer = _build(cfg, run_dir, stop, began, first=first)
    start, before = _open(cfg, run_dir, trainer) if first else (None, 0)
    try:
        stop.held = trainer.world_size > 1  # alone a rank would leave the others waiting: all stop at the same step
        with stop, _mistakes(cfg, trainer, began, first=first):
            trainer.fit(objective, datamodule=data, ckpt_path=meet(trainer, start, run=str(run_dir)))
    except Stopped as stopped:
        _leave(trainer, stopped, run_dir)
        return
    except RuntimeError as error:
        if not is_lost(error) or not (run_dir / STOP).exists():  # after a failure a launcher sends signals, but no file
            raise
        _leave(trainer, Stopped(BY_FILE), run_dir)  # another rank has left a round before this one could
        end_now(0)
    if trainer.global_step < cfg.trainer.max_steps:
        raise UserError(f"{_where(trainer)}; {_resume_hint(saved=_saved_at(run_dir) > before)}")
    objective.backbone.response_length = cfg.data.response_length
    save_pretrained(objective.backbone, codec, run_dir / MODEL)
    if trainer.is_global_zero:
        write_json(run_dir / FINISHED, {"steps": trainer.global_step})
        sys.stdout.write(f"{trainer.global_step} steps done; the model is in {run_dir / MODEL}\n")
    trainer.strategy.barrier()  # a launcher may take the end of one process for a failure of the others


def _build(
    cfg: DictConfig, run_dir: Path, stop: Stop, began: Event, *, first: bool
) -> tuple[Codec, Any, Any, L.Trainer]:
    check_stops(cfg)
    check_started(cfg.trainer.get("devices", 1), cfg.trainer.get("num_nodes", 1))
    run_dir.mkdir(parents=True, exist_ok=True)  # paths such as `run_dir/../stage1/model` need it
    codec = codec_of(cfg)
    note = LambdaCallback(on_train_batch_start=lambda *_: _note(began, run_dir, first=first))
    return codec, *assemble(cfg, codec, note, stop=stop, first=first)


def _open(cfg: DictConfig, run_dir: Path, trainer: L.Trainer) -> tuple[Path | None, int]:
    """Make the folder this run's; the checkpoint to go on from, and when the newest was written."""
    begin(cfg, run_dir)
    _forget_stop(run_dir)
    start = newest(run_dir)
    if trainer.world_size > 1:
        log.info("%d processes, %s", trainer.world_size, type(trainer.strategy).__name__)
    if start:
        log.info("going on from %s", start.name)
    return start, _saved_at(run_dir)


@contextmanager
def _mistakes(cfg: DictConfig, trainer: L.Trainer, began: Event, *, first: bool) -> Iterator[None]:
    """Before the first step a mistake in the settings restores the run that this one was to replace.

    Lightning's error about its settings, and a device without memory left, become UserError.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        traceback.clear_frames(error.__traceback__)  # the plan needs some memory, too
        raise UserError(_out_of_memory(cfg, trainer)) from None
    except (UserError, MisconfigurationException) as error:
        if first and not began.is_set() and not isinstance(error, FailedRound):
            _restore_previous_run(path_of(cfg, "run_dir"))
        raise error if isinstance(error, UserError) else UserError(str(error)) from error


def _restore_previous_run(run_dir: Path) -> None:
    """Restore the run that this one was to replace, unless an expert was paid for this one already."""
    answered = any(path.stat().st_size for path in run_dir.glob("rounds/*/journal-*.jsonl"))
    (forget if answered else restore)(run_dir)


def _leave(trainer: L.Trainer, stopped: Stopped, run_dir: Path) -> None:
    """End a run that was stopped. Rank 0 alone says so: another's exit code would have it killed by the launcher."""
    if not trainer.is_global_zero:
        return
    asked = f" ({run_dir / STOP})" if stopped.signal is BY_FILE else ""
    sys.stderr.write(f"\n{_where(trainer)} by {stopped}{asked}; the same command continues\n")
    if not SLURMEnvironment.detect():
        sys.exit(SIGNALLED + stopped.signal)
    (run_dir / REQUEUE).touch()


def _forget_stop(run_dir: Path) -> None:
    """Remove what asked an earlier process to stop. A job does so itself, before it can be asked."""
    if SLURMEnvironment.detect():
        return
    with suppress(FileNotFoundError):
        if (run_dir / STOP).stat().st_mtime < BEGAN:
            (run_dir / STOP).unlink()


def _out_of_memory(cfg: DictConfig, trainer: L.Trainer) -> str:
    """What to tell where a device has no memory left: what the step needs, by the plan."""
    shared = trainer.world_size if isinstance(trainer.strategy, FSDP2) else 1
    return (
        f"out of memory at step {trainer.global_step}. What a step is planned to take:\n\n{plan(cfg, gpus=shared)}\n"
        "Less of it: objective.training.micro_batch, objective.training.checkpointing=full, more devices with "
        "parallel/fsdp2 (docs/memory.md)"
    )


def _note(began: Event, run_dir: Path, *, first: bool) -> None:
    """Take note of the first step, from which on a run that it replaces is gone."""
    if not began.is_set():
        began.set()
        if first:
            forget(run_dir)


def _where(trainer: L.Trainer) -> str:
    return f"stopped at step {trainer.global_step} of {trainer.max_steps}"


def _saved_at(run_dir: Path) -> int:
    """When the newest checkpoint was written, in nanoseconds; 0 before the first."""
    return max((path.stat().st_mtime_ns for path in checkpoints(run_dir)), default=0)


def _resume_hint(*, saved: bool) -> str:
    """What to do about a training that its trainer has ended early."""
    if saved:
        return "the same command continues"
    return (
        "no checkpoint was saved on the way, so the same command would do the same again: raise or unset what ended it "
        "(trainer.max_epochs, max_time, limit_train_batches), or lower callbacks.checkpoint.every_n_train_steps"
    )


if __name__ == "__main__":
    main()
