"""Losses as tables over kinds: (kinds -> weight, reduction, coefficient), each a numerator and a denominator.

B rows, L response positions, N loss positions. ReDiff Stage I is four rows of such a table, LLaDA is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from src.batch import Corrupted, Kind, Loss

WEIGHTS = ("one", "inverse_rate")
REDUCTIONS = ("kind_mean", "answer_len", "tokens")


@dataclass(frozen=True)
class Term:
    """One row of an objective's table.

    weight: `one`, or `inverse_rate` = 1/t with t at least `floor` (bounds the variance of small t).
    reduce: `kind_mean` = per sample the mean over the positions of this kind (0 if none), then over samples (ReDiff);
            `answer_len` = per sample the sum over the number of editable positions, then over samples (LLaDA SFT);
            `tokens` = the sum over the number of positions of this kind in the whole batch.
    """

    name: str
    kind: Kind
    weight: str = "one"
    reduce: str = "kind_mean"
    coef: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.weight not in WEIGHTS:
            raise ValueError(f"weight must be one of {WEIGHTS}, got {self.weight!r}")
        if self.reduce not in REDUCTIONS:
            raise ValueError(f"reduce must be one of {REDUCTIONS}, got {self.reduce!r}")


def denominator(term: Term, corrupted: Corrupted) -> Tensor:
    """What the sum of a term is divided by: rows, or positions of its kind. Known before any forward pass."""
    if term.reduce == "tokens":
        return corrupted.where(term.kind).sum()
    return torch.tensor(len(corrupted.rate), device=corrupted.kind.device)


def term_loss(term: Term, cross_entropy: Tensor, corrupted: Corrupted) -> Loss:
    """Reduce per-token losses (B, L), defined where a term looks and 0 elsewhere, to one `Loss`."""
    where = corrupted.where(term.kind)
    weight = (
        1 / corrupted.rate.clamp(min=term.floor) if term.weight == "inverse_rate" else torch.ones_like(corrupted.rate)
    )
    sums = (cross_entropy * where).sum(1)  # (B,)
    if term.reduce == "kind_mean":
        sums = sums / where.sum(1).clamp(min=1)
    elif term.reduce == "answer_len":
        sums = sums / (corrupted.kind != int(Kind.FROZEN)).sum(1).clamp(min=1)
    return Loss((weight * sums).sum(), denominator(term, corrupted))


def positions_of(terms: tuple[Term, ...], corrupted: Corrupted) -> Tensor:
    """(B, L) bool: where logits are needed."""
    return torch.stack([corrupted.where(term.kind) for term in terms]).any(0)
