"""The spacing of a format's grid over Gaussian weights: its moments, by exact integrals over the binades.

For w ~ N(0, sigma^2) the spacing u is constant between neighboring powers of two, so that

    E[u^a] = sum over binades of u^a P(2^k <= |w| < 2^(k+1)),    P(|w| < x) = erf(x / (sigma sqrt(2))).

The mean of u over sigma is what the floor of stochastic rounding is proportional to; CV^2, the variance of u
over its squared mean, is what geometry can win where rounding is to nearest. Both depend on where in its
binade the largest magnitude lies, because a `fit` scale moves by whole binades: sigma runs over one.
"""

from __future__ import annotations

import math

import attrs
import torch
from quadratic import EIGHT_BITS, Estimate, Grid
from torch import Tensor

AMAX = 4.5  # over sigma: about the largest of 150,000 Gaussian weights
PLACES = 64  # of sigma within a binade
SAMPLE = 2**18
BINADES = range(-140, 128)


def binades(grid: Grid, sigma: float) -> tuple[Tensor, Tensor]:
    """Return every binade's spacing and its share of N(0, sigma^2); what is below counts with the lowest."""
    edges = torch.tensor([2.0**k for k in BINADES], dtype=torch.float64)
    below = torch.erf(edges / (sigma * math.sqrt(2)))
    shares = torch.cat((below[1:], below.new_ones(1))) - below
    shares[0] += below[0]
    return grid.spacing(edges), shares


def moment(grid: Grid, power: float, sigma: float = 1.0) -> float:
    """Return E[u^power] over N(0, sigma^2) weights."""
    spacing, shares = binades(grid, sigma)
    return float((shares * spacing**power).sum())


def squared_variation(grid: Grid, sigma: float = 1.0) -> float:
    """Return CV^2 = Var(u) / E[u]^2."""
    return moment(grid, 2, sigma) / moment(grid, 1, sigma) ** 2 - 1


@attrs.frozen(kw_only=True)
class Spacing:
    """A format's spacing over Gaussian weights whose largest magnitude is AMAX sigma."""

    format: str
    mean_at_1: float  # E[u]/sigma at sigma = 1
    measured_at_1: Estimate
    mean_at_002: float  # at sigma = 0.02
    lowest: float  # over sigma in [1, 2)
    highest: float
    squared_variation: tuple[float, float]  # lowest and highest
    scramble_cost: float  # E[u^2] E[u^-2] at sigma = 1


def spacing_row(name: str) -> Spacing:
    def mean(sigma: float) -> float:
        return moment(Grid.fitted(name, AMAX * sigma), 1, sigma) / sigma

    sigmas = [2.0 ** (place / PLACES) for place in range(PLACES)]
    means = [mean(sigma) for sigma in sigmas]
    variations = [squared_variation(Grid.fitted(name, AMAX * sigma), sigma) for sigma in sigmas]
    grid = Grid.fitted(name, AMAX)
    sample = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return Spacing(
        format=name,
        mean_at_1=mean(1.0),
        measured_at_1=Estimate.of(grid.spacing(sample)),
        mean_at_002=mean(0.02),
        lowest=min(means),
        highest=max(means),
        squared_variation=(min(variations), max(variations)),
        scramble_cost=moment(grid, 2) * moment(grid, -2),
    )


def spacing_rows() -> list[Spacing]:
    return [spacing_row(name) for name in EIGHT_BITS]
