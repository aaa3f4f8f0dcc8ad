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

from callbacks.look import Look


class Probe(Look):
    """Logs the means of `metric` on `num` fixed samples."""

    def __init__(self, *, metric: Metric, every_n_steps: int | None, num: int = 64) -> None:
        super().__init__(every_n_steps=every_n_steps, num=num)
        self.metric = metric
        metric.distributed_available_fn = lambda: False  # rank 0 alone computes it

    @property
    def state_key(self) -> str:
        return f"Probe({type(self.metric).__name__})"  # a run may have several probes

    def look(self, trainer: L.Trainer, pl_module: Any) -> None:
        metric = self.metric.to(pl_module.device)
        metric.reset()
        for batch in self.batches:
            metric.update(pl_module.backbone, batch.to(pl_module.device))
        self.log_scalars(trainer, {chart_name(name): stat["mean"] for name, stat in metric.compute().items()})


def chart_name(name: str) -> str:
    """`p_break at t=0` as `p_break/t=0`, `hidden word=shape` as `hidden word/shape`, as a slash makes groups."""
    return name.replace(" at ", "/") if " at " in name else name.replace("=", "/")
