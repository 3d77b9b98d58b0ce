"""T2: the dead zone of nearest rounding, and which power of the spacing wins back most of it.

Without noise a weight stops where its step is half a spacing, lr h S^q |delta| = u/2, at

    delta* = u / (2 lr h S^q),   which leaves the loss   1/2 h delta*^2 = u^2 / (8 lr^2 h S^(2q)).

With S = u, divided by the L^r norm of S^q over the tensor (r = 2 is `rms`, 1 `mean`, infinity `max`), and u
independent of h, the loss relative to q = 0 is E[u^(2-2q)] E[u^(rq)]^(2/r) / E[u^2]. The logarithm of this is
convex in q, and its slope is zero where 2 - 2q = rq: the best power is q = 2/(2 + r), one half matched by
rms, two thirds by mean, zero by max. With a scrambled S, q = 1 and rms it is E[u^2] E[u^-2].

The last move before the zone covers one spacing, so the weight stops up to one u inside of it, uniformly if
w* lies anywhere between grid values: E[(delta* - U u)^2] = delta*^2 (1 - 2a + 4a^2/3), a = lr h S^q.
Neglected: that u and S differ between w* and the place where the weight stops. `crossing` is the share of the
predicted loss for which they do, in this arm or in q = 0; where it is large, the prediction has left its
regime, and has no error to give. Neither has a descent that has not ended: under q = 1 a weight on its way
through zero passes every value of the grid.
"""

from __future__ import annotations

import functools
import math

import attrs
import torch
from quadratic import EIGHT_BITS, Bowl, Estimate, Grid, gaussian_bowl
from torch import Tensor

import altgrad_core as altgrad
from altgrad_core.format import Format
from altgrad_formats.exmy import ExMy

WEIGHTS = 8192
LR = 0.02
MOST_STEPS = 4000
OUT_OF_REGIME = 0.25
"""Crossing share from which a prediction is marked."""
UNDER_WAY = 0.001
"""Share of weights that still move, from which it is marked too."""
# The formats' exponent fields with 12 mantissa bits, or as many as 16 bits leave.
WIDE = tuple(ExMy(exponents, min(12, 15 - exponents)) for exponents in range(8))


@attrs.frozen
class Arm:
    """S^q over its `norm` over the tensor, scrambled or not."""

    label: str
    q: float
    norm: str = "rms"
    scrambled: bool = False


ARMS = (
    Arm("q = 0", 0),
    Arm("q = 1/2", 0.5),
    Arm("q = 1", 1),
    Arm("scrambled", 1, scrambled=True),
    Arm("mean q = 2/3", 2 / 3, "mean"),
    Arm("mean q = 1", 1, "mean"),
    Arm("max q = 1", 1, "max"),
)

NORMS = {
    "rms": lambda s: s.square().mean().sqrt(),
    "mean": lambda s: s.mean(),
    "max": lambda s: s.amax(),
}


@attrs.frozen(kw_only=True)
class DeadZone:
    """What one arm leaves of the loss, in units of what q = 0 leaves."""

    format: str
    arm: str
    formula: float  # to leading order
    predicted: float  # with the last move
    measured: Estimate
    crossing: float
    of_start: float  # loss left over loss at the start
    moving: float  # share of the weights that had not stopped

    @property
    def in_regime(self) -> bool:
        return not math.isnan(self.measured.error)


@attrs.frozen(eq=False, kw_only=True)
class Setting:
    """A bowl without noise on a grid, and the predictions for one arm in it."""

    grid: Grid
    bowl: Bowl
    lr: float
    arm: Arm

    @functools.cached_property
    def norm(self) -> Tensor:
        return NORMS[self.arm.norm](self.grid.spacing(self.bowl.target) ** self.arm.q)

    @functools.cached_property
    def scrambled(self) -> Tensor:
        """The spacing at the targets, in another order."""
        spacing = self.grid.spacing(self.bowl.target)
        return spacing[torch.randperm(len(spacing), generator=torch.Generator().manual_seed(3))]

    def stiffness(self, w: Tensor, which: Tensor | slice = slice(None)) -> Tensor:
        """Return S^q over its norm over the targets, at the places w of the weights `which`."""
        spacing = self.scrambled[which] if self.arm.scrambled else self.grid.spacing(w)
        return spacing**self.arm.q / self.norm

    @functools.cached_property
    def rate(self) -> Tensor:
        """a = lr h S^q at the targets."""
        return self.lr * self.bowl.curvature * self.stiffness(self.bowl.target)

    @functools.cached_property
    def zone(self) -> Tensor:
        """delta* of every weight."""
        return self.grid.spacing(self.bowl.target) / (2 * self.rate)

    def leading(self) -> Tensor:
        return self.bowl.excess(self.bowl.target + self.zone)

    def predicted(self) -> Tensor:
        return self.leading() * (1 - 2 * self.rate + 4 * self.rate**2 / 3)

    def crossing(self) -> float:
        """Return the share of the predicted loss from weights in whose dead zone the spacing changes."""
        size, loss = self.bowl.target.abs(), self.leading()
        ends = (self.grid.spacing((size - self.zone).clamp(min=0)), self.grid.spacing(size + self.zone))
        return float(loss[ends[0] != ends[1]].sum() / loss.sum())

    def stopped(self, start: Tensor, most_steps: int = MOST_STEPS) -> tuple[Tensor, float]:
        """Descend until nothing moves; return the weights, and the share that moves still.

        There is no noise: a weight that does not move in one step never moves again, and is left out.
        """
        w = self.grid.rounded(start, None)
        moving = torch.arange(len(w))
        target, curvature = self.bowl.target, self.bowl.curvature
        for _ in range(most_steps):
            here = w[moving]
            gradient = curvature[moving] * (here - target[moving])
            there = self.grid.rounded(here - self.lr * self.stiffness(here, moving) * gradient, None)
            w[moving] = there
            moving = moving[there != here]
            if not len(moving):
                break
        return w, len(moving) / len(w)


def dead_zones(
    format: Format, start: str, *, arms: tuple[Arm, ...] = ARMS, weights: int = WEIGHTS, lr: float = LR
) -> list[DeadZone]:
    """Return the arms on one format, relative to the first, which is q = 0.

    start: "outside", two dead zones from every target, so that all there is to see is where weights stop;
    "anew", Gaussian and independent of the targets.
    """
    bowl = gaussian_bowl(weights, noise=0.0)
    grid = Grid.fitted(format, float(bowl.target.abs().max()))
    runs = [Run.of(Setting(grid=grid, bowl=bowl, lr=lr, arm=arm), start) for arm in arms]
    return [run.relative_to(runs[0], format.layout.shape) for run in runs]


@attrs.frozen(eq=False)
class Run:
    """One arm's losses, weight by weight: to leading order, predicted, measured, and at the start."""

    setting: Setting
    leading: Tensor
    predicted: Tensor
    measured: Tensor
    start: Tensor
    moving: float

    @classmethod
    def of(cls, setting: Setting, start: str) -> Run:
        bowl, draws = setting.bowl, torch.Generator().manual_seed(4)
        sides = torch.randint(2, bowl.target.shape, generator=draws) * 2 - 1
        anew = torch.randn(bowl.target.shape, generator=draws, dtype=torch.float64)
        w = bowl.target + 2 * sides * setting.zone if start == "outside" else anew
        rest, moving = setting.stopped(w)
        return cls(setting, setting.leading(), setting.predicted(), bowl.excess(rest), bowl.excess(w), moving)

    def relative_to(self, base: Run, shape: str) -> DeadZone:
        """Return the row; the error is that of the sum of the weights' departures from the prediction."""
        unit, ratio = base.measured.sum(), float(self.measured.sum() / base.measured.sum())
        departures = (self.measured - self.predicted) - ratio * (base.measured - base.predicted)
        error = float(departures.std() * math.sqrt(len(departures)) / unit)
        crossing = max(run.setting.crossing() for run in (self, base))
        in_regime = crossing <= OUT_OF_REGIME and self.moving <= UNDER_WAY
        return DeadZone(
            format=shape,
            arm=self.setting.arm.label,
            formula=float(self.leading.sum() / base.leading.sum()),
            predicted=float(self.predicted.sum() / base.predicted.sum()),
            measured=Estimate(ratio, error if in_regime else math.nan),
            crossing=crossing,
            of_start=float(self.measured.sum() / self.start.sum()),
            moving=self.moving,
        )


def wide() -> list[DeadZone]:
    return [row for format in WIDE for row in dead_zones(format, "outside")]


def eight_bits() -> list[DeadZone]:
    return [row for name in EIGHT_BITS for row in dead_zones(altgrad.get_format(name), "anew")]
