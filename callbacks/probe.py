"""A probe of the model on validation texts, logged during training: any metric of a model alone, without a sampler.

    callbacks: {looks: {target: callbacks.probe.Probe, every_n_steps: 150, num: 64, metric:
                        {target: src.metrics.fixing.Looks, levels: [0, 0.1, 0.5]}}}

    first `num` validation samples -> metric.update(backbone, batch) -> metric.compute() -> `p_break/t=0`, ...

`src.metrics.fixing.Looks`: a model that decodes with a reviser is asked for texts with few masks and none; a P(break)
that rises towards level 0 says that its training did not show it such texts.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from torchmetrics import Metric

from callbacks.ema import weights_for
from src.distributed.parallel import gathered
from src.io.errors import UserError
from src.models.inference import evaluating
from src.types import Batch


class Probe(L.Callback):
    """Logs the means of `metric` on `num` fixed samples every `every_n_steps` optimizer steps; nothing without
    validation data."""

    def __init__(self, *, metric: Metric, every_n_steps: int, num: int = 64) -> None:
        super().__init__()
        if min(every_n_steps, num) < 1:
            raise UserError(f"every_n_steps and num must be at least 1, got {every_n_steps} and {num}")
        self.metric, self.every_n_steps, self.num = metric, every_n_steps, num
        metric.distributed_available_fn = lambda: False  # rank 0 alone computes it
        self.last_step = 0  # step logged last, so a resumed run does not log it twice
        self.batches: list[Batch] = []

    @property
    def state_key(self) -> str:
        return f"Probe({type(self.metric).__name__})"  # a run may have several probes

    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_step = state_dict["last_step"]

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.batches, missing = [], self.num
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            self.batches.append(batch.rows(slice(0, missing)))
            missing -= len(self.batches[-1])
            if not missing:
                break

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        step = trainer.global_step
        if not self.batches or step % self.every_n_steps or step == self.last_step:
            return
        self.last_step = step
        backbone: Any = pl_module.backbone
        metric = self.metric.to(pl_module.device)
        metric.reset()
        with weights_for(trainer, "evaluate"), gathered(backbone):  # on all ranks, so that rank 0 can then ask alone
            if not trainer.is_global_zero:
                return
            with evaluating(pl_module):
                for batch in self.batches:
                    metric.update(backbone, batch.to(pl_module.device))
        # `p_break at t=0` is the chart `p_break/t=0`: TensorBoard groups charts by what stands before a slash
        values = {name.replace(" at ", "/"): stat["mean"] for name, stat in metric.compute().items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
