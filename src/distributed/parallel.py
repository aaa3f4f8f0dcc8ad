"""Collectives, and FSDP2 sharding of a backbone.

    world_size(), rank()             1 and 0 without a process group
    all_reduce_sum(tensor)           the sum over all ranks
    Team().gather(value)             collectives with a timeout of hours
    Sharding().apply(backbone, mesh) each rank keeps a shard of every parameter; units are gathered while in use
    with gathered(backbone): ...     all parameters on every rank, for generation: no rank waits for another inside

The backbone defines its FSDP units: `units()` yields (module, names of its entry points besides `forward`), inner
modules first and the backbone last.
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
BUCKET = 1 << 26  # bytes of gradients in an all-reduce


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of `values` over all ranks. All ranks must call this, with the same shape."""
    if world_size() == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


def gather(value: Any, *, group: Any = None) -> list[Any]:
    """The values of all ranks, in rank order; any picklable object. `Team.gather` waits longer."""
    values: list[Any] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average each gradient over all ranks, except those of sharded parameters, which FSDP2 averages.

    A missing gradient counts as zero; a parameter without a gradient on any rank keeps none.
    """
    replicated = [p for p in parameters if p.requires_grad and not isinstance(p, DTensor)]
    if world_size() == 1 or not replicated:
        return
    counts = all_reduce_sum(torch.tensor([p.grad is not None for p in replicated], device=replicated[0].device).long())
    with_gradient = [parameter for parameter, count in zip(replicated, counts.tolist(), strict=True) if count]
    for parameter in with_gradient:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    buckets: list[list[Tensor]] = []  # of one dtype and up to BUCKET bytes: few large messages are faster
    for gradient in [parameter.grad for parameter in with_gradient if parameter.grad is not None]:
        last = buckets[-1] if buckets else []
        if last and gradient.dtype == last[0].dtype and sum(g.nbytes for g in last) + gradient.nbytes <= BUCKET:
            last.append(gradient)
        else:
            buckets.append([gradient])
    for bucket in buckets:
        if len(bucket) == 1:
            dist.all_reduce(bucket[0])
            bucket[0] /= world_size()
            continue
        mean = all_reduce_sum(torch.cat([gradient.flatten() for gradient in bucket])) / world_size()
        for gradient, values in zip(bucket, mean.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(values.view_as(gradient))


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one; any other as it is. All ranks must call this for a sharded tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class RemoteRankError(RuntimeError):
    """An error that another rank raised."""


class Team:
    """A process group of all ranks for long waits, such as for an expert; separate from the training group.

    All ranks must construct it at the same point, and call the same methods in the same order. hours: timeout of a call
    """

    def __init__(self, *, hours: float = 24.0) -> None:
        self.rank, self.size = rank(), world_size()
        self._group: Any = None
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=hours))

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        return gather(value, group=self._group)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on all ranks; any picklable object."""
        if self.size == 1:
            return value
        message = [value if self.is_rank0 else None]
        dist.broadcast_object_list(message, src=0, group=self._group)
        return message[0]

    def all_reduce_max(self, value: int) -> int:
        """The maximum of `value` over all ranks. Cheap enough for every step."""
        if self.size == 1:
            return value
        maximum = torch.tensor(value)
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=self._group)
        return int(maximum)

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 only; returns its result on all ranks.

        A ValueError or OSError is raised again on rank 0, and as RemoteRankError on the others.
        """
        failure, result = None, None
        if self.is_rank0:
            try:
                result = work()
            except (ValueError, OSError) as error:
                failure = error
        message, result = self.broadcast((failure and f"rank 0: {failure}", result))
        if failure is not None:
            raise failure
        if message is not None:
            raise RemoteRankError(message)
        return result


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How FSDP2 shards a backbone.

    reshard: free a unit's gathered parameters after its forward pass, and gather them again for the backward pass: less
        memory, 1.5 times the traffic
    compute: dtype that parameters are gathered and computed in (`bfloat16`); null: the lower dtype of a mixed trainer
        precision, else that of the parameters. The stored parameters keep their dtype; gradients in another dtype are
        reduced over ranks in float32
    """

    reshard: bool = True
    compute: str | None = None

    def __post_init__(self) -> None:
        if self.compute not in (None, "bfloat16"):
            raise UserError(f"compute must be bfloat16 or null, got {self.compute!r}")

    def apply(self, backbone: Any, mesh: DeviceMesh, *, precision: str = "32-true") -> None:
        """Shard in place. Raises UserError for a parameter in no unit, which would diverge between ranks."""
        mixed = torch.bfloat16 if precision == "bf16-mixed" else None
        dtype = getattr(torch, self.compute) if self.compute else mixed
        reduce_dtype = torch.float32 if dtype else None
        # inputs are not cast: activations have that dtype already, and rotary tables must not be rounded
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
        for module, entries in backbone.units():
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=self.reshard)
            for entry in entries:
                register_fsdp_forward_method(module, entry)
        unsharded = [name for name, p in backbone.named_parameters() if not isinstance(p, DTensor)]
        if unsharded:
            raise UserError(f"{', '.join(unsharded)}: in no unit of the backbone, so not sharded")
        backbone.sharding = self


def is_sharded(module: nn.Module) -> bool:
    return any(isinstance(part, FSDPModule) for part in module.modules())


@contextmanager
def gathered(backbone: Any) -> Iterator[None]:
    """Gather all parameters on every rank, so that ranks may run different numbers of forward calls in the block.

    All ranks must enter and leave. Takes the memory of all parameters in the compute dtype. A backbone that is not
    sharded stays as it is.
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
