"""How many tokens a step unmasks, and where.

    schedule = Schedule(length=32, tokens_per_step=4, steps=None, blocks=2)
    progress = Progress(schedule, tokens, mask_id)
    progress.enter(tokens)        moves rows whose block is full to their next block
    progress.take(tokens)         (B,) number to unmask in this step; one scheduled step is used up
    progress.stop_at(tokens, eot) ends rows at their first eot, for good: masks behind it are never unmasked

The number is `ceil(masks now / steps left)`: an even split with the remainder in the earliest steps, right
also when a reviser hides tokens again or a caption starts with few masks. At the last scheduled step of a
block all its masks go, so every row ends. Rows move through the blocks on their own: none waits for another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from src.io.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Blocks of a response of `length` tokens, and the steps of each: `steps` in all, or `tokens_per_step`.

    shift: after the share x of a block's steps shift * x / (1 + (shift - 1) * x) of it is unmasked (LaViDa, arXiv
        2505.16839): 1 is an even split, above 1 unmasks most in the first steps, below 1 in the last ones

    Raises UserError when the numbers do not fit together.
    """

    length: int
    tokens_per_step: int | None
    steps: int | None
    blocks: int
    shift: float = 1.0

    def __post_init__(self) -> None:
        tokens, steps, length, blocks = self.tokens_per_step, self.steps, self.length, self.blocks
        if (tokens is None) == (steps is None):
            raise UserError(f"give one of tokens_per_step and steps, got tokens_per_step={tokens} steps={steps}")
        if length < 1 or blocks < 1 or length % blocks:
            raise UserError(f"a length of {length} tokens cannot be split into {blocks} equal blocks")
        if steps is not None and (steps < 1 or steps % blocks):
            raise UserError(f"{steps} steps cannot be shared equally by {blocks} blocks")
        if tokens is not None and not 1 <= tokens <= self.block_length:
            raise UserError(f"tokens_per_step must be between 1 and the block's {self.block_length}, got {tokens}")
        if not 0 < self.shift < math.inf:
            raise UserError(f"shift must be above 0, got {self.shift}")

    @property
    def block_length(self) -> int:
        return self.length // self.blocks

    @property
    def block_steps(self) -> int:
        """Steps that a block of masks gets."""
        return int(self.steps_for(torch.tensor([self.block_length]))[0])

    def steps_for(self, masks: Tensor) -> Tensor:
        """(B,) steps that a block with `masks` (B,) hidden tokens gets."""
        if self.steps is not None:
            return torch.full_like(masks, self.steps // self.blocks)
        return ceil_divide(masks, torch.full_like(masks, self.tokens_per_step or 1))

    def share(self, masks: Tensor, steps: Tensor, left: Tensor) -> Tensor:
        """(B,) how many of `masks` (B,) to unmask now, with `left` (B,) of a block's `steps` to come; rounded up."""
        left = left.clamp(min=1)
        if self.shift == 1:
            return ceil_divide(masks, left)
        done = 1 - torch.stack([left, left - 1]).double() / steps.clamp(min=1).maximum(left)
        hidden = 1 - self.shift * done / (1 + (self.shift - 1) * done)  # before the step and after it
        return (masks * (1 - hidden[1] / hidden[0]) - 1e-9).ceil().long()


class Progress:
    """Where each row stands.

    end:        (B,) the end of its current block
    steps:      (B,) how many steps this block was given; steps_left: how many of them are to come
    made:       (B,) how many it has had, which may be more where a policy does not keep to the schedule
    stop:       (B,) the place of the eot that ends its text, or the length of the response
    uses_all_steps:    a row stays in its block for all its steps, also where no mask is left in it before
    """

    def __init__(self, schedule: Schedule, tokens: Tensor, mask_id: int, *, uses_all_steps: bool = False) -> None:
        self.schedule, self.mask_id, self.uses_all_steps = schedule, mask_id, uses_all_steps
        self.place = torch.arange(schedule.length, device=tokens.device)[None]  # (1, L)
        self.end, self.steps, self.steps_left, self.made = (tokens.new_zeros(len(tokens)) for _ in range(4))
        self.stop = torch.full_like(self.end, schedule.length)

    def enter(self, tokens: Tensor) -> None:
        """Open the next block that has masks, in rows without a mask up to the end of their current one."""
        size, masked = self.schedule.block_length, tokens == self.mask_id
        full = ~(masked & self.before_end).any(1) & masked.any(1) & ~self._stays
        first = masked.int().argmax(1) // size
        self.end = torch.where(full, (first + 1) * size, self.end)
        fresh = self.schedule.steps_for((masked & self.before_end).sum(1))
        self.steps = torch.where(full, fresh, self.steps)
        self.steps_left = torch.where(full, fresh, self.steps_left)
        self.made = self.made.masked_fill(full, 0)

    def take(self, tokens: Tensor) -> Tensor:
        """(B,) how many masks before the end of the block to unmask now."""
        masks = ((tokens == self.mask_id) & self.before_end).sum(1)
        count = self.schedule.share(masks, self.steps, self.steps_left)
        self.steps_left = (self.steps_left - 1).clamp(min=0)
        self.made = self.made + 1
        return count

    def stop_at(self, tokens: Tensor, eot: int) -> None:
        """Take the first `eot` of each row as its end, unless an earlier one was seen before."""
        self.stop = torch.where(tokens == eot, self.place, self.stop[:, None]).amin(1)

    def stop_behind(self, tokens: Tensor, eos: int) -> None:
        """End the rows whose current block is full and has end-of-text in its last place."""
        last = tokens.gather(1, (self.end - 1).clamp(min=0)[:, None])[:, 0]
        full = ~((tokens == self.mask_id) & self.before_end).any(1)
        self.stop = torch.where(full & (last == eos), self.end.minimum(self.stop), self.stop)

    def wanted(self, tokens: Tensor) -> Tensor:
        """(B, L) bool: the masks that have to be unmasked before the row is over."""
        return (tokens == self.mask_id) & (self.place < self.stop[:, None])

    def busy(self, tokens: Tensor) -> Tensor:
        """(B,) bool: rows with a mask that is wanted, or with steps of a block that they wait for."""
        return self.wanted(tokens).any(1) | self._stays

    @property
    def _stays(self) -> Tensor:
        """(B,) bool: rows that do not leave their block yet."""
        return (self.steps_left > 0) & (self.stop == self.schedule.length) & self.uses_all_steps

    @property
    def reach(self) -> Tensor:
        """(B, L) bool: where masks may be unmasked. As in the released code a known end takes the block's place."""
        return self.place < torch.where(self.stop < self.schedule.length, self.stop, self.end)[:, None]

    @property
    def before_end(self) -> Tensor:
        """(B, L) bool: the current block and all earlier ones."""
        return self.place < self.end[:, None]

    @property
    def in_block(self) -> Tensor:
        """(B, L) bool: the current block."""
        return self.before_end & (self.place >= self.end[:, None] - self.schedule.block_length)


def ceil_divide(number: Tensor, by: Tensor) -> Tensor:
    """Integer division that rounds up."""
    return (number + by - 1) // by
