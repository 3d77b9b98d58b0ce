"""`magnitude`: how large the weights are, and whether they run away or collapse.

log2_mean             mean and standard deviation of log2|w| over the non-zero weights: under rung rounding
log2_std              log|w| is a random walk on flat directions, under value rounding it sinks
max_over_initial_rms  the largest |w| over the weight's root mean square at the start of the run; the total is
                      the largest of the layers'

Quantized weights only. A layer without a non-zero weight has no log2; one that began at zero has no ratio.
NaN weights make all of it NaN.

Source: the drift of multiplicative updates, docs/science.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad_core.hookspecs import Step
from altgrad_monitors import MagnitudeOptions
from altgrad_monitors.codes import chosen
from altgrad_monitors.reporting import Share, largest, pooled, reported, summed

Moments = tuple[Tensor, Tensor, Tensor]
"""Count of the non-zero weights, sum and sum of squares of their log2|w|: 0-d float64."""


class Magnitude:
    """Reports the sizes of the weights; see the module's text."""

    needs: tuple[str, ...] = ()
    provides: Mapping[str, str] = {"log2_mean": "", "log2_std": "", "max_over_initial_rms": ""}
    undefined_is_nan = True

    def __init__(self, options: MagnitudeOptions) -> None:
        self.every = options.every
        self._options, self.layers = options, options.layers
        self._initial: dict[str, Tensor] = {}

    def start(self, run: Any) -> None:
        """Measure the weights, unless a checkpoint has what they were at the start."""
        for name, weight in run.weights().items():
            if name in self._initial:
                self._initial[name] = self._initial[name].to(weight.value.device)
            elif weight.format is not None and weight.value.any():  # the host may wait: no step runs
                self._initial[name] = weight.value.double().square().mean().sqrt()

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return the three quantities of each layer and in total."""
        weights = chosen(self.layers, step)
        logs = {weight.layer: _moments(weight.value) for weight in weights.values()}
        ratios = {
            weight.layer: weight.value.abs().amax().double() / self._initial[name]
            for name, weight in weights.items()
            if name in self._initial
        }
        per = self._options.per
        shares: dict[str, Share] = {layer: (total, count) for layer, (count, total, _) in logs.items()}
        return {
            **reported("magnitude/log2_mean", shares, pooled, per),
            **reported("magnitude/log2_std", logs, _deviation, per),
            **reported("magnitude/max_over_initial_rms", ratios, largest, per),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"initial": self._initial}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._initial = dict(state["initial"])


def _moments(weight: Tensor) -> Moments:
    logs = torch.where(weight == 0, 0.0, weight.double().abs().log2())
    return (weight != 0).sum(dtype=torch.float64), logs.sum(), logs.square().sum()


def _deviation(found: list[Moments]) -> Tensor:
    """Return the standard deviation over all elements; NaN where there is none."""
    count, total, squares = (summed(list(part)) for part in zip(*found, strict=True))
    return (squares / count - (total / count).square()).clamp(min=0).sqrt()
