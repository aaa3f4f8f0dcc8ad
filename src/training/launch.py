"""The processes of a run: which one prepares it, how they connect, and what they report when one fails.

    is_rank0 = is_rank0_by_env()           from the launcher's environment, before the process group exists
    checkpoint = rendezvous(trainer, checkpoint, run=...)      connects all ranks; rank 0's checkpoint
    with process_group() as team: ...      the processes of a verb that does not train
    with report_lost_ranks(): ...          errors name the rank, and end its process at once

Launchers: Lightning's own (`trainer.devices=2`: this process starts the others of its node), `srun`, `torchrun`.
Every wait of a rank has a deadline (`trainer.strategy.timeout_minutes`; `Team` for an expert), so that a rank that dies
or hangs ends the run.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread, Timer
from typing import Any, NoReturn

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from src.cli.signals import EXIT_BASE, STOP_FILE_SIGNAL
from src.distributed.parallel import RemoteRankError, Team, rank
from src.io.errors import UserError
from src.io.progress import close_bars
from src.training.run_dir import REQUEUE, STOP
from src.training.strategy import DDP, FSDP2

PARENT = "REDIFF_PARENT"  # id of the process that started this one
MARGIN = 10.0  # seconds that a rank waits for the others beyond the timeout of its strategy
PARENT_POLL = 1.0  # seconds between two checks that the parent is alive


def is_rank0_by_env() -> bool:
    """Whether the launcher's environment variables say that this process is rank 0, which prepares the run."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"]) == 0
    return not any(int(os.environ.get(name, 0)) for name in ("SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


def exit_with_parent() -> None:
    """Exit when the process of this run that started this one is gone.

    Otherwise a rank that is drafting would notice only at its next collective call, perhaps an hour later.
    """
    parent = int(os.environ.get(PARENT, 0))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL)
        os._exit(1)

    if parent and parent != os.getpid():
        Thread(target=watch, daemon=True).start()


def rendezvous(trainer: L.Trainer, value: Any, *, run: str) -> Any:
    """Connect the ranks of the run, after starting them if no launcher did. Returns rank 0's `value` on all of them.

    run: the run folder. Raises UserError if the strategy supports one process only, or if a process of another run
    connected.
    """
    if trainer.world_size == 1:
        return value
    strategy = trainer.strategy
    if not isinstance(strategy, DDP | FSDP2):
        raise UserError(
            f"trainer.strategy: {type(strategy).__name__} supports one process; {trainer.world_size} need parallel/ddp "
            "or parallel/fsdp2, as in conf=stage1,parallel/fsdp2"
        )
    if strategy.launcher is not None:  # neither srun nor torchrun has started the ranks
        os.environ[PARENT] = str(os.getpid())
        strategy.launcher.launch(lambda: None)  # `fit` then starts no more processes

    def exit_unconnected() -> None:
        address, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = "rank 0 has failed, or another program uses the port"
        _fail(f"no process of this run answers at {address}, port {port}: {reason}")

    # torch may wait forever on a port that belongs to another program
    guard = Timer(strategy.timeout.total_seconds() + MARGIN, exit_unconnected)
    guard.daemon = True
    guard.start()
    strategy.join()
    guard.cancel()
    message = [(run, value)]
    dist.broadcast_object_list(message)
    run_of_rank0, value_of_rank0 = message[0]
    if run_of_rank0 != run:
        raise UserError("connected to the processes of another run: two runs use the same MASTER_ADDR and MASTER_PORT")
    return value_of_rank0


@contextmanager
def process_group() -> Iterator[Team]:
    """The processes that `srun` or `torchrun` started for a verb that does not train; without these, this one alone."""
    environment = next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
    if environment is None or environment.world_size() == 1:
        yield Team()
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    dist.init_process_group("gloo", rank=environment.global_rank(), world_size=environment.world_size())
    yield Team()
    dist.destroy_process_group()


@contextmanager
def report_lost_ranks() -> Iterator[None]:
    """Name the rank in an error of one process among several, and end that process, so that the others do not wait.

    Exit code 2 for a UserError, 1 for any other. An OSError, such as a full disk's, and an error of a process that is
    alone pass through.
    """
    try:
        yield
    except UserError as error:
        if not (number := _rank()):
            raise
        sys.stderr.write(f"rank {number}: error: {error}\n")
        sys.exit(2)
    except RemoteRankError as error:
        _fail(str(error))
    except RuntimeError as error:  # every error of torch.distributed is one
        if not dist.is_initialized() and not isinstance(error, dist.DistError):
            raise
        traceback.print_exc()
        _fail(
            f"{' '.join(str(error).split())[:300]}\nIf this is about a connection, another process of this run has "
            "ended or does not answer; see its own error. The same command continues from the newest checkpoint"
        )


def exit_stopped(trainer: L.Trainer, number: signal.Signals, run_dir: Path) -> None:
    """Report the stop, then exit with the signal's code, or touch RUN/REQUEUE in a Slurm job. Rank 0 only.

    NOTE: a non-zero exit code of another rank would make the launcher kill rank 0.
    """
    if not trainer.is_global_zero:
        return
    by = f"{number.name} ({run_dir / STOP})" if number is STOP_FILE_SIGNAL else number.name
    close_bars()
    sys.stderr.write(
        f"stopped at step {trainer.global_step} of {trainer.max_steps} by {by}; the same command continues\n"
    )
    if not SLURMEnvironment.detect():
        sys.exit(EXIT_BASE + number)
    (run_dir / REQUEUE).touch()


def exit_now(code: int) -> NoReturn:
    """Exit without joining threads, which may be waiting for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _fail(message: str) -> NoReturn:
    sys.stderr.write(f"\nrank {_rank()}: error: {message}\n")
    exit_now(1)


def _rank() -> int:
    """This process's rank; from the launcher's environment before the process group exists."""
    return rank() or int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", 0))))
