"""Which masked tokens to unmask: policies, the scores they rank by, and the draw of the tokens themselves.

B rows, L response positions, V vocabulary, N positions with logits of all rows, M of them scored. Scores do not depend
on the temperature, which would saturate them. A copy of all logits in float64 would take gigabytes, so it is in parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from src.diffusion.noise import PART, Noise
from src.io.errors import UserError


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


def low_confidence(logits: Tensor, rows: Tensor, proposal: Tensor) -> Tensor:
    """(M,) float64 probability of `proposal` (M,) under `rows` (M,) of `logits` (N, V); LLaDA's low-confidence rule."""
    # NOTE: in lower precision many probabilities near 1 are equal, and position would decide instead.
    parts = zip(rows.split(PART), proposal.split(PART), strict=True)
    log_probs = [logits[part].double().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for part, ids in parts]
    return torch.cat(log_probs).exp()


def margin(logits: Tensor, rows: Tensor, proposal: Tensor) -> Tensor:
    """(M,) float64 highest minus second highest probability; `proposal` is not used."""
    best = [logits[part].double().softmax(-1).topk(2, dim=-1).values for part in rows.split(PART)]
    first, second = torch.cat(best).unbind(-1)
    return first - second


def negative_entropy(logits: Tensor, rows: Tensor, proposal: Tensor) -> Tensor:
    """(M,) float64 sum of p log p, at most 0; `proposal` is not used."""
    return -torch.cat([torch.special.entr(logits[part].double().softmax(-1)).sum(-1) for part in rows.split(PART)])


# Scores that are functions of the logits; the score "random" is drawn from the row's noise instead.
SCORES = {"probability": low_confidence, "margin": margin, "entropy": negative_entropy}


def draw(logits: Tensor, where: Tensor, *, temperature: float, noise: Noise) -> Tensor:
    """(N,) ids by the Gumbel-max rule, from logits (N, V) at the N true positions of `where` (B, L) bool."""
    parts = zip(logits.split(PART), noise.gumbel(where, logits.shape[1]), strict=True)
    ids = [(part.double() + temperature * gumbel).argmax(-1) for part, gumbel in parts]
    return torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64, device=logits.device)


def keep_nucleus(logits: Tensor, *, temperature: float, top_p: float) -> None:
    """Set logits (N, V) outside the nucleus, the smallest set of probability `top_p`, to -inf (arXiv 1904.09751)."""
    for part in logits.split(PART):
        probs, order = (part.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        outside = probs.cumsum(-1) - probs >= top_p
        part.masked_fill_(torch.zeros_like(outside).scatter_(-1, order, outside), -torch.inf)
