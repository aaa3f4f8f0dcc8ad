"""The processes of a run: who is who, what they tell each other, and how they share a backbone (FSDP2).

    world(), rank()                  one process alone is rank 0 of 1, without any set-up
    summed(tensor)                   the sum over all ranks, on all of them
    Team().gather(value)             where ranks may wait for each other for hours
    Sharding().apply(backbone, mesh) each rank keeps a part of every parameter, and gathers a unit while it is used
    with gathered(backbone): ...     the whole of it on every rank, for generation: no rank waits for another in there

A backbone says what its units are: `units()` yields (module, names of its other entry points), inner ones first and
itself last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from src.io.errors import UserError

T = TypeVar("T")
BUCKET = 1 << 26  # bytes of gradients in a message


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


def gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order; anything that can be pickled. For waits of hours there is `Team`."""
    found: list[Any] = [value] * world()
    if world() > 1:
        dist.all_gather_object(found, value)
    return found


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make each gradient its mean over all ranks, but for sharded parameters, whose gradients are means already.

    A parameter without a gradient on some rank counts as zero there; without one on any, it keeps none.
    """
    copied = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if world() == 1 or not copied:
        return
    there = summed(torch.tensor([p.grad is not None for p in copied], device=copied[0].device).long())
    found = [parameter for parameter, count in zip(copied, there.tolist(), strict=True) if count]
    for parameter in found:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for part in _parts([parameter.grad for parameter in found if parameter.grad is not None]):
        if len(part) == 1:
            dist.all_reduce(part[0])
            part[0] /= world()
            continue
        mean = summed(torch.cat([gradient.flatten() for gradient in part])) / world()
        for gradient, values in zip(part, mean.split([gradient.numel() for gradient in part]), strict=True):
            gradient.copy_(values.view_as(gradient))


def _parts(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type in a row, up to BUCKET bytes together: many small messages would take longer than a few."""
    part: list[Tensor] = []
    for tensor in tensors:
        if part and (tensor.dtype != part[0].dtype or sum(some.nbytes for some in part) + tensor.nbytes > BUCKET):
            yield part
            part = []
        part.append(tensor)
    if part:
        yield part


def whole(tensor: Tensor) -> Tensor:
    """A tensor as one process would have it; of a sharded one every rank has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class RemoteRankError(RuntimeError):
    """What went wrong on another rank."""


class Team:
    """All ranks where they may wait for each other for hours, as for an expert: apart from the group that trains.

    Every rank has to make one at the same place, and to call the same methods in the same order.

    hours: how long a rank waits for the others before it fails
    """

    def __init__(self, *, hours: float = 24.0) -> None:
        self.rank, self.size = rank(), world()
        self._group: Any = None
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=hours))

    @property
    def first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order; anything that can be pickled."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._group)
        return found

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value."""
        if self.size == 1:
            return value
        told = [value if self.first else None]
        dist.broadcast_object_list(told, src=0, group=self._group)
        return told[0]

    def all_reduce_max(self, value: int) -> int:
        """The greatest value of any rank. Cheap enough for every step."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self._group)
        return int(found)

    def on_rank0(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, which alone does it; what it raises there stops all ranks."""
        wrong, found = None, None
        if self.first:
            try:
                found = work()
            except (ValueError, OSError) as error:
                wrong = error
        told, found = self.broadcast((wrong and f"rank 0: {wrong}", found))
        if wrong is not None:
            raise wrong
        if told is not None:
            raise RemoteRankError(told)
        return found


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How FSDP2 shares a backbone.

    reshard: free a unit's gathered parameters after its forward pass, and gather them again for the backward pass: less
        memory, half as much traffic again
    compute: type that parameters are gathered and computed in (`bfloat16`); null: the lower type of the trainer's
        precision where it is mixed, else their own. The parameters stay as they are, and gradients are added over ranks
        in float32 if they are of another type than the parameters
    """

    reshard: bool = True
    compute: str | None = None

    def __post_init__(self) -> None:
        if self.compute not in (None, "bfloat16"):
            raise UserError(f"compute must be bfloat16 or null, got {self.compute!r}")

    def apply(self, backbone: Any, mesh: DeviceMesh, *, precision: str = "32-true") -> None:
        """Shard in place. Raises UserError where a parameter belongs to no unit: it would differ among the ranks."""
        mixed = torch.bfloat16 if precision == "bf16-mixed" else None
        dtype = getattr(torch, self.compute) if self.compute else mixed
        # inputs stay as they are: activations have that type anyway, and rotary tables must not be rounded to it
        reduced = torch.float32 if dtype else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduced, cast_forward_inputs=False)
        for module, entries in backbone.units():
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=self.reshard)
            for entry in entries:
                register_fsdp_forward_method(module, entry)
        loose = [name for name, p in backbone.named_parameters() if not isinstance(p, DTensor)]
        if loose:
            raise UserError(f"{', '.join(loose)}: in no unit of the backbone, so it would not be sharded")
        backbone.sharding = self


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(part, FSDPModule) for part in module.modules())


@contextmanager
def gathered(backbone: Any) -> Iterator[None]:
    """The whole backbone on every rank: in the block ranks may run it differently often. A rank alone changes nothing.

    All ranks have to enter and to leave. It takes the memory of all parameters, in the type that they are computed in.
    """
    units = [part for part in backbone.modules() if isinstance(part, FSDPModule)]
    if not units:
        yield
        return
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
    for pending in [unit.unshard(async_op=True) for unit in units]:
        if pending is not None:
            pending.wait()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(backbone.sharding.reshard, recurse=False)


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
