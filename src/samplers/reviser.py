"""Revisers: what a sampler does, besides unmasking masks, to tokens that are already visible.

One step of the sampler calls the hooks of its reviser in this order:

    editable        which visible positions the step may change
    reads           which positions need logits, besides the masks that may be unmasked
    refine          predict -> refine: may make further forward calls and return a better `Prediction`
    chance          predict -> unmask: the fraction of the masks to unmask
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
from typing import Any, ClassVar

import torch
from torch import Tensor

from src.diffusion.noise import Noise
from src.io.errors import UserError
from src.samplers.predictor import Prediction, Predictor
from src.samplers.schedule import Schedule


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


class Reviser:
    """Base class; leaves visible tokens alone.

    random: may act differently in the same state, so that a text that was seen before is no reason to stop
    uses_all_steps: rows make all steps of a block even if no mask is left, as it may remask tokens
    can_veto: `remask` may also name positions that the step is about to unmask; these stay masked
    selects_positions: every mask is proposed to be unmasked, and `remask` alone decides which ones are
    """

    @property
    def within_block(self) -> bool:
        """Whether it changes tokens of the current block only (post steps aside), so that the blocks before it stay."""
        return type(self).editable is Reviser.editable

    random: bool = False
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

    def chance(self, state: State, chance: Tensor) -> Tensor:
        """(B,) float64: the fraction of the block's masks to unmask; `chance` (B,) is the one by the schedule.

        For policies that draw it is the probability of each mask, for others a number of masks, rounded up.
        """
        return chance

    def editable(self, state: State) -> Tensor:
        """(B, L) bool: the visible positions that this step may change."""
        kind = type(self)
        acts = kind.overwrite is not Reviser.overwrite or kind.remask is not Reviser.remask
        return state.visible & state.block if acts else torch.zeros_like(state.visible)

    def reads(self, state: State) -> Tensor:
        """(B, L) bool: positions that need logits besides the masks that may be unmasked; by default the editable."""
        return self.editable(state) & state.visible

    def refine(self, state: State, prediction: Prediction, predict: Predictor) -> Prediction:
        """The prediction for the rest of the step: a new object that covers the positions of `prediction.where`."""
        return prediction

    def overwrite(self, state: State, prediction: Prediction) -> Tensor:
        """(B, L) int64 ids; only those at editable positions are used. Never the mask: use `remask`."""
        return state.tokens

    def remask(self, state: State, prediction: Prediction) -> Tensor:
        """(B, L) bool; only editable positions count, and none in the last scheduled step of a block."""
        return torch.zeros_like(state.visible)
