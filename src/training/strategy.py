"""Lightning's strategies as this project uses them; each has a layer, as in `conf=stage1,parallel/fsdp2`.

    trainer:
      strategy: {target: src.training.strategy.FSDP2}      all processes share one copy of the model
      strategy: {target: src.training.strategy.DDP}        every process has a copy

What FSDP2 shards, and how, is `src.distributed.parallel.Sharding` (objective.training.sharding).
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from src.distributed.checkpoints import REFUSED, check_sizes, entries, named, read_whole, replace_folder, write_manifest
from src.distributed.parallel import gather
from src.io.errors import UserError


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

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Raises OSError, on all ranks, where rank 0 cannot write."""
        wrong = None
        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)  # of rank 0 only
        except OSError as error:
            wrong = _reason(error)
        _agree(wrong, Path(filepath))

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
            raise UserError(f"replicas must be at least 1, got {replicas}")
        super().__init__(timeout=_minutes(timeout_minutes))
        self._replicas = replicas

    def setup_environment(self) -> None:
        ranks = self.num_nodes * self.num_processes
        if ranks % self._replicas or 1 < self._replicas == ranks:
            raise UserError(
                f"trainer.strategy.replicas={self._replicas} must divide the {ranks} processes, and be fewer: "
                "parallel/ddp gives each of them a copy"
            )
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
        _agree(self._on_first(partial(_clear, temporary)), path)
        wrong, found = None, []
        try:
            super().save_checkpoint(checkpoint, temporary, storage_options)
            found = entries(temporary, rank=self.global_rank)
        except (CheckpointException, OSError, RuntimeError) as error:  # the first is no Exception
            wrong = _reason(error)
        told = gather((wrong, found))
        files = {name: entry for _, some in told for name, entry in some}
        if not any(reason for reason, _ in told):
            wrong = self._on_first(partial(_publish, temporary, path, files))
        try:
            _agree(wrong, path)
        except OSError:
            self._on_first(partial(shutil.rmtree, temporary, ignore_errors=True))
            raise

    def _on_first(self, work: Callable[[], None]) -> str | None:
        """What goes wrong with work that rank 0 alone does."""
        if not self.is_global_zero:
            return None
        try:
            work()
        except (OSError, ValueError) as error:
            return _reason(error)
        return None

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """A folder, or the one file of a run with another strategy. Raises UserError for a folder that is damaged."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            check_sizes(path)
            return super().load_checkpoint(path, weights_only)
        assert self.model is not None
        content, options = read_whole(path), StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, dict(content.pop("state_dict")), options=options)
        known = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, content.pop("optimizer_states"), strict=True):
            names = [known[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            set_optimizer_state_dict(self.model, optimizer, named(state, names), options=options)
        return content


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(temporary: Path, path: Path, files: dict[str, dict[str, int]]) -> None:
    write_manifest(temporary, files)
    check_sizes(temporary)  # do all ranks write to the same file system?
    replace_folder(temporary, path)


def _agree(wrong: str | None, path: Path) -> None:
    """Raise OSError on all ranks where something went wrong on one."""
    if reason := next((told for told in gather(wrong) if told), None):
        raise OSError(errno.EIO, f"the checkpoint cannot be written ({reason})", str(path))


def _minutes(number: float) -> timedelta:
    if number <= 0:
        raise UserError(f"timeout_minutes must be more than 0, got {number}")
    return timedelta(minutes=number)


def _reason(error: BaseException) -> str:
    """What went wrong in one line: of all that ranks report, the first of their own words."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip()
    if REFUSED.search(text):
        return "is a disk full?"
    return text.splitlines()[-1] if text else type(error).__name__
