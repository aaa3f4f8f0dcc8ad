"""EMA: an exponential moving average of the trained weights, and what is done with it instead of the raw weights.

    callbacks: {ema: {target: callbacks.ema.EMA, decay: 0.9999, use_for: [evaluate, draft, export]}}

    optimizer step -> average += (1 - decay) * (weights - average), in float32, each rank its own shards
    with weights_for(trainer, "draft"): ...      inside, the model has the average, if `use_for` names drafting

Training itself never sees the average. Checkpoints hold both: the raw weights in `state_dict`, the average in `ema`
(in a sharded checkpoint under `state_dict` too, see `src/distributed/checkpoints.py`). `src.export` exports either.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from src.io.errors import UserError

USES = ("evaluate", "draft", "export")


class EMA(L.Callback):
    """Averages after every optimizer step, the n-th (from 1) with decay min(decay, (1 + n) / (10 + n)).

    The warm-up is that of the released ProSeCo runs. A step that is skipped, as its gradients are not finite, does not
    count. Must come before the callbacks that use the average, and before those that save checkpoints.

    use_for: where the average replaces the raw weights, any of `evaluate` (validation, looks, samples), `draft` (online
        rounds) and `export` (the run's model folder). Meanwhile the raw weights are kept beside it
    """

    def __init__(self, *, decay: float, use_for: Sequence[str] = USES) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise UserError(f"callbacks.ema.decay must be at least 0 and less than 1, got {decay}")
        if unknown := [use for use in use_for if use not in USES]:
            raise UserError(f"callbacks.ema.use_for: {unknown[0]!r} is none of {', '.join(USES)}")
        self.decay, self.use_for = decay, tuple(use_for)
        self.average: dict[str, Tensor] = {}  # by name of the parameter; float32, a DTensor if the parameter is one
        self.num_updates = 0
        self._step = 0  # at the start of the batch
        self._validation = ExitStack()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {"ema": self.average, "ema_updates": self.num_updates}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.num_updates = checkpoint["ema_updates"]
        self._start_from(checkpoint["ema"], pl_module)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # NOTE: one process loads checkpoints before this hook and moves the model to its device after it, FSDP2 later
        trained = {name: p.detach() for name, p in pl_module.named_parameters() if p.requires_grad}
        self._start_from(self.average or trained, pl_module)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        if trainer.global_step == self._step:
            return
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, parameter in pl_module.named_parameters():
            if name in self.average:
                local(self.average[name]).lerp_(local(parameter).float(), 1 - decay)

    # Around each batch, not the whole validation, as a stop saves a checkpoint between two batches.

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        self._validation.enter_context(weights_for(trainer, "evaluate"))

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        self._validation.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._validation.close()

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[bool]:
        """Context in which the module has the average; then it has its raw weights again, also after an error."""
        _reshard(module)
        raw = {name: p.detach().clone() for name, p in module.named_parameters() if name in self.average}
        try:
            _overwrite(module, self.average)
            yield True
        finally:
            _reshard(module)
            _overwrite(module, raw)

    def _start_from(self, tensors: Mapping[str, Tensor], module: nn.Module) -> None:
        """Make copies of `tensors` the average, sharded and placed as the parameters are."""
        parameters = dict(module.named_parameters())
        self.average = {}
        for name, tensor in tensors.items():
            like = parameters[name]
            if isinstance(like, DTensor) and not isinstance(tensor, DTensor):  # of a checkpoint of one process
                tensor = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
            self.average[name] = tensor.to(like.device, torch.float32, copy=True)


def ema_of(trainer: L.Trainer) -> EMA | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, EMA)), None)  # type: ignore[attr-defined]


@contextmanager
def weights_for(trainer: L.Trainer, use: str) -> Iterator[bool]:
    """Context in which the model has the weights for `use`, and but for an export computes in the trainer's precision.

    Its value says whether the weights are averaged. All ranks must enter and leave, outside of `gathered`.
    """
    ema = ema_of(trainer)
    weights = ema.applied(trainer.lightning_module) if ema and use in ema.use_for else nullcontext(False)
    precision = nullcontext() if use == "export" else trainer.precision_plugin.forward_context()
    with weights as averaged, precision:
        yield averaged


def local(tensor: Tensor) -> Tensor:
    """This rank's part: a call for each DTensor of a large model would take longer than the arithmetic."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _reshard(module: nn.Module) -> None:
    """Free gathered parameters, which would hide the shards and keep the old values in use."""
    for unit in module.modules():
        if isinstance(unit, FSDPModule):
            unit.reshard()


@torch.no_grad()
def _overwrite(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in module.named_parameters():
        if name in values:
            parameter.copy_(values[name])
