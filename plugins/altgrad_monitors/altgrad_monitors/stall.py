"""`stall`: how many updates change no code, beside what the size of the updates predicts.

stall_ratio    1 - flips/updates, counting flips of elements that had a non-zero gradient only, so that it
               lies in [0, 1]; under GridOptim both are its own counts. Not logged where nothing was updated.
bit_stall      the share of elements with a non-zero actual update dw for which Q(w + dw) = Q(w).
expected_stall 1 - mean(min(1, |dw|/S)) over the updated elements, dw the intended update and S the spacing
               (under GridOptim |r| in rungs): what stochastic rounding of the same updates would give.

A high stall ratio is normal with float32 masters and with small steps. The signals are its excess over
expected_stall, and `descent`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad_core.hookspecs import Step
from altgrad_monitors import MonitorOptions
from altgrad_monitors.codes import CodeBook, book_of
from altgrad_monitors.tally import Summed, columns_of


class Stall:
    """Reports the three stall ratios; see the module's text."""

    provides: Mapping[str, str] = {"stall_ratio": "mean", "bit_stall": "mean", "expected_stall": "mean"}
    undefined_is_nan = True

    def __init__(self, options: MonitorOptions) -> None:
        self.every = options.every
        self._options, self.layers = options, options.layers
        self._book: CodeBook | None = None

    @property
    def needs(self) -> Collection[str]:
        """The weights before the step, and the updates, where the code book does not keep them."""
        return () if self._book is None else self._book.needs(updates=True)

    @property
    def landing(self) -> CodeBook | None:
        """Who is told of weights while they land on their grids."""
        return self._book

    def start(self, run: Any) -> None:
        self._book = book_of(run, "stall", every=self.every)

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return the ratios of each layer and in total; NaN where a ratio is undefined."""
        assert self._book is not None
        found = self._book.summed(step, self.layers, self._options.per)
        flips, updates = _arrived(found, step)
        columns = found.columns
        ratios = {
            "stall/stall_ratio": (updates - flips) / updates,
            "stall/bit_stall": columns["stayed"] / columns["moved"],
            "stall/expected_stall": columns["lost"] / columns["updates"],
        }
        return found.metrics(ratios)


def _arrived(found: Summed, step: Step) -> tuple[Tensor, Tensor]:
    """Return flips and updates, the optimizer's own counts where it has them: (groups,)."""
    names = "flips_of_updated", "updates"
    if not step.counts or not found.layers:
        return found.columns[names[0]], found.columns[names[1]]
    columns = columns_of(found.tally.table)
    ours = zip(*(columns[name].unbind() for name in names), strict=True)
    rows = [step.counts.get(name, own) for name, own in zip(found.tally.names, ours, strict=True)]
    flips, updates = (torch.stack([one.double() for one in column]) for column in zip(*rows, strict=True))
    return found.of(torch.minimum(flips, updates)), found.of(updates)  # momentum moves what has no gradient
