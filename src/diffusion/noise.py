"""Noise that belongs to a sample: a pure function of (seed, epoch, key, draw), not of the batch, rank or worker.

    noise = Noise(["key-1", "key-2"], seed=0, epoch=3)
    noise.level(0.1)                    (B,) noise levels t, uniform on [0.1, 1)
    noise.uniform(editable)             (B, L) numbers in [0, 1), one for each editable position

Each row has its own generator and draws exactly one number for each of its true positions, so neither padding nor
the other rows of a batch change its numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """One generator per row, on the CPU; results go to `device`."""

    def __init__(self, keys: Sequence[str], *, seed: int, epoch: int = 0, draw: str | int = 0) -> None:
        self.generators = [_generator(f"{seed}/{epoch}/{key}/{draw}") for key in keys]

    def level(self, low: float = 0.0, *, device: torch.device | str = "cpu") -> Tensor:
        """(B,) float32, uniform on [low, 1)."""
        values = torch.cat([_rand(1, g) for g in self.generators])
        return (low + (1 - low) * values).to(device)

    def uniform(self, where: Tensor) -> Tensor:
        """(B, L) float32: uniform on [0, 1) at the true positions of `where` (B, L) bool, 1 elsewhere."""
        counts = where.sum(1).tolist()
        values = torch.cat([_rand(n, g) for n, g in zip(counts, self.generators, strict=True)])
        out = torch.ones(where.shape, device=where.device, dtype=torch.float32)
        out[where] = values.to(where.device)
        return out

    def integers(self, where: Tensor, high: int) -> Tensor:
        """(B, L) int64: uniform on [0, high) at the true positions of `where`, 0 elsewhere."""
        counts = where.sum(1).tolist()
        values = [torch.randint(high, (n,), generator=g) for n, g in zip(counts, self.generators, strict=True)]
        out = torch.zeros(where.shape, dtype=torch.int64, device=where.device)
        out[where] = torch.cat(values).to(where.device)
        return out


def _rand(count: int, generator: torch.Generator) -> Tensor:
    """(count,) float32, even if a trainer in half precision has changed the default dtype."""
    return torch.rand(count, generator=generator, dtype=torch.float32)


def _generator(name: str) -> torch.Generator:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
