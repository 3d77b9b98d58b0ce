"""What rounding weights to their grids after a step cuts off, counted as `range_counts` counts it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from altgrad_core.grid_scales import GridScales
from altgrad_core.quantizer import quantizer_of
from altgrad_core.range_counts import RangeCounts, last_kept


class LandingCounts:
    """Counts what rounding weights to their grids after a step cuts off, at the format's ends or the bound.

    rows: where each weight counts; others are left out.
    """

    def __init__(self, rows: Mapping[Tensor, RangeCounts], rounding: str) -> None:
        self._rows = dict(rows)
        self._rounding = "stochastic" if rounding == "stochastic" else "nearest_even"

    __reduce__ = RangeCounts.__reduce__

    def unrounded(self, weights: Sequence[Tensor]) -> list[Tensor | None] | None:
        """Return copies of the weights before they are rounded; None where this step is not counted."""
        table = next((one.table for one in self._rows.values()), None)
        if table is None or not table.begin():
            return None
        begun = time.perf_counter()
        kept = [weight.detach().clone() if weight in self._rows else None for weight in weights]
        table.seconds += time.perf_counter() - begun
        return kept

    def add(self, unrounded: Sequence[Tensor | None], weights: Sequence[Tensor], scales: GridScales) -> None:
        """Count what the weights lost that have been rounded under these scales, which are in their order."""
        limits = scales.limits()
        for index, (before, weight) in enumerate(zip(unrounded, weights, strict=True)):
            quantizer = quantizer_of(weight)
            if before is None or quantizer is None:
                continue
            row, format = self._rows[weight], quantizer.format
            row.begin(format, self._rounding)
            kept = None
            if limits is not None:
                dtype = torch.promote_types(weight.dtype, torch.float32)  # in which weights are scaled
                kept = last_kept(format, limits[index], self._rounding, dtype)
            row.add(before, weight, scales.scales[index], kept)
