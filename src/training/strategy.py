"""Lightning strategies DDP and FSDP2, adapted; each has a config layer, as in `conf=stage1,parallel/fsdp2`.

    trainer:
      strategy: {target: src.training.strategy.FSDP2}      all ranks share one copy of the model
      strategy: {target: src.training.strategy.DDP}        every rank has a copy

`src.distributed.parallel.Sharding` (optim.sharding) sets what FSDP2 shards, and how.
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

from src.distributed.checkpoints import REFUSED, check_sizes, entries, named, read_full, replace_folder, write_manifest
from src.distributed.parallel import gather
from src.io.errors import UserError


class DDP(DDPStrategy):
    """`DDPStrategy` without PyTorch's DDP wrapper: the objective averages the gradients itself, once per step.

    The wrapper's buckets would take the memory of one more copy of the gradients.

    timeout_minutes: how long a rank waits for the others before the job fails
    """

    def __init__(self, *, timeout_minutes: float = 30.0) -> None:
        super().__init__(timeout=_minutes(timeout_minutes))

    def configure_ddp(self) -> None:
        """Broadcast the weights of rank 0."""
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            dist.broadcast(tensor, src=0)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Save on rank 0. Raises OSError on all ranks if it cannot write."""
        failure = None
        try:
            super().save_checkpoint(checkpoint, filepath, storage_options)  # writes on rank 0 only
        except OSError as error:
            failure = _reason(error)
        _raise_on_all_ranks(failure, Path(filepath))

    def join(self) -> None:
        """Create the process group, before Lightning would."""
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()


class FSDP2(ModelParallelStrategy):
    """`ModelParallelStrategy` with data parallelism only, and with atomic checkpoints.

    replicas: copies of the model, each sharded over consecutive ranks (HSDP). With one copy per node, only gradients
        travel between nodes
    timeout_minutes: how long a rank waits for the others before the job fails

    A checkpoint is a folder with one shard per rank, and can be loaded by any number of ranks. All ranks need the same
    file system.
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
                f"trainer.strategy.replicas={self._replicas} must divide the {ranks} processes, and be less: "
                "parallel/ddp gives each process a copy"
            )
        hybrid = self._replicas > 1  # HSDP: Lightning's second mesh dimension shards
        self._data_parallel_size = self._replicas if hybrid else ranks
        self._tensor_parallel_size = ranks // self._data_parallel_size
        super().setup_environment()

    def join(self) -> None:
        """Create the process group, before Lightning would."""
        self._setup_distributed()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Save to a temporary folder, then rename it. Raises OSError on all ranks if one cannot write.

        An older checkpoint at `filepath` stays if that happens.
        """
        path = Path(self.broadcast(filepath))
        temporary = path.with_name(f".{path.name}.tmp")
        _raise_on_all_ranks(self._try_on_rank0(partial(_clear, temporary)), path)
        failure, own_files = None, []
        try:
            super().save_checkpoint(checkpoint, temporary, storage_options)
            own_files = entries(temporary, rank=self.global_rank)
        except (CheckpointException, OSError, RuntimeError) as error:  # CheckpointException is no Exception
            failure = _reason(error)
        by_rank = gather((failure, own_files))
        files = {name: entry for _, rank_files in by_rank for name, entry in rank_files}
        if not any(reason for reason, _ in by_rank):
            failure = self._try_on_rank0(partial(_publish, temporary, path, files))
        try:
            _raise_on_all_ranks(failure, path)
        except OSError:
            self._try_on_rank0(partial(shutil.rmtree, temporary, ignore_errors=True))
            raise

    def _try_on_rank0(self, work: Callable[[], None]) -> str | None:
        """Run `work` on rank 0 only; returns why it failed, None if it did not."""
        if not self.is_global_zero:
            return None
        try:
            work()
        except (OSError, ValueError) as error:
            return _reason(error)
        return None

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder, or the single file of a run with another strategy. Raises UserError for a damaged folder."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            check_sizes(path)
            return super().load_checkpoint(path, weights_only)
        assert self.model is not None
        content, options = read_full(path), StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, dict(content.pop("state_dict")), options=options)
        name_of = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, content.pop("optimizer_states"), strict=True):
            names = [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            set_optimizer_state_dict(self.model, optimizer, named(state, names), options=options)
        return content


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(temporary: Path, path: Path, files: dict[str, dict[str, int]]) -> None:
    write_manifest(temporary, files)
    check_sizes(temporary)  # raises if ranks wrote to different file systems
    replace_folder(temporary, path)


def _raise_on_all_ranks(failure: str | None, path: Path) -> None:
    """Raise OSError on all ranks if any rank passes a failure."""
    if reason := next((text for text in gather(failure) if text), None):
        raise OSError(errno.EIO, f"the checkpoint cannot be written ({reason})", str(path))


def _minutes(number: float) -> timedelta:
    if number <= 0:
        raise UserError(f"timeout_minutes must be more than 0, got {number}")
    return timedelta(minutes=number)


def _reason(error: BaseException) -> str:
    """One line on an error; of a CheckpointException, the first rank's error."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    text = str(error).strip()
    if REFUSED.search(text):
        return "is a disk full?"
    return text.splitlines()[-1] if text else type(error).__name__
