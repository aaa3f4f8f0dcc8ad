"""The processes of a run: which one prepares it, how they connect, and what to report when one is lost.

    is_rank0 = is_rank0_by_env()           from the launcher's environment, before the process group exists
    trainer.fit(..., ckpt_path=rendezvous(trainer, checkpoint, run=...))      connects all ranks, rank 0's checkpoint
    with process_group() as team: ...      the processes of a verb that does not train
    with report_lost_ranks(): ...          a lost process, a port in use: one line, and exit code 1

Launchers: Lightning's own (`trainer.devices=2`: this process starts the others of its node), `srun`, `torchrun`.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Thread, Timer
from typing import Any, NoReturn

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from src.distributed.parallel import RemoteRankError, Team, rank
from src.io.errors import UserError
from src.training.strategy import DDP, FSDP2

PARENT = "REDIFF_PARENT"  # id of the process that started this one
MARGIN = 10.0  # seconds that a rank waits for the others beyond the timeout of its strategy
PARENT_POLL = 1.0  # seconds between two checks that the parent is alive
LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|timed out waiting|wait timeout|timeout waiting|"
    r"remote process exited|ncclRemoteError|failed to recv|heartbeat|not contact|application timeout",
    re.IGNORECASE,
)
IN_USE = re.compile("EADDRINUSE|address already in use", re.IGNORECASE)
JOINED = re.compile(r"(\d+)/(\d+) clients joined")


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
    if parent and parent != os.getpid():
        Thread(target=_exit_without, args=(parent,), daemon=True).start()


def check_world_size(devices: Any, nodes: int) -> None:
    """Raise UserError if torchrun started another number of processes than the trainer expects."""
    started = int(os.environ.get("WORLD_SIZE", 0))
    if started and type(devices) is int and started != devices * nodes:
        raise UserError(f"{started} processes were started, but trainer.devices={devices} and num_nodes={nodes}")


def rendezvous(trainer: L.Trainer, value: Any, *, run: str) -> Any:
    """Connect the ranks of the run, after starting them if no launcher did. Returns rank 0's `value` on all of them.

    run: the run folder. Raises UserError if the strategy supports one process only, or if a process of another run
    connected.
    """
    if trainer.world_size == 1:
        return value
    strategy, launcher = trainer.strategy, trainer.strategy.launcher
    if not isinstance(strategy, DDP | FSDP2):
        raise UserError(
            f"trainer.strategy: {type(strategy).__name__} supports one process; {trainer.world_size} need parallel/ddp "
            "or parallel/fsdp2, as in conf=stage1,parallel/fsdp2"
        )
    if isinstance(launcher, _SubprocessScriptLauncher) and not launcher.procs:
        os.environ[PARENT] = str(os.getpid())
        launcher.launch(lambda: None)  # `fit` then starts no more processes
    timeout: timedelta = strategy._timeout or timedelta(0)
    # torch may wait forever on a port that belongs to another program
    guard = Timer(timeout.total_seconds() + MARGIN, _exit_unconnected)
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


def _exit_unconnected() -> None:
    address, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    _exit_with_error(
        f"no process of this run answers at {address}, port {port}: rank 0 has failed, or another program uses the port"
    )


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
    """Report a failure between processes in one line, and exit with code 1; a UserError of another rank with code 2."""
    try:
        yield
    except UserError as error:
        if not (number := _rank()):
            raise
        sys.stderr.write(f"rank {number}: error: {error}\n")
        sys.exit(2)
    except RuntimeError as error:
        message = _explain(error)
        if message is None:
            raise
        _exit_with_error(message)


def _exit_with_error(message: str) -> NoReturn:
    sys.stderr.write(f"\nrank {_rank()}: error: {message}\n")
    exit_now(1)


def _rank() -> int:
    """This process's rank; from the launcher's environment before the process group exists."""
    return rank() or int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", 0))))


def exit_now(code: int) -> NoReturn:
    """Exit without joining threads, which may be waiting for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _explain(error: RuntimeError) -> str | None:
    """One line on a failure between processes; None for any other error."""
    text = str(error)
    address, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if IN_USE.search(text):
        return f"port {port} of {address} is in use: set MASTER_PORT to a free port and start again"
    if joined := JOINED.search(text):
        return (
            f"only {joined[1]} of {joined[2]} processes connected to {address}, port {port}: start "
            "trainer.devices * trainer.num_nodes processes"
        )
    if isinstance(error, RemoteRankError):
        return text
    if is_lost_rank(error):
        return (
            "another process of this run has ended or does not answer; see its own error. The same command continues "
            f"from the newest checkpoint ({' '.join(text.split())[:300]})"
        )
    return None


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether the error means that another process is gone."""
    return isinstance(error, dist.DistNetworkError | dist.DistStoreError) or bool(LOST.search(str(error)))


def _exit_without(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_POLL)
    os._exit(1)
