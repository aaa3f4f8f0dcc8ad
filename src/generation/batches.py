"""Responses batch by batch: readable samples of the entries, and one call of the sampler per batch.

with memory_of(batch_size):
    for samples in read_batches(entries, batch_size=16, caption=None, done=keys, outcome=outcome, bar=bar):
        sampled = caption_batch(backbone, batch, sampler, codec, seed=0)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from datamodules.shards import Sample
from src.generation.requests import Entry
from src.io.errors import UserError
from src.io.images import ImageProblem
from src.samplers.uniform import AnySampler
from src.text.tokenizer import Codec
from src.types import Batch, Prefix, Sampled

logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """Responses written as (key, text), the number of entries skipped as already written, keys of unreadable ones."""

    texts: list[tuple[str, str]] = field(default_factory=list)
    skipped: int = 0
    unreadable: list[str] = field(default_factory=list)


def read_batches(
    entries: Iterator[Entry], *, batch_size: int, caption: str | None, done: set[str], outcome: Outcome, bar: tqdm
) -> Iterator[list[Sample]]:
    """Batches of readable samples that have no response yet; counts the others in `outcome`.

    caption: the text to correct, which becomes each sample's reference
    """
    samples: list[Sample] = []
    for key, read in entries:
        if key in done:
            outcome.skipped += 1
            bar.update()
            continue
        try:
            sample = read()
        except ImageProblem as problem:
            logger.warning("%s: %s", key, problem)
            outcome.unreadable.append(key)
            bar.update()
            continue
        sample.record["captions"] = [{"text": caption or ""}]
        samples.append(sample)
        if len(samples) == batch_size:
            yield samples
            samples = []
    if samples:
        yield samples


def caption_batch(
    backbone: Any,
    batch: Batch,
    sampler: AnySampler,
    codec: Codec,
    *,
    seed: int,
    correct: bool = False,
    suffix: Tensor | None = None,
    trace: bool = False,
    max_positions: int | None = None,
) -> Sampled:
    """Responses for a batch.

    correct: start from the responses of the batch instead of masks
    suffix: ids after every response
    max_positions: positions that the model was made for, if known; longer rows are warned about
    """
    start = batch.response if correct else None
    length = sampler.length + (0 if suffix is None else len(suffix))
    with torch.inference_mode():
        prefix = backbone.encode_prefix(batch.prefix)
        _warn_if_long(batch.keys, prefix, length, max_positions)
        return sampler(
            backbone,
            prefix,
            start=start,
            suffix=suffix,
            special=codec.special,
            keys=batch.keys,
            seed=seed,
            trace=trace,
        )


@contextmanager
def memory_of(batch_size: int) -> Iterator[None]:
    """Turn an out-of-memory error into a UserError that says what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        raise UserError(
            f"a batch of {batch_size} does not fit into memory; lower batch_size or length, then repeat the command: "
            "it continues after the lines already written"
        ) from error


def _warn_if_long(keys: list[str], prefix: Prefix, length: int, max_positions: int | None) -> None:
    """Log the rows whose prefix and `length` tokens after it exceed the model's positions."""
    prefix_lengths = [prefix.embeds.shape[1]] * len(keys) if prefix.mask is None else prefix.mask.sum(1).tolist()
    for key, tokens in zip(keys, prefix_lengths, strict=True):
        if max_positions is not None and tokens + length > max_positions:
            logger.warning(
                "%s: %d prompt tokens and %d after them exceed the model's %d positions",
                key,
                tokens,
                length,
                max_positions,
            )
