"""`flip`: how many codes an optimizer step changed.

Per layer and in total: `flip_count`, codes that changed in this step; `update_count`, elements with a
non-zero gradient; `flips_of_updated`, the changed codes among those.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad_core.hookspecs import Step
from altgrad_monitors import MonitorOptions
from altgrad_monitors.codes import CodeBook, book_of, chosen


class Flip:
    """Counts flips; see the module's text."""

    def __init__(self, options: MonitorOptions) -> None:
        self.every = options.every
        self.needs = ("before",) if options.every > 1 else ()
        self._layers = options.layers
        self._book: CodeBook | None = None

    def start(self, run: Any) -> None:
        self._book = book_of(run)

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return the three counts of each layer and in total."""
        assert self._book is not None
        found = self._book.flips(step)
        metrics: dict[str, Tensor | float] = {}
        weights = {name: weight for name, weight in chosen(self._layers, step).items() if name in found}
        for quantity, field in (
            ("flip_count", "flips"),
            ("update_count", "updates"),
            ("flips_of_updated", "flips_of_updated"),
        ):
            counts = {weight.layer: getattr(found[name], field) for name, weight in weights.items()}
            metrics |= {f"flip/{quantity}/{layer}": count for layer, count in counts.items()}
            if counts:
                metrics[f"flip/{quantity}/total"] = torch.stack(list(counts.values())).sum()
        return metrics
