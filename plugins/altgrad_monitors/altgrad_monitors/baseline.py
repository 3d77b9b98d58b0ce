"""The run that another one is held against: what it logged of one metric, by layer and step.

Read once, from the `metrics.jsonl` of its run folder.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path

from altgrad_core.record import METRICS, read_lines
from altgrad_core.registry import UsageError


class Baseline:
    """One metric of a finished or running run.

    folder: the run's folder, `runs/<name>/<cell>`.
    metric: `<monitor>/<quantity>`.

    Raises UsageError where there is no run, or none that logged the metric.
    """

    def __init__(self, folder: str, metric: str) -> None:
        self._folder, self._metric = folder, metric
        path = Path(os.path.expanduser(folder)) / METRICS
        if not path.is_file():
            raise UsageError(
                f"baseline {folder!r} is no run: it has no {METRICS}; name the folder of a run, such as "
                "'runs/my_experiment/run'"
            )
        self._steps: dict[str, list[int]] = {}
        self._values: dict[str, list[float]] = {}
        for line in read_lines(path):
            for name, value in line.items():
                if name.startswith(f"{metric}/"):
                    layer = name.removeprefix(f"{metric}/")
                    self._steps.setdefault(layer, []).append(line["step"])
                    self._values.setdefault(layer, []).append(value)
        if not self._steps:
            raise UsageError(
                f"the baseline {folder!r} logged no {metric}; run it with [[monitor]] plugin = "
                f"{metric.partition('/')[0]!r}"
            )

    def check(self, layers: Iterable[str]) -> None:
        """Raise UsageError where the baseline does not know one of the layers."""
        missing = [layer for layer in layers if layer not in self._steps]
        if missing:
            raise UsageError(
                f"the baseline {self._folder!r} logged no {self._metric}/{missing[0]}; it has "
                f"{', '.join(self._steps)}: run it with the same model and per = 'layer', or narrow `layers`"
            )

    def at(self, step: int, layer: str) -> float | None:
        """Return the layer's last value that was logged at this step or before; None: none yet."""
        position = bisect_right(self._steps[layer], step)
        return self._values[layer][position - 1] if position else None
