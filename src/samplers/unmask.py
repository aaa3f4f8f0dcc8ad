"""Which masked tokens to unmask: policies, the scores they rank by, and the draw of the tokens themselves.

B rows, L response positions, V vocabulary, N positions with logits. Scores do not depend on the temperature, which
would saturate them. A copy of all logits in float64 would take gigabytes, so it is in parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from src.diffusion.noise import PART, Noise
from src.io.errors import UserError
from src.types import SpecialIds


class Unmask(Protocol):
    """A policy: `select` chooses some of the `eligible` (B, L) bool positions of each row.

    confidence: (B, L) float64, the score of each position
    count:      (B,) the scheduled number
    chance:     (B,) float64, probability of each position to be unmasked, for policies that draw
    noise:      for policies that draw
    scores:     the values of `Sampler.score` that the policy can use; empty if it does not use a score
    scheduled:  whether the policy follows `count`
    """

    scores: ClassVar[tuple[str, ...]]

    @property
    def scheduled(self) -> bool: ...

    def select(self, confidence: Tensor, eligible: Tensor, count: Tensor, chance: Tensor, noise: Noise) -> Tensor: ...


@dataclass(frozen=True)
class TopK:
    """The scheduled number of most confident positions; among equal ones the leftmost."""

    scores: ClassVar[tuple[str, ...]] = ("probability", "margin", "entropy", "random")
    scheduled: ClassVar[bool] = True

    def select(self, confidence: Tensor, eligible: Tensor, count: Tensor, chance: Tensor, noise: Noise) -> Tensor:
        return top(confidence, eligible, count)


@dataclass(frozen=True)
class Threshold:
    """Every position whose confidence reaches `tau`, and at least the scheduled number, or one if `scheduled` is false.

    Fast-dLLM, arXiv 2505.22618.
    """

    tau: float
    scheduled: bool = True
    scores: ClassVar[tuple[str, ...]] = ("probability", "margin")

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise UserError(f"tau must be above 0 and at most 1, got {self.tau}")

    def select(self, confidence: Tensor, eligible: Tensor, count: Tensor, chance: Tensor, noise: Noise) -> Tensor:
        if not self.scheduled:
            count = count.clamp(max=1)
        return top(confidence, eligible, count) | (eligible & (confidence >= self.tau))


@dataclass(frozen=True)
class Factor:
    """The n most confident positions, n the largest with (n + 1)(1 - c_n) < factor; c_n is the n-th highest confidence.

    Fast-dLLM's other rule, and at least as many as with `Threshold`.
    """

    factor: float
    scheduled: bool = True
    scores: ClassVar[tuple[str, ...]] = ("probability",)

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise UserError(f"factor must be above 0, got {self.factor}")

    def select(self, confidence: Tensor, eligible: Tensor, count: Tensor, chance: Tensor, noise: Noise) -> Tensor:
        if not self.scheduled:
            count = count.clamp(max=1)
        ordered = confidence.masked_fill(~eligible, -torch.inf).sort(dim=1, descending=True).values
        number = torch.arange(1, eligible.shape[1] + 1, device=eligible.device)  # n
        fits = (number + 1) * (1 - ordered) < self.factor  # false where the confidence is -inf
        return top(confidence, eligible, (fits * number).amax(1).maximum(count))


@dataclass(frozen=True)
class Bernoulli:
    """Each position independently, with probability `chance`: MDLM's ancestral sampler (arXiv 2406.07524)."""

    scores: ClassVar[tuple[str, ...]] = ()
    scheduled: ClassVar[bool] = False

    def select(self, confidence: Tensor, eligible: Tensor, count: Tensor, chance: Tensor, noise: Noise) -> Tensor:
        return eligible & (noise.uniform(eligible) < chance[:, None])


def top(confidence: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """(B, L) bool: the `count` (B,) most confident eligible positions; among equal ones the leftmost."""
    order = confidence.masked_fill(~eligible, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return eligible & (order.argsort(dim=1) < count[:, None])


def log_probability(logits: Tensor, ids: Tensor) -> Tensor:
    """(N,) float64 log-probability of `ids` (N,) under logits (N, V)."""
    # NOTE: in lower precision many probabilities near 1 are equal, and position would decide instead.
    parts = zip(logits.split(PART), ids.split(PART), strict=True)
    return torch.cat([part.double().log_softmax(-1).gather(-1, of[:, None])[:, 0] for part, of in parts])


def margin(logits: Tensor) -> Tensor:
    """(N,) float64 highest minus second highest probability of logits (N, V)."""
    best = [part.double().softmax(-1).topk(2, dim=-1).values for part in logits.split(PART)]
    first, second = torch.cat(best).unbind(-1)
    return first - second


def negative_entropy(logits: Tensor) -> Tensor:
    """(N,) float64 sum of p log p, at most 0, of logits (N, V)."""
    return -torch.cat([torch.special.entr(part.double().softmax(-1)).sum(-1) for part in logits.split(PART)])


# Scores other than the probability of a proposal and "random", which is drawn from the row's noise.
SCORES = {"margin": margin, "entropy": negative_entropy}


def draw(
    logits: Tensor,
    rows: Tensor,
    at: Tensor,
    where: Tensor,
    *,
    special: SpecialIds,
    temperature: float,
    noise: Noise,
    top_p: float = 1,
) -> Tensor:
    """(N,) ids by the Gumbel-max rule, never the mask or an id beyond the tokenizer's.

    logits: (M, V), of which `rows` (N,) are those of the positions `at` (N,) of the flattened (B, L)
    where: (B, L) bool, a row that is true somewhere uses up a call of `noise`
    top_p: draw from the smallest set of tokens that has this probability (nucleus, arXiv 1904.09751)
    """
    ids = []
    for part, gumbel in zip(rows.split(PART), noise.gumbel(where, special.vocab_size, at=at), strict=False):
        own = logits[part, : special.vocab_size].double()
        own[:, special.mask] = -torch.inf
        if top_p < 1:
            own = nucleus(own, temperature=temperature, top_p=top_p)
        ids.append((own + temperature * gumbel).argmax(-1))
    return torch.cat(ids) if ids else torch.zeros_like(at)


def nucleus(logits: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Logits (N, V) float64, -inf outside the smallest set of probability `top_p`."""
    probs, order = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    outside = probs.cumsum(-1) - probs >= top_p
    return logits.masked_fill(torch.zeros_like(outside).scatter_(-1, order, outside), -torch.inf)
