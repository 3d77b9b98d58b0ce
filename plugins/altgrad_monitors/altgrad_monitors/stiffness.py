"""`stiffness`: the field of local spacings S = dw/du that the weights live in, and gradients beside it.

log2_p05 ... log2_p95  quantiles of log2 S (0.05, 0.25, 0.50, 0.75, 0.95), S in weight units; rounded down to
                       an eighth of an octave, exact for the powers of two that ExMy formats have
octave_minus_3 ...     the histogram of log2 S, by whole octaves from the median's: the share of the weights
octave_plus_3          whose S lies so many octaves above it; the ends hold what lies further out
correlation            Pearson correlation of log|g| with log S over weights and gradients that are not 0.
                       NaN, and not logged, where either does not vary: in E0M7, where S is constant, or
                       under the formula `uniform`
metric_violations      how many weights have no positive and finite metric 1/S^2 in their dtype
out_of_range           how many lie beyond their grid's ends after the step

S is that of the weight's own format unless the formula says `of_format`; it is taken at the weights before
the step, to which the gradients belong, under the scale after it. Only quantized weights have a stiffness.
Over layers, the histograms and the counts add up, and the correlation is that of all their elements. A layer
with a NaN weight has NaN quantiles, shares and correlation, and they are not logged; the NaN counts as both
violations.

The bins are the leading bits of the float32 pattern of S: its exponent and three bits of its mantissa, so
that counting needs no logarithm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Stiffness, Weight
from altgrad_core.kernels import flat
from altgrad_core.stiffness import metric_violations, out_of_range
from altgrad_monitors import StiffnessOptions
from altgrad_monitors.codes import chosen
from altgrad_monitors.histogram import binned, quantile_bin
from altgrad_monitors.reporting import reported, summed

QUANTILES = {"log2_p05": 0.05, "log2_p25": 0.25, "log2_p50": 0.5, "log2_p75": 0.75, "log2_p95": 0.95}
"""Quantity to the share of the weights whose S is at most that."""

OCTAVES = {
    f"octave_{'minus' if octave < 0 else 'plus'}_{abs(octave)}" if octave else "octave_0": octave
    for octave in range(-3, 4)
}
"""Quantity to octaves above the median's."""

VIOLATIONS = ("metric_violations", "out_of_range")
"""What a manifold with the metric 1/S^2 promises, counted where it does not hold."""

_DROPPED_BITS = 20  # of float32's 23 mantissa bits
_BINS = 2**11  # 8 exponent bits and 3 of the mantissa; S has no sign
_BINS_PER_OCTAVE = 8
_FINITE_BINS = 255 * _BINS_PER_OCTAVE  # those behind are NaN's


class Together(NamedTuple):
    """Of the pairs (x, y) of one layer; 0-d float64."""

    number: Tensor
    x: Tensor
    """Mean; so is y."""
    y: Tensor
    xx: Tensor
    """Sum of the products of deviations from the means; so are the others."""
    yy: Tensor
    xy: Tensor


class StiffnessField:
    """Reports the distribution of S and its correlation with the gradients; see the module's text."""

    needs = ("before",)
    provides: Mapping[str, str] = dict.fromkeys((*QUANTILES, *OCTAVES, "correlation", *VIOLATIONS), "mean")
    undefined_is_nan = True

    def __init__(self, options: StiffnessOptions) -> None:
        self.every = options.every
        self._options, self.layers = options, options.layers
        self._formula: Stiffness | None = None

    def start(self, run: Any) -> None:
        self._formula = self._options.formula.build(run.registry)

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return the quantities of each layer, and of all of them."""
        counts, pairs = {}, {}
        violations: dict[str, dict[str, Tensor]] = {name: {} for name in VIOLATIONS}
        for name, weight in chosen(self.layers, step).items():
            stiffness = self._at(step.before[name], weight)
            counts[weight.layer] = histogram(stiffness)
            violations["metric_violations"][weight.layer] = metric_violations(stiffness)
            violations["out_of_range"][weight.layer] = out_of_range(weight.value, *_grid(weight))
            if name in step.gradients:
                pairs[weight.layer] = in_octaves(step.gradients[name], step.before[name], stiffness)

        def quantity(
            metric: str, found: Mapping[str, Any], combine: Callable[[list[Any]], Tensor]
        ) -> dict[str, Tensor | float]:
            return reported(f"stiffness/{metric}", found, combine, self._options.per)

        metrics = quantity("correlation", pairs, correlation)
        for metric, share in QUANTILES.items():
            metrics |= quantity(metric, counts, functools.partial(quantile, share=share))
        for metric, octave in OCTAVES.items():
            metrics |= quantity(metric, counts, functools.partial(within, octave=octave))
        for metric in VIOLATIONS:
            metrics |= quantity(metric, violations[metric], summed)
        return metrics

    def _at(self, value: Tensor, weight: Weight) -> Tensor:
        """Return S at a weight's values."""
        assert self._formula is not None
        return self._formula(value, *_grid(weight))


def _grid(weight: Weight) -> tuple[Format, Tensor]:
    assert weight.format is not None and weight.scale is not None  # noqa: PT018 - for the type checker
    return weight.format, weight.scale


def histogram(stiffness: Tensor) -> Tensor:
    """Return how many S have each pattern of leading bits: (_BINS,) int64."""
    patterns = flat(stiffness).float().contiguous().view(torch.int32)
    return binned((patterns >> _DROPPED_BITS) & (_BINS - 1), _BINS)


def quantile(histograms: list[Tensor], share: float) -> Tensor:
    """Return the quantile of log2 S over some layers, float64; NaN where a weight is NaN."""
    counts = torch.stack(histograms).sum(dim=0)
    first = quantile_bin(counts, share).to(torch.int32) << _DROPPED_BITS
    return _nan_where_some_are(counts, first.view(torch.float32).double().log2())


def within(histograms: list[Tensor], octave: int) -> Tensor:
    """Return the share of S so many octaves above the median's, float64; the ends of OCTAVES are open."""
    counts = torch.stack(histograms).sum(dim=0)
    above = torch.arange(_BINS, device=counts.device) // _BINS_PER_OCTAVE
    above = above - quantile_bin(counts, 0.5) // _BINS_PER_OCTAVE
    inside = above.clamp(min(OCTAVES.values()), max(OCTAVES.values())) == octave
    return _nan_where_some_are(counts, (counts * inside).sum() / counts.sum().double())


def _nan_where_some_are(counts: Tensor, value: Tensor) -> Tensor:
    return torch.where(counts[_FINITE_BINS:].any(), torch.nan, value)


def in_octaves(gradient: Tensor, weight: Tensor, stiffness: Tensor) -> Together:
    """Return the moments of log2|g| and log2 S over weights and gradients that are not 0."""
    gradient, weight = flat(gradient), flat(weight)
    counted = (gradient != 0) & (weight != 0)
    x = torch.where(counted, gradient.abs().log2(), 0.0)
    y = torch.where(counted, flat(stiffness).log2(), 0.0)
    count = counted.count_nonzero().double()
    mean_x, mean_y = (one.sum(dtype=torch.float64) / count.clamp(min=1) for one in (x, y))
    x, y = (torch.where(counted, one - mean, 0.0).double() for one, mean in ((x, mean_x), (y, mean_y)))
    return Together(count, mean_x, mean_y, x.dot(x), y.dot(y), x.dot(y))


def correlation(parts: list[Together]) -> Tensor:
    """Return the correlation over the pairs of all parts (Chan, Golub and LeVeque, 1979)."""
    counts, x, y, xx, yy, xy = (torch.stack(column) for column in zip(*parts, strict=True))
    total = counts.sum()
    x, y = x - (counts * x).sum() / total, y - (counts * y).sum() / total
    xx, yy, xy = (
        one.sum() + (counts * products).sum() for one, products in ((xx, x * x), (yy, y * y), (xy, x * y))
    )
    correlated: Tensor = xy / (xx * yy).sqrt()  # 0/0 where one is constant: a mean of equal float32 is exact
    return correlated
