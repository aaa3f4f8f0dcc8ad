"""Train: build the data, the objective and the trainer from a config, fit, and export a model folder.

    python -m src.train conf=mask
    python -m src.train conf=stage2 seed=1 trainer.max_steps=500 resume=false
    python -m src.train conf=stage2,parallel/fsdp2 trainer.devices=8        docs/cluster.md
    python -m src.train conf=runs/stage1/config.yaml run_dir=runs/again
    python -m src.train conf=stage1 plan.gpus=8         prints the memory plan of a step, and trains nothing

    RUN/config.yaml      repeats the run             RUN/checkpoints/  to resume from
    RUN/inputs.json      hashes of model and data    RUN/model/        the result, written last
    RUN/tensorboard/     logs                        RUN/rounds/       online rounds (Stage II)

The same command resumes a run that stopped, and does nothing if the run is finished; `resume=false` deletes the run and
starts over. It refuses to resume if the settings, the initial model or the data have changed. SIGTERM and Ctrl-C save a
checkpoint at the end of the step (exit code 143 and 130); a second one exits at once. A file RUN/STOP, which the batch
job creates (src/submit.py), does the same (138). In a Slurm job the exit code is 0, and RUN/REQUEUE asks for a requeue.

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

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig

from src.cli.config import load_config, path_of
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.cli.instantiate import check
from src.cli.signals import EXIT_BASE, STOP_FILE_SIGNAL, Stop, Stopped
from src.io.errors import UserError
from src.io.files import write_json
from src.io.lock import locked
from src.models.hf.folder import save_pretrained
from src.training.build import OFFERS, assemble, check_trainer, load_codec, silence_lightning
from src.training.launch import (
    check_world_size,
    exit_now,
    exit_with_parent,
    is_lost_rank,
    is_rank0_by_env,
    rendezvous,
    report_lost_ranks,
)
from src.training.memory_plan import plan
from src.training.run_dir import (
    FINISHED,
    MODEL,
    REQUEUE,
    STOP,
    begin,
    check_folder,
    check_format,
    checkpoints,
    discard_replaced,
    is_complete,
    newest_checkpoint,
    restore_replaced,
)
from src.training.strategy import FSDP2
from src.types import FailedRound

PROCESS_STARTED = time.time()
log = logging.getLogger(__name__)


@main_guard
def main(argv: list[str]) -> None:
    """Train, or print the memory plan if `plan.gpus` is set."""
    cfg = load_config(argv, verb="src.train", needs=NEEDS["src.train"])
    check_format(cfg)
    check(cfg, offers=OFFERS, sections=["callbacks"])
    if cfg.plan.gpus is not None:
        sys.stdout.write(plan(cfg, gpus=cfg.plan.gpus))
        return
    is_rank0 = is_rank0_by_env()
    exit_with_parent()
    with locked(path_of(cfg, "run_dir")) if is_rank0 else nullcontext(), report_lost_ranks():
        train(cfg, is_rank0=is_rank0)


def train(cfg: DictConfig, *, is_rank0: bool = True) -> None:
    """Build everything, fit from the newest checkpoint if there is one, and export the model.

    is_rank0: whether this process prepares the run folder
    """
    run_dir = path_of(cfg, "run_dir")
    stop = Stop(run_dir / STOP)
    training_started = Event()  # set when the first training step begins
    silence_lightning()

    # 1. Check that the folder is this run's, and whether there is anything left to do.
    if is_rank0:
        check_folder(cfg, run_dir)
    if cfg.resume and is_complete(run_dir):
        log.info("%s is already finished; resume=false starts over", run_dir)
        return

    # 2. Build the data, the objective and the trainer.
    check_trainer(cfg)
    check_world_size(cfg.trainer.get("devices", 1), cfg.trainer.get("num_nodes", 1))
    run_dir.mkdir(parents=True, exist_ok=True)  # paths such as `run_dir/../stage1/model` need it
    codec = load_codec(cfg)
    on_step = LambdaCallback(on_train_batch_start=lambda *_: _on_step(training_started, run_dir, is_rank0=is_rank0))
    data, objective, trainer = assemble(cfg, codec, on_step, stop=stop, is_rank0=is_rank0)

    # 3. Write the config into the run folder, and find the checkpoint to resume from.
    checkpoint, saved_before = None, 0
    if is_rank0:
        begin(cfg, run_dir)
        _remove_old_stop_file(run_dir)
        checkpoint, saved_before = newest_checkpoint(run_dir), _saved_at(run_dir)
        _log_start(trainer, checkpoint)

    # 4. Fit. With several ranks a signal must not raise on one rank alone, as the others would wait for it.
    try:
        stop.deferred = trainer.world_size > 1
        with stop, _user_errors(cfg, trainer, training_started, is_rank0=is_rank0):
            trainer.fit(objective, datamodule=data, ckpt_path=rendezvous(trainer, checkpoint, run=str(run_dir)))
    except Stopped as stopped:
        _exit_stopped(trainer, stopped, run_dir)
        return
    except RuntimeError as error:
        # Another rank saw RUN/STOP in a round and left first. A launcher that ends a failed job creates no such file.
        if not is_lost_rank(error) or not (run_dir / STOP).exists():
            raise
        _exit_stopped(trainer, Stopped(STOP_FILE_SIGNAL), run_dir)
        exit_now(0)
    if trainer.global_step < cfg.trainer.max_steps:
        raise UserError(f"{_stopped_at(trainer)}; {_resume_hint(saved=_saved_at(run_dir) > saved_before)}")

    # 5. Export the model, then mark the run as finished.
    objective.backbone.response_length = cfg.data.response_length
    save_pretrained(objective.backbone, codec, run_dir / MODEL)
    if trainer.is_global_zero:
        write_json(run_dir / FINISHED, {"steps": trainer.global_step})
        sys.stdout.write(f"{trainer.global_step} steps done; the model is in {run_dir / MODEL}\n")
    trainer.strategy.barrier()  # a launcher may treat the exit of one process as a failure of the others


@contextmanager
def _user_errors(cfg: DictConfig, trainer: L.Trainer, training_started: Event, *, is_rank0: bool) -> Iterator[None]:
    """Raise Lightning's errors about settings, and a device out of memory, as UserError.

    A mistake in the settings that shows before the first step restores the run that this one was to replace.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        traceback.clear_frames(error.__traceback__)  # frees tensors: the plan needs some memory, too
        raise UserError(_out_of_memory(cfg, trainer)) from None
    except (UserError, MisconfigurationException) as error:
        if is_rank0 and not training_started.is_set() and not isinstance(error, FailedRound):
            _restore_previous_run(path_of(cfg, "run_dir"))
        raise error if isinstance(error, UserError) else UserError(str(error)) from error


def _restore_previous_run(run_dir: Path) -> None:
    """Restore the run that this one was to replace, unless this one already holds paid answers of an expert."""
    answered = any(path.stat().st_size for path in run_dir.glob("rounds/*/journal-*.jsonl"))
    (discard_replaced if answered else restore_replaced)(run_dir)


def _on_step(training_started: Event, run_dir: Path, *, is_rank0: bool) -> None:
    """At the first step, delete the run that this one replaces."""
    if not training_started.is_set():
        training_started.set()
        if is_rank0:
            discard_replaced(run_dir)


def _exit_stopped(trainer: L.Trainer, stopped: Stopped, run_dir: Path) -> None:
    """Report the stop, then exit with the signal's code, or touch RUN/REQUEUE in a Slurm job. Rank 0 only.

    NOTE: a non-zero exit code of another rank would make the launcher kill rank 0.
    """
    if not trainer.is_global_zero:
        return
    file = f" ({run_dir / STOP})" if stopped.signal is STOP_FILE_SIGNAL else ""
    sys.stderr.write(f"\n{_stopped_at(trainer)} by {stopped}{file}; the same command continues\n")
    if not SLURMEnvironment.detect():
        sys.exit(EXIT_BASE + stopped.signal)
    (run_dir / REQUEUE).touch()


def _remove_old_stop_file(run_dir: Path) -> None:
    """Remove a RUN/STOP that is older than this process. In a Slurm job the batch script does so."""
    if SLURMEnvironment.detect():
        return
    with suppress(FileNotFoundError):
        if (run_dir / STOP).stat().st_mtime < PROCESS_STARTED:
            (run_dir / STOP).unlink()


def _log_start(trainer: L.Trainer, checkpoint: Path | None) -> None:
    if trainer.world_size > 1:
        log.info("%d processes, %s", trainer.world_size, type(trainer.strategy).__name__)
    if checkpoint:
        log.info("resuming from %s", checkpoint.name)


def _out_of_memory(cfg: DictConfig, trainer: L.Trainer) -> str:
    """The error message of a device out of memory, with the memory plan of a step."""
    gpus = trainer.world_size if isinstance(trainer.strategy, FSDP2) else 1
    return (
        f"out of memory at step {trainer.global_step}. Planned memory of a step:\n\n{plan(cfg, gpus=gpus)}\n"
        "To use less: optim.micro_batch, optim.checkpointing=full, more devices with "
        "parallel/fsdp2 (docs/memory.md)"
    )


def _stopped_at(trainer: L.Trainer) -> str:
    return f"stopped at step {trainer.global_step} of {trainer.max_steps}"


def _saved_at(run_dir: Path) -> int:
    """Modification time of the newest checkpoint in nanoseconds; 0 if there is none."""
    return max((path.stat().st_mtime_ns for path in checkpoints(run_dir)), default=0)


def _resume_hint(*, saved: bool) -> str:
    """What to do if the trainer ended before `max_steps`. saved: whether this process wrote a checkpoint."""
    if saved:
        return "the same command continues"
    return (
        "no checkpoint was saved, so the same command would stop there again: raise or unset the limit that ended it "
        "(trainer.max_epochs, max_time, limit_train_batches), or lower callbacks.checkpoint.every_n_train_steps"
    )


if __name__ == "__main__":
    main()
