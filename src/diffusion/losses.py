"""Losses as tables over kinds: (kind -> form, weight, reduction, coefficient), each a sum and a denominator.

B rows, L response positions. ReDiff Stage I is four rows of such a table, LLaDA is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from src.io.errors import UserError
from src.types import Corrupted, Kind

WRONG = (Kind.SYNTAX, Kind.HALLUCINATION, Kind.MISTAKE)

WEIGHTS = ("one", "inverse_rate")
REDUCTIONS = ("kind_mean", "answer_len", "tokens", "batch_tokens")
FORMS = ("cross_entropy", "probability")


@dataclass(frozen=True)
class Term:
    """One row of an objective's table.

    kind:   of the positions that the loss is on; None: all but frozen ones
    weight: `one`, or `inverse_rate` = 1/t with t clamped to at least `floor` (bounds the variance of small t)
    reduce: `kind_mean` = mean over the positions of this kind in a sample (0 if none), then over samples (ReDiff)
            `answer_len` = sum divided by the editable positions of a sample, then mean over samples (LLaDA SFT)
            `tokens` = sum divided by the number of positions of this kind in the whole batch
            `batch_tokens` = sum divided by the number of editable positions in the whole batch (MDLM, ProSeCo)
    form:   `cross_entropy`, or `probability` = -p(token), which has the cross-entropy's gradient times p and bounds no
            likelihood (ProSeCo uses it for right tokens of a draft, so that wrong ones weigh more)
    only:   `wrong` or `right`: only positions whose input token differs from, or equals, the target; None: both

    Raises UserError for a value that none of these allows.
    """

    name: str
    kind: Kind | None
    weight: str = "one"
    reduce: str = "kind_mean"
    coef: float = 1.0
    floor: float = 0.0
    form: str = "cross_entropy"
    only: str | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"form must be one of {FORMS}, got {self.form!r}")
        if self.only not in (None, "wrong", "right"):
            raise UserError(f"only must be 'wrong', 'right' or None, got {self.only!r}")
        if self.weight not in WEIGHTS:
            raise UserError(f"weight must be one of {WEIGHTS}, got {self.weight!r}")
        if self.reduce not in REDUCTIONS:
            raise UserError(f"reduce must be one of {REDUCTIONS}, got {self.reduce!r}")
        if not 0 <= self.floor < 1:
            raise UserError(f"floor must be at least 0 and less than 1, got {self.floor}")
        if not 0 <= self.coef < math.inf:
            raise UserError(f"the coefficient of {self.name!r} must be at least 0, got {self.coef}")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(kind for kind in Kind if kind) if self.kind is None else (self.kind,)

    def where(self, corrupted: Corrupted) -> Tensor:
        """(B, L) bool: the positions that the loss is on."""
        where = editable(corrupted) if self.kind is None else corrupted.where(self.kind)
        if self.only is None:
            return where
        right = corrupted.tokens == corrupted.target
        return where & (right if self.only == "right" else ~right)

    def values(self, cross_entropy: Tensor) -> Tensor:
        """(B, L): the loss of each token from its cross-entropy. Override it for another form."""
        return -(-cross_entropy).exp() if self.form == "probability" else cross_entropy

    def weights(self, corrupted: Corrupted) -> Tensor | float:
        """(B,) weight of each sample. Override it for another dependence on the noise level."""
        return 1 / corrupted.rate.clamp(min=self.floor) if self.weight == "inverse_rate" else 1.0


def editable(corrupted: Corrupted) -> Tensor:
    """(B, L) bool: all but the frozen positions."""
    return ~corrupted.where(Kind.FROZEN)


def denominator(term: Term, corrupted: Corrupted) -> Tensor:
    """Divisor of a term's sum: the number of rows or of positions. Needs no forward pass."""
    if term.reduce == "tokens":
        return term.where(corrupted).sum()
    if term.reduce == "batch_tokens":
        return editable(corrupted).sum()
    return torch.full((), len(corrupted.rate), device=corrupted.kind.device)


def term_sum(term: Term, cross_entropy: Tensor, corrupted: Corrupted) -> Tensor:
    """Weighted sum of a term over per-token cross-entropies (B, L), before the division by `denominator`."""
    where = term.where(corrupted)
    sums = (term.values(cross_entropy) * where).sum(1)  # (B,)
    if term.reduce == "kind_mean":
        sums = sums / where.sum(1).clamp(min=1)
    elif term.reduce == "answer_len":
        sums = sums / editable(corrupted).sum(1).clamp(min=1)
    return (term.weights(corrupted) * sums).sum()


def positions_of(terms: tuple[Term, ...], corrupted: Corrupted) -> Tensor:
    """(B, L) bool: positions that need logits."""
    return torch.stack([term.where(corrupted) for term in terms]).any(0)


def shares_of(counts: dict[str, tuple[float, float]]) -> dict[str, float]:
    """The accuracy of each kind, P(keep | clean), P(fix | wrong) and other shares over all passes of a step."""
    accuracy = {kind: counts.get(f"accuracy/{kind.name.lower()}") for kind in Kind}
    if kept := accuracy[Kind.CLEAN]:
        counts = {**counts, "p_keep_clean": kept}
    if wrong := [pair for kind in WRONG if (pair := accuracy[kind])]:
        counts = {**counts, "p_fix_wrong": (sum(hits for hits, _ in wrong), sum(tries for _, tries in wrong))}
    return {name: hits / tries for name, (hits, tries) in counts.items() if tries}
