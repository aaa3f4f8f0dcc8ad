"""Which masked tokens to unmask: scores, policies, and the draw of the tokens themselves.

    proposal = draw(logits, temperature=0.7, noise=noise, counts=[3, 5])    (N,) token ids
    score = low_confidence(logits, rows, proposal)                          (M,) probability of each proposal
    TopK().select(score, eligible, count)                                   (B, L) bool, what to unmask

N counts the eligible positions of all rows in row-major order. A score never sees the temperature,
which would saturate it. All work in float64, a part at a time: a copy of all logits would take gigabytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from src.diffusion.noise import Noise
from src.io.errors import UserError

PART = 64  # rows of logits that are held in float64 at once


class Unmask(Protocol):
    """A policy: some of the `eligible` (B, L) bool positions of each row.

    confidence: (B, L) float64, the score of each position
    count:      (B,) the scheduled number; more than the length in the last call of a budget, for all that is left
    chance:     (B,) float64, the probability with which a position is to be unmasked, for policies that draw
    noise:      for such policies alone
    scores:     which of `Sampler.score` make sense here; none where positions are not chosen by a score
    scheduled:  whether `count` is kept to at all
    """

    scores: ClassVar[tuple[str, ...]]

    @property
    def scheduled(self) -> bool: ...

    def select(self, confidence: Tensor, eligible: Tensor, count: Tensor, chance: Tensor, noise: Noise) -> Tensor: ...


@dataclass(frozen=True)
class TopK:
    """The scheduled number of most confident positions; of equal ones the leftmost."""

    scores: ClassVar[tuple[str, ...]] = ("probability", "margin", "entropy", "random")
    scheduled: ClassVar[bool] = True

    def select(self, confidence: Tensor, eligible: Tensor, count: Tensor, chance: Tensor, noise: Noise) -> Tensor:
        return top(confidence, eligible, count)


@dataclass(frozen=True)
class Threshold:
    """Every position whose confidence reaches `tau` (Fast-dLLM, arXiv 2505.22618), and at least the scheduled number.

    scheduled: false asks for one position instead of the scheduled number, so that the schedule is a bound no more
    """

    tau: float
    scheduled: bool = True
    scores: ClassVar[tuple[str, ...]] = ("probability", "margin")

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise UserError(f"tau must be above 0 and at most 1, got {self.tau}")

    def select(self, confidence: Tensor, eligible: Tensor, count: Tensor, chance: Tensor, noise: Noise) -> Tensor:
        if not self.scheduled:
            count = one_or_all(count, eligible)
        return top(confidence, eligible, count) | (eligible & (confidence >= self.tau))


@dataclass(frozen=True)
class Factor:
    """The largest n for which (n + 1)(1 - c_n) < factor, c_n being the n-th confidence from above (Fast-dLLM).

    At least one position. Like `Threshold`, it unmasks the scheduled number at least unless `scheduled` is false.
    """

    factor: float
    scheduled: bool = True
    scores: ClassVar[tuple[str, ...]] = ("probability",)

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise UserError(f"factor must be above 0, got {self.factor}")

    def select(self, confidence: Tensor, eligible: Tensor, count: Tensor, chance: Tensor, noise: Noise) -> Tensor:
        if not self.scheduled:
            count = one_or_all(count, eligible)
        ordered = confidence.masked_fill(~eligible, -torch.inf).sort(dim=1, descending=True).values
        number = torch.arange(1, eligible.shape[1] + 1, device=eligible.device)  # n
        fits = (number + 1) * (1 - ordered) < self.factor  # never where the confidence is -inf
        return top(confidence, eligible, (fits * number).amax(1).maximum(count))


@dataclass(frozen=True)
class Bernoulli:
    """Each position on its own with probability `chance`: the ancestral sampler of MDLM (arXiv 2406.07524)."""

    scores: ClassVar[tuple[str, ...]] = ()
    scheduled: ClassVar[bool] = False

    def select(self, confidence: Tensor, eligible: Tensor, count: Tensor, chance: Tensor, noise: Noise) -> Tensor:
        return eligible & (noise.uniform(eligible) < chance[:, None])


def top(confidence: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
    """(B, L) bool: the `count` (B,) eligible positions of most confidence (B, L); of equal ones the leftmost."""
    order = confidence.masked_fill(~eligible, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return eligible & (rank < count[:, None])


def one_or_all(count: Tensor, eligible: Tensor) -> Tensor:
    """(B,) one for each row, or `count` in the last forward call of a budget, which takes all that is left."""
    return count.where(count > eligible.shape[1], count.clamp(max=1))


def low_confidence(logits: Tensor, rows: Tensor, proposal: Tensor) -> Tensor:
    """(M,) float64 probability of `proposal` (M,) under `rows` (M,) of `logits` (N, V): the least sure stay hidden."""
    # NOTE: in lower precision many probabilities near 1 are equal, and position would decide instead.
    parts = zip(rows.split(PART), proposal.split(PART), strict=True)
    shares = [logits[some].double().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for some, ids in parts]
    return torch.cat(shares).exp()


def margin(logits: Tensor, rows: Tensor, proposal: Tensor) -> Tensor:
    """(M,) float64 by how much the first probability is above the second, whatever is proposed."""
    best = [logits[some].double().softmax(-1).topk(2, dim=-1).values for some in rows.split(PART)]
    first, second = torch.cat(best).unbind(-1)
    return first - second


def negative_entropy(logits: Tensor, rows: Tensor, proposal: Tensor) -> Tensor:
    """(M,) float64 sum of p log p, at most 0, whatever is proposed."""
    return -torch.cat([torch.special.entr(logits[some].double().softmax(-1)).sum(-1) for some in rows.split(PART)])


# Scores that are functions of the logits. The other one, "random", is drawn from the row's noise.
SCORES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "probability": low_confidence,
    "margin": margin,
    "entropy": negative_entropy,
}


def draw(logits: Tensor, *, temperature: float, noise: Noise, counts: list[int]) -> Tensor:
    """(N,) token ids by the Gumbel-max rule. `counts`: how many of the N positions each row of the batch has.

    Each row draws from its own generator, so that its tokens do not depend on its neighbours in the batch.
    """
    found = []
    for row, generator in zip(logits.split(counts), noise.generators, strict=True):
        for part in row.split(PART):
            # NOTE: float64, because Gumbel noise from float32 numbers is cut off and so lowers the temperature.
            gumbel = -(-torch.rand(part.shape, generator=generator, dtype=torch.float64).log()).log()
            found.append((part.double() + temperature * gumbel.to(part.device)).argmax(-1))
    return torch.cat(found)


def keep_nucleus(logits: Tensor, *, temperature: float, top_p: float) -> None:
    """Set logits (N, V) to -inf, in place, outside the smallest set of ids whose share is at least `top_p`.

    Shares are those of softmax(logits / temperature). The id that crosses `top_p` is kept (arXiv 1904.09751).
    """
    for part in logits.split(PART):
        share, order = (part.double() / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
        beyond = share.cumsum(-1) - share >= top_p
        part.masked_fill_(torch.zeros_like(beyond).scatter_(-1, order, beyond), -torch.inf)
