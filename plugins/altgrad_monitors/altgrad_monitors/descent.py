"""`descent`: how much of the update that was intended arrives.

quality    effective descent quality <intended, actual>/|intended|^2 of a step: 1 where the update arrives
           whole, 0 where nothing arrives; stochastic rounding arrives late but whole, so it averages 1.
           Under GridOptim both are in rungs and intended is -r.
delivered  the same with what the storage keeps for later steps taken as arrived. Under `error_feedback` that
           is the residual as it is stored, so that what its own format rounds away is missing; under `eco`
           what goes into the first moment. Elsewhere nothing is kept, and it is the quality.

Where residuals are kept, a weight stands still and then moves a whole spacing for many steps at once: the
quality of single steps sinks toward 0 with the size of the updates though none is lost. `delivered` tells the
two apart. It costs some passes over the weights in torch under these two roundings, and nothing elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.hookspecs import Step
from altgrad_core.storage_options import COMPENSATED
from altgrad_monitors import MonitorOptions
from altgrad_monitors.codes import CodeBook, book_of
from altgrad_monitors.tally import Summed, columns_of


class Descent:
    """Reports both per layer and in total; see the module's text."""

    provides: Mapping[str, str] = {"quality": "mean", "delivered": "mean"}
    undefined_is_nan = True

    def __init__(self, options: MonitorOptions) -> None:
        self.every = options.every
        self._options, self.layers = options, options.layers
        self._book: CodeBook | None = None
        self._run: Any = None

    @property
    def needs(self) -> Collection[str]:
        """The weights before the step, and the updates, where the code book does not keep them."""
        return () if self._book is None else self._book.needs(updates=True)

    @property
    def landing(self) -> CodeBook | None:
        """Who is told of weights while they land on their grids."""
        return self._book

    def start(self, run: Any) -> None:
        self._book, self._run = book_of(run, "descent", every=self.every), run

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return `descent/quality/<layer>` and `descent/delivered/<layer>`; NaN: no update was intended."""
        assert self._book is not None
        found = self._book.summed(step, self.layers, self._options.per)
        square = found.columns["square"]
        ratios = {
            "descent/quality": found.columns["product"] / square,
            "descent/delivered": self._delivered(step, found) / square,
        }
        return found.metrics(ratios)

    def _delivered(self, step: Step, found: Summed) -> Tensor:
        """Return <intended, actual> with what is kept of the updates: (groups,)."""
        storage, names = getattr(self._run, "storage", None), found.tally.names
        if storage is None or storage.rounding not in COMPENSATED or not names:
            return found.columns["product"]
        places = {id(weight): place for place, weight in enumerate(storage.weights)}
        rows = []
        for name, row in zip(names, columns_of(found.tally.table)["product"].unbind(), strict=True):
            place = places.get(id(self._run.trained[name]))
            if place is not None:
                moved = moved_with_feedback if storage.feedback is not None else moved_with_moment
                row = (step.intended[name].double() * moved(storage, place, step, name)).sum()
            rows.append(row)
        return found.of(torch.stack(rows))


def moved_with_feedback(storage: Any, place: int, step: Step, name: str) -> Tensor:
    """Return how far a weight and its stored residual have moved together, float64."""
    parameter, now = storage.weights[place], step.weights[name].value
    residual = storage.feedback.residual(place, now, storage.scales.scales[place])
    before: Tensor = storage.watched[parameter]  # with the residual of the step before
    return now.double() + residual.double() - before.double()


def moved_with_moment(_storage: Any, _place: int, step: Step, name: str) -> Tensor:
    """Return how far a weight has moved, with the residual that its first moment gets, float64.

    A moment gets half the widest gap of the grid at most; what is cut off there is lost.
    """
    weight, before = step.weights[name], step.before[name].double()
    assert weight.format is not None and weight.scale is not None  # noqa: PT018 - for the type checker
    residual = before + step.intended[name].double() - weight.value.double()
    half = 0.5 * _widest_gap(weight.format) / weight.scale.double()
    return weight.value.double() + torch.minimum(torch.maximum(residual, -half), half) - before


@functools.lru_cache(maxsize=64)
def _widest_gap(format: Format) -> float:
    return float(format.values.diff().max())
