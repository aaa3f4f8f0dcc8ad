"""How many tokens a step unmasks, where, and when a row is done.

The number is `ceil(masks now / steps left)`: an even split with the remainder in the earliest steps, also if a reviser
remasks tokens or the given text has few masks. The last scheduled step of a block unmasks all its masks, so every row
ends. Each row moves through the blocks on its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from src.io.errors import UserError
from src.types import SpecialIds


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
    blocks: int = 1
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
        return self.steps // self.blocks if self.steps else -(-self.block_length // (self.tokens_per_step or 1))

    @property
    def levels(self) -> list[float]:
        """The share of the response that is masked before each step, if it starts as all masks and none is remasked."""
        steps, levels = torch.tensor([self.block_steps]), []
        for behind in range(self.length - self.block_length, -1, -self.block_length):  # masks of later blocks
            masks = torch.tensor([self.block_length])
            for left in range(self.block_steps, 0, -1):
                levels += [(int(masks) + behind) / self.length] if masks else []  # a shifted block may be full early
                masks = masks - scheduled(masks, self.chance(steps, torch.tensor([left])))
        return levels

    def steps_for(self, masks: Tensor) -> Tensor:
        """(B,) steps of a block with `masks` (B,) masks."""
        if self.steps is not None:
            return torch.full_like(masks, self.steps // self.blocks)
        return ceil_divide(masks, torch.full_like(masks, self.tokens_per_step or 1))

    def chance(self, steps: Tensor, left: Tensor) -> Tensor:
        """(B,) float64: the fraction of a block's masks to unmask now, with `left` (B,) of its `steps` (B,) left."""
        left = left.clamp(min=1)
        if self.shift == 1:
            return 1 / left.double()
        done = 1 - torch.stack([left, left - 1]).double() / steps.clamp(min=1).maximum(left)
        masked = 1 - self.shift * done / (1 + (self.shift - 1) * done)  # fraction before the step and after it
        return 1 - masked[1] / masked[0]


class Progress:
    """Where each row stands, and when it is done.

    active:     (B,) bool, rows that are not done
    masked:     (B, L) bool, the masks of the text; pending: those that must be unmasked before the row is done
    unfinished: (B,) bool, rows with a pending mask, or with steps of a block still to make
    end:        (B,) end of the row's current block; before_end: (B, L) bool, that block and all earlier ones
    steps, steps_left, steps_done: (B,) as in `State`
    stop:       (B,) position of the eot that ends its text, or the response length
    passes:     (B,) post steps made
    seen:       (B, post_steps + 1, L) the text after each of them

    early_stop, post_steps: as in `Sampler`; uses_all_steps, random: as in `Reviser`
    """

    def __init__(
        self,
        schedule: Schedule,
        tokens: Tensor,
        special: SpecialIds,
        *,
        early_stop: bool | Literal["eot", "block"] = False,
        post_steps: int = 0,
        uses_all_steps: bool = False,
        random: bool = False,
    ) -> None:
        self.schedule, self.special, self.early_stop, self.post_steps = schedule, special, early_stop, post_steps
        self.uses_all_steps, self.random = uses_all_steps, random
        self.place = torch.arange(schedule.length, device=tokens.device)[None]  # (1, L)
        self.masked = self.pending = tokens == special.mask
        self.unfinished = self.masked.any(1)
        self.active = self.unfinished | (post_steps > 0)
        self.end, self.steps, self.steps_left, self.steps_done, self.passes = tokens.new_zeros(5, len(tokens))
        self.before_end = torch.zeros_like(self.masked)
        self.stop = torch.full_like(self.end, schedule.length)
        self.stopped = torch.zeros_like(self.active)
        self.seen = tokens.new_full((len(tokens), post_steps + 1, schedule.length), -1)
        self.seen[:, 0] = tokens
        self._enter(self.unfinished)

    def _enter(self, moves: Tensor) -> None:
        """Move the rows `moves` (B,) bool to the next block that has masks."""
        size = self.schedule.block_length
        block = self.masked.int().argmax(1) // size  # of the first mask
        self.end = torch.where(moves, (block + 1) * size, self.end)
        self.before_end = self.place < self.end[:, None]
        steps = self.schedule.steps_for((self.masked & self.before_end).sum(1))
        self.steps = torch.where(moves, steps, self.steps)
        self.steps_left = torch.where(moves, steps, self.steps_left)
        self.steps_done = self.steps_done.masked_fill(moves, 0)

    def count(self, chance: Tensor) -> Tensor:
        """(B,) the fraction `chance` (B,) of the masks up to the end of the block, rounded up."""
        return scheduled((self.masked & self.before_end).sum(1), chance)

    def finish(self, tokens: Tensor, *, post: Tensor, last: Tensor) -> None:
        """Count a step as made, find the rows that are done, and move others to their next block.

        tokens: (B, L) after the step; post: (B,) rows that were only revised; last: (B,) rows whose budget is spent
        """
        self.steps_left = (self.steps_left - 1).clamp(min=0)
        self.steps_done = self.steps_done + 1
        self.masked = self.pending = tokens == self.special.mask
        # 1. where the text ends, if it is known before everything is unmasked
        if self.early_stop in (True, "block"):  # the block is full and its last token is an end
            final = tokens.gather(1, (self.end - 1).clamp(min=0)[:, None])[:, 0]
            ends = (final == self.special.eos) | ((final == self.special.eot) & (self.early_stop is True))
            ends &= ~(self.masked & self.before_end).any(1)
            self.stop = torch.where(ends, self.end.minimum(self.stop), self.stop)
            self.stopped = self.stopped | ends
        elif self.early_stop == "eot":  # at the first eot, or at an earlier one of a previous step
            self.stop = torch.where(tokens == self.special.eot, self.place, self.stop[:, None]).amin(1)
            self.stopped = self.stop < self.schedule.length
        if self.early_stop:
            self.pending = self.masked & (self.place < self.stop[:, None])
        # 2. A row is done when no mask is pending and it is revised, or when its budget is spent.
        self.unfinished = self.pending.any(1)
        stays = (self.steps_left > 0) & ~self.stopped if self.uses_all_steps else None  # may not leave its block yet
        if stays is not None:
            self.unfinished = self.unfinished | stays
        goes_on = self.unfinished
        if self.post_steps:
            goes_on = goes_on | ~self._is_revised(tokens, post)
        self.active = self.active & ~last & goes_on
        # 3. rows without a mask up to the end of their block move to the next one that has masks
        if self.schedule.blocks > 1:
            moves = self.masked.any(1) & ~(self.masked & self.before_end).any(1)
            self._enter(moves if stays is None else moves & ~stays)

    def _is_revised(self, tokens: Tensor, post: Tensor) -> Tensor:
        """(B,) bool: rows that have made their post steps, or have a text that they had before."""
        # NOTE: greedy revision may alternate between texts forever; from one seen before it can only repeat itself.
        self.passes = self.passes + post
        revised = self.passes >= self.post_steps
        if not self.random:
            revised |= (self.seen == tokens[:, None]).all(-1).any(1) & post
        self.seen[torch.arange(len(tokens), device=tokens.device), self.passes] = tokens
        return revised

    def text(self, tokens: Tensor) -> Tensor:
        """(B, L) the tokens, with the end of each row that stopped early: eot there, or end-of-text from there on."""
        stop = self.stop[:, None]
        if self.early_stop in (True, "block"):
            return tokens.masked_fill(self.place >= stop, self.special.eos)
        return tokens.masked_fill(self.place == stop, self.special.eot)

    @property
    def reach(self) -> Tensor:
        """(B, L) bool: where masks may be unmasked, up to the end of the block or, once known, of the text (ReDiff)."""
        if not self.early_stop:
            return self.before_end
        return self.place < torch.where(self.stop < self.schedule.length, self.stop, self.end)[:, None]

    @property
    def in_block(self) -> Tensor:
        """(B, L) bool: the current block."""
        return self.before_end & (self.place >= self.end[:, None] - self.schedule.block_length)


def scheduled(masks: Tensor, chance: Tensor) -> Tensor:
    """(B,) the fraction `chance` (B,) of `masks` (B,), rounded up."""
    return (masks * chance - 1e-9).ceil().long()  # NOTE: rounding may exceed a whole number


def ceil_divide(number: Tensor, by: Tensor) -> Tensor:
    return (number + by - 1) // by
