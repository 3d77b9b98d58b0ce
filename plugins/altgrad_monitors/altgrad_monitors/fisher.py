"""`fisher`: whether the format's metric is the one that the loss has.

A format measures a weight's moves in its own spacing S, that is by the metric 1/S^2; the loss measures them
by the Fisher information. Of that the diagonal is estimated from gradients, F = mean over micro-batches of
(gradient of the micro-batch's mean loss)^2, element by element.

correlation  Spearman's rank correlation of F with 1/S^2, in [-1, 1]: 1 where the format is finest exactly
             where the loss is most sensitive. `total` ranks the elements of all layers together. Not defined
             where all F, or all S, are the same (as under the uniform grid E0M7).
trace        the sum of F over a layer

What F is not. It is the *empirical* Fisher: the labels are the text's, not drawn from the model's own
distribution, and it stays away from the Fisher where the model does not fit the text (Kunstner et al., arXiv
1905.12558). And it squares the gradient of a micro-batch of N tokens, not of each token: in expectation
|mean gradient|^2 + (variance over tokens)/N, so that its size hangs on the batch size. Ranks do not, as far
as the mean gradient is small beside the noise. It is averaged over `batches` micro-batches alone, and so is
noisy: an element's F has a relative standard error of about sqrt(2/batches).

The gradients are those of the model that trains, quantized as it is, at the weights after the step, in
evaluation mode, on the first `batches` micro-batches of the coming step (further random windows of the
training text where the step has fewer). S is the formula's (`grid`: the spacing at the weight). Equal values
share their average rank, as in scipy.stats.spearmanr; ranks are taken of -S, whose order is that of 1/S^2
and which neither overflows nor makes ties. Sums are in float64; ranking takes some 100 bytes a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad_core.extra_pass import extra_passes, gradients, micro_batches
from altgrad_core.hookspecs import Step, Stiffness, Weight
from altgrad_monitors import FisherOptions
from altgrad_monitors.codes import chosen
from altgrad_monitors.reporting import reported, summed

Pair = tuple[Tensor, Tensor]
"""F and -S of one layer, as rows."""


class Fisher:
    """Reports `correlation` and `trace` per layer and in total; see the module's text."""

    needs = ()
    provides: Mapping[str, str] = {"correlation": "mean", "trace": "mean"}
    undefined_is_nan = True
    may_be_infinite = ("trace",)  # of a model whose coming gradient overflows

    def __init__(self, options: FisherOptions) -> None:
        self.every = options.every
        self._options, self.layers = options, options.layers
        self._formula: Stiffness | None = None
        self._run: Any = None

    def start(self, run: Any) -> None:
        self._run, self._formula = run, self._options.formula.build(run.registry)

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return the two metrics of the quantized weights."""
        weights = chosen(self.layers, step)
        if not weights:
            return {}
        parameters = [self._run.trained[name] for name in weights]
        fisher = diagonal(self._run, parameters, step.index, self._options.batches)
        pairs = {
            weight.layer: (f.flatten(), -self._stiffness(weight).flatten())
            for f, weight in zip(fisher, weights.values(), strict=True)
        }
        traces = {layer: f.sum() for layer, (f, _) in pairs.items()}
        return {
            **reported("fisher/correlation", pairs, pooled_correlation, self._options.per),
            **reported("fisher/trace", traces, summed, self._options.per),
        }

    def _stiffness(self, weight: Weight) -> Tensor:
        assert self._formula is not None and weight.format is not None and weight.scale is not None  # noqa: PT018 - for the type checker
        return self._formula(weight.value, weight.format, weight.scale)


def diagonal(run: Any, parameters: list[Tensor], step: int, batches: int) -> list[Tensor]:
    """Return the mean of the squared gradients of `batches` micro-batches, float64, one per parameter."""
    fisher = [torch.zeros_like(one, dtype=torch.float64) for one in parameters]
    with extra_passes(run) as loss_of:
        for batch in micro_batches(run, step, batches):
            for total, gradient in zip(fisher, gradients(loss_of, parameters, [batch]), strict=True):
                total.add_(gradient.double().square_(), alpha=1 / batches)
    return fisher


def pooled_correlation(pairs: list[Pair]) -> Tensor:
    """Return the rank correlation over the elements of several layers together."""
    x, y = (torch.cat(rows) for rows in zip(*pairs, strict=True))
    return rank_correlation(x, y)


def rank_correlation(x: Tensor, y: Tensor) -> Tensor:
    """Return Spearman's correlation of two rows, 0-d float64; NaN where either is constant or has a NaN."""
    a, b = ranks(x), ranks(y)
    a, b = a - a.mean(), b - b.mean()
    r = (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()
    return torch.where(x.isnan().any() | y.isnan().any(), torch.nan, r)


def ranks(x: Tensor) -> Tensor:
    """Return the ranks 1..n of a row, float64; equal values share their average rank."""
    ordered, order = x.sort()
    places = torch.arange(len(x), device=x.device)
    begins = torch.ones_like(x, dtype=torch.bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    ends = begins.roll(-1)  # the first begins always, so that the last ends always
    first = torch.where(begins, places, 0).cummax(0).values
    last = torch.where(ends, places, len(x) - 1).flip(0).cummin(0).values.flip(0)
    return torch.empty_like(ordered, dtype=torch.float64).scatter_(0, order, (first + last).double() / 2 + 1)
