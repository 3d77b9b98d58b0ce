"""Overflow and underflow of an optimizer that lands on the grid by itself, in whole rungs (GridOptim).

It draws where a weight goes, and never has the number that it rounds. What is at hand is the rung r of the
weight before the step and the real number d of rungs that it was meant to move. So, with u = r + d:

    overflow     u lies past the last rung of the format, or of the bound: what is further out is cut off
    underflow    u is not 0, and the weight became 0
    non-finite   the weight or d is NaN or infinite

Rungs are those under the scale before the step, in which d is given.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from altgrad_core import native
from altgrad_core.format import Format
from altgrad_core.grid_scales import GridScales
from altgrad_core.hookspecs import Step, Weight
from altgrad_core.kernels import flat, kernel
from altgrad_core.quantizer import quantizer_of
from altgrad_core.range_counts import RangeCounts, RangeTable


class RungCounts:
    """Counts in a table what the rungs of a run's weights lose in the step.

    rows: where each weight counts.
    """

    needs = ("before", "intended")
    """What the step must carry."""

    def __init__(self, run: Any, table: RangeTable, rows: Mapping[Tensor, RangeCounts]) -> None:
        self._run, self._table, self._rows = run, table, dict(rows)
        self._scales: dict[int, Tensor] = {}
        self._ends: dict[Format, Tensor] = {}
        self._hook = run.optimizer.register_step_pre_hook(self._before_step)

    def remove(self) -> None:
        """Leave the optimizer alone."""
        self._hook.remove()

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        """Keep the scales under which the rungs of this step are."""
        scales: GridScales | None = optimizer.scales
        if scales is not None and self._table.begin():
            kept = torch.stack(scales.scales).unbind()
            self._scales = {id(scale): one for scale, one in zip(scales.scales, kept, strict=True)}

    def add(self, step: Step) -> None:
        """Count what this step's weights lost."""
        scales: GridScales | None = self._run.optimizer.scales
        if scales is None:
            return
        limits = scales.limits()
        for name, weight in self._run.trained.items():
            quantizer = quantizer_of(weight)
            if weight not in self._rows or quantizer is None or not _moved(name, step):
                continue
            before, seen = self._scales.get(id(quantizer.scale)), step.weights[name]
            if before is not None and seen.format is not None and seen.storage == "grid":
                index = next(at for at, scale in enumerate(scales.scales) if scale is quantizer.scale)
                limit = None if limits is None else limits[index] * (before / quantizer.scale)
                ends = self._ends_of(seen.format, before.device) if limit is None else limit
                self._rows[weight].index = self._table.index
                self._rows[weight].add_found(weight.numel(), *_lost(name, seen, step, before, ends))

    def _ends_of(self, format: Format, device: torch.device) -> Tensor:
        """Return a format's lowest and largest value on a device, moved there once."""
        if format not in self._ends:
            self._ends[format] = format.values[[0, -1]].to(device)
        return self._ends[format]


def _moved(name: str, step: Step) -> bool:
    return step.intended_in_rungs and name in step.counts and name in step.intended


def _lost(name: str, weight: Weight, step: Step, scale: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight's counts and extremes; ends: the lowest and the largest value, in scaled units."""
    assert weight.format is not None
    tensors = [flat(one) for one in (step.before[name], step.intended[name], weight.value)]
    rungs = weight.format.rung(ends)
    return _lost_in_c(*tensors, scale, rungs, weight.format) or _rungs_lost(
        *tensors, scale, rungs, weight.format
    )


def _lost_in_c(
    before: Tensor, intended: Tensor, after: Tensor, scale: Tensor, ends: Tensor, format: Format
) -> tuple[Tensor, Tensor] | None:
    """Return what `_rungs_lost` does, by one pass on a CPU; None where there is no loop for it."""
    if not (native.serves(before) and native.readable(before, intended, after, scale)):
        return None
    loops, blocks = _loops(), format.block_loops()
    if loops is None or blocks is None:
        return None
    counts, extremes = torch.zeros(3, dtype=torch.int64), torch.zeros(3)
    inputs = [native.address(one) for one in (before, intended, after)]
    found = [native.address(one) for one in (counts, extremes)]
    told = native.address(scale), native.address(ends), blocks.rungs, blocks.context
    loops.count_rungs(*inputs, before.numel(), *told, *found)
    return counts, extremes


@functools.cache
def _loops() -> ctypes.CDLL | None:
    """Return the compiled file with the types of its arguments declared; None where there is none."""
    loops = native.library(Path(__file__).with_name("rung_counts.c"))
    if loops is not None:
        loops.count_rungs.argtypes = [*[ctypes.c_void_p] * 3, ctypes.c_int64, *[ctypes.c_void_p] * 6]
        loops.count_rungs.restype = None
    return loops


@kernel
def _rungs_lost(
    before: Tensor, intended: Tensor, after: Tensor, scale: Tensor, ends: Tensor, format: Format
) -> tuple[Tensor, Tensor]:
    """Return overflow, underflow, non-finite; and largest |w|, twice, and smallest non-zero |w|, float32."""
    wanted = format.rung(before * scale) + intended
    size, undefined = after.abs(), ~(intended.isfinite() & before.isfinite())
    over = (wanted > ends[1]) | (wanted < ends[0])
    under = (after == 0) & (wanted != 0)
    counts = torch.stack([(over & ~undefined).sum(), (under & ~undefined).sum(), undefined.sum()])
    used = (size > 0) & size.isfinite()
    top, bottom = torch.where(used, size, 0.0).amax(), torch.where(used, size, torch.inf).amin()
    return counts, torch.stack((top, top, bottom)).float()
