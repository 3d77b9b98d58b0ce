"""T3: the walk in rungs, on flat ground, in a bowl, and toward zero.

Flat ground: r is symmetric noise, |r| <= 1 (1/2 by value), and p = sum E|r| over the steps.

- Rung rounding moves by one rung, either way, with probability |r|/2 each: Var(rung) = p. On E7M0, where a
  rung is an octave, E|w| grows by 1 + E|r| (2/2 + 1/4 - 1) = 1 + E|r|/4 a step, and the largest of N weights
  lies about sqrt(2 p ln N) octaves up.
- Value rounding of w - r u keeps E[w]. On E7M0 up costs a gap of w, probability |r|, and down one of w/2,
  probability 2|r|: mean log2|w| falls by E|r|/2 a step, so by p/2 in all, and its variance grows by
  3/2 E|r| - (E|r|)^2/4 a step.

A bowl: in equilibrium rung rounding has E[g] = 0, so E[w] = w*. Value rounding under `update` moves by
-lr E[u g], so E[u delta] = 0 and E[delta] = -Cov(u, delta)/E[u]: biased toward zero, where u is small.
`quadratic.stationary` gives both without simulating. Its factor 1/u also says when a weight is lost: if at
w = 0 it is pushed back less than 2^(1/2^M) times as hard as away, the equilibrium grows toward zero.

Sign lock: a constant drift of r rungs a step, rounded stochastically, needs R steps of probability r to come
from rung R to zero: R/r of them in the mean, with variance R (1 - r)/r^2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import NormalDist

import attrs
import torch
from quadratic import EIGHT_BITS, Bowl, Estimate, Grid, stationary
from spacings import AMAX
from torch import Tensor

import altgrad_core as altgrad
from altgrad_core.format import Format
from altgrad_optim.rungs import grid_step, value_step

WALKERS = 16384
STEPS = 1000
SPREAD = 0.12  # standard deviation of r
MEAN_STEP = SPREAD * math.sqrt(2 / math.pi)  # E|r|; |r| > 1/2 is four standard deviations away
EARLY = 40  # steps after which the mean of |w| is read: later its tail is too rare to be in a sample
FROM = {False: 1.0, True: 2.0**45}  # by rung from the middle of E7M0; by value from higher up, as it falls
CROWD = 1024  # walkers among whom the largest is looked for
DRIFT = 0.15  # rungs a step
PATIENCE = 6  # times the predicted steps, after which a walker is where it is
MEDIAN = NormalDist().inv_cdf(0.75)  # of |w| over sigma
REPLICAS = 16


@attrs.frozen(kw_only=True)
class Fact:
    """One predicted number beside what was measured."""

    format: str
    what: str
    predicted: float
    measured: Estimate


# --- flat ground ----------------------------------------------------------------------------------------


def walk(format: Format, by_value: bool, steps: int, walkers: int = WALKERS) -> Iterator[Tensor]:
    """Yield log2(w / start) after every step of symmetric noise, taken by the optimizer's own functions."""
    draws, step = torch.Generator().manual_seed(5), value_step if by_value else grid_step
    w = torch.full((walkers,), FROM[by_value])
    for _ in range(steps):
        r = SPREAD * torch.randn(walkers, generator=draws)
        w, _past = step(w, r, format, torch.rand(walkers, generator=draws))
        yield (w.double() / FROM[by_value]).log2()


def flat_ground(walkers: int = WALKERS, steps: int = STEPS) -> list[Fact]:
    """Return where E7M0's walk, which is one in whole octaves, has come to."""
    e7m0, p = altgrad.get_format("E7M0"), steps * MEAN_STEP
    by_rung = list(walk(e7m0, False, steps, walkers))
    fallen = list(walk(e7m0, True, steps, walkers))[-1]
    early, late = by_rung[EARLY - 1].exp2(), by_rung[-1]
    largest = late.view(-1, min(CROWD, walkers)).amax(1)
    facts = (
        ("rung rounding: mean log2(w/w0) = 0", 0.0, Estimate.of(late)),
        ("rung rounding: Var log2(w) = p", p, variance(late)),
        (f"rung rounding: E[w/w0] after {EARLY} steps", (1 + MEAN_STEP / 4) ** EARLY, Estimate.of(early)),
        (
            f"rung rounding: largest of {CROWD}, octaves",
            math.sqrt(p) * mean_of_largest(),
            Estimate.of(largest),
        ),
        ("value rounding: mean log2(w/w0) = -p/2", -p / 2, Estimate.of(fallen)),
        ("value rounding: Var log2(w)", steps * (1.5 * MEAN_STEP - MEAN_STEP**2 / 4), variance(fallen)),
    )
    return [Fact(format="E7M0", what=what, predicted=x, measured=measured) for what, x, measured in facts]


def variance(sample: Tensor) -> Estimate:
    """Return the variance of independent numbers."""
    return Estimate.of((sample - sample.mean()) ** 2)


def mean_of_largest(count: int = CROWD, nodes: int = 4096) -> float:
    """Return the mean of the largest of `count` normal numbers, by its quantiles; below sqrt(2 ln count)."""
    quantiles = ((node + 0.5) / nodes for node in range(nodes))
    return sum(NormalDist().inv_cdf(quantile ** (1 / count)) for quantile in quantiles) / nodes


def curve(by_value: bool, walkers: int = 8192, marks: int = 10) -> list[tuple[float, Estimate, Estimate]]:
    """Return (p, mean log2 w/w0, its variance) along E7M0's walk."""
    logs = walk(altgrad.get_format("E7M0"), by_value, STEPS, walkers)
    return [
        (step * MEAN_STEP, Estimate.of(log), variance(log))
        for step, log in enumerate(logs, 1)
        if step % (STEPS // marks) == 0
    ]


# --- a bowl ---------------------------------------------------------------------------------------------

BOWL_TARGET = 1.1
BOWL_NOISE = 0.3
BOWL_STEP = 0.2  # rungs for each unit of gradient: |r| stays below 1/2
BOWL_STEPS = 2000
BOWL_AFTER = 500


def bias(
    name: str, by_value: bool, *, weights: int = 128, steps: int = BOWL_STEPS, after: int = BOWL_AFTER
) -> Fact:
    """Return the mean of delta in a bowl of curvature 1 around a target between grid values.

    The step is `BOWL_STEP * g` rungs, so that value rounding is `update`: a target w - lr u g.
    """
    grid = Grid.fitted(name, AMAX)
    bowl = Bowl(*torch.tensor([[BOWL_TARGET], [1.0]], dtype=torch.float64), BOWL_NOISE)
    factor = grid.spacing(grid.values) if by_value else None
    predicted = float((stationary(grid, bowl, factor) @ (grid.values - BOWL_TARGET)).mean())
    draws, step = torch.Generator().manual_seed(6), value_step if by_value else grid_step
    w = grid.rounded(bowl.target.repeat(REPLICAS, weights), draws)
    total = torch.zeros_like(w)
    for index in range(steps):
        if index >= after:
            total += w - BOWL_TARGET
        rungs = BOWL_STEP * bowl.gradient(w, draws)
        scaled, _past = step(w * grid.scale, rungs, grid.format, torch.rand(w.shape, generator=draws))
        w = scaled / grid.scale
    what = "value rounding, `update`" if by_value else "rung rounding"
    measured = Estimate.of(total.mean(1) / (steps - after))
    return Fact(format=name, what=what, predicted=predicted, measured=measured)


def biases() -> list[Fact]:
    return [bias(name, by_value) for name in EIGHT_BITS for by_value in (False, True)]


# --- toward zero ----------------------------------------------------------------------------------------


def sign_lock(name: str, walkers: int = 4096) -> Fact:
    """Return the steps that the median weight needs to zero under a drift of `DRIFT` rungs a step."""
    grid = Grid.fitted(name, AMAX)
    start = grid.rounded(torch.tensor([MEDIAN], dtype=torch.float64), None)
    rungs = int(grid.rung(start))
    w, rate = start.float().repeat(walkers) * grid.scale, torch.full((walkers,), DRIFT)
    draws, steps = torch.Generator().manual_seed(7), torch.zeros(walkers, dtype=torch.float64)
    for _ in range(round(PATIENCE * rungs / DRIFT)):
        steps += w > 0
        if not bool((w > 0).any()):
            break
        w, _past = grid_step(w, rate, grid.format, torch.rand(walkers, generator=draws))
    return Fact(format=name, what=f"rung {rungs}", predicted=rungs / DRIFT, measured=Estimate.of(steps))


def sign_locks() -> list[Fact]:
    return [sign_lock(name) for name in EIGHT_BITS]
