"""Stiffness formulas of the core: the true spacing, and the null control.

Stiffness is the local spacing seen as a geometry: if u is the position in rungs and w = T(u), then
S = dw/du, in weight units. Formulas are callables (weight, format, scale) -> tensor of weight's shape,
strictly positive.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.hookspecs import NoOptions, Stiffness


def grid_stiffness(weight: Tensor, format: Format, scale: Tensor | float) -> Tensor:
    """Return the spacing of the format's grid at the weight, ulp(w*s)/s; finite at 0."""
    return format.spacing(weight * scale) / scale


def uniform_stiffness(weight: Tensor, format: Format, scale: Tensor | float) -> Tensor:
    """Return 1 everywhere: with it, geometry-aware updates are plain ones."""
    return torch.ones_like(weight)


def grid(options: NoOptions) -> Stiffness:
    return grid_stiffness


def uniform(options: NoOptions) -> Stiffness:
    return uniform_stiffness
