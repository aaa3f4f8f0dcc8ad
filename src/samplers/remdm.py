"""ReMDM: visible tokens become masks again at random, and are then unmasked anew (arXiv 2503.00307).

A step goes from time t to s < t; a_t = 1 - t is the fraction of the text that is visible at t. It remasks each visible
token with probability sigma, and unmasks each mask with probability

    rho = (a_s - (1 - sigma) a_t) / (1 - a_t),     sigma <= sigma_max = min(1, (1 - a_s) / a_t),

so that the fraction visible at s is a_s for any sigma. `Cap`, `Rescale`, `Confident` and `Loop` differ in sigma. They
are meant for `unmask: Bernoulli`, which draws; with other policies the number unmasked is the expected one. Time runs
from 1 to 0 in each block. Only tokens that the sampler unmasked itself are remasked: those of `start` stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from src.io.errors import UserError
from src.samplers.predictor import Prediction
from src.samplers.reviser import Reviser, State
from src.samplers.schedule import Schedule, ceil_divide
from src.samplers.unmask import top


@dataclass(frozen=True, kw_only=True)
class Remasking(Reviser):
    """Base class. eta: how much is remasked; 0 is the ancestral sampler of MDLM."""

    eta: float
    uses_all_steps: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta must be within 0..1, got {self.eta}")

    def check(self, schedule: Schedule) -> None:
        # In the first step nothing is visible, and the last remasks nothing.
        if schedule.block_steps < 3:
            raise UserError(f"{type(self).__name__} needs at least 3 steps a block, got {schedule.block_steps}")

    def reads(self, state: State) -> Tensor:
        return torch.zeros_like(state.visible)

    def visible_share(self, t: Tensor) -> Tensor:
        """(B,) a_t, the fraction of the block visible at time t (B,): 0 at t = 1, 1 at t = 0."""
        return 1 - t

    def sigma(self, state: State) -> Tensor:
        """(B, 1) or (B, L): probability of a visible token to be remasked."""
        raise NotImplementedError

    def chance(self, state: State, chance: Tensor) -> Tensor:
        """(B,) rho, if sigma is the same at all positions."""
        before, after = self.visible_shares(state)
        return (after - (1 - self.sigma(state)[:, 0]) * before) / (1 - before)

    def remask(self, state: State, prediction: Prediction) -> Tensor:
        where = unmasked_tokens(state)
        return where & (state.noise.uniform(where) < self.sigma(state))

    def visible_shares(self, state: State) -> tuple[Tensor, Tensor]:
        """a_t and a_s, both (B,)."""
        steps, left = state.steps.clamp(min=1).double(), state.steps_left.clamp(min=1).double()
        return self.visible_share(left / steps), self.visible_share((left - 1) / steps)

    def sigma_max(self, state: State) -> Tensor:
        """(B,) the largest sigma for which unmasking all masks still reaches a_s."""
        before, after = self.visible_shares(state)
        return torch.where(before > 0, (1 - after) / before, 1.0).clamp(max=1)


class Cap(Remasking):
    """ReMDM-cap: sigma = min(eta, sigma_max)."""

    def sigma(self, state: State) -> Tensor:
        return self.sigma_max(state).clamp(max=self.eta)[:, None]


class Rescale(Remasking):
    """ReMDM-rescale: sigma = eta sigma_max."""

    def sigma(self, state: State) -> Tensor:
        return self.eta * self.sigma_max(state)[:, None]


@dataclass(frozen=True, kw_only=True)
class Confident(Remasking):
    """ReMDM-conf: sigma = eta sigma_max softmax(-c) over the visible tokens; c is their probability when unmasked.

    compensate: false, as released: masks are unmasked as if nothing were remasked, so fewer tokens are visible than
        scheduled, until the last steps unmask the rest. true: rho = (n a_s - sum of (1 - sigma) over the visible
        tokens) / (number of masks), clipped to [0, 1]; n is the number of positions of the block not given by `start`
    """

    eta: float = 1.0
    compensate: bool = False

    def sigma(self, state: State) -> Tensor:
        where = unmasked_tokens(state)
        weights = (-state.confidence).masked_fill(~where, -torch.inf).softmax(1)
        weights = weights.masked_fill(~where, 0.0)  # NaN in rows without such tokens
        return self.eta * self.sigma_max(state)[:, None] * weights

    def chance(self, state: State, chance: Tensor) -> Tensor:
        before, after = self.visible_shares(state)
        if not self.compensate:
            return (after - before) / (1 - before)
        where, masks = unmasked_tokens(state), (state.block & ~state.visible).sum(1)
        still_visible = ((1 - self.sigma(state)) * where).sum(1)  # expected number after remasking
        to_unmask = (where.sum(1) + masks) * after - still_visible
        return (to_unmask / masks.clamp(min=1)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class Loop(Remasking):
    """ReMDM-loop: a rises to `share` by time t_on, stays there until t_off while tokens are remasked, then rises to 1.

    sigma = min(eta, sigma_max) in the middle phase, else 0. A step that crosses from one phase into the next uses the a
    of the time at which it ends; the released code completes such a step in its first phase.
    """

    eta: float = 0.02
    share: float = 0.9
    t_off: float = 0.05
    t_on: float = 0.55

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.t_off < self.t_on < 1 or not 0 < self.share < 1:
            times = f"t_off={self.t_off} t_on={self.t_on} share={self.share}"
            raise UserError(f"expected 0 < t_off < t_on < 1 and 0 < share < 1, got {times}")

    def check(self, schedule: Schedule) -> None:
        steps = schedule.block_steps
        if not any(self.t_off < left / steps <= self.t_on for left in range(2, steps)):
            raise UserError(f"of {steps} steps a block none begins between t_on={self.t_on} and t_off={self.t_off}")

    def visible_share(self, t: Tensor) -> Tensor:
        rising = self.share * (1 - t) / (1 - self.t_on)
        ending = 1 - (1 - self.share) * t / self.t_off
        return torch.where(t > self.t_on, rising, ending.clamp(min=self.share))

    def sigma(self, state: State) -> Tensor:
        t = state.steps_left / state.steps.clamp(min=1).double()
        middle = (t <= self.t_on) & (t > self.t_off)
        return (self.sigma_max(state).clamp(max=self.eta) * middle)[:, None]


@dataclass(frozen=True, kw_only=True)
class RemaskLowest(Reviser):
    """ReMDM for LLaDA: some of a block's steps remask its least confident tokens and unmask as many masks.

    Of the T steps of a block T_r = floor(T * share) revise: each unmasks `number` masks, which the step before made by
    remasking the `number` tokens that were least probable when unmasked. The other T_w = T - T_r steps share the masks
    evenly; the first ceil(T_w * begin) of them come before the revising steps. The official port has T_r = T_w, and
    begins at 7/8 of the block's *length*, which is right only for one token a step; here it is a fraction of steps.
    """

    begin: float = 0.875
    number: int = 1
    share: float = 0.5
    uses_all_steps: ClassVar[bool] = True
    can_veto: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.number < 1:
            raise UserError(f"number must be at least 1, got {self.number}")
        if not (0 < self.share < 1 and 0 < self.begin <= 1):
            values = f"share={self.share} begin={self.begin}"
            raise UserError(f"share must be between 0 and 1, begin above 0 and at most 1, got {values}")

    def check(self, schedule: Schedule) -> None:
        steps = schedule.block_steps
        if not int(steps * self.share):
            raise UserError(f"share={self.share} of {steps} steps a block is no step: raise share or take more steps")

    def chance(self, state: State, chance: Tensor) -> Tensor:
        revising, begin = self._phase(state.steps)
        masks = (state.block & ~state.visible).sum(1)
        writing_steps = torch.where(state.steps_done < begin, state.steps_left - revising, state.steps_left).clamp(
            min=1
        )
        revises = self._revises(state, state.steps_done)
        count = torch.where(revises, self.number, ceil_divide(masks, writing_steps))
        return (count / masks.clamp(min=1).double()).clamp(max=1)

    def reads(self, state: State) -> Tensor:
        return torch.zeros_like(state.visible)

    def remask(self, state: State, prediction: Prediction) -> Tensor:
        unmasked = state.block & state.confidence.isfinite()  # includes the tokens of this step
        number = self._revises(state, state.steps_done + 1) * self.number
        return top(-state.confidence, unmasked, number)

    def _phase(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) number of steps that revise, and (B,) number of steps before the first of them."""
        revising = (steps * self.share).floor().long()
        return revising, ((steps - revising) * self.begin).ceil().long()

    def _revises(self, state: State, steps_done: Tensor) -> Tensor:
        """(B,) bool: whether the step after `steps_done` (B,) steps of the block revises."""
        revising, begin = self._phase(state.steps)
        return (steps_done >= begin) & (steps_done < begin + revising)


class KeepSurest(Reviser):
    """RemeDi's sampler (arXiv 2509.23653) without its second network: each step chooses anew which tokens are visible.

    After the n-th of T steps these are the ceil(N n / T) most confident of the N positions of the block that `start`
    left open, whether they were visible before or not; all others are masks. Confidence is the probability of the
    token, or of the proposal for a mask, by the logits of this step.
    """

    can_veto: ClassVar[bool] = True
    selects_positions: ClassVar[bool] = True

    def remask(self, state: State, prediction: Prediction) -> Tensor:
        where = state.block & state.confidence.isfinite()  # all but the tokens of `start`
        visible = where & state.visible
        current = prediction.confidence(visible & prediction.where, state.tokens)
        confidence = torch.where(visible, current, state.confidence)
        num_kept = ceil_divide(where.sum(1) * (state.steps_done + 1), state.steps.clamp(min=1))
        return where & ~top(confidence, where, num_kept)


def unmasked_tokens(state: State) -> Tensor:
    """(B, L) bool: the visible tokens of the block that the sampler unmasked itself."""
    return state.block & state.visible & state.confidence.isfinite()
