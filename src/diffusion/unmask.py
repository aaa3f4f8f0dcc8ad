"""Which masked tokens to reveal: scores, policies, and the draw of the tokens themselves.

    proposal = draw(logits, temperature=0.7, noise=noise, counts=[3, 5])    (N,) token ids
    score = low_confidence(logits, rows, proposal)                          (M,) probability of each proposal
    TopK().select(confidence, eligible, count)                              (B, L) bool, what to reveal

N counts the eligible positions of all rows in row-major order. A score never sees the temperature,
which would saturate it. Both work in float64, a part at a time: a copy of all logits would take gigabytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from src.diffusion.noise import Noise

PART = 64  # rows of logits that are held in float64 at once


class Unmask(Protocol):
    """A policy. It selects at least `count` (B,) eligible positions of a row, or all if there are fewer."""

    def select(self, confidence: Tensor, eligible: Tensor, count: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class TopK:
    """The scheduled number of most confident positions; of equal ones the leftmost."""

    def select(self, confidence: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
        """(B, L) bool from confidence (B, L), eligible (B, L) bool and count (B,)."""
        order = confidence.masked_fill(~eligible, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = order.argsort(dim=1)
        return eligible & (rank < count[:, None])


@dataclass(frozen=True)
class Threshold:
    """Every position whose confidence reaches `tau` (Fast-dLLM), and at least the scheduled number.

    scheduled: false asks for one position instead of the scheduled number, so that the schedule is a bound no more
    """

    tau: float
    scheduled: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise ValueError(f"tau must be above 0 and at most 1, got {self.tau}")

    def select(self, confidence: Tensor, eligible: Tensor, count: Tensor) -> Tensor:
        """(B, L) bool from confidence (B, L), eligible (B, L) bool and count (B,)."""
        if not self.scheduled:
            all_that_is_left = count >= eligible.shape[1]  # the last forward call of a budget
            count = count.where(all_that_is_left, count.clamp(max=1))
        return TopK().select(confidence, eligible, count) | (eligible & (confidence >= self.tau))


def low_confidence(logits: Tensor, rows: Tensor, proposal: Tensor) -> Tensor:
    """(M,) float64 probability of `proposal` (M,) under `rows` (M,) of `logits` (N, V): the least sure stay hidden."""
    # NOTE: in lower precision many probabilities near 1 are equal, and position would decide instead.
    parts = zip(rows.split(PART), proposal.split(PART), strict=True)
    shares = [logits[some].double().log_softmax(-1).gather(-1, ids[:, None])[:, 0] for some, ids in parts]
    return torch.cat(shares).exp()


def draw(logits: Tensor, *, temperature: float, noise: Noise, counts: list[int]) -> Tensor:
    """(N,) token ids by the Gumbel-max rule. `counts`: how many of the N positions each row of the batch has.

    Each row draws from its own generator, so that its tokens do not depend on its neighbours in the batch.
    """
    found = []
    for part, generator in zip(logits.split(counts), noise.generators, strict=True):
        # NOTE: float64, because Gumbel noise from float32 numbers is cut off and so lowers the temperature.
        gumbel = -(-torch.rand(part.shape, generator=generator, dtype=torch.float64).log()).log()
        found.append((part.double() + temperature * gumbel.to(part.device)).argmax(-1))
    return torch.cat(found)
