"""Lightning strategies DDP and FSDP2, adapted; each has a config layer, as in `conf=stage1,parallel/fsdp2`.

With DDP every rank has a copy of the model, with FSDP2 all ranks share one; `src.distributed.parallel.Sharding`
(optim.sharding) sets what FSDP2 shards, and how.
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
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from src.distributed.checkpoints import EMA, publish_folder, read_average, read_full, written_files
from src.distributed.parallel import gather
from src.io.errors import UserError


class DDP(DDPStrategy):
    """`DDPStrategy` without PyTorch's DDP wrapper: the objective averages the gradients itself, once per step.

    The wrapper's buckets would take the memory of one more copy of the gradients.

    timeout_minutes: how long a rank waits for the others before the job fails
    """

    def __init__(self, *, timeout_minutes: float = 30.0) -> None:
        self.timeout = timedelta(minutes=timeout_minutes)
        super().__init__(timeout=self.timeout)

    def configure_ddp(self) -> None:
        assert self.model is not None
        for tensor in self.model.state_dict().values():
            dist.broadcast(tensor, src=0)

    def join(self) -> None:
        self.setup_environment()


class FSDP2(ModelParallelStrategy):
    """`ModelParallelStrategy` with data parallelism only, and with atomic checkpoints.

    replicas: copies of the model, each sharded over consecutive ranks (HSDP). With one copy per node, only gradients
        travel between nodes
    timeout_minutes: how long a rank waits for the others before the job fails

    A checkpoint is a folder with one shard per rank, and can be loaded by any number of ranks. All ranks need the same
    file system.
    """

    def __init__(self, *, replicas: int = 1, timeout_minutes: float = 30.0) -> None:
        self.timeout = timedelta(minutes=timeout_minutes)
        super().__init__(timeout=self.timeout)
        self._replicas = replicas

    def setup_environment(self) -> None:
        ranks = self.num_nodes * self.num_processes
        if self._replicas < 1 or ranks % self._replicas or 1 < self._replicas == ranks:
            raise UserError(
                f"trainer.strategy.replicas={self._replicas} must divide the {ranks} processes, and be less: "
                "parallel/ddp gives each process a copy"
            )
        hybrid = self._replicas > 1  # HSDP: Lightning's second mesh dimension shards
        self._data_parallel_size = self._replicas if hybrid else ranks
        self._tensor_parallel_size = ranks // self._data_parallel_size
        super().setup_environment()

    def join(self) -> None:
        self._setup_distributed()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        path = Path(self.broadcast(filepath))
        temporary = path.with_name(f".{path.name}.tmp")
        if self.is_global_zero:
            shutil.rmtree(temporary, ignore_errors=True)
        self.barrier()
        checkpoint["state_dict"] |= {EMA + name: shard for name, shard in checkpoint.pop("ema", {}).items()}
        try:
            super().save_checkpoint(checkpoint, temporary, storage_options)
        except CheckpointException as error:  # raised on all ranks; it is no Exception
            (failure, _), *_ = error.failures.values()
            reason = f"the checkpoint cannot be written; is a disk full? ({str(failure).partition(chr(10))[0]})"
            raise OSError(errno.EIO, reason, str(path)) from error
        files = {}
        for written in gather(written_files(temporary, rank=self.global_rank)):
            files |= written
        if self.is_global_zero:
            publish_folder(temporary, path, files)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a folder, or the single file of a run with another strategy."""
        path = Path(self.broadcast(checkpoint_path))
        assert self.model is not None
        if path.is_dir():
            return {**super().load_checkpoint(path, weights_only), "ema": read_average(path, self.model)}
        content, options = read_full(path), StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, dict(content.pop("state_dict")), options=options)
        name_of = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, content.pop("optimizer_states"), strict=True):
            # one process numbers the parameters in the optimizer's order; torch expects their names
            names = [name_of[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            named = {
                "state": {names[number]: values for number, values in state["state"].items()},
                "param_groups": [
                    {**group, "params": [names[number] for number in group["params"]]}
                    for group in state["param_groups"]
                ],
            }
            set_optimizer_state_dict(self.model, optimizer, named, options=options)
        return content
