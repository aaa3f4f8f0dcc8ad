"""Revisers: what a sampler does, besides unmasking masks, to tokens that are already visible.

A step of the sampler calls these hooks of its reviser, in this order:

    count      how many masks a step unmasks; chance: with which probability each, for policies that draw
    refine     once the logits are there: may run further passes and return a better `Prediction`
    overwrite  after the unmask: new ids for visible positions
    remask     last: visible positions to hide again

Only positions that `editable` names, and that were visible before the step, can change: the block's, if a class
defines `overwrite` or `remask`. A hook does nothing unless a class defines it. So a new method is one class,
and the loop in `sampler.py` stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from src.diffusion.noise import Noise
from src.samplers.schedule import Schedule
from src.samplers.unmask import SCORES
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
    sure:     (B, L) float64, the probability of a token when it was unmasked; inf where none was: what was given, and
              what is hidden. `remask` sees it with the tokens that this step unmasks
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
    needs_logits:   needs logits of the positions that it may change
    uses_all_steps: rows use all steps of a block, also those that are left when no mask is: it may hide tokens again
    can_veto:  `remask` may also name positions that the step is about to unmask; they then stay hidden
    selects_positions: so every mask is proposed to it, and what is unmasked is its choice alone
    """

    random: bool = False
    needs_logits: ClassVar[bool] = True
    uses_all_steps: ClassVar[bool] = False
    can_veto: ClassVar[bool] = False
    selects_positions: ClassVar[bool] = False

    def check(self, schedule: Schedule) -> None:
        """Raise UserError where the reviser can never act with such a schedule."""

    def count(self, state: State, count: Tensor) -> Tensor:
        """(B,) how many masks this step unmasks; `count` (B,) is an even split over the steps that are left."""
        return count

    def chance(self, state: State) -> Tensor:
        """(B,) float64 probability with which each mask is unmasked, where masks are unmasked by chance.

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


@dataclass
class Corrected(Prediction):
    """A prediction that further calls have brought up to date, and the draft (B, L) that they led to."""

    draft: Tensor

    @classmethod
    def of(cls, prediction: Prediction, draft: Tensor) -> Corrected:
        """A prediction that may be changed without harm to the one it comes from."""
        return cls(**{**vars(prediction), "logits": prediction.logits.clone()}, draft=draft)

    def ask(self, predict: Predict, where: Tensor) -> None:
        """One call with the draft, for the true places of `where` (B, L)."""
        found = predict(self.draft, where)
        self.logits[where[self.where]] = found.logits
        self.best = torch.where(where, found.best, self.best)
