"""`scale_backoff`: gradients that saturate get half the scale, before any format is changed.

A delayed or static scale can be too large for the gradients that come: they are cut at the format's end.
Where the share of those in the step before is above `threshold`, the scale of all gradient quantizers is
halved at once; after `clean_steps` steps in a row below, it is doubled, never above where it began.

A change is decided after the backward pass of its step, so that the value of that step is still one of the
scale before: it is passed over, or every burst would be answered twice.

Under overflow = "ieee" what saturates elsewhere becomes infinite or NaN, and no step is left that could be
observed: a gradient that is not finite, of a loss that is, halves the scale at once, in each such step. No
step that is not finite is a clean one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from altgrad_core.hookspecs import Action, AdjustScale
from altgrad_core.surgery import quantized_flows
from altgrad_policies import ScaleBackoffOptions
from altgrad_policies.quantized_layers import flow_layers, refuse_unwatched

SATURATED = "range/saturated_gradients/total"

LOWEST = 2.0**-24
"""Where halving ends: what saturates still (an infinite value) does so under any scale."""


class ScaleBackoff:
    """Keeps the factor that has been asked for; see the module's text."""

    needs = (SATURATED,)

    def __init__(self, options: ScaleBackoffOptions) -> None:
        self.options = options
        self.factor = 1.0
        self.clean = 0
        self.changed: int | None = None
        """The step of the last change."""
        self._run: Any = None

    def start(self, run: Any) -> None:
        self._run = run
        if run.step:
            return
        layers = flow_layers(run, "gradients")
        refuse_unwatched(run, "scale_backoff", "range", layers, each=False)
        if not layers:
            run.warn("scale_backoff has no scale to adjust: no gradients are quantized")

    def decide(self, step: int, metrics: Mapping[str, float]) -> Action | None:
        """Return AdjustScale by 1/2 or by 2, or None."""
        if not (metrics["train/loss_finite"] and metrics["train/gradient_finite"]):
            return self._not_finite(step, metrics)
        share = metrics.get(SATURATED, math.nan)
        if math.isnan(share):  # not known of the step before: neither clean nor saturated
            return None
        if self.changed is not None and self.changed == step - 1:
            return None
        if share > self.options.threshold:
            self.clean = 0
            why = f"{share:.3g} of the gradient elements saturate, above {self.options.threshold:g}"
            return self._adjusted(step, 0.5, why)
        self.clean += 1
        if self.clean < self.options.clean_steps:
            return None
        self.clean = 0
        return self._adjusted(step, 2.0, f"{self.options.clean_steps} steps in a row without saturation")

    def _not_finite(self, step: int, metrics: Mapping[str, float]) -> Action | None:
        """Begin the clean steps again; halve where it is the gradients that may have overflowed."""
        self.clean = 0
        if not metrics["train/loss_finite"] or not self._overflow_is_infinite():
            return None
        norm = metrics["train/gradient_norm"]
        return self._adjusted(step, 0.5, f"the gradient is not finite ({norm}), as where it overflows")

    def _overflow_is_infinite(self) -> bool:
        """Whether what overflows in a quantized gradient becomes infinite or NaN."""
        flows = {} if self._run is None else quantized_flows(self._run.model)
        return any(
            name.endswith(".gradients") and flow.recipe.overflow != "saturate" for name, flow in flows.items()
        )

    def _adjusted(self, step: int, factor: float, why: str) -> Action | None:
        """Return the change; None where halving or doubling has come to its end."""
        if self.factor >= 1 if factor > 1 else self.factor <= LOWEST:
            return None
        self.factor *= factor
        self.changed = step
        return AdjustScale(
            layers=".*", factor=factor, of="gradients", reason=f"{why}; the factor is {self.factor:g} now"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor, "clean": self.clean, "changed": self.changed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.factor, self.clean, self.changed = state["factor"], state["clean"], state["changed"]
