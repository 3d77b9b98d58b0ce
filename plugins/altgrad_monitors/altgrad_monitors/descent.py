"""`descent`: effective descent quality, <intended, actual> / |intended|^2.

1 where the update arrives whole, 0 where nothing arrives; stochastic rounding arrives late but whole, so it
averages 1. Under GridOptim both are in rungs and intended is -r.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from altgrad_core.hookspecs import Step
from altgrad_monitors import MonitorOptions
from altgrad_monitors.codes import CodeBook, book_of, layers_of
from altgrad_monitors.tally import shares


class Descent:
    """Reports the quality per layer and in total; see the module's text."""

    needs = ("before", "intended")
    provides: Mapping[str, str] = {"quality": "mean"}
    undefined_is_nan = True

    def __init__(self, options: MonitorOptions) -> None:
        self.every = options.every
        self._options = options
        self._book: CodeBook | None = None

    def start(self, run: Any) -> None:
        self._book = book_of(run, "descent")

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return `descent/quality/<layer>`; NaN where no update was intended."""
        assert self._book is not None
        tally = self._book.tally(step)
        layers = layers_of(self._options.layers, step, tally.names)
        tally = tally.of(list(layers))
        products = tally.column("product"), tally.column("square")
        return shares("descent/quality", list(layers.values()), *products, self._options.per)
