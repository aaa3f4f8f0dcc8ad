"""ReMDM: what is written is hidden again now and then, so that it can be written anew (arXiv 2503.00307).

    Sampler(length=64, unmask=Bernoulli(), reviser=Cap(eta=0.008), temperature=1.0)

A step goes from time t to s < t, and a_t = 1 - t is the share of the text that is visible at t. Each visible token is
hidden with probability sigma, and each mask unmasked with probability

    rho = (a_s - (1 - sigma) a_t) / (1 - a_t),     sigma <= sigma_max = min(1, (1 - a_s) / a_t),

so that the share visible at s is a_s for any sigma. `Cap`, `Rescale`, `Confident` and `Loop` differ in sigma. They
were made for `unmask: Bernoulli`, which unmasks by chance; with other policies the number unmasked is what is expected.
Time is that of a block, and only what the sampler wrote itself is hidden: a given beginning stays.

`RemaskLowest` and `KeepSurest` hide by confidence in place of chance, in numbers that are fixed.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from src.io.errors import UserError
from src.samplers.reviser import Prediction, Reviser, State
from src.samplers.schedule import Schedule, ceil_divide
from src.samplers.unmask import top


class Remasking(Reviser):
    """What the samplers of ReMDM share. B rows, L positions; all numbers are float64.

    eta: how much is hidden; 0 is the ancestral sampler of MDLM
    """

    needs_logits: ClassVar[bool] = False
    uses_all_steps: ClassVar[bool] = True

    def __init__(self, *, eta: float) -> None:
        if not 0 <= eta <= 1:
            raise UserError(f"eta must be within 0..1, got {eta}")
        self.eta = eta

    def check(self, schedule: Schedule) -> None:
        """Raises UserError for less than three steps a block: nothing is visible in the first, the last hides none."""
        if schedule.block_steps < 3:
            raise UserError(f"{type(self).__name__} needs 3 steps a block, this schedule has {schedule.block_steps}")

    def visible_share(self, t: Tensor) -> Tensor:
        """(B,) a(t), 0 at t = 1 and 1 at t = 0."""
        return 1 - t

    def sigma(self, state: State) -> Tensor:
        """(B, 1) or (B, L): with which probability a visible token is hidden."""
        raise NotImplementedError

    def chance(self, state: State) -> Tensor:
        """(B,) rho, which presumes that sigma is the same everywhere."""
        before, after = self.shares(state)
        return (after - (1 - self.sigma(state)[:, 0]) * before) / (1 - before)

    def count(self, state: State, count: Tensor) -> Tensor:
        masks = (state.block & ~state.visible).sum(1)
        return (self.chance(state) * masks - 1e-9).ceil().long()  # a whole number may be a little more after rounding

    def remask(self, state: State, prediction: Prediction) -> Tensor:
        where = written(state)
        return where & (state.noise.uniform(where) < self.sigma(state))

    def shares(self, state: State) -> tuple[Tensor, Tensor]:
        """a_t and a_s, both (B,)."""
        steps, left = state.steps.clamp(min=1).double(), state.left.clamp(min=1).double()
        return self.visible_share(left / steps), self.visible_share((left - 1) / steps)

    def sigma_max(self, state: State) -> Tensor:
        """(B,) the most that can be hidden so that unmasking all masks makes up for it."""
        before, after = self.shares(state)
        return torch.where(before > 0, (1 - after) / before, 1.0).clamp(max=1)


class Cap(Remasking):
    """ReMDM-cap: sigma = min(eta, sigma_max)."""

    def sigma(self, state: State) -> Tensor:
        return self.sigma_max(state).clamp(max=self.eta)[:, None]


class Rescale(Remasking):
    """ReMDM-rescale: sigma = eta sigma_max."""

    def sigma(self, state: State) -> Tensor:
        return self.eta * self.sigma_max(state)[:, None]


class Confident(Remasking):
    """ReMDM-conf: sigma = eta sigma_max softmax(-c) over the visible tokens, c being their probability when unmasked.

    compensate: false as released: masks are unmasked as if nothing were hidden, so that fewer tokens are visible than
        the schedule says, until the last steps unmask the rest. True: rho = (n a_s - sum of (1 - sigma) over the
        visible) / (number of masks), clipped to [0, 1], for the n places that the block has to write
    """

    def __init__(self, *, eta: float = 1.0, compensate: bool = False) -> None:
        super().__init__(eta=eta)
        self.compensate = compensate

    def sigma(self, state: State) -> Tensor:
        where = written(state)
        surety = (-state.sure).masked_fill(~where, -torch.inf)
        share = surety.softmax(1).masked_fill(~where, 0.0)  # NaN in rows where nothing is written
        return self.eta * self.sigma_max(state)[:, None] * share

    def chance(self, state: State) -> Tensor:
        before, after = self.shares(state)
        if not self.compensate:
            return (after - before) / (1 - before)
        where, masks = written(state), (state.block & ~state.visible).sum(1)
        kept = ((1 - self.sigma(state)) * where).sum(1)
        wanted = (where.sum(1) + masks) * after - kept
        return (wanted / masks.clamp(min=1)).clamp(0, 1)


class Loop(Remasking):
    """ReMDM-loop: a rises to `share` by time t_on, stays there until t_off while tokens are hidden, then goes on to 1.

    sigma = min(eta, sigma_max) in the middle phase and 0 else. A step that begins in one phase and ends in another goes
    to the share that is right at its end; the released code completes such a step in its first phase.
    """

    def __init__(self, *, eta: float = 0.02, t_on: float = 0.55, t_off: float = 0.05, share: float = 0.9) -> None:
        super().__init__(eta=eta)
        if not 0 < t_off < t_on < 1 or not 0 < share < 1:
            raise UserError(f"expected 0 < t_off < t_on < 1 and 0 < share < 1, got {t_off=} {t_on=} {share=}")
        self.t_on, self.t_off, self.share = t_on, t_off, share

    def check(self, schedule: Schedule) -> None:
        """Raises UserError where no step begins in the middle phase."""
        steps = schedule.block_steps
        if not any(self.t_off < left / steps <= self.t_on for left in range(2, steps)):
            raise UserError(f"of {steps} steps a block none begins between t_on={self.t_on} and t_off={self.t_off}")

    def visible_share(self, t: Tensor) -> Tensor:
        rising = self.share * (1 - t) / (1 - self.t_on)
        ending = 1 - (1 - self.share) * t / self.t_off
        return torch.where(t > self.t_on, rising, ending.clamp(min=self.share))

    def sigma(self, state: State) -> Tensor:
        t = state.left / state.steps.clamp(min=1).double()
        middle = (t <= self.t_on) & (t > self.t_off)
        return (self.sigma_max(state).clamp(max=self.eta) * middle)[:, None]


class RemaskLowest(Reviser):
    """ReMDM for LLaDA: a part of a block's steps hides its least sure tokens again, as many as it unmasks.

    Of the T steps of a block T_r = floor(T * share) only revise: before each of them the `number` written tokens that
    were least probable when unmasked are hidden, and the step unmasks as many. The other steps share the masks evenly,
    the first ceil(T_w * begin) of these T_w = T - T_r before that. The official port has T_r = T_w, and begins at 7/8
    of the block's *length*, which is only right for one token a step; here `begin` is a part of the steps.
    """

    needs_logits: ClassVar[bool] = False
    uses_all_steps: ClassVar[bool] = True
    can_veto: ClassVar[bool] = True

    def __init__(self, *, number: int = 1, share: float = 0.5, begin: float = 0.875) -> None:
        if number < 1:
            raise UserError(f"number must be at least 1, got {number}")
        if not (0 < share < 1 and 0 < begin <= 1):
            raise UserError(f"share must be within 0..1 and begin above 0 and at most 1, got {share=} {begin=}")
        self.number, self.share, self.begin = number, share, begin

    def check(self, schedule: Schedule) -> None:
        """Raises UserError where no step revises, or less than `number` tokens are written when the first does."""
        steps, masks = schedule.block_steps, schedule.block_length
        revising, begin = (int(v) for v in self._phase(torch.tensor([steps])))
        if not revising:
            raise UserError(f"share={self.share} of {steps} steps a block is none")
        writing = steps - revising
        if begin * (masks // writing) + min(begin, masks % writing) < self.number:
            raise UserError(f"number={self.number} is more than the tokens that {begin} steps have written")

    def count(self, state: State, count: Tensor) -> Tensor:
        revising, begin = self._phase(state.steps)
        masks = (state.block & ~state.visible).sum(1)
        ahead = torch.where(state.made < begin, state.left - revising, state.left)  # steps that share the masks
        return torch.where(self._revises(state, state.made), self.number, ceil_divide(masks, ahead.clamp(min=1)))

    def chance(self, state: State) -> Tensor:
        masks = (state.block & ~state.visible).sum(1).clamp(min=1)
        return (self.count(state, masks) / masks.double()).clamp(max=1)

    def remask(self, state: State, prediction: Prediction) -> Tensor:
        now = state.block & state.sure.isfinite()  # written, the tokens of this step too
        number = self._revises(state, state.made + 1) * self.number
        return top(-state.sure, now, number)

    def _phase(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) the number of steps that revise, and of those that are made before."""
        revising = (steps * self.share).floor().long()
        return revising, ((steps - revising) * self.begin).ceil().long()

    def _revises(self, state: State, made: Tensor) -> Tensor:
        """(B,) bool: whether the step that follows on `made` (B,) steps revises."""
        revising, begin = self._phase(state.steps)
        return (made >= begin) & (made < begin + revising)


class KeepSurest(Reviser):
    """RemeDi's sampler (arXiv 2509.23653) without its second network: each step chooses anew what is visible.

    After the n-th of T steps these are the ceil(N n / T) surest of the N places of the block that were not given,
    whether they were visible before or not. All others are masks. How sure a place is: the probability of its token, or
    of the proposal where there is a mask, in the logits of this step.
    """

    can_veto: ClassVar[bool] = True
    selects_positions: ClassVar[bool] = True

    def remask(self, state: State, prediction: Prediction) -> Tensor:
        places = state.block & state.sure.isfinite()  # all that was not given
        visible = places & state.visible
        sure = torch.where(visible, prediction.confidence(visible & prediction.where, state.tokens), state.sure)
        kept = ceil_divide(places.sum(1) * (state.made + 1), state.steps.clamp(min=1))
        return places & ~top(sure, places, kept)


def written(state: State) -> Tensor:
    """(B, L) bool: the visible tokens of the block that the sampler wrote itself."""
    return state.block & state.visible & state.sure.isfinite()
