"""Revisers: what a sampler does, besides unmasking masks, to tokens that are already visible.

One step of the sampler calls the hooks of its reviser in this order:

    count, chance   how many masks to unmask, and for policies that draw: each with which probability
    editable        which visible positions the step may change
    reads           which further positions `refine` needs logits of
    refine          predict -> refine: may make further forward calls and return a better `Prediction`
    overwrite       unmask -> overwrite: new ids for visible positions
    remask          overwrite -> remask: positions that become masks again

Only positions in `editable` that were visible before the step can change; by default these are the visible ones of the
current block if the class defines `overwrite` or `remask`. A hook that a class does not define does nothing. A new
method is one class, and the loop in `sampler.py` stays as it is:

    class RewriteLongTexts(Reviser):
        def overwrite(self, state, prediction):
            many = state.visible.sum(1, keepdim=True) > 16
            return torch.where(many, prediction.best, state.tokens)
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.samplers.schedule import Schedule
from src.samplers.unmask import SCORES
from src.types import SpecialIds


@dataclass
class Prediction:
    """Logits of the backbone at the true positions of `where` (B, L).

    logits: (N, V) float32 at those positions in row-major order. -inf at banned ids and at ids beyond the tokenizer's,
            which thus get no probability, whether the head is cut to the tokenizer's length (LLaDA-V) or not. The mask
            keeps its logit unless it is banned, but is never written
    best:   (B, L) their argmax over the ids that may be written; elsewhere the input tokens
    """

    where: Tensor
    logits: Tensor
    best: Tensor

    def at(self, positions: Tensor) -> Tensor:
        """(M, V), a copy: logits at the M true positions of `positions` (B, L), which must lie within `where`."""
        return self.logits[positions[self.where]]

    def confidence(self, positions: Tensor, tokens: Tensor, score: str = "probability") -> Tensor:
        """(B, L) float64 probability, or another score, of `tokens` (B, L) where `positions` is true; 0 elsewhere."""
        out = torch.zeros(positions.shape, dtype=torch.float64, device=positions.device)
        if positions.any():
            out[positions] = SCORES[score](self.logits, positions[self.where].nonzero()[:, 0], tokens[positions])
        return out


@dataclass
class State:
    """What a reviser knows of a step. B rows, L positions.

    tokens:       (B, L) before the step
    visible:      (B, L) bool, not masked before the step
    block:        (B, L) bool, the current block of each row; the whole response once no mask is left (post steps)
    step:         (B,) number of steps that the row made before this one
    steps:        (B,) number of steps scheduled for the block
    steps_left:   (B,) how many of these are left, this one included; 0 in post steps
    steps_done:   (B,) steps made in the block before this one, which may exceed `steps` if the policy ignores the
                  schedule; -1 in post steps
    spare_passes: (B,) forward passes that `refine` may make in this step within the sampler's `max_forwards`
    confidence:   (B, L) float64, the probability of each token when it was unmasked; inf where the sampler unmasked
                  none: tokens of `start`, and masks. In `remask` it includes the tokens that this step unmasks
    num_remasks:  (B, L) how often each position has been remasked
    noise:        random numbers for the reviser alone
    """

    tokens: Tensor
    visible: Tensor
    block: Tensor
    step: Tensor
    steps: Tensor
    steps_left: Tensor
    steps_done: Tensor
    spare_passes: Tensor
    confidence: Tensor
    num_remasks: Tensor
    noise: Noise


class Predict(Protocol):
    """One forward call of each row that has a true position in `where` (B, L)."""

    special: SpecialIds

    def __call__(self, tokens: Tensor, where: Tensor) -> Prediction: ...


class Reviser:
    """Base class; leaves visible tokens alone.

    random: may act differently in the same state, so that a text that was seen before is no reason to stop
    needs_logits: needs logits of the positions that it may change
    uses_all_steps: rows make all steps of a block even if no mask is left, as it may remask tokens
    can_veto: `remask` may also name positions that the step is about to unmask; these stay masked
    selects_positions: every mask is proposed to be unmasked, and `remask` alone decides which ones are
    """

    random: bool = False
    needs_logits: ClassVar[bool] = True
    uses_all_steps: ClassVar[bool] = False
    can_veto: ClassVar[bool] = False
    selects_positions: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        hooks = [name for name in vars(Reviser) if not name.startswith("_")]
        for name in vars(cls):  # a misspelt hook would never be called, without a word
            near = [] if name in hooks or name.startswith("_") else difflib.get_close_matches(name, hooks, cutoff=0.8)
            if near:
                raise UserError(
                    f"{cls.__name__}.{name} is no hook of Reviser; did you mean {near[0]!r}? Else rename it"
                )

    def check(self, schedule: Schedule) -> None:
        """Raise UserError if the reviser can never act with this schedule."""

    def count(self, state: State, count: Tensor) -> Tensor:
        """(B,) number of masks that this step unmasks; `count` (B,) is the number by the schedule."""
        return count

    def chance(self, state: State) -> Tensor:
        """(B,) float64 probability of each mask to be unmasked, for policies that draw.

        By default (a_s - a_t) / (1 - a_t) of the linear schedule a_t = 1 - t. It is 1 in the last step of a block.
        """
        return 1 / state.steps_left.clamp(min=1).double()

    def editable(self, state: State) -> Tensor:
        """(B, L) bool: the visible positions that this step may change.

        Those of the block if the class defines `overwrite` or `remask`, else none.
        """
        kind = type(self)
        acts = kind.overwrite is not Reviser.overwrite or kind.remask is not Reviser.remask
        return state.visible & state.block if acts else torch.zeros_like(state.visible)

    def reads(self, state: State) -> Tensor:
        """(B, L) bool: further positions that `refine` needs logits of; they are not changed."""
        return torch.zeros_like(state.visible)

    def refine(self, state: State, prediction: Prediction, predict: Predict) -> Prediction:
        """The prediction for the rest of the step: a new object that covers the positions of `prediction.where`."""
        return prediction

    def overwrite(self, state: State, prediction: Prediction) -> Tensor:
        """(B, L) ids; only those at editable positions are used."""
        return state.tokens

    def remask(self, state: State, prediction: Prediction) -> Tensor:
        """(B, L) bool; only editable positions count, and none in the last scheduled step of a block."""
        return torch.zeros_like(state.visible)


@dataclass
class DraftPrediction(Prediction):
    """A prediction, updated by further forward calls, and the draft (B, L) that these calls read."""

    draft: Tensor

    @classmethod
    def copy_of(cls, prediction: Prediction, draft: Tensor) -> DraftPrediction:
        """A copy whose logits may be changed without changing those of `prediction`."""
        return cls(**{**vars(prediction), "logits": prediction.logits.clone()}, draft=draft)

    def update(self, predict: Predict, where: Tensor) -> None:
        """One forward call with the draft, for the true positions of `where` (B, L)."""
        fresh = predict(self.draft, where)
        self.logits[where[self.where]] = fresh.logits
        self.best = torch.where(where, fresh.best, self.best)
