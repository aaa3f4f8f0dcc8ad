"""What float32 rounds off in a golden model. It grows with the depth, so tolerances for sets of any depth need it.

    wide = in_float64(model)
    atol = tolerance(1e-3, found, the same of `wide`)

Two programs that add up the same numbers in another order are each off by about what separates our result in float32
from ours in float64 (the norms and the rotary embedding remain in float32), and apart by at most twice that.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

SMALL = 1e-3  # of the spread: more is no rounding of float32, which takes 2e-4 of it in 12 layers


def in_float64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def rounded_off(found: Tensor, wide: Tensor) -> float:
    """The largest difference between a result in float32 and in float64, which must be small."""
    lost = float((found.double() - wide).abs().max())
    assert lost < SMALL * float(wide.std()), "float32 loses more than rounding does"
    return lost


def tolerance(least: float, found: Tensor, wide: Tensor) -> float:
    """An absolute tolerance: `least`, which suits a model of few layers, or more if float32 rounds off more here."""
    return max(least, 2 * rounded_off(found, wide))
