"""`ulp`: how far a step moves the weights, counted in spacings of their grid.

With u the spacing at the weight before the step (one ULP, in weight units), dw what the step changed and
dw* what the optimizer asked for:

mean, median, max   of |dw|/u
zero_fraction       share of the weights with dw = 0
variation           standard deviation of |dw|/u over its mean: 0 where all weights move equally far
rms                 root mean square of dw, in weight units
rounding_noise      sum u^2 f(1 - f) / sum dw*^2, f the fraction of |dw*|/u. Rounded stochastically, a step
                    below one spacing adds the variance u|dw*|(1 - |dw*|/u), from which the floor of the loss
                    follows; whole spacings add none. Under float32 masters, where nothing is rounded, it is
                    what rounding would add.
sign_changes        weights of each 1,000 that were on one side of zero and are on the other; to or from zero
                    itself does not count
median_rung         median of |rung|: how many grid values lie between a typical weight and zero

Under GridOptim dw*/u is -r, in rungs. A scale that moved in the step counts as it is after it.

Medians are exact up to a million weights. Of more, they are those of every k-th weight in row-major order, k
the first prime from 11 that leaves a million at most: the rank of such a median is off by some 0.05 % for the
model, by 0.4 % for a layer of 200 thousand in a model of 10 million. (A prime, so that every column of a
matrix has its turn.) Of two weights in the middle it is the lower, and NaN where one of them is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from altgrad_core.elementwise import wide
from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_core.kernels import flat
from altgrad_monitors import UlpOptions
from altgrad_monitors.codes import chosen, row_of
from altgrad_monitors.reporting import Share, largest, pooled, reported

PER = 1000
"""Weights by which sign changes are counted."""


SAMPLED = 2**20
"""Weights of which a median is taken, at most."""

NARROWEST = 11
"""The smallest step between them that is not 1: the first prime that divides no common width."""


@attrs.frozen(kw_only=True, eq=False)
class Moves:
    """One weight's step. Rows in float32, or float64 where the weight is; sums 0-d float64."""

    moved: Tensor
    """|dw|/u of the sampled weights, as one row."""
    rung: Tensor
    """|rung| after the step, of the sampled weights, as one row."""
    largest: Tensor
    """The largest |dw|/u."""
    count: Tensor
    """How many weights there are."""
    still: Tensor
    """How many did not move."""
    total: Tensor
    """Sum of |dw|/u."""
    squares: Tensor
    """Sum of (|dw|/u)^2."""
    update: Tensor
    """Sum of dw^2, in weight units."""
    noise: Share
    """Sum of u^2 f(1 - f), and of dw*^2."""
    crossed: Tensor
    """How many weights changed their sign."""


class Ulp:
    """Reports the sizes of a step; see the module's text."""

    needs = ("before", "intended")
    undefined_is_nan = True

    def __init__(self, options: UlpOptions) -> None:
        self.every = options.every
        self._options, self.layers = options, options.layers

    @property
    def provides(self) -> Mapping[str, str]:
        return dict.fromkeys(QUANTITIES, "mean")

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return each quantity of each layer and in total; NaN where a ratio is undefined."""
        weights = {
            name: weight for name, weight in chosen(self.layers, step).items() if name in step.intended
        }
        every = stride(sum(weight.value.numel() for weight in weights.values()))
        seen = {weight.layer: moves(name, weight, step, every) for name, weight in weights.items()}
        metrics: dict[str, Tensor | float] = {}
        for quantity, (part, combine) in QUANTITIES.items():
            parts = {layer: part(one) for layer, one in seen.items()}
            metrics |= reported(f"ulp/{quantity}", parts, combine, self._options.per)
        return metrics


def moves(name: str, weight: Weight, step: Step, every: int = 1) -> Moves:
    """Measure one weight's step; of every so many weights for the medians."""
    assert weight.format is not None and weight.scale is not None  # noqa: PT018 - for the type checker
    value, before, asked = (wide(flat(x)) for x in (weight.value, step.before[name], step.intended[name]))
    scale = row_of(weight.scale)
    ulp = weight.format.spacing(before * scale).div_(scale)
    change = value - before
    moved = change.abs().div_(ulp)
    in_rungs = step.intended_in_rungs and name in step.counts
    wanted = asked.abs() if in_rungs else asked.abs().div_(ulp)
    total = moved.sum(dtype=torch.float64)
    return Moves(
        moved=moved[::every].clone(),
        rung=_rungs((value * scale)[::every], weight.format),
        largest=moved.amax(),
        count=torch.full_like(total, moved.numel()),
        still=(moved == 0).sum().double(),
        total=total,
        squares=_squares(moved),
        update=_squares(change),
        noise=_noise(wanted, ulp),
        crossed=(value.sign().mul_(before.sign()) < 0).sum().double(),
    )


def _rungs(scaled: Tensor, format: Format) -> Tensor:
    """Return |rung| as floats; NaN has none, and stays NaN."""
    return torch.where(scaled.isnan(), scaled, format.rung(scaled).abs_().to(scaled.dtype))


def _squares(x: Tensor) -> Tensor:
    """Return the sum of squares, 0-d float64: none of them overflows, or vanishes."""
    return x.double().square_().sum()


def _noise(wanted: Tensor, ulp: Tensor) -> Share:
    """Return the variance that stochastic rounding adds, and the squares of what it rounds: 0-d float64."""
    fraction, ulp = wanted.frac().double(), ulp.double()
    variance = (fraction - fraction.square()).mul_(ulp).mul_(ulp).sum()
    return variance, _squares(ulp.mul_(wanted))


def stride(count: int) -> int:
    """Return how many weights of so many one stands for in a median: 1, or a prime of 11 or more."""
    if count <= SAMPLED:
        return 1
    wanted = max(NARROWEST, -(-count // SAMPLED))
    return next(n for n in itertools.count(wanted) if all(n % d for d in range(2, math.isqrt(n) + 1)))


def median(rows: list[Tensor]) -> Tensor:
    """Return the median of all elements of some rows, 0-d."""
    row = rows[0] if len(rows) == 1 else torch.cat(rows)
    return row.median() if row.is_cpu else sorted_median(row)  # off a CPU torch's own is not deterministic


def sorted_median(row: Tensor) -> Tensor:
    """Return the median as `Tensor.median` does, by sorting: NaN, which sorts last, where there is one."""
    ordered = row.sort().values
    return torch.where(ordered[-1].isnan(), ordered[-1], ordered[(len(row) - 1) // 2])


def variation(parts: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Return standard deviation over mean, from counts, sums and sums of squares; NaN for a mean of 0."""
    count, total, squares = (torch.stack(each).sum() for each in zip(*parts, strict=True))
    return (count * squares / total.square() - 1).clamp(min=0).sqrt()


QUANTITIES: Mapping[str, tuple[Callable[[Moves], Any], Callable[[list[Any]], Tensor]]] = {
    "mean": (lambda one: (one.total, one.count), pooled),
    "median": (lambda one: one.moved, median),
    "max": (lambda one: one.largest, largest),
    "zero_fraction": (lambda one: (one.still, one.count), pooled),
    "variation": (lambda one: (one.count, one.total, one.squares), variation),
    "rms": (lambda one: (one.update, one.count), lambda shares: pooled(shares).sqrt()),
    "rounding_noise": (lambda one: one.noise, pooled),
    "sign_changes": (lambda one: (PER * one.crossed, one.count), pooled),
    "median_rung": (lambda one: one.rung, median),
}
"""What is read from one weight's moves, and how several weights' become one number."""
