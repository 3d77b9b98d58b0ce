"""Powers of a stiffness: how they are limited, taken and normalized, for one weight or a row of weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from altgrad_core.rows import Row, norms
from altgrad_core.stiffness import grid_stiffness, uniform_stiffness

NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "rms": lambda s: s.double().square().mean().sqrt(),
    "mean": lambda s: s.double().mean(),
    "max": lambda s: s.double().amax(),
}
"""What S^q is divided by, of one tensor, accumulated in float64."""

_AS_NORMS: dict[str, tuple[float, Callable[[int], float]]] = {
    "rms": (2, math.sqrt),
    "mean": (1, float),
    "max": (math.inf, lambda count: 1.0),
}
"""The same of positive numbers: a norm's order, and what it is divided by for so many elements."""


def limited(stiffness: Tensor, largest: float) -> Tensor:
    """Return S, at most `largest`, or what its dtype holds."""
    return stiffness.clamp(max=min(largest, torch.finfo(stiffness.dtype).max))


def powered(stiffness: Tensor, exponent: float) -> Tensor | float:
    """Return S^exponent, of equal S equal; exact for 0 and 1, rounded once for -1 and 1/2, twice for -1/2."""
    if exponent == 0:
        return 1.0
    if exponent == 1:
        return stiffness
    if abs(exponent) == 0.5:
        return root(stiffness) if exponent > 0 else root(stiffness).reciprocal_()
    if exponent == -1:
        return stiffness.reciprocal()
    # by float64: float32's own differs between the lanes of a vector
    return stiffness.double().pow(exponent).to(stiffness.dtype)


def root(x: Tensor) -> Tensor:
    """Return the square root, rounded once.

    torch's own on a CPU is up to one unit in the last place off (MKL's vector library); by way of float64 a
    float32 one is right.
    """
    return x.double().sqrt_().to(x.dtype) if x.dtype == torch.float32 and x.is_cpu else x.sqrt()


def normalized(powers: Tensor | float, exponent: float, normalize: str, row: Row) -> Tensor | float:
    """Return S^exponent, as a row, over its rms, mean or max over each of the row's tensors, in S's dtype.

    A constant S gives 1 to the bit: by a quotient; where the exponent is whole and S a power of two times the
    reciprocal too, which is sooner.
    """
    if normalize == "none" or not isinstance(powers, Tensor) or not powers.numel():
        return powers
    parts = [part if part.numel() else part.new_ones(1) for part in row.parts(powers)]
    found = [NORMALIZERS[normalize](one) for one in parts] if powers.is_cpu else as_norms(parts, normalize)
    norm = torch.stack(found)
    if exponent.is_integer():
        return powers * row.spread((1 / norm).to(powers.dtype).unbind())
    return powers / row.spread(norm.to(powers.dtype).unbind())


def as_norms(parts: Sequence[Tensor], normalize: str) -> Sequence[Tensor]:
    """Return what `NORMALIZERS` does of tensors of positive numbers, in two launches for all of them."""
    order, divisor = _AS_NORMS[normalize]
    return torch._foreach_div(norms(parts, order).unbind(), [divisor(one.numel()) for one in parts])


def pointwise(stiffness: Any) -> Any:
    """Return the formula that gives a weight's S from that weight, format and scale alone.

    None where S is kept or depends on the tensor as a whole, or nobody says that it does not. The core's own
    are known; a formula that has a loop over blocks (`block_loop`) cannot look further than a block.
    """
    if getattr(stiffness, "refresh", "step") != "step" or getattr(stiffness, "of_format", None):
        return None
    formula = getattr(stiffness, "formula", stiffness)
    if formula is grid_stiffness or formula is uniform_stiffness:
        return formula
    return next((one for one in (stiffness, formula) if getattr(one, "block_loop", None)), None)
