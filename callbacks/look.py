"""Base of the callbacks that look at the model on a few validation samples during training: probe, samples, quality.

step n, 2n, ... and the last one (or the end of each validation)
  -> the first `num` validation samples, the averaged weights if there are any -> `look` on rank 0 -> loggers
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.ema import weights_for
from src.distributed.parallel import gathered
from src.evaluation.cells import first_batches
from src.io.errors import UserError
from src.models.inference import evaluating
from src.types import Batch


class Look(L.Callback):
    """Calls `look` every `every_n_steps` optimizer steps and after the last; None: at the end of each validation.

    num: validation samples, always the same; without any, nothing is done
    """

    def __init__(self, *, every_n_steps: int | None, num: int) -> None:
        super().__init__()
        if min(every_n_steps or num, num) < 1 or every_n_steps == 0:
            raise UserError(f"every_n_steps and num must be at least 1, got {every_n_steps} and {num}")
        self.every_n_steps, self.num = every_n_steps, num
        self.last_step = 0  # step of the last look, so a resumed run does not log it twice
        self.batches: list[Batch] = []

    @abstractmethod
    def look(self, trainer: L.Trainer, pl_module: Any) -> None:
        """On rank 0, in eval mode and without gradients. May run forward calls of `pl_module.backbone`, and log."""

    def log_scalars(self, trainer: L.Trainer, values: Mapping[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(dict(values), step=trainer.global_step)

    def writer(self, trainer: L.Trainer) -> Any:
        """TensorBoard's `SummaryWriter`, for texts and images. Raises UserError if nothing is logged there."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                return logger.experiment
        raise UserError(f"{type(self).__name__} logs to TensorBoard: the trainer needs a TensorBoardLogger")

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_step = state_dict["last_step"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
        self.batches = list(first_batches(loader, self.num))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        step = trainer.global_step
        if self.every_n_steps and (step % self.every_n_steps == 0 or step == trainer.max_steps):
            self._look(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.every_n_steps is None:
            with torch.inference_mode(False), torch.no_grad():  # Lightning's mode would stay with gathered parameters
                self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.batches or trainer.global_step == self.last_step:
            return
        self.last_step = trainer.global_step
        backbone: Any = pl_module.backbone
        with weights_for(trainer, "evaluate"), gathered(backbone):  # on all ranks, so that rank 0 can then look alone
            if trainer.is_global_zero:
                with evaluating(pl_module), torch.no_grad():
                    self.look(trainer, pl_module)
