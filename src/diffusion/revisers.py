"""Revisers: what a sampler does, besides revealing masks, to tokens that are already visible.

A step of the sampler calls three hooks of its reviser, in this order:

    refine     once the logits are there: may run further passes and return a better `Prediction`
    overwrite  after the reveal: new ids for visible positions
    remask     last: visible positions to hide again

Only positions that `editable` names, and that were visible before the step, can change. A hook does nothing
unless a class defines it. So a new method is one class here, and the loop in `sampler.py` stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


@dataclass
class Prediction:
    """What the backbone says at the true places of `where` (B, L).

    logits: (N, V) at those places in row-major order, -inf at banned ids
    best:   (B, L) their argmax, elsewhere the tokens that were fed in
    """

    where: Tensor
    logits: Tensor
    best: Tensor

    def at(self, places: Tensor) -> Tensor:
        """(M, V) logits at the M true places of `places` (B, L), which `where` has to cover."""
        return self.logits[places[self.where]]


@dataclass
class State:
    """A step as a reviser sees it. B rows, L positions.

    tokens:   (B, L) before the step
    visible:  (B, L) bool, not masked before the step
    block:    (B, L) bool, the block that the row is working on; the whole response once no mask is left
    step:     (B,) how many steps the row has made before
    """

    tokens: Tensor
    visible: Tensor
    block: Tensor
    step: Tensor


class Predict(Protocol):
    """One forward call of the rows in which `where` (B, L) is true anywhere; at least one row has to ask."""

    def __call__(self, tokens: Tensor, where: Tensor) -> Prediction: ...


class Reviser:
    """Leaves visible tokens alone; the base of the others."""

    def editable(self, state: State) -> Tensor:
        """(B, L) bool: the visible positions that this step may change, and so needs logits of."""
        return torch.zeros_like(state.visible)

    def refine(self, state: State, prediction: Prediction, predict: Predict) -> Prediction:
        """What the rest of the step works with; it has to cover the places of `prediction.where`."""
        return prediction

    def overwrite(self, state: State, prediction: Prediction) -> Tensor:
        """(B, L) ids; read at editable positions only."""
        return state.tokens

    def remask(self, state: State, prediction: Prediction) -> Tensor:
        """(B, L) bool; read at editable positions only, and not in a row's last scheduled step of a block."""
        return torch.zeros_like(state.visible)


class OverwriteAll(Reviser):
    """ReDiff: every token that was visible before the step becomes its argmax (arXiv 2510.19871).

    scope: `block` leaves the other blocks alone, `all` does not. Post steps always revise every block.
    """

    def __init__(self, *, scope: Literal["block", "all"] = "block") -> None:
        if scope not in ("block", "all"):
            raise ValueError(f"scope must be 'block' or 'all', got {scope!r}")
        self.scope = scope

    def editable(self, state: State) -> Tensor:
        return state.visible if self.scope == "all" else state.visible & state.block

    def overwrite(self, state: State, prediction: Prediction) -> Tensor:
        return prediction.best


class Settled:
    """Remembers the full responses of each row, to tell that one has come back: a fixed point or a cycle.

    Greedy revision may swing between two texts for ever; from a state seen before it can only repeat itself.
    """

    def __init__(self, tokens: Tensor, *, passes: int) -> None:
        self.states = tokens.new_full((len(tokens), passes + 1, tokens.shape[1]), -1)
        self.states[:, 0] = tokens

    def update(self, tokens: Tensor, passes: Tensor) -> Tensor:
        """(B,) bool: whether `tokens` (B, L) were seen before; notes them as the state after `passes`."""
        known = (self.states == tokens[:, None]).all(-1).any(1)
        self.states[torch.arange(len(tokens), device=tokens.device), passes] = tokens
        return known
