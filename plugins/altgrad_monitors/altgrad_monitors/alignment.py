"""`alignment`: how the weights sit on their format's grid, and how they use its codes.

distance_mean     mean and largest distance to the nearest grid value, in ULPs (the grid's local spacing at
distance_max      the weight): up to 1/2 within the range, more beyond its ends, where weights saturate
on_grid_fraction  share of the weights that are grid values, bit for bit; 1 under grid storage
code_utilization  share of the format's codes that some weight has
code_ks_distance  Kolmogorov-Smirnov distance of the codes' distribution from uniform: the largest difference
                  between the shares of weights and of codes up to some code, over the codes in the order of
                  their values. 0: all codes are used alike; near 1: all weights sit at one end
octave_0 ...      the octave histogram: share of the weights whose code lies in the octave of the format's
octave_7          largest value (0), or so many octaves below it
octave_below      share further down
zeros             share at zero

A code is a finite value of the format, both zeros being one; a weight has the code of its nearest value, so
under master storage this describes what the forward pass sees. Only quantized weights are observed. Over
layers, shares and means are those of all their elements; utilization and KS distance, which hang on the
format, are averaged. A NaN weight has no code and is off the grid; the layer's distances are NaN then. A
tensor with fewer elements than the format has codes cannot use them all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from altgrad_core.elementwise import wide
from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_core.kernels import flat
from altgrad_monitors import AlignmentOptions
from altgrad_monitors.codes import chosen, row_of
from altgrad_monitors.histogram import binned
from altgrad_monitors.reporting import Share, averaged, largest, pooled, reported

OCTAVES = 8
"""Octaves with a share of their own; the founding formats' weights lie within these."""

_BELOW, _ZERO = OCTAVES, OCTAVES + 1
_SHARES = {
    **{f"octave_{octave}": octave for octave in range(OCTAVES)},
    "octave_below": _BELOW,
    "zeros": _ZERO,
}


class Aligned(NamedTuple):
    """One weight against its grid; 0-d but for `octaves`."""

    distance: Share
    """Sum of the distances in ULPs, and the number of elements: float64."""
    furthest: Tensor
    on_grid: Share
    utilization: Tensor
    ks_distance: Tensor
    octaves: Tensor
    """Weights in each of _SHARES, (OCTAVES + 2,) float64."""


class Alignment:
    """Reports distances to the grid and the use of its codes; see the module's text."""

    needs = ()
    provides: Mapping[str, str] = dict.fromkeys(
        (
            "distance_mean", "distance_max", "on_grid_fraction", "code_utilization", "code_ks_distance",
            *_SHARES,
        ),
        "mean",
    )  # fmt: skip

    def __init__(self, options: AlignmentOptions) -> None:
        self.every = options.every
        self._options, self.layers = options, options.layers

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return the quantities of each quantized layer, and of all of them."""
        found = {weight.layer: aligned(weight) for weight in chosen(self.layers, step).values()}

        def quantity(
            metric: str, of: Callable[[Aligned], Any], combine: Callable[[list[Any]], Tensor]
        ) -> dict[str, Tensor | float]:
            values = {layer: of(one) for layer, one in found.items()}
            return reported(f"alignment/{metric}", values, combine, self._options.per)

        metrics = {
            **quantity("distance_mean", lambda one: one.distance, pooled),
            **quantity("distance_max", lambda one: one.furthest, largest),
            **quantity("on_grid_fraction", lambda one: one.on_grid, pooled),
            **quantity("code_utilization", lambda one: one.utilization, averaged),
            **quantity("code_ks_distance", lambda one: one.ks_distance, averaged),
        }
        for metric, place in _SHARES.items():
            metrics |= quantity(metric, functools.partial(_share_at, place=place), pooled)
        return metrics


def _share_at(found: Aligned, place: int) -> Share:
    return found.octaves[place], found.octaves.sum()


@torch.no_grad()
def aligned(weight: Weight) -> Aligned:
    """Return how a quantized weight sits on its grid."""
    assert weight.format is not None and weight.scale is not None  # noqa: PT018 - for the type checker
    value, scale, format = flat(weight.value), row_of(weight.scale), weight.format
    value = wide(value)
    nearest = format.fake_quantize(value, scale)
    inside = (value * scale).clamp(lowest(format), format.largest)  # the product may have overflowed
    distance = (value - nearest).abs().double() / format.spacing(inside) * scale
    whole = value.new_full((), value.numel(), dtype=torch.float64)
    counts = code_counts(value, format, scale)
    shares = counts.cumsum(0) / counts.sum().double()
    octaves = octave_of(format, value.device)
    return Aligned(
        distance=(distance.sum(dtype=torch.float64), whole),
        furthest=distance.max(),
        on_grid=((value == nearest).count_nonzero().double(), whole),
        utilization=(counts > 0).double().mean(),
        ks_distance=(shares - uniform_shares(len(counts), value.device)).abs().max(),
        octaves=torch.zeros(OCTAVES + 2, dtype=torch.float64, device=value.device).index_add_(
            0, octaves, counts.double()
        ),
    )


def code_counts(value: Tensor, format: Format, scale: Tensor) -> Tensor:
    """Return how many elements have each of the format's values: (values,) int64, ascending."""
    rungs = format.rung(value * scale)
    nan_first = (
        (rungs + negative_values(format)).clamp_(min=-1).add_(1)
    )  # of NaN: its rung is the lowest integer
    return binned(nan_first, len(format.values) + 1)[1:]


@functools.lru_cache(maxsize=64)
def lowest(format: Format) -> float:
    return float(format.values[0])


@functools.lru_cache(maxsize=64)
def negative_values(format: Format) -> int:
    """Return how many values are below zero: the lowest one has the rung -n."""
    return int((format.values < 0).sum())


def uniform_shares(codes: int, device: torch.device) -> Tensor:
    """Return the shares 1/n, 2/n, ..., 1 of the codes up to each: float64."""
    return torch.arange(1, codes + 1, dtype=torch.float64, device=device) / codes


@functools.lru_cache(maxsize=64)
def octave_of(format: Format, device: torch.device) -> Tensor:
    """Return the place in _SHARES of each of the format's values: (values,) int64."""
    exponents = torch.frexp(format.values).exponent
    top = torch.frexp(torch.tensor(format.largest)).exponent
    below = (top - exponents).clamp(0, _BELOW)
    return torch.where(format.values == 0, _ZERO, below).to(torch.int64).to(device)
