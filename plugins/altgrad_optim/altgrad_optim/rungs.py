"""Arithmetic in rungs: stochastic steps on the grid, and the real rung coordinate of a master.

Pure functions of tensors. Weights are in scaled units, w*s, where the grid is the format's own. Random
numbers come in as tensors or as the keys of a stream; a NaN in any argument is a NaN in the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad_core.elementwise import wide
from altgrad_core.format import Format
from altgrad_core.kernels import kernel
from altgrad_core.random_bits import uniform_like


def stochastic_round(x: Tensor, uniform: Tensor) -> Tensor:
    """Round to an integer, up in magnitude with probability frac|x|; integers never move. Floating result.

    uniform: float32 in [0, 1), of x's shape. Unbiased to the resolution of `uniform`; NaN stays NaN.
    """
    magnitude = x.abs()
    whole = magnitude.floor()
    return (whole + (uniform < magnitude - whole)).copysign(x)


def grid_step(scaled: Tensor, rungs: Tensor, format: Format, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Move on-grid values down by `rungs`, rounded stochastically to whole rungs.

    scaled: w*s, on the format's grid. rungs: r, float, already clipped. uniform: float32 in [0, 1).
    Returns the new grid values (NaN where w or r is NaN), and which were pushed past the end: bool.
    """
    moved = format.rung(scaled) - stochastic_round(rungs, uniform).to(torch.int32)
    lost = torch.isnan(rungs) | torch.isnan(scaled)
    values = format.from_rung(moved).to(scaled.dtype)
    past = (moved.abs() > format.rung(values).abs()) & ~lost
    return torch.where(lost, torch.nan, values), past


def value_step(
    scaled: Tensor, rungs: Tensor, format: Format, uniform: Tensor, rung_clip: int = 10
) -> tuple[Tensor, Tensor]:
    """Move on-grid values by `rungs` of their spacing, rounded stochastically between grid values.

    As `grid_step`; the target w - r*ulp(w) becomes 0 where it lies beyond 0, and the result stays within
    `rung_clip` rungs of where it was.
    """
    target = scaled - rungs * format.spacing(scaled)
    target = torch.where(target.sign() * scaled.sign() < 0, 0.0, target)
    start = format.rung(scaled)
    rung = format.rung(format.quantize(target, rounding="stochastic", uniform=uniform))
    values = format.from_rung(rung.clamp(start - rung_clip, start + rung_clip)).to(scaled.dtype)
    lost = torch.isnan(rungs) | torch.isnan(scaled)
    past = (target.abs() > format.largest) & ~lost
    return torch.where(lost, torch.nan, values), past


@kernel
def taken_step(
    weight: Tensor, rungs: Tensor, scale: Tensor, keys: Tensor, format: Format, rung_clip: int, by_value: bool
) -> tuple[Tensor, Tensor]:
    """Draw and take the step of a row of on-grid weights; see `grid_step` and `value_step`.

    scale: 0-d, or for each element. keys: of `uniform_like`.
    """
    scaled, uniform = weight * scale, uniform_like(weight, keys)
    if by_value:
        return value_step(scaled, rungs, format, uniform, rung_clip)
    return grid_step(scaled, rungs, format, uniform)


def rung_coordinate(scaled: Tensor, format: Format) -> Tensor:
    """Return the real rung coordinate u of any values, linear between neighboring rungs.

    float32, also where the values are of fewer bits, and float64 for float64.
    """
    scaled = wide(scaled)
    below = format.quantize(scaled, rounding="toward_zero")
    rung = format.rung(below)
    outward = torch.where(torch.signbit(scaled), -1, 1)
    gap = format.from_rung(rung + outward).to(scaled.dtype) - below
    fraction = torch.where(gap == 0, 0.0, (scaled - below) / torch.where(gap == 0, 1.0, gap)).clamp_(0, 1)
    return rung + outward * fraction


def master_values(u: Tensor, format: Format, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Clamp the coordinate u in place to the rungs [low, high], and return from_rung(round(u))."""
    u.clamp_(low, high)
    return format.from_rung(u.round()).to(u.dtype)
