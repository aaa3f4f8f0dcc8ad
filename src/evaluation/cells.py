"""One cell of the table: a split answered by one model with one sampler, scored; and a model's likelihood bound.

sampling = Sampling(loader=loader, num=256, codec=codec, metrics=[node, ...], offers={...}, seed=0, device=device)
stats, captions = evaluate_cell(backbone, sampler, sampling)
stats = evaluate_bound(backbone, Bound(...), sampling)

batches -> prefix -> sampler -> texts -> metrics -> {name: {mean, se, n}}, [{key, text, scores}, ...]
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchmetrics import Metric
from tqdm import tqdm

from src.cli.instantiate import build
from src.io.errors import UserError
from src.metrics.bound import Bound
from src.metrics.caption import CaptionMetric, Stat, summarise
from src.metrics.text import response_counts
from src.samplers.uniform import AnySampler
from src.text.tokenizer import Codec
from src.types import Backbone, Batch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """What all cells of a model share: the samples, the tokenizer, the config nodes of the metrics and their offers."""

    loader: Any
    num: int
    codec: Codec
    metrics: list[dict]
    offers: dict
    seed: int
    device: torch.device

    def build_metrics(self) -> list[Metric]:
        return [build(node, **self.offers).to(self.device) for node in self.metrics]


def evaluate_cell(
    backbone: Backbone, sampler: AnySampler, sampling: Sampling, *, bar: tqdm | None = None
) -> tuple[dict[str, Stat], list[dict]]:
    """Answer all prompts with one sampler: statistics by name, and each caption with its scores."""
    metrics = sampling.build_metrics()
    special = sampling.codec.special
    captions: list[dict] = []
    seconds: list[float] = []
    for batch in first_batches(sampling.loader, sampling.num):
        inputs = batch.to(sampling.device)
        with torch.inference_mode():
            prefix = backbone.encode_prefix(inputs.prefix)
            sampled = sampler(backbone, prefix, special=special, keys=batch.keys, seed=sampling.seed)
        texts = [sampling.codec.decode(ids) for ids in sampled.ids.tolist()]
        seconds.append(sampled.wall_s / len(batch))
        counts = {"forwards": sampled.forwards, "edits": sampled.edits, "remasks": sampled.remasks}
        for row, text in enumerate(texts):
            scores = {name: float(values[row]) for name, values in counts.items()}
            scores |= response_counts(sampled.ids[row].tolist(), special)
            scores |= _scores(metrics, text, batch.records[row])
            captions.append({"key": batch.keys[row], "text": text, "scores": scores})
        for metric in metrics:
            metric.update(texts, batch.records)
        if bar is not None:
            bar.update(len(batch))
    return _statistics(metrics, captions, seconds), captions


def evaluate_bound(
    backbone: Backbone, metric: Bound, sampling: Sampling, *, bar: tqdm | None = None
) -> dict[str, Stat]:
    """The likelihood bound of a model on the reference responses, by name."""
    metric.reset()
    for batch in first_batches(sampling.loader, sampling.num):
        with torch.inference_mode():
            metric.update(backbone, batch.to(sampling.device))
        if bar is not None:
            bar.update(len(batch))
    return metric.compute()


def count_samples(loader: Any, num: int, metrics: list[Metric], *, split: str) -> dict[str, int]:
    """Number of samples `taken`, and of samples `left_out` as damaged; later samples take the place of those.

    Scores the empty text against every record, so that a record that a metric cannot use fails before sampling starts.
    """
    taken = 0
    for batch in first_batches(loader, num):
        taken += len(batch)
        for record in batch.records:
            _scores(metrics, "", record)
    if not taken:
        raise UserError(f"the split {split} has no samples to evaluate")
    if taken < num:
        logger.warning("evaluate.num=%d, but the split %s has only %d samples: evaluating those", num, split, taken)
    left_out = sum(count for (_, reason), count in loader.notes.items() if reason in ("damaged", "missing"))
    return {"taken": taken, "left_out": left_out}


def first_batches(loader: Any, num: int) -> Iterator[Batch]:
    """Batches of the first `num` samples of a loader."""
    left = num
    for batch in loader:
        yield batch.rows(slice(0, left)) if len(batch) > left else batch
        left -= min(left, len(batch))
        if not left:
            return


def _scores(metrics: list[Metric], text: str, record: dict) -> dict[str, float]:
    """Scores of one caption; corpus metrics such as BLEU have none."""
    per_metric = (metric.score(text, record) for metric in metrics if isinstance(metric, CaptionMetric))
    return {name: value for scores in per_metric for name, value in scores.items()}


def _statistics(metrics: list[Metric], captions: list[dict], seconds: list[float]) -> dict[str, Stat]:
    """The metrics' statistics, means of the counts, and seconds per caption (its n is the number of batches)."""
    stats = {name: stat for metric in metrics for name, stat in metric.compute().items()}
    for name in captions[0]["scores"]:
        stats.setdefault(name, summarise([line["scores"][name] for line in captions]))
    return {**stats, "seconds": summarise(seconds)}
