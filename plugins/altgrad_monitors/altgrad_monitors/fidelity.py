"""`fidelity`: how far the quantized model's gradient is from a float32 one.

Of the same micro-batches and at the same weights, two gradients: g as the run computes it, quantized and
under its autocast, and the reference r (the "FP32 shadow"), which nothing quantizes.

cosine  <g, r> / (|g| |r|)
snr_db  10 log10(|r|^2 / |g - r|^2), in decibels; inf where both are the same bit for bit

Both are computed by extra passes, at the weights after the step and on the micro-batches of the coming one.
The gradients of the step itself do not serve: they are clipped, which changes |g|, and they belong to the
weights before the step, which are gone. So g is what training is about to compute, dropout apart.

The reference uses the weights as they are stored. Weights that live on a grid are on it in both gradients:
the monitor then sees what quantizing activations and gradients does, and not what storing on a grid does; a
run with grid weights and nothing else quantized, in float32, has a cosine of 1 and an SNR of inf. The SNR
counts a wrong length of the gradient, the cosine does not. Stochastic rounding of gradients is noise in g:
its mean is right at an SNR that is low.

A layer is all its parameters; `total` is over all elements of the observed layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from altgrad_core.extra_pass import extra_passes, gradients, micro_batches
from altgrad_core.hookspecs import Step
from altgrad_monitors import FidelityOptions
from altgrad_monitors.reporting import reported, summed

Products = tuple[Tensor, Tensor, Tensor, Tensor]
"""<g, r>, |g|^2, |r|^2 and |g - r|^2 of one layer, 0-d float64."""


class Fidelity:
    """Reports cosine and SNR per layer and in total; see the module's text."""

    needs = ()
    provides: Mapping[str, str] = {"cosine": "mean", "snr_db": "mean"}
    undefined_is_nan = True
    may_be_infinite = ("snr_db",)

    def __init__(self, options: FidelityOptions) -> None:
        self.every = options.every
        self._options, self.layers = options, options.layers
        self._run: Any = None

    def start(self, run: Any) -> None:
        self._run = run

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return the two metrics; NaN where a gradient is zero everywhere, or not finite."""
        layers = {
            name: weight.layer
            for name, weight in step.weights.items()
            if re.fullmatch(self.layers, weight.layer)
        }
        if not layers:
            return {}
        parameters = [self._run.trained[name] for name in layers]
        batches = list(micro_batches(self._run, step.index))
        with extra_passes(self._run) as loss_of:
            quantized = gradients(loss_of, parameters, batches)
        with extra_passes(self._run, float32=True) as loss_of:
            reference = gradients(loss_of, parameters, batches)
        found: dict[str, list[Products]] = {}
        for layer, g, r in zip(layers.values(), quantized, reference, strict=True):
            found.setdefault(layer, []).append(products(g.double(), r.double()))
        of_layers = {layer: added(several) for layer, several in found.items()}
        return {
            **reported("fidelity/cosine", of_layers, cosine, self._options.per),
            **reported("fidelity/snr_db", of_layers, snr_db, self._options.per),
        }


def products(g: Tensor, r: Tensor) -> Products:
    """Return g.r, g.g, r.r and (g - r).(g - r), 0-d."""
    return (g * r).sum(), g.square().sum(), r.square().sum(), (g - r).square().sum()


def added(several: list[Products]) -> Products:
    """Return the products of several weights as one's."""
    dot, gg, rr, ee = (summed(list(column)) for column in zip(*several, strict=True))
    return dot, gg, rr, ee


def cosine(several: list[Products]) -> Tensor:
    """Return <g, r> / (|g| |r|) over all these layers; exactly 1 where g is r."""
    dot, gg, rr, _ = added(several)
    return dot / (gg * rr).sqrt()


def snr_db(several: list[Products]) -> Tensor:
    """Return 10 log10(|r|^2 / |g - r|^2) over all these layers."""
    _, _, rr, ee = added(several)
    return 10 * (rr / ee).log10()
