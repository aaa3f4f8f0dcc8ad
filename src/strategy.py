"""Lightning's strategies as this project uses them; each has a layer, as in `conf=stage1,parallel/fsdp2`.

    trainer:
      strategy: {target: src.strategy.FSDP2}      all processes share one copy of the model
      strategy: {target: src.strategy.DDP}        every process has a copy

What FSDP2 shards, and how, is `src.parallel.Sharding` (objective.training.sharding).
"""

from __future__ import annotations

import errno
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from src.parallel import gather
from src.snapshots import REFUSED, check_sizes, entries, replace_folder, write_manifest


class DDP(DDPStrategy):
    """`DDPStrategy` without PyTorch's wrapper: an objective averages the gradients of a step itself, once it has all.

    The wrapper's buckets would take memory for one more copy of the gradients.

    timeout_minutes: how long a rank waits for the others before the job fails
    """

    def __init__(self, *, timeout_minutes: float = 30.0) -> None:
        super().__init__(timeout=_minutes(timeout_minutes))

    def configure_ddp(self) -> None:
        """Start from the weights of rank 0."""
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            dist.broadcast(tensor, src=0)

    def join(self) -> None:
        """Meet the other ranks, before Lightning does."""
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()


class FSDP2(ModelParallelStrategy):
    """`ModelParallelStrategy` with data parallelism only, and with checkpoints that are whole or not there.

    replicas: copies of the model. Each is shared by as many ranks as follow each other, best those of one node (HSDP):
        then only gradients travel between nodes
    timeout_minutes: how long a rank waits for the others before the job fails

    A checkpoint is a folder with the part of each rank; it can be read by any number of ranks. All of them need to
    see the same file system.
    """

    def __init__(self, *, replicas: int = 1, timeout_minutes: float = 30.0) -> None:
        if replicas < 1:
            raise ValueError(f"replicas must be at least 1, got {replicas}")
        super().__init__(timeout=_minutes(timeout_minutes))
        self._replicas = replicas

    def setup_environment(self) -> None:
        ranks = self.num_nodes * self.num_processes
        if ranks % self._replicas:
            raise ValueError(f"trainer.strategy.replicas={self._replicas} does not divide the {ranks} processes")
        shared = self._replicas > 1  # the second dimension of Lightning's mesh is then the one that shares
        self._data_parallel_size = self._replicas if shared else ranks
        self._tensor_parallel_size = ranks // self._data_parallel_size
        super().setup_environment()

    def join(self) -> None:
        """Meet the other ranks, before Lightning does."""
        self._setup_distributed()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Raises OSError, on all ranks, where one of them cannot write; what was there before is then left alone."""
        path = Path(self.broadcast(filepath))
        temporary = path.with_name(f".{path.name}.tmp")
        if self.is_global_zero:
            shutil.rmtree(temporary, ignore_errors=True)
        self.barrier()
        wrong, found = None, []
        try:
            super().save_checkpoint(checkpoint, temporary, storage_options)
            found = entries(temporary, rank=self.global_rank)
        except (CheckpointException, OSError, RuntimeError) as error:  # the first is no Exception
            wrong = _reason(error)
        told = gather((wrong, found))
        wrong = next((reason for reason, _ in told if reason), None)
        if wrong is None and self.is_global_zero:
            try:
                write_manifest(temporary, {name: entry for _, some in told for name, entry in some})
                replace_folder(temporary, path)
            except OSError as error:
                wrong = _reason(error)
        wrong = self.broadcast(wrong)
        if wrong:
            if self.is_global_zero:
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(errno.EIO, f"the checkpoint cannot be written ({wrong})", str(path))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            check_sizes(path)
        return super().load_checkpoint(path, weights_only)


def _minutes(number: float) -> timedelta:
    if number <= 0:
        raise ValueError(f"timeout_minutes must be more than 0, got {number}")
    return timedelta(minutes=number)


def _reason(error: BaseException) -> str:
    """What went wrong in one line: of all that ranks report, the first of their own words."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip()
    if REFUSED.search(text):
        return "is a disk full?"
    return text.splitlines()[-1] if text else type(error).__name__
