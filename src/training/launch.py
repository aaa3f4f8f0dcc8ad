"""The processes of a run, from their start to their end: who prepares, when they meet, what to say when one is lost.

    first = launched_first()              before they know each other: rank 0, as the launcher says
    trainer.fit(..., ckpt_path=meet(trainer, start))      starts the others, if nobody has; all get rank 0's `start`
    with together() as team: ...          of a verb that does not train: those that srun or torchrun has started
    with explained(): ...                 a lost process, a port in use: one line, and exit code 1

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

PARENT = "REDIFF_PARENT"  # the process that has started this one
MARGIN = 10.0  # seconds that a rank waits for the others beyond what its strategy does
PATIENCE = 1.0  # seconds until a process notices that its parent is gone
LOST = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|timed out waiting|wait timeout|timeout waiting|"
    r"remote process exited|ncclRemoteError|failed to recv|heartbeat|not contact|application timeout",
    re.IGNORECASE,
)
IN_USE = re.compile("EADDRINUSE|address already in use", re.IGNORECASE)
JOINED = re.compile(r"(\d+)/(\d+) clients joined")


def launched_first() -> bool:
    """Whether this is the process that prepares the run, as far as its launcher has said."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"]) == 0
    return not any(int(os.environ.get(name, 0)) for name in ("SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"))


def leave_with_parent() -> None:
    """End this process when the one that has started it is gone, if another of the same run has.

    It may be drafting for an hour before it would notice.
    """
    parent = int(os.environ.get(PARENT, 0))
    if parent and parent != os.getpid():
        Thread(target=_end_with, args=(parent,), daemon=True).start()


def check_started(devices: Any, nodes: int) -> None:
    """Raise UserError where torchrun has started another number of processes than the trainer is for."""
    started = int(os.environ.get("WORLD_SIZE", 0))
    if started and type(devices) is int and started != devices * nodes:
        raise UserError(f"{started} processes were started, but trainer.devices={devices} and num_nodes={nodes}")


def meet(trainer: L.Trainer, told: Any, *, run: str) -> Any:
    """Start the other processes of the run, or wait for them; all of them get what rank 0 tells.

    run: its folder. Raises UserError where the strategy is for one process only, or one of another run has come.
    """
    if trainer.world_size == 1:
        return told
    strategy, launcher = trainer.strategy, trainer.strategy.launcher
    if not isinstance(strategy, DDP | FSDP2):
        raise UserError(
            f"trainer.strategy: {type(strategy).__name__} is for one process; {trainer.world_size} need parallel/ddp "
            "or parallel/fsdp2, as in conf=stage1,parallel/fsdp2"
        )
    if isinstance(launcher, _SubprocessScriptLauncher) and not launcher.procs:
        os.environ[PARENT] = str(os.getpid())
        launcher.launch(lambda: None)  # once they are there, `fit` starts no others
    patience: timedelta = strategy._timeout or timedelta(0)  # of another program's port torch may wait for ever
    guard = Timer(patience.total_seconds() + MARGIN, _give_up)
    guard.daemon = True
    guard.start()
    strategy.join()
    guard.cancel()
    found = [(run, told)]
    dist.broadcast_object_list(found)
    if found[0][0] != run:
        raise UserError("this process has met those of another run: two use the same MASTER_ADDR and MASTER_PORT")
    return found[0][1]


def _give_up() -> None:
    address, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    _end(f"nobody of this run answers at {address}, port {port}: has rank 0 failed, or another program that port?")


@contextmanager
def together() -> Iterator[Team]:
    """The processes that `srun` or `torchrun` has started of a verb that does not train; one alone without them."""
    found = next((kind() for kind in (TorchElasticEnvironment, SLURMEnvironment) if kind.detect()), None)
    if found is None or found.world_size() == 1:
        yield Team()
        return
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = found.main_address, str(found.main_port)
    dist.init_process_group("gloo", rank=found.global_rank(), world_size=found.world_size())
    yield Team()
    dist.destroy_process_group()


@contextmanager
def explained() -> Iterator[None]:
    """What goes wrong between processes in one line; the process then ends with exit code 1."""
    try:
        yield
    except UserError as error:
        if not (number := _number()):
            raise
        sys.stderr.write(f"rank {number}: error: {error}\n")
        sys.exit(2)
    except RuntimeError as error:
        told = _explain(error)
        if told is None:
            raise
        _end(told)


def _end(told: str) -> NoReturn:
    """Say what is wrong and end, at once: what waits for the other processes in threads would hold this one up."""
    sys.stderr.write(f"\nrank {_number()}: error: {told}\n")
    end_now(1)


def _number() -> int:
    """This process's rank, also before the processes have met."""
    return rank() or int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", 0))))


def end_now(code: int) -> NoReturn:
    """End this process without waiting for its threads, which may wait for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _explain(error: RuntimeError) -> str | None:
    text = str(error)
    address, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if IN_USE.search(text):
        return f"port {port} of {address} is in use: set MASTER_PORT to a free one, and start again"
    if joined := JOINED.search(text):
        return (
            f"only {joined[1]} of {joined[2]} processes have come to {address}, port {port}: start as many as "
            "trainer.devices times trainer.num_nodes"
        )
    if isinstance(error, RemoteRankError):
        return text
    if is_lost(error):
        return (
            "another process of this run has ended, or does not answer; what went wrong is told by that one. The same "
            f"command continues from the newest checkpoint ({' '.join(text.split())[:300]})"
        )
    return None


def is_lost(error: RuntimeError) -> bool:
    """Whether it says that another process is gone."""
    return isinstance(error, dist.DistNetworkError | dist.DistStoreError) or bool(LOST.search(str(error)))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PATIENCE)
    os._exit(1)
