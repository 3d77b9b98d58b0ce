"""A quadratic bowl whose weights live on a grid: the setting in which theory can be checked in seconds.

    f(w) = 1/2 sum h_i (w_i - w*_i)^2        g = h (w - w*) + sigma xi,  xi ~ N(0, 1)
    w <- Q(w - lr D g)                       D = 1, or a stiffness: the spacing at w

Coordinates do not interact, so one tensor of shape (replicas, weights) is many experiments at once; the
replicas give the standard errors. Everything is float64, and the grids are the formats' own.

`stationary` is the other half: what the simulation must come to, without simulating. As long as a step is
never longer than the gap it points into, stochastic rounding moves a weight to a neighbor or not at all,

    P(v -> v+) = lr D(v) E[(-g)^+ | v] / (v+ - v)          P(v+ -> v) = lr D(v+) E[g^+ | v+] / (v+ - v),

and in equilibrium these two flows are equal (a chain on a line has no other way to be stationary):

    pi(v+) / pi(v) = D(v) E[(-g)^+ | v] / (D(v+) E[g^+ | v+]).

The gap and lr cancel. So the equilibrium knows no learning rate, D reweights it by 1/D and nothing else, and
steps of whole rungs, whose probabilities lack the factor 1 / (v+ - v), have the equilibrium of plain ones.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

import altgrad_core as altgrad
from altgrad_core.format import Format
from altgrad_core.stiffness import fit_scale

EIGHT_BITS = ("E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0")
FAR = 30.0  # standard deviations; beyond it the odds are as good as none, and their logarithm still a number


@attrs.frozen
class Estimate:
    """A mean over independent replicas, and its standard error; NaN where there is none to give."""

    value: float
    error: float

    @classmethod
    def of(cls, replicas: Tensor) -> Estimate:
        """Return the mean over the first dimension, which is all there is."""
        return cls(float(replicas.mean()), float(replicas.std() / math.sqrt(len(replicas))))

    def over(self, prediction: float) -> Estimate:
        return Estimate(self.value / prediction, self.error / prediction)

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if math.isnan(self.error) else f" ± {self.error:.3f}")

    def to(self, digits: int) -> str:
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


@attrs.frozen(eq=False)
class Grid:
    """A format's grid laid over weights, values/scale, in float64."""

    format: Format
    scale: float

    @classmethod
    def fitted(cls, format: str | Format, amax: float) -> Grid:
        """Return the format's grid at its `fit` scale for this largest magnitude."""
        format = altgrad.get_format(format) if isinstance(format, str) else format
        return cls(format, float(fit_scale(torch.tensor([amax]), format)))

    @property
    def values(self) -> Tensor:
        return self.format.values.double() / self.scale

    def rounded(self, w: Tensor, draws: torch.Generator | None) -> Tensor:
        """Return the weights on the grid: stochastically with `draws`, to nearest even without."""
        if draws is None:
            return self.format.quantize(w * self.scale) / self.scale
        uniform = torch.rand(w.shape, generator=draws)
        return self.format.quantize(w * self.scale, "stochastic", uniform=uniform) / self.scale

    def spacing(self, w: Tensor) -> Tensor:
        return self.format.spacing(w * self.scale) / self.scale

    def rung(self, w: Tensor) -> Tensor:
        return self.format.rung(w * self.scale)


@attrs.frozen(eq=False)
class Bowl:
    """f(w) = 1/2 sum h (w - target)^2, seen through gradients with Gaussian noise."""

    target: Tensor  # (weights,) float64
    curvature: Tensor  # (weights,) float64, h
    noise: float  # sigma, the standard deviation of each gradient

    def gradient(self, w: Tensor, draws: torch.Generator) -> Tensor:
        noise = torch.randn(w.shape, generator=draws).double()
        return self.curvature * (w - self.target) + self.noise * noise

    def excess(self, w: Tensor) -> Tensor:
        """Return each weight's part of the loss above the minimum."""
        return 0.5 * self.curvature * (w - self.target) ** 2

    def pushes(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return E[(-g)^+ | w] and E[g^+ | w], what drives a weight up and what drives it down."""
        z = self.curvature * (w - self.target) / self.noise
        return self.noise * positive_part(-z), self.noise * positive_part(z)


def positive_part(z: Tensor) -> Tensor:
    """Return E[(z + xi)^+] = phi(z) + z Phi(z) for xi ~ N(0, 1), to full relative precision below 0 too."""
    a = z.abs().clamp(max=FAR)
    density = torch.exp(-a * a / 2)
    tail = density * (1 / math.sqrt(2 * math.pi) - a / 2 * torch.special.erfcx(a / math.sqrt(2)))
    return tail + z.clamp(min=0)


def gaussian_bowl(weights: int, noise: float, seed: int = 0) -> Bowl:
    """Return a bowl with w* ~ N(0, 1) and h log-uniform in [1/2, 2], drawn independently."""
    draws = torch.Generator().manual_seed(seed)
    target = torch.randn(weights, generator=draws, dtype=torch.float64)
    return Bowl(target, 4.0 ** (torch.rand(weights, generator=draws, dtype=torch.float64) - 0.5), noise)


def stationary(grid: Grid, bowl: Bowl, factor: Tensor | None = None) -> Tensor:
    """Return the equilibrium of every weight over `grid.values`: (weights, values), each row sums to 1.

    factor: (values,), the D of a weight at each of the grid's values; None: any constant.
    """
    values = grid.values
    up, down = bowl.pushes(values[:, None])
    log_odds = up[:-1].log() - down[1:].log()  # (values - 1, weights)
    log_weight = torch.cat((torch.zeros_like(log_odds[:1]), log_odds.cumsum(0)))
    if factor is not None:
        log_weight = log_weight - factor.log()[:, None]
    return log_weight.softmax(0).T
