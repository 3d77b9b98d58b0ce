"""Which weights a sign-like direction can move under nearest rounding: octave by octave, or all at once.

An Adam direction of a steady gradient is +-1. Plain AdamW moves every weight by lr, which is lost where lr
is below half the gap it points into: the coarsest octave freezes first, then the next. Under `update` all
weights move by the same number r of spacings, and r = 1/2 decides for all of them. The arms are compared at
equal rms of the step, which is r times the rms of the spacing.

One exception: below a power of two the gap is half the spacing, and r = 1/4 decides for the step inward. For
E7M0, whose values are all powers of two, that is one half of all steps.
"""

from __future__ import annotations

import attrs
import torch
from quadratic import EIGHT_BITS, Grid
from torch import Tensor, nn

from altgrad_optim.manifold import ManifoldAdamW

WEIGHTS = 2**16
RATIOS = (0.6, 0.4, 0.2, 0.05)  # rms step over rms spacing
POWERS = {"plain": 0.0, "update": 1.0}


@attrs.frozen(kw_only=True)
class Frozen:
    """The share of the weights that one step does not move."""

    format: str
    arm: str
    ratio: float
    predicted: float
    measured: float


def gap_toward(grid: Grid, w: Tensor, direction: Tensor) -> Tensor:
    """Return the distance of every grid value to its neighbor in the direction, +1 or -1; 0 at the end."""
    neighbor = grid.format.from_rung(grid.rung(w) + direction.int()).double() / grid.scale
    return (neighbor - w).abs()


def step_taken(grid: Grid, start: Tensor, gradient: Tensor, power: float, lr: float) -> Tensor:
    """Return the weights, on the grid again, after the optimizer's first step."""
    weight = nn.Parameter(start.clone())
    weight.grad = gradient
    group = {"params": [weight], "format": grid.format, "scale": grid.scale}
    ManifoldAdamW([group], lr=lr, eps=0.0, placement=(0.0, power), normalize="rms").step()
    return grid.rounded(weight.detach(), None)


def stays(name: str, arm: str, ratio: float, weights: int = WEIGHTS) -> tuple[Tensor, Tensor]:
    """Return which weights one step is predicted not to move, and which it does not."""
    draws = torch.Generator().manual_seed(8)
    w = torch.randn(weights, generator=draws, dtype=torch.float64)
    grid = Grid.fitted(name, float(w.abs().max()))
    w = grid.rounded(w, None)
    gradient = (torch.randint(2, w.shape, generator=draws) * 2 - 1).double()
    spacing = grid.spacing(w)
    rms, power = float(spacing.square().mean().sqrt()), POWERS[arm]
    moves = ratio * rms * (spacing / rms) ** power
    after = step_taken(grid, w, gradient, power, ratio * rms)
    return moves < gap_toward(grid, w, -gradient) / 2, after == w


def frozen(name: str, arm: str, ratio: float, weights: int = WEIGHTS) -> Frozen:
    predicted, measured = (float(one.double().mean()) for one in stays(name, arm, ratio, weights))
    return Frozen(format=name, arm=arm, ratio=ratio, predicted=predicted, measured=measured)


def shares() -> list[Frozen]:
    return [frozen(name, arm, ratio) for name in EIGHT_BITS for arm in POWERS for ratio in RATIOS]
