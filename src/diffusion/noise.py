"""Noise that belongs to a sample: a pure function of (seed, pass, key, draw), not of the batch, rank, worker or device.

    noise = Noise(["key-1", "key-2"], seed=0, passes=[0, 3])
    noise.level(0.1)                    (B,) noise levels t, uniform on [0.1, 1)
    noise.uniform(editable)             (B, L) numbers in [0, 1), one for each position

B rows, L positions, N true positions. `passes` says how often the stream of each sample has been read before, so that
a sample gets new noise each time. The generator is SplitMix64 (Steele, Lea and Flood, 2014) in int64 arithmetic that
wraps: the same bits on CPU and GPU. A number depends on its row, call, position and index alone; neither padding, nor
the other positions that are asked for, nor the other rows of a batch change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

GOLDEN, FIRST, SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
CALL, POSITION = 42, 21  # bits of a counter below the number of the call, and below the position
PART = 64  # rows of vocabulary-sized noise that are made at once


class Noise:
    """Random numbers for B rows. Each call draws new ones for the rows that have a true position in `where`, so the
    same calls in the same order repeat them, whatever the other rows ask for."""

    def __init__(
        self,
        keys: Sequence[str],
        *,
        seed: int | Sequence[int],
        passes: Sequence[int] | None = None,
        draw: str | int = 0,
    ) -> None:
        seeds = [seed] * len(keys) if isinstance(seed, int) else seed
        rows = zip(seeds, passes or [0] * len(keys), keys, strict=True)
        names = [f"{seed}/{number}/{key}/{draw}" for seed, number, key in rows]
        digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
        self.start = torch.tensor(
            [int.from_bytes(d, "little", signed=True) for d in digests], dtype=torch.int64
        )  # (B,)
        self.calls = torch.zeros_like(self.start)

    def level(self, low: float = 0.0, *, device: torch.device | str = "cpu") -> Tensor:
        """(B,) float32, uniform on [low, 1)."""
        return low + (1 - low) * self.uniform(torch.ones(len(self.start), 1, dtype=torch.bool, device=device))[:, 0]

    def uniform(self, where: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, L): uniform on [0, 1) at the true positions of `where` (B, L) bool, 1 elsewhere.

        dtype: float64 where the spacing of float32 is no smaller than the probability of a token
        """
        return fraction(self._bits(where), dtype).masked_fill(~where, 1.0)

    def integers(self, where: Tensor, high: int) -> Tensor:
        """(B, L) int64: uniform on [0, high) at the true positions of `where`, 0 elsewhere."""
        return (shift(self._bits(where), 1) % high).masked_fill(~where, 0)

    def gumbel(self, where: Tensor, size: int, *, at: Tensor | None = None) -> Iterator[Tensor]:
        """Standard Gumbel noise for N positions, in parts of at most (PART, size).

        at: (N,) int64 positions of the flattened (B, L); None: the true ones of `where`, which waits for the device
        float64: float32 would truncate the tail of the distribution, which lowers the temperature of a sampler.
        """
        state, index = self._begin(where), torch.arange(size, device=where.device)
        at = where.flatten().nonzero()[:, 0] if at is None else at
        for part in at.split(PART):
            row, position = part // where.shape[1], part % where.shape[1]
            bits = splitmix(state[row, None] + ((position[:, None] << POSITION) + index) * GOLDEN)
            yield -(-(fraction(bits, torch.float64) + 2.0**-54).log()).log()  # never log(0)

    def _bits(self, where: Tensor) -> Tensor:
        """(B, L) int64, all 64 bits random."""
        positions = torch.arange(where.shape[1], device=where.device)
        return splitmix(self._begin(where)[:, None] + (positions << POSITION) * GOLDEN)

    def _begin(self, where: Tensor) -> Tensor:
        """(B,) the state at position 0 of a new call, for rows with a true position in `where`."""
        self.start, self.calls = (part.to(where.device, non_blocking=True) for part in (self.start, self.calls))
        self.calls = self.calls + where.any(1)
        return self.start + (self.calls << CALL) * GOLDEN


def splitmix(state: Tensor) -> Tensor:
    """The output function of SplitMix64, int64 to int64."""
    state = (state ^ shift(state, 30)) * FIRST
    state = (state ^ shift(state, 27)) * SECOND
    return state ^ shift(state, 31)


def shift(bits: Tensor, by: int) -> Tensor:
    """Shift int64 right, filling with zeros."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def fraction(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """[0, 1) from the upper bits, as many as the dtype holds exactly: 24 of float32, 53 of float64."""
    return shift(bits, 40).float() * 2.0**-24 if dtype == torch.float32 else shift(bits, 11).double() * 2.0**-53
