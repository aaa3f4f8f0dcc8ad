"""The processes of a run: who is who, sums over all of them, and how a backbone is shared among them (FSDP2).

    world(), rank()                  one process alone is rank 0 of 1, without any set-up
    summed(tensor)                   the sum over all ranks, on all of them
    Sharding().apply(backbone, mesh) each rank keeps a part of every parameter, and gathers a unit while it is used

A backbone says what its units are: `units()` yields (module, names of its other entry points), inner ones first and
itself last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if _distributed() else 0


def world() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if _distributed() else 1


def summed(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks; every rank has to ask, with the same shape."""
    if world() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make each gradient its mean over all ranks, but for sharded parameters, whose gradients are means already.

    A parameter without a gradient on some rank counts as zero there.
    """
    if world() == 1:
        return
    whole = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    for parameter in whole:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= world()


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How FSDP2 shares a backbone.

    reshard: free a unit's gathered parameters after its forward pass, and gather them again for the backward pass: less
        memory, half as much traffic again
    compute: type that parameters are gathered and computed in (`bfloat16`), null: their own; the parameters stay as
        they are, and gradients are added over ranks in float32
    """

    reshard: bool = True
    compute: str | None = None

    def __post_init__(self) -> None:
        if self.compute not in (None, "bfloat16", "float16"):
            raise ValueError(f"compute must be bfloat16, float16 or null, got {self.compute!r}")

    def apply(self, backbone: Any, mesh: DeviceMesh) -> None:
        """Shard in place. Raises ValueError where a parameter belongs to no unit: it would differ among the ranks."""
        dtype = getattr(torch, self.compute) if self.compute else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
        for module, entries in backbone.units():
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=self.reshard)
            for entry in entries:
                register_fsdp_forward_method(module, entry)
        loose = [name for name, p in backbone.named_parameters() if not isinstance(p, DTensor)]
        if loose:
            raise ValueError(f"{', '.join(loose)}: in no unit of the backbone, so it would not be sharded")


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(part, FSDPModule) for part in module.modules())


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
