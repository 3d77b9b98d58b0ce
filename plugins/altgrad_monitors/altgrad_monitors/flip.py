"""`flip`: how many codes an optimizer step changed.

Per layer and in total: `flip_count`, codes that changed in this step; `update_count`, elements with a
non-zero gradient; `flips_of_updated`, the changed codes among those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from altgrad_core.hookspecs import Step
from altgrad_monitors import MonitorOptions
from altgrad_monitors.codes import CodeBook, book_of, chosen
from altgrad_monitors.reporting import reported, summed


class Flip:
    """Counts flips; see the module's text."""

    provides: Mapping[str, str] = {"flip_count": "sum", "update_count": "sum", "flips_of_updated": "sum"}

    def __init__(self, options: MonitorOptions) -> None:
        self.every = options.every
        self.needs = ("before",) if options.every > 1 else ()
        self._options = options
        self._book: CodeBook | None = None

    def start(self, run: Any) -> None:
        self._book = book_of(run)

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return the three counts of each layer and in total."""
        assert self._book is not None
        found = self._book.flips(step)
        layers = {
            name: one.layer for name, one in chosen(self._options.layers, step).items() if name in found
        }
        metrics: dict[str, Tensor | float] = {}
        for quantity, field in (
            ("flip_count", "flips"),
            ("update_count", "updates"),
            ("flips_of_updated", "flips_of_updated"),
        ):
            counts = {layer: getattr(found[name], field) for name, layer in layers.items()}
            metrics |= reported(f"flip/{quantity}", counts, summed, self._options.per)
        return metrics
