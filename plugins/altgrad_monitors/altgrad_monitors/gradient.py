"""`gradient`: the size of the gradients, and which of them do nothing.

l2                    Euclidean norm of the layer's gradients, after clipping
linf                  their largest magnitude
snr                   |mean| / standard deviation over the layer's elements (the deviation divides by their
                      number): near 0 where signs cancel out, inf where all are equal, undefined where all
                      are 0
dead_fraction         share of elements with |g| < 1e-8 in `window` consecutive checks; not reported before
                      so many checks were made. A NaN is not dead
zero_update_fraction  share of the elements of quantized weights that this step left exactly as they were,
                      with or without a gradient: rounded away, or never moved

Every parameter that trains is observed, biases and LayerNorms too; only quantized ones have a
zero_update_fraction. Parameters of one layer count as one. Over layers, everything is what it would be of one
long vector: `l2/total` is the norm that clipping left. Sums are float64; the deviation is resolved down to
1e-7 of the mean.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from altgrad_core.hookspecs import Step
from altgrad_core.kernels import flat
from altgrad_monitors import GradientOptions
from altgrad_monitors.reporting import Share, largest, pooled, reported

DEAD = 1e-8
"""A gradient below this, in nats per weight unit, is as good as none."""

_Found = TypeVar("_Found")


class Moments(NamedTuple):
    """Of the elements of one gradient; 0-d float64."""

    number: Tensor
    mean: Tensor
    squares: Tensor
    """Sum of the squared deviations from the mean."""


class Gradient:
    """Reports norms, signal-to-noise ratio and idle elements; see the module's text."""

    needs = ("before",)
    provides: Mapping[str, str] = dict.fromkeys(
        ("l2", "linf", "snr", "dead_fraction", "zero_update_fraction"), "mean"
    )
    undefined_is_nan = True
    may_be_infinite = ("snr",)

    def __init__(self, options: GradientOptions) -> None:
        self.every = options.every
        self._options, self.layers = options, options.layers
        self._quiet: dict[str, Tensor] = {}
        self._checks: dict[str, int] = {}

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return the quantities of each layer, and of all of them."""
        gradients = {
            name: flat(step.gradients[name])
            for name, weight in step.weights.items()
            if name in step.gradients and re.fullmatch(self.layers, weight.layer)
        }
        for name, gradient in gradients.items():
            self._count_quiet(name, gradient)
        aged = [name for name in gradients if self._checks[name] >= self._options.window]
        kept = [name for name in gradients if name in step.before]

        def quantity(
            metric: str,
            names: Sequence[str],
            of: Callable[[str], _Found],
            combine: Callable[[list[_Found]], Tensor],
        ) -> dict[str, Tensor | float]:
            found: dict[str, list[_Found]] = {}
            for name in names:
                found.setdefault(step.weights[name].layer, []).append(of(name))
            return reported(f"gradient/{metric}", found, _of_all(combine), self._options.per)

        names = list(gradients)
        return {
            **quantity("l2", names, lambda name: _norm(gradients[name]), _norm_of_norms),
            **quantity("linf", names, lambda name: gradients[name].abs().max(), largest),
            **quantity("snr", names, lambda name: moments(gradients[name]), signal_to_noise),
            **quantity("dead_fraction", aged, self._dead, pooled),
            **quantity("zero_update_fraction", kept, lambda name: _unmoved(name, step), pooled),
        }

    def _count_quiet(self, name: str, gradient: Tensor) -> None:
        """Count the checks in a row in which an element was below DEAD: one byte each, up to `window`."""
        quiet = gradient.abs() < DEAD
        if name not in self._quiet:
            self._quiet[name] = torch.zeros_like(gradient, dtype=torch.uint8)
        counter = self._quiet[name] = self._quiet[name].to(gradient.device)
        counter.add_(1).mul_(quiet).clamp_(max=self._options.window)
        self._checks[name] = self._checks.get(name, 0) + 1

    def _dead(self, name: str) -> Share:
        return _share(self._quiet[name] >= self._options.window)

    def state_dict(self) -> dict[str, Any]:
        return {"quiet": dict(self._quiet), "checks": dict(self._checks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._quiet, self._checks = dict(state["quiet"]), dict(state["checks"])


def _of_all(combine: Callable[[list[_Found]], Tensor]) -> Callable[[list[list[_Found]]], Tensor]:
    """Return `combine` for layers of several parameters each."""
    return lambda layers: combine([one for parameters in layers for one in parameters])


def _norm(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float64)


def _norm_of_norms(norms: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(norms))


def moments(values: Tensor) -> Moments:
    """Return count, mean and squared deviations of a row of values."""
    count = values.new_full((), values.numel(), dtype=torch.float64)
    mean = values.sum(dtype=torch.float64) / count
    return Moments(count, mean, _norm(values - mean.to(values.dtype)).square())


def signal_to_noise(parts: list[Moments]) -> Tensor:
    """Return |mean| / standard deviation over the elements of all parts (Chan, Golub and LeVeque, 1979)."""
    counts, means, squares = (torch.stack(column) for column in zip(*parts, strict=True))
    mean = (counts * means).sum() / counts.sum()
    variance = (squares.sum() + (counts * (means - mean).square()).sum()) / counts.sum()
    return mean.abs() / variance.sqrt()


def _unmoved(name: str, step: Step) -> Share:
    return _share(step.before[name] == step.weights[name].value)


def _share(chosen: Tensor) -> Share:
    """Return how many are chosen, and of how many, float64."""
    whole = torch.full((), chosen.numel(), dtype=torch.float64, device=chosen.device)
    return chosen.count_nonzero().double(), whole
