"""Train: build the data, the objective and the trainer from a config, fit, and export a model folder.

    python -m src.train conf=mask
    python -m src.train conf=stage2 seed=1 trainer.max_steps=500 resume=false
    python -m src.train conf=stage2,parallel/fsdp2 trainer.devices=8        docs/cluster.md
    python -m src.train conf=runs/stage1/config.yaml run_dir=runs/again
    python -m src.train conf=stage1 plan.gpus=8         prints the memory plan of a step, and trains nothing

    RUN/config.yaml      repeats the run             RUN/checkpoints/  to resume from
    RUN/inputs.json      hashes of model and data    RUN/model/        the result, written last
    RUN/events.*         for TensorBoard             RUN/rounds/       online rounds (Stage II)

The same command resumes a run that stopped, and does nothing if the run is finished; `resume=false` deletes the run and
starts over. It refuses to resume if the settings, the initial model or the data have changed. SIGTERM, Ctrl-C and a
file RUN/STOP (of a batch job) save a checkpoint at the end of the step; a second signal exits at once.

Several processes (`trainer.devices`, `srun`, `torchrun`) run the same command. Rank 0 writes all files of the run.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

from callbacks.ema import weights_for
from src.cli.config import load_config, path_of
from src.cli.entrypoint import main_guard
from src.cli.help import NEEDS
from src.cli.instantiate import check
from src.cli.signals import STOP_FILE_SIGNAL, Stop, Stopped
from src.io.errors import UserError
from src.io.files import write_json
from src.io.lock import locked
from src.io.words import counted
from src.models.hf.folder import save_pretrained
from src.training.build import OFFERS, assemble, check_trainer, load_codec, silence_lightning
from src.training.launch import exit_now, exit_stopped, exit_with_parent, is_rank0_by_env, rendezvous, report_lost_ranks
from src.training.memory_plan import plan
from src.training.run_dir import (
    FINISHED,
    MODEL,
    STOP,
    begin,
    check_folder,
    check_format,
    is_complete,
    newest_checkpoint,
)

log = logging.getLogger(__name__)


@main_guard
def main(argv: list[str]) -> None:
    cfg = load_config(argv, verb="src.train", needs=NEEDS["src.train"])
    check_format(cfg)
    check(cfg, offers=OFFERS, sections=["callbacks"])
    if cfg.plan.gpus is not None:
        sys.stdout.write(plan(cfg, gpus=cfg.plan.gpus))
        return
    run_dir, is_rank0 = path_of(cfg, "run_dir"), is_rank0_by_env()
    silence_lightning()
    exit_with_parent()
    with locked(run_dir) if is_rank0 else nullcontext(), report_lost_ranks():
        # 1. Check that the folder is this run's, and whether there is anything left to do.
        if is_rank0:
            check_folder(cfg, run_dir)
        if cfg.resume and is_complete(run_dir):
            log.info("%s is already finished; resume=false starts over", run_dir)
            return

        # 2. Build the data, the objective and the trainer.
        check_trainer(cfg)
        run_dir.mkdir(parents=True, exist_ok=True)  # paths such as `run_dir/../stage1/model` need it
        codec, stop_file = load_codec(cfg), run_dir / STOP
        stop = Stop(stop_file)
        data, objective, trainer = assemble(cfg, codec, stop=stop, is_rank0=is_rank0)

        # 3. Make the folder this run's, find the checkpoint to resume from, and connect the ranks.
        checkpoint = None
        if is_rank0:
            begin(cfg, run_dir)
            checkpoint = newest_checkpoint(run_dir)
        checkpoint = rendezvous(trainer, checkpoint, run=str(run_dir))

        # 4. Fit. With several ranks a signal must not raise on one rank alone, as the others would wait for it.
        stop.deferred = trainer.world_size > 1
        try:
            with stop, _user_errors(trainer, max_steps=cfg.trainer.max_steps):
                trainer.fit(objective, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        except Stopped as stopped:
            exit_stopped(trainer, stopped.signal, run_dir)
            return
        except RuntimeError:
            # Another rank saw RUN/STOP in a round and left first, which breaks the connection to it.
            if trainer.world_size == 1 or not stop_file.exists():
                raise
            log.exception("lost another process")
            exit_stopped(trainer, STOP_FILE_SIGNAL, run_dir)
            exit_now(0)

        # 5. Export the model, then mark the run as finished.
        objective.backbone.response_length = cfg.data.response_length
        with weights_for(trainer, "export") as averaged:
            save_pretrained(objective.backbone, codec, run_dir / MODEL)
        if is_rank0:
            write_json(run_dir / FINISHED, {"steps": trainer.global_step})
            weights = " with averaged weights" if averaged else ""
            sys.stdout.write(
                f"{counted(trainer.global_step, 'step')} done; the model{weights} is in {run_dir / MODEL}; "
                f"charts: tensorboard --logdir {run_dir.parent}\n"
            )
        trainer.strategy.barrier()  # a launcher may treat the exit of one process as a failure of the others


@contextmanager
def _user_errors(trainer: L.Trainer, *, max_steps: int) -> Iterator[None]:
    """Raise UserError for settings that `fit` refuses, a device out of memory, and an end before `max_steps`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory at step {trainer.global_step} ({error}). plan.gpus={trainer.world_size} prints what a step "
            "takes (docs/memory.md). To use less: optim.micro_batch, optim.checkpointing=full, more devices with "
            "parallel/fsdp2"
        ) from error
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    if trainer.global_step < max_steps:
        raise UserError(
            f"stopped at step {trainer.global_step} of {max_steps} by another limit: raise or unset "
            "trainer.max_epochs, max_time, limit_train_batches or fast_dev_run, and the same command continues"
        )


if __name__ == "__main__":
    main()
