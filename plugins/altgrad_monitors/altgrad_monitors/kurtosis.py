"""`kurtosis`: how heavy the tails of the activations are.

Excess kurtosis of the inputs of each Linear, m4 / m2^2 - 3 with m_k the k-th central moment over all
elements: 0 for a normal distribution, -1.2 for a uniform one, n^2/(n - 1) - 6 where one of n numbers differs
from the others. A few large elements that take the scale from all others show here before the loss diverges.

excess  the excess kurtosis; `total` is the largest of the layers'; not defined, NaN, for inputs that are all
        the same, or not finite
alert   1 where it is above the option `alert`, or the inputs are not finite, else 0

The inputs are those before any quantization, in evaluation mode (no dropout), of one micro-batch of the
coming step: one extra forward pass. Padding past a document's end does not count. Moments are taken in
float64, biased as scipy.stats.kurtosis takes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from altgrad_core.extra_pass import extra_passes, micro_batches, watched
from altgrad_core.hookspecs import Step
from altgrad_monitors import KurtosisOptions
from altgrad_monitors.reporting import largest, reported


class Kurtosis:
    """Reports `excess` and `alert` per layer; see the module's text."""

    needs = ()
    provides: Mapping[str, str] = {"excess": "mean", "alert": "sum"}
    undefined_is_nan = True

    def __init__(self, options: KurtosisOptions) -> None:
        self.every = options.every
        self._options, self.layers = options, options.layers
        self._run: Any = None

    def start(self, run: Any) -> None:
        self._run = run

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return both quantities of each monitored Linear, and the largest of all."""
        linears = {
            name: module
            for name, module in self._run.model.named_modules()
            if isinstance(module, nn.Linear) and re.fullmatch(self.layers, name)
        }
        excesses: dict[str, Tensor] = {}
        alerts: dict[str, Tensor] = {}

        batch = next(micro_batches(self._run, step.index, 1))

        def seen(layer: str, inputs: Tensor, _: Tensor) -> None:
            there = self._run.task.there(batch[0], inputs.shape[:-1])
            excesses[layer] = excess_kurtosis(inputs, there)
            alerts[layer] = alert(inputs, excesses[layer], self._options.alert, there)

        with extra_passes(self._run) as loss_of, torch.no_grad(), watched(linears, seen):
            loss_of(*batch)
        return {
            **reported("kurtosis/excess", excesses, largest, self._options.per),
            **reported("kurtosis/alert", alerts, largest, self._options.per),
        }


def excess_kurtosis(x: Tensor, there: Tensor | None = None) -> Tensor:
    """Return m4 / m2^2 - 3 over all elements, 0-d float64.

    NaN where they are all the same: float64 adds up equal float32 numbers without rounding, so that m2 is 0.

    there: which positions count, bool of the shape of x but for its last dimension; None: all.
    """
    centered = x.double()
    squares = (centered - _mean(centered, there)).square_()
    return _mean(squares.square(), there) / _mean(squares, there).square() - 3


def _mean(x: Tensor, there: Tensor | None) -> Tensor:
    if there is None:
        return x.mean()
    return torch.where(there.unsqueeze(-1), x, 0.0).sum() / (there.sum() * x.shape[-1])


def alert(x: Tensor, excess: Tensor, limit: float, there: Tensor | None = None) -> Tensor:
    """Return 1 where the excess is above the limit or x is not finite, else 0: 0-d float32."""
    finite = x.isfinite() if there is None else x.isfinite() | ~there.unsqueeze(-1)
    return ((excess > limit) | ~finite.all()).float()
