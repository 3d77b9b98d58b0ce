"""`flip`: how many codes an optimizer step changed.

Per layer and in total: `flip_count`, codes that changed in this step; `update_count`, elements with a
non-zero gradient; `flips_of_updated`, the changed codes among those. A change of scale re-codes a whole
tensor, and counts (`codes`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from altgrad_core.hookspecs import Step
from altgrad_monitors import MonitorOptions
from altgrad_monitors.codes import CodeBook, book_of

_COLUMNS = {"flip_count": "flips", "update_count": "updates", "flips_of_updated": "flips_of_updated"}


class Flip:
    """Counts flips; see the module's text."""

    provides: Mapping[str, str] = {"flip_count": "sum", "update_count": "sum", "flips_of_updated": "sum"}

    def __init__(self, options: MonitorOptions) -> None:
        self.every = options.every
        self._options, self.layers = options, options.layers
        self._book: CodeBook | None = None

    @property
    def needs(self) -> Collection[str]:
        """`before` in steps whose codes before are not kept: after others that were left out."""
        return () if self._book is None else self._book.needs()

    @property
    def landing(self) -> CodeBook | None:
        """Who is told of weights while they land on their grids."""
        return self._book

    def start(self, run: Any) -> None:
        self._book = book_of(run, "flips")

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return the three counts of each layer and in total."""
        assert self._book is not None
        found = self._book.summed(step, self.layers, self._options.per)
        return found.metrics({f"flip/{name}": found.columns[column] for name, column in _COLUMNS.items()})
