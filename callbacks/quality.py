"""Quality of captions against tokens per step, at each validation: the curve that a self-correcting model is for.

    conf=stage1,quality      scenes; a metric of another kind, speeds and samples by callbacks.quality

    first `num` validation samples -> sampler at each speed -> metric -> `quality/tokens_per_step=4`, ...
      -> `quality/curve`: a figure, today's curve over those of earlier validations

A look writes `num` captions per speed, each at length / speed forward calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L

from callbacks.look import Look
from src.evaluation.cells import evaluate_cell, first_batches
from src.evaluation.pareto import speed_figure
from src.io.errors import UserError
from src.io.progress import Bar
from src.metrics.caption import CaptionMetric
from src.samplers.sampler import Sampler
from src.text.tokenizer import Codec


class Quality(Look):
    """metric: of captions; name: which of its statistics; every_n_steps: null is at each validation"""

    def __init__(
        self,
        *,
        metric: CaptionMetric,
        sampler: Sampler,
        codec: Codec,
        tokens_per_step: Sequence[int],
        name: str = "quality",
        every_n_steps: int | None = None,
        num: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, num=num)
        if name not in metric.names:
            raise UserError(f"name: the metric has no {name!r}; there are {', '.join(metric.names)}")
        self.samplers = {speed: sampler.with_steps(tokens_per_step=speed) for speed in tokens_per_step}
        self.metric, self.codec, self.name, self.seed = metric, codec, name, seed
        metric.distributed_available_fn = lambda: False  # rank 0 alone computes it
        self.curves: dict[int, list[float]] = {}  # step -> a mean for each speed

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "curves": self.curves}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.curves = state_dict["curves"]

    def look(self, trainer: L.Trainer, pl_module: Any) -> None:
        count, means = sum(map(len, self.batches)), []
        with Bar(total=len(self.samplers) * count, unit="caption", desc="quality") as bar:
            for sampler in self.samplers.values():
                batches = first_batches(self.batches, count, bar)
                metrics = [self.metric.to(pl_module.device)]
                answers = (pl_module.backbone, sampler, self.codec, batches, metrics)
                means.append(evaluate_cell(*answers, seed=self.seed)[0][self.name]["mean"])
        self.curves[trainer.global_step] = means
        values = {f"{self.name}/tokens_per_step={n}": mean for n, mean in zip(self.samplers, means, strict=True)}
        self.log_scalars(trainer, values)
        figure = speed_figure(list(self.samplers), self.curves, metric=self.name)
        self.writer(trainer).add_figure(f"{self.name}/curve", figure, trainer.global_step)
