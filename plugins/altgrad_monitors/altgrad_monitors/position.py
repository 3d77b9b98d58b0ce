"""`position`: how far the weights have moved since tracking began, and on which rungs they stand.

mean, std, min, max                       of the bit position: the signed movements of all steps, in ULPs
rung_mean, rung_std, rung_min, rung_max   of the rungs now

The optimizer does the counting, which costs it a buffer: ManifoldAdamW with `track_position = true`, or any
optimizer with a method `position_of(weight)` that returns an object with the tensors `moved` and `rung`, or
None for a weight that it does not track. Deviations are those of the population. NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad_core.hookspecs import Step
from altgrad_core.registry import UsageError
from altgrad_monitors import PositionOptions
from altgrad_monitors.codes import chosen
from altgrad_monitors.reporting import largest, pooled, reported, smallest

Sums = tuple[Tensor, Tensor, Tensor]
"""How many, their sum, and the sum of their squares: 0-d float64."""


class Position:
    """Reports the positions that the optimizer keeps; see the module's text."""

    needs = ()

    def __init__(self, options: PositionOptions) -> None:
        self.every = options.every
        self._options, self.layers = options, options.layers
        self._position_of: Callable[[Tensor], Any] = _untracked
        self._parameters: Mapping[str, Tensor] = {}

    @property
    def provides(self) -> Mapping[str, str]:
        return {f"{prefix}{quantity}": "mean" for prefix in VIEWS for quantity in QUANTITIES}

    def start(self, run: Any) -> None:
        """Raise UsageError where the optimizer keeps no positions."""
        _refuse_untracked(run.optimizer)
        self._position_of, self._parameters = run.optimizer.position_of, run.trained

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return each quantity of each layer and in total."""
        found = {
            weight.layer: position
            for name, weight in chosen(self.layers, step).items()
            if (position := self._position_of(self._parameters[name])) is not None
        }
        metrics: dict[str, Tensor | float] = {}
        for prefix, view in VIEWS.items():
            values = {layer: view(position) for layer, position in found.items()}
            for quantity, (part, combine) in QUANTITIES.items():
                parts = {layer: part(value) for layer, value in values.items()}
                metrics |= reported(f"position/{prefix}{quantity}", parts, combine, self._options.per)
        return metrics


def sums(values: Tensor) -> Sums:
    """Return count, sum and sum of squares, 0-d float64."""
    wide = values.double()
    total = wide.sum()
    return torch.full_like(total, values.numel()), total, wide.square_().sum()


def mean(parts: list[Sums]) -> Tensor:
    """Return the mean over all parts; NaN of nothing."""
    return pooled((total, count) for count, total, _ in parts)


def deviation(parts: list[Sums]) -> Tensor:
    """Return the population's standard deviation."""
    squares = pooled((square, count) for count, _, square in parts)
    return (squares - mean(parts).square()).clamp(min=0).sqrt()


VIEWS: Mapping[str, Callable[[Any], Tensor]] = {
    "": lambda position: position.moved,
    "rung_": lambda position: _seen_nan(position.rung, position.moved),
}
"""Prefix of the quantities to what they are of."""

QUANTITIES: Mapping[str, tuple[Callable[[Tensor], Any], Callable[[list[Any]], Tensor]]] = {
    "mean": (sums, mean),
    "std": (sums, deviation),
    "min": (lambda values: values.amin(), smallest),
    "max": (lambda values: values.amax(), largest),
}
"""What is read from one layer, and how several layers become one number."""


def _seen_nan(rung: Tensor, moved: Tensor) -> Tensor:
    """Return rungs as floats, NaN where the weight has been NaN: a NaN has no rung."""
    return torch.where(moved.isnan(), torch.nan, rung.to(moved.dtype))


def _untracked(_: Tensor) -> None:
    return None


def _refuse_untracked(optimizer: torch.optim.Optimizer) -> None:
    able = hasattr(optimizer, "position_of")
    if not able or not any(group.get("track_position", True) for group in optimizer.param_groups):
        way_out = "set track_position = true" if able else "use ManifoldAdamW with track_position = true"
        raise UsageError(
            f"the monitor 'position' needs an optimizer that counts how far weights move, and this run's "
            f"{type(optimizer).__name__} does not: {way_out} under [optimizer], or leave the monitor out"
        )
