"""What a metric means that is not finite: that the model is sick, that it is not defined, or a fault.

In this order:

sick       a weight of its layer is NaN or infinite (for any other name than a layer's: one of the model), or
           the loss or the gradient is, of the step that the metric is of; it is logged as it is
undefined  NaN of a monitor with `undefined_is_nan`: the quantity has no value in this step; it is not logged
unbounded  infinity in one of the quantities that the monitor lists in `may_be_infinite`; it is logged
fault      anything else of a monitor, while all of the model is finite; the monitor is dropped

It is told at the log interval, from what comes over from the device then: a step waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from altgrad_core.intervals import Interval
from altgrad_core.run_state import Run
from altgrad_core.watched import Watched


@attrs.frozen
class Sick:
    """What of a run was not finite when its monitors looked."""

    layers: Collection[str]
    """Those with a weight that is not."""
    monitors: Collection[str]
    """Those whose last report is of a step with such a loss or gradient."""

    def explains(self, run: Run, name: str) -> bool:
        """Whether the metric has its value from there."""
        owner, _, rest = name.partition("/")
        layer = "total" if owner == "epoch" else rest.rpartition("/")[2]
        weights = layer in self.layers if layer in run.layers.values() else bool(self.layers)
        return weights or owner in self.monitors


@attrs.frozen
class Signs:
    """Numbers on the device, finite where the run is: of each parameter, and of each monitor's last step."""

    weights: Mapping[str, Tensor]
    steps: Mapping[str, Tensor]

    @property
    def values(self) -> list[Tensor]:
        return [*self.weights.values(), *self.steps.values()]

    def read(self, run: Run, found: Sequence[float]) -> Sick:
        """Return what is not finite; found: `values` as numbers."""
        weights, steps = found[: len(self.weights)], found[len(self.weights) :]
        return Sick(
            {
                run.layers[name]
                for name, size in zip(self.weights, weights, strict=True)
                if not math.isfinite(size)
            },
            {name for name, one in zip(self.steps, steps, strict=True) if not math.isfinite(one)},
        )


def signs_of(run: Run, interval: Interval) -> Signs:
    """Return the signs of what monitors have reported; none where none has.

    interval: of which the last step is the run's.
    """
    reported = {watched.name: watched.reported for watched in run.monitors if watched.reported}
    if not reported:
        return Signs({}, {})
    extremes = {name: parameter.detach().aminmax() for name, parameter in run.trained.items()}
    begin = run.step - len(interval.losses) + 1
    return Signs(
        {name: torch.maximum(-low, high) for name, (low, high) in extremes.items()},
        {
            name: interval.losses[step - begin] + interval.norms[step - begin]
            for name, step in reported.items()
            if step >= begin
        },
    )


def undefined(run: Run, values: Mapping[str, float], sick: Sick) -> set[str]:
    """Return those of the metrics that have no value in this step."""
    return {
        name
        for name, value in values.items()
        if math.isnan(value) and may_be_undefined(run, name) and not sick.explains(run, name)
    }


def may_be_undefined(run: Run, name: str) -> bool:
    """Whether NaN may mean that a monitor's quantity, or its sum over an epoch, is not defined."""
    owner = _owner(run, name.removeprefix("epoch/"))
    return owner is not None and bool(getattr(owner.plugin, "undefined_is_nan", False))


def faults(run: Run, values: Mapping[str, float], sick: Sick) -> dict[Watched, str]:
    """Return the monitors at fault, each with what it has done first."""
    found: dict[Watched, str] = {}
    for name, value in values.items() if not sick.layers else ():
        owner = None if math.isfinite(value) else _owner(run, name)
        if owner is None or owner.name in sick.monitors:
            continue
        if not (may_be_undefined(run, name) if math.isnan(value) else _may_be_infinite(owner, name)):
            found.setdefault(owner, _said(name, value))
    return found


def _owner(run: Run, name: str) -> Watched | None:
    """Return the monitor that reports the metric."""
    return next((watched for watched in run.monitors if name.startswith(f"{watched.name}/")), None)


def _may_be_infinite(owner: Watched, name: str) -> bool:
    return name.split("/")[1] in getattr(owner.plugin, "may_be_infinite", ())


def _said(name: str, value: float) -> str:
    declared = "`undefined_is_nan`" if math.isnan(value) else "`may_be_infinite`"
    return (
        f"the metric {name!r} is {value} in a step whose loss and gradients are finite, as all weights are; "
        f"a quantity of which that is no fault needs {declared}"
    )
