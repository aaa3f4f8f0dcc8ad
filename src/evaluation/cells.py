"""One cell of the table: prompts answered by one model with one sampler, scored; and what a model alone is measured by.

stats, captions = evaluate_cell(backbone, sampler, codec, first_batches(loader, 256), metrics, seed=0)
batches -> prefix -> sampler -> texts -> metrics -> {name: {mean, se, n}}, [{key, text, scores}, ...]
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torchmetrics import Metric

from src.io.errors import UserError
from src.io.progress import Bar
from src.io.words import counted
from src.metrics.caption import CaptionMetric, Stat, summarise
from src.metrics.text import response_counts
from src.models.llada_v import LLaDAV
from src.samplers.base import AnySampler
from src.text.tokenizer import Codec
from src.types import Batch

logger = logging.getLogger(__name__)


def first_batches(loader: Any, num: int, bar: Bar | None = None) -> Iterator[Batch]:
    """Batches of the first `num` samples of a loader. bar: counts the samples of the batches that are done."""
    left = num
    for batch in loader:
        taken = batch.rows(slice(0, left)) if len(batch) > left else batch
        yield taken
        left -= len(taken)
        if bar is not None:
            bar.update(len(taken))
        if not left:
            return


def count_samples(loader: Any, num: int, metrics: Sequence[Metric], *, split: str) -> dict[str, int]:
    """Number of samples `taken`, and of samples `left_out` as damaged; later samples take the place of those."""
    # a record that a metric cannot score fails here, before the first caption
    taken, per_caption = 0, [metric for metric in metrics if isinstance(metric, CaptionMetric)]
    with Bar(total=num, unit="sample", desc="check") as bar:
        for batch in first_batches(loader, num, bar):
            taken += len(batch)
            for metric, record in product(per_caption, batch.records):
                metric.check(record)
    if not taken:
        raise UserError(f"the split {split} has no samples to evaluate")
    if taken < num:
        message = "evaluate.num=%d, but the split %s has only %s: evaluating %s"
        logger.warning(message, num, split, counted(taken, "sample"), "it" if taken == 1 else "those")
    damages = ("damaged", "missing", "unreadable")
    left_out = sum(count for (_, reason), count in loader.notes.items() if reason in damages)
    return {"taken": taken, "left_out": left_out}


def evaluate_cell(
    backbone: LLaDAV,
    sampler: AnySampler,
    codec: Codec,
    batches: Iterable[Batch],
    metrics: Sequence[Metric],
    *,
    seed: int,
) -> tuple[dict[str, Stat], list[dict]]:
    """Statistics by name, and each caption with its scores.

    The statistics are those of the metrics, the means of the counts of every caption (forward calls, tokens, ...), and
    `seconds` per caption, whose n is the number of batches.
    """
    if sampler.compile:
        backbone.compile_blocks()
    device = next(backbone.parameters()).device
    captions: list[dict] = []
    seconds: list[float] = []
    for metric in metrics:
        metric.reset()
    for batch in batches:
        with torch.inference_mode():
            prefix = backbone.encode_prefix(batch.to(device).prefix)
            sampled = sampler(backbone, prefix, special=codec.special, keys=batch.keys, seed=seed)
        ids, texts = sampled.ids.tolist(), [codec.decode(row) for row in sampled.ids.tolist()]
        counts = {"forwards": sampled.forwards, "edits": sampled.edits, "remasks": sampled.remasks}
        scores = [
            {name: float(values[row]) for name, values in counts.items()} | response_counts(ids[row], codec.special)
            for row in range(len(batch))
        ]
        for metric in metrics:
            metric.update(texts, batch.records)
            if isinstance(metric, CaptionMetric):  # a corpus metric such as BLEU has no scores of captions
                scores = [{**old, **new} for old, new in zip(scores, metric.latest, strict=True)]
        rows = zip(batch.keys, texts, scores, strict=True)
        captions += [{"key": key, "text": text, "scores": row} for key, text, row in rows]
        seconds.append(sampled.wall_s / len(batch))
    stats = {name: stat for metric in metrics for name, stat in metric.compute().items()}
    for name in captions[0]["scores"]:
        stats.setdefault(name, summarise([line["scores"][name] for line in captions]))
    return {**stats, "seconds": summarise(seconds)}, captions


def evaluate_model(backbone: LLaDAV, probes: Sequence[Metric], batches: Iterable[Batch]) -> dict[str, Stat]:
    """Statistics of a model on the reference responses, without a sampler: its bound, its looks, its words."""
    device = next(backbone.parameters()).device
    for probe in probes:
        probe.reset()
    for batch in batches:
        with torch.inference_mode():
            for probe in probes:
                probe.update(backbone, batch.to(device))
    return {name: stat for probe in probes for name, stat in probe.compute().items()}
