"""Stiffness formulas of the core, and the options that the core gives to every formula.

Stiffness is the local spacing seen as a geometry: if u is the position in rungs and w = T(u), then
S = dw/du, in weight units. Formulas are callables (weight, format, scale) -> tensor of weight's shape and
dtype, strictly positive. The scale s maps the weight onto the format: the grid in w is values/s.

`Geometry` is a formula with the core's options, which no formula need know of: `of_format` takes another
format's grid, laid over the weight by the rule `fit`, and `refresh = "never"` asks the optimizer, which has
a place for state, to keep the S of the initial weights.
"""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from torch import Tensor

from altgrad_core import scaling
from altgrad_core.elementwise import wide
from altgrad_core.format import Format
from altgrad_core.hookspecs import NoOptions, Stiffness


@torch.no_grad()
def grid_stiffness(weight: Tensor, format: Format, scale: Tensor | float) -> Tensor:
    """Return the spacing of the format's grid at the weight, ulp(w*s)/s; finite at 0.

    Half-precision weights are worked out in float32, where w*s neither overflows nor is rounded.
    """
    return representable_(format.spacing(wide(weight) * scale) / scale, weight.dtype)


def uniform_stiffness(weight: Tensor, format: Format, scale: Tensor | float) -> Tensor:
    """Return 1 everywhere: with it, geometry-aware updates are plain ones."""
    return torch.ones_like(weight, requires_grad=False)


def representable_(stiffness: Tensor, dtype: torch.dtype) -> Tensor:
    """Return S in `dtype`, in S's own memory or not, and keep it in its range, so positive and finite.

    E7M0 on weights below 1e-7 has spacings below 2^-149, float32's smallest number.
    """
    limits = torch.finfo(dtype)
    return stiffness.to(dtype).clamp_(limits.smallest_normal * limits.eps, limits.max)


def metric_violations(stiffness: Tensor) -> Tensor:
    """Return how many S are not positive, or give no positive and finite metric 1/S^2, 0-d int64.

    In S's dtype: that is where training would compute it.
    """
    metric = stiffness.square().reciprocal()
    sound: Tensor = (stiffness > 0) & (metric > 0) & metric.isfinite()
    return (~sound).sum()


def out_of_range(weight: Tensor, format: Format, scale: Tensor | float) -> Tensor:
    """Return how many weights lie beyond the grid's ends, or are NaN, 0-d int64."""
    lowest, highest = format.values[[0, -1]].to(weight.device)
    scaled = weight * scale
    within: Tensor = (scaled >= lowest) & (scaled <= highest)
    return (~within).sum()


def grid(options: NoOptions) -> Stiffness:
    """Return the formula `grid`."""
    return grid_stiffness


def uniform(options: NoOptions) -> Stiffness:
    """Return the formula `uniform`."""
    return uniform_stiffness


@attrs.frozen
class Geometry:
    """A stiffness formula with the options that every formula has."""

    formula: Stiffness
    of_format: Format | None = None
    """The geometry of this format, whatever format and scale the weight has; None: the weight's own."""
    refresh: Literal["step", "never"] = "step"
    """`never` is for the optimizer to honor: it keeps what the first call for a weight returned."""

    def __call__(self, weight: Tensor, format: Format, scale: Tensor | float) -> Tensor:
        """Return the formula's S, for `of_format` at its own fit scale of the weight."""
        if self.of_format is None:
            return self.formula(weight, format, scale)
        return self.formula(weight, self.of_format, fit_scale(weight, self.of_format))


@torch.no_grad()
def fit_scale(weight: Tensor, format: Format) -> Tensor:
    """Return the scale 2^k at which the weight fits the format, 0-d float32; 1 for BF16 and FP16."""
    if not scaling.scaled(format):
        return torch.ones((), dtype=torch.float32, device=weight.device)
    return scaling.power_of_two(scaling.fitted_exponent(scaling.amax([weight]), format))[0]
