"""How many tokens a step unmasks, and where.

    schedule = Schedule(length=32, tokens_per_step=4, steps=None, blocks=2)
    progress = Progress(schedule, tokens, mask_id)
    progress.enter(tokens)        moves rows whose block is full to their next block
    progress.take(tokens)         (B,) number to unmask in this step; uses up one scheduled step
    progress.stop_at(tokens, eot) ends rows at their first eot, for good: masks behind it are never unmasked

The number is `ceil(masks now / steps left)`: an even split with the remainder in the earliest steps, also if a reviser
remasks tokens or the given text has few masks. The last scheduled step of a block unmasks all its masks, so every row
ends. Each row moves through the blocks on its own.
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

    shift: after a fraction x of a block's steps, shift * x / (1 + (shift - 1) * x) of it is unmasked (LaViDa, arXiv
        2505.16839): 1 is an even split, above 1 unmasks most in the first steps, below 1 in the last ones

    Raises UserError if the numbers do not fit together.
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
        """Steps of a block that starts as all masks."""
        return int(self.steps_for(torch.tensor([self.block_length]))[0])

    def steps_for(self, masks: Tensor) -> Tensor:
        """(B,) steps of a block with `masks` (B,) masks."""
        if self.steps is not None:
            return torch.full_like(masks, self.steps // self.blocks)
        return ceil_divide(masks, torch.full_like(masks, self.tokens_per_step or 1))

    def count(self, masks: Tensor, steps: Tensor, left: Tensor) -> Tensor:
        """(B,) how many of `masks` (B,) to unmask now, with `left` (B,) of a block's `steps` left; rounded up."""
        left = left.clamp(min=1)
        if self.shift == 1:
            return ceil_divide(masks, left)
        done = 1 - torch.stack([left, left - 1]).double() / steps.clamp(min=1).maximum(left)
        masked = 1 - self.shift * done / (1 + (self.shift - 1) * done)  # fraction before the step and after it
        return (masks * (1 - masked[1] / masked[0]) - 1e-9).ceil().long()


class Progress:
    """Where each row stands.

    end:        (B,) end of its current block
    steps:      (B,) number of steps scheduled for this block; steps_left: how many of them are left
    steps_done: (B,) steps made in this block, which may exceed `steps` if a policy ignores the schedule
    stop:       (B,) position of the eot that ends its text, or the response length
    uses_all_steps: a row makes all steps of its block even if no mask is left in it
    """

    def __init__(self, schedule: Schedule, tokens: Tensor, mask_id: int, *, uses_all_steps: bool = False) -> None:
        self.schedule, self.mask_id, self.uses_all_steps = schedule, mask_id, uses_all_steps
        self.place = torch.arange(schedule.length, device=tokens.device)[None]  # (1, L)
        self.end, self.steps, self.steps_left, self.steps_done = (tokens.new_zeros(len(tokens)) for _ in range(4))
        self.stop = torch.full_like(self.end, schedule.length)

    def enter(self, tokens: Tensor) -> None:
        """Move rows without a mask up to the end of their block to the next block that has masks."""
        size, masked = self.schedule.block_length, tokens == self.mask_id
        full = ~(masked & self.before_end).any(1) & masked.any(1) & ~self._stays
        block = masked.int().argmax(1) // size  # of the first mask
        self.end = torch.where(full, (block + 1) * size, self.end)
        steps = self.schedule.steps_for((masked & self.before_end).sum(1))
        self.steps = torch.where(full, steps, self.steps)
        self.steps_left = torch.where(full, steps, self.steps_left)
        self.steps_done = self.steps_done.masked_fill(full, 0)

    def take(self, tokens: Tensor) -> Tensor:
        """(B,) how many masks up to the end of the block to unmask now; counts the step as made."""
        masks = ((tokens == self.mask_id) & self.before_end).sum(1)
        count = self.schedule.count(masks, self.steps, self.steps_left)
        self.steps_left = (self.steps_left - 1).clamp(min=0)
        self.steps_done = self.steps_done + 1
        return count

    def stop_at(self, tokens: Tensor, eot: int) -> None:
        """End each row at its first `eot`, or at an earlier one of a previous step."""
        self.stop = torch.where(tokens == eot, self.place, self.stop[:, None]).amin(1)

    def stop_behind(self, tokens: Tensor, eos: int) -> None:
        """End the rows whose current block is full and has end-of-text in its last position."""
        last = tokens.gather(1, (self.end - 1).clamp(min=0)[:, None])[:, 0]
        full = ~((tokens == self.mask_id) & self.before_end).any(1)
        self.stop = torch.where(full & (last == eos), self.end.minimum(self.stop), self.stop)

    def pending(self, tokens: Tensor) -> Tensor:
        """(B, L) bool: the masks that must be unmasked before the row is done."""
        return (tokens == self.mask_id) & (self.place < self.stop[:, None])

    def unfinished(self, tokens: Tensor) -> Tensor:
        """(B,) bool: rows with a pending mask, or with steps of a block still to make."""
        return self.pending(tokens).any(1) | self._stays

    @property
    def _stays(self) -> Tensor:
        """(B,) bool: rows that may not leave their block yet."""
        return (self.steps_left > 0) & (self.stop == self.schedule.length) & self.uses_all_steps

    @property
    def reach(self) -> Tensor:
        """(B, L) bool: where masks may be unmasked: up to the end of the block or, once known, of the text.

        The latter as in ReDiff's released code.
        """
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
