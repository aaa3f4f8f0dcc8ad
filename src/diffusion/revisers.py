"""Revisers: what a sampler does, besides revealing masks, to tokens that are already visible.

A step of the sampler calls these hooks of its reviser, in this order:

    count      how many masks a step reveals; chance: with which probability each, for policies that draw
    refine     once the logits are there: may run further passes and return a better `Prediction`
    overwrite  after the reveal: new ids for visible positions
    remask     last: visible positions to hide again

Only positions that `editable` names, and that were visible before the step, can change: the block's, if a class
defines `overwrite` or `remask`. A hook does nothing unless a class defines it. So a new method is one class,
and the loop in `sampler.py` stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from src.diffusion.noise import Noise
from src.diffusion.schedule import Schedule
from src.diffusion.unmask import SCORES, top
from src.types import SpecialIds


@dataclass
class Prediction:
    """What the backbone says at the true places of `where` (B, L).

    logits: (N, V) float32 at those places in row-major order, -inf at banned ids and at those that the tokenizer lacks,
            which so have no share of a probability: LLaDA-V is run with a head cut to the tokenizer's length, and a
            whole head gives the same. Only the mask keeps its logit where it is not banned; it is never written
    best:   (B, L) their argmax among what may be written; elsewhere the tokens that were fed in
    """

    where: Tensor
    logits: Tensor
    best: Tensor

    def at(self, places: Tensor) -> Tensor:
        """(M, V), a copy: logits at the M true places of `places` (B, L), which `where` has to cover."""
        return self.logits[places[self.where]]

    def confidence(self, places: Tensor, tokens: Tensor, score: str = "probability") -> Tensor:
        """(B, L) float64 probability, or another score, of `tokens` (B, L) where `places` is true; 0 elsewhere."""
        out = torch.zeros(places.shape, dtype=torch.float64, device=places.device)
        if places.any():
            out[places] = SCORES[score](self.logits, places[self.where].nonzero()[:, 0], tokens[places])
        return out


@dataclass
class State:
    """A step as a reviser sees it. B rows, L positions.

    tokens:   (B, L) before the step
    visible:  (B, L) bool, not masked before the step
    block:    (B, L) bool, the block that the row is working on; the whole response once no mask is left
    step:     (B,) how many steps the row has made before
    steps:    (B,) how many steps the block was given; left: how many of them are left, with this one. No step is left
              once no mask is
    made:     (B,) how many steps the block has had before, which without a schedule may be more than it was given; -1
              once no mask is left
    spare:    (B,) how many passes of its own the reviser may make in this step, by the sampler's `max_forwards`
    sure:     (B, L) float64, the probability of a token when it was revealed; inf where none was: what was given, and
              what is hidden. `remask` sees it with the tokens that this step reveals
    hidden:   (B, L) how often a position has been hidden again
    noise:    numbers for the reviser alone
    """

    tokens: Tensor
    visible: Tensor
    block: Tensor
    step: Tensor
    steps: Tensor
    left: Tensor
    made: Tensor
    spare: Tensor
    sure: Tensor
    hidden: Tensor
    noise: Noise


class Predict(Protocol):
    """One forward call of the rows in which `where` (B, L) is true anywhere."""

    special: SpecialIds

    def __call__(self, tokens: Tensor, where: Tensor) -> Prediction: ...


class Reviser:
    """Leaves visible tokens alone; the base of the others.

    random:  does not do the same again in the same state, so that a text that comes back is no reason to stop
    looks:   needs logits of the positions that it may change
    patient: rows use all steps of a block, also those that are left when no mask is: it may hide tokens again
    vetoes:  `remask` may also name positions that the step is about to reveal; they then stay hidden
    chooses: so every mask is proposed to it, and what is revealed is its choice alone
    """

    random: bool = False
    looks: ClassVar[bool] = True
    patient: ClassVar[bool] = False
    vetoes: ClassVar[bool] = False
    chooses: ClassVar[bool] = False

    def check(self, schedule: Schedule) -> None:
        """Raise ValueError where the reviser can never act with such a schedule."""

    def count(self, state: State, count: Tensor) -> Tensor:
        """(B,) how many masks this step reveals; `count` (B,) is an even split over the steps that are left."""
        return count

    def chance(self, state: State) -> Tensor:
        """(B,) float64 probability with which each mask is revealed, where masks are revealed by chance.

        By default (a_s - a_t) / (1 - a_t) of the linear schedule a_t = 1 - t. It is 1 in the last step of a block.
        """
        return 1 / state.left.clamp(min=1).double()

    def editable(self, state: State) -> Tensor:
        """(B, L) bool: the visible positions that this step may change.

        Those of the block where a class defines `overwrite` or `remask`, else none.
        """
        kind = type(self)
        acts = kind.overwrite is not Reviser.overwrite or kind.remask is not Reviser.remask
        return state.visible & state.block if acts else torch.zeros_like(state.visible)

    def reads(self, state: State) -> Tensor:
        """(B, L) bool: further positions that `refine` needs logits of; they are not changed."""
        return torch.zeros_like(state.visible)

    def refine(self, state: State, prediction: Prediction, predict: Predict) -> Prediction:
        """What the rest of the step works with: a new object that covers the places of `prediction.where`."""
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
    share: only this part of them is rewritten, rounded down: where the model is most sure of what it would write
    begin: only the last `begin` of a block's steps rewrite, rounded up; 0 leaves it to the post steps
    """

    def __init__(self, *, scope: Literal["block", "all"] = "block", share: float = 1.0, begin: float = 1.0) -> None:
        if scope not in ("block", "all"):
            raise ValueError(f"scope must be 'block' or 'all', got {scope!r}")
        if not 0 < share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, got {share}")
        if not 0 <= begin <= 1:
            raise ValueError(f"begin must be within 0..1, got {begin}")
        self.scope, self.share, self.begin = scope, share, begin

    def editable(self, state: State) -> Tensor:
        begun = state.left <= (state.steps.double() * self.begin).ceil()  # (B,)
        visible = state.visible & begun[:, None]
        return visible if self.scope == "all" else visible & state.block

    def overwrite(self, state: State, prediction: Prediction) -> Tensor:
        if self.share == 1:
            return prediction.best
        where = self.editable(state) & prediction.where
        count = (where.sum(1).double() * self.share).long()
        sure = top(prediction.confidence(where, prediction.best), where, count)
        return torch.where(sure, prediction.best, state.tokens)


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
