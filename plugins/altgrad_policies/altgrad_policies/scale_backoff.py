"""`scale_backoff`: gradients that saturate get half the scale, before any format is changed.

A delayed or static scale can be too large for the gradients that come: they are cut at the format's end.
Where the share of those in the step before is above `threshold`, the scale of all gradient quantisers is
halved at once; after `clean_steps` steps in a row below, it is doubled, never above where it began.

A change is decided after the backward pass of its step, so that the next value to come in is still that of
the scale before: it is passed over, or every burst would be answered twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from altgrad_core.hookspecs import Action, AdjustScale
from altgrad_core.surgery import quantized_flows
from altgrad_policies import ScaleBackoffOptions

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
        self.just_changed = False

    def start(self, run: Any) -> None:
        flows = quantized_flows(run.model)
        if run.step == 0 and not any(name.endswith(".gradients") for name in flows):
            run.warn("scale_backoff has no scale to adjust: no gradients are quantised")

    def decide(self, step: int, metrics: Mapping[str, float]) -> Action | None:
        """Return AdjustScale by 1/2 or by 2, or None."""
        share = metrics.get(SATURATED, math.nan)
        if math.isnan(share):  # not defined in this step: neither clean nor saturated
            return None
        if self.just_changed:
            self.just_changed = False
            return None
        if share > self.options.threshold:
            self.clean = 0
            return self._adjusted(0.5, share) if self.factor > LOWEST else None
        self.clean += 1
        if self.clean < self.options.clean_steps:
            return None
        self.clean = 0
        return self._adjusted(2.0, share) if self.factor < 1 else None

    def _adjusted(self, factor: float, share: float) -> Action:
        self.factor *= factor
        self.just_changed = True
        why = (
            f"{share:.3g} of the gradient elements saturate, above {self.options.threshold:g}"
            if factor < 1
            else f"{self.options.clean_steps} steps in a row without saturation"
        )
        return AdjustScale(
            layers=".*", factor=factor, of="gradients", reason=f"{why}; the factor is {self.factor:g} now"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor, "clean": self.clean, "just_changed": self.just_changed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.factor, self.clean = state["factor"], state["clean"]
        self.just_changed = state["just_changed"]
