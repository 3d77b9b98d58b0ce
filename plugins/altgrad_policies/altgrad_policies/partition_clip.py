"""`partition_clip`: while many values overflow, the gradients are clipped to what the format can take.

Where the share of overflowing elements in the step before is `overflow_threshold` or more, the global L2 norm
of this step's gradients is clipped to base_clip * f(format) before the optimizer sees them:

octaves  f = octaves(format)/octaves(E5M2), octaves = log2(largest/smallest positive value): a format with
         half of E5M2's range in octaves gets half of its norm.
max      f = largest/57344, AltGrad's founding rule. Under scaling the largest value says nothing of a
         format's range: E3M4 gets 1/462 of the norm, and training stands still; E7M0 is never clipped. It is
         there to be compared with.

The format is that of the tensors that overflow; of several, the one with the smallest f.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from altgrad_core.format import Format
from altgrad_core.hookspecs import Action, ClipGradients
from altgrad_core.surgery import quantized_flows
from altgrad_policies import PartitionClipOptions
from altgrad_policies.quantized_layers import flow_layers, formats, refuse_unwatched

E5M2_LARGEST = 57344.0
"""1.75 * 2^15 (OCP 8-bit floating point)."""
E5M2_SMALLEST = 2.0**-16
"""The smallest subnormal number of E5M2."""


class PartitionClip:
    """Compares the overflow with its threshold; it has no state. See the module's text."""

    def __init__(self, options: PartitionClipOptions) -> None:
        self.options = options
        self.needs = (f"range/{options.flow}_overflow_fraction/total",)
        self._run: Any = None

    def start(self, run: Any) -> None:
        self._run = run
        if run.step:
            return
        backward = self.options.flow == "backward"
        layers = flow_layers(run, "gradients" if backward else "activations")
        layers += [] if backward else list(formats(run))
        refuse_unwatched(run, "partition_clip", "range", layers, each=False)
        if not layers:
            what = "gradients are" if backward else "weights or activations are"
            run.warn(f"partition_clip watches the {self.options.flow} pass, where no {what} quantized")

    def decide(self, step: int, metrics: Mapping[str, float]) -> Action | None:
        """Return ClipGradients where the overflow asks for it and the norm is above the limit."""
        share, norm = metrics.get(self.needs[0], math.nan), metrics["train/gradient_norm"]
        if not share >= self.options.overflow_threshold:  # NaN: not defined in this step
            return None
        found = formats_of(self._run, self.options.flow)
        if not found or not math.isfinite(norm):
            return None
        f, name = min((FACTORS[self.options.factor](one), one.name) for one in found)
        limit = self.options.base_clip * f
        if norm <= limit:
            return None
        return ClipGradients(
            norm=limit,
            reason=f"{share:.3g} of the {self.options.flow} pass overflows in {name}, "
            f"{self.options.overflow_threshold:g} or more; the gradient's norm is {norm:.3g}, "
            f"f({name}) is {f:.3g}",
        )


def formats_of(run: Any, flow: str) -> list[Format]:
    """Return the formats of a run's gradients (`backward`), or of its weights and activations (`forward`)."""
    kind = "gradients" if flow == "backward" else "activations"
    flows = {
        one.recipe.format for name, one in quantized_flows(run.model).items() if name.endswith(f".{kind}")
    }
    return list(flows | (set(formats(run).values()) if flow == "forward" else set()))


def octaves(format: Format) -> float:
    """Return the range of a format's positive values in powers of two."""
    return math.log2(format.largest / format.smallest)


def by_octaves(format: Format) -> float:
    """Return octaves(format)/octaves(E5M2)."""
    return octaves(format) / math.log2(E5M2_LARGEST / E5M2_SMALLEST)


def by_largest(format: Format) -> float:
    """Return the format's largest value over that of E5M2."""
    return format.largest / E5M2_LARGEST


FACTORS: Mapping[str, Callable[[Format], float]] = {"octaves": by_octaves, "max": by_largest}
