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

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_core.kernels import flat, kernel
from altgrad_monitors import MonitorOptions
from altgrad_monitors.codes import CodeBook, Flips, book_of, chosen, row_of
from altgrad_monitors.reporting import Share, pooled, reported


class Stall:
    """Reports the three stall ratios; see the module's text."""

    needs = ("before", "intended")
    provides: Mapping[str, str] = {"stall_ratio": "mean", "bit_stall": "mean", "expected_stall": "mean"}
    undefined_is_nan = True

    def __init__(self, options: MonitorOptions) -> None:
        self.every = options.every
        self._options = options
        self._book: CodeBook | None = None

    def start(self, run: Any) -> None:
        self._book = book_of(run)

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return the ratios of each layer and in total; NaN where a ratio is undefined."""
        assert self._book is not None
        found = self._book.flips(step)
        metrics: dict[str, Tensor | float] = {}
        weights = {
            name: weight for name, weight in chosen(self._options.layers, step).items() if name in found
        }
        for quantity, share in (
            ("stall_ratio", stalled),
            ("bit_stall", bit_stalled),
            ("expected_stall", expected),
        ):
            shares = {
                weight.layer: share(name, weight, found[name], step) for name, weight in weights.items()
            }
            metrics |= reported(f"stall/{quantity}", shares, pooled, self._options.per)
        return metrics


def stalled(name: str, weight: Weight, found: Flips, step: Step) -> Share:
    flips, updates = step.counts.get(name, (found.flips_of_updated, found.updates))
    return (updates - flips).double(), updates.double()


def bit_stalled(name: str, weight: Weight, found: Flips, step: Step) -> Share:
    stayed, moved = _stayed(flat(weight.value), flat(step.before[name]), found.now, found.before)
    return stayed.double(), moved.double()


def expected(name: str, weight: Weight, found: Flips, step: Step) -> Share:
    assert weight.format is not None and weight.scale is not None  # noqa: PT018 - for the type checker
    in_rungs = step.intended_in_rungs and name in step.counts
    before = None if in_rungs else flat(step.before[name])
    intended, gradient = flat(step.intended[name]), flat(step.gradients[name])
    lost = _lost(intended, gradient, before, row_of(weight.scale), weight.format)
    return lost, found.updates.double()


@kernel
def _stayed(now: Tensor, before: Tensor, code: Tensor, code_before: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many elements moved without changing their code, and how many moved: 0-d int64."""
    moved = now != before
    return (moved & (code == code_before)).sum(), moved.sum()


@kernel
def _lost(intended: Tensor, gradient: Tensor, before: Tensor | None, scale: Tensor, format: Format) -> Tensor:
    """Return the expected number of updated elements whose code stays, 0-d float64.

    intended: in rungs where `before` is None, else in weight units.
    """
    size = intended.abs()
    if before is not None:
        size = size * scale / format.spacing(before * scale)
    return ((1 - size.clamp(max=1)) * (gradient != 0)).sum(dtype=torch.float64)
