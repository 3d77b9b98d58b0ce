"""`loss_spike`: a loss far above its own moving average halves the learning rate, once per cooldown.

The average is of the losses before this one; the spike itself then enters it, so that a loss that stays high
ends being a spike. Losses that are not finite are left to `nan_guard`. The learning rate stays halved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from altgrad_core.hookspecs import Action, ScaleLearningRate
from altgrad_policies import LossSpikeOptions

HALF = 0.5
"""What a spike multiplies the learning rate by."""


class LossSpike:
    """Keeps the moving average; see the module's text."""

    needs: tuple[str, ...] = ()

    def __init__(self, options: LossSpikeOptions) -> None:
        self.options = options
        self.average: float | None = None
        self.last: int | None = None
        """The step of the last answer."""

    def decide(self, step: int, metrics: Mapping[str, float]) -> Action | None:
        """Return ScaleLearningRate(0.5) at a spike, else None."""
        if not metrics["train/loss_finite"]:
            return None
        loss, before, weight = metrics["train/loss"], self.average, self.options.ema
        self.average = loss if before is None else (1 - weight) * before + weight * loss
        resting = self.last is not None and step - self.last < self.options.cooldown
        if before is None or step <= self.options.warmup or resting or loss <= self.options.factor * before:
            return None
        self.last = step
        return ScaleLearningRate(
            factor=HALF,
            reason=f"the loss {loss:.4g} is above {self.options.factor:g} times its average {before:.4g}",
        )

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average, "last": self.last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.average, self.last = state["average"], state["last"]
