"""`descent`: effective descent quality, <intended, actual> / |intended|^2.

1 where the update arrives whole, 0 where nothing arrives; stochastic rounding arrives late but whole, so it
averages 1. Under GridOptim both are in rungs and intended is -r.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from altgrad_core.hookspecs import Step, Weight
from altgrad_monitors import MonitorOptions
from altgrad_monitors.codes import chosen
from altgrad_monitors.reporting import Share, pooled, reported


class Descent:
    """Reports the quality per layer and in total; see the module's text."""

    needs = ("before", "intended")
    provides: Mapping[str, str] = {"quality": "mean"}
    undefined_is_nan = True

    def __init__(self, options: MonitorOptions) -> None:
        self.every = options.every
        self._options = options

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return `descent/quality/<layer>`; NaN where no update was intended."""
        products = {
            weight.layer: _products(name, weight, step)
            for name, weight in chosen(self._options.layers, step).items()
            if name in step.intended
        }
        return reported("descent/quality", products, pooled, self._options.per)


def _products(name: str, weight: Weight, step: Step) -> Share:
    """Return <intended, actual> and |intended|^2 in float64."""
    assert weight.format is not None and weight.scale is not None  # noqa: PT018 - for the type checker
    intended = step.intended[name].double()
    if step.intended_in_rungs and name in step.counts:
        after, before = (
            weight.format.rung(value * weight.scale) for value in (weight.value, step.before[name])
        )
        actual = (after - before).double()
    else:
        actual = weight.value.double() - step.before[name].double()
    return (intended * actual).sum(), intended.square().sum()
