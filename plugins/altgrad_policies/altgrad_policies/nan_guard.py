"""`nan_guard`: a step whose loss or gradient is not finite is skipped; `nan_patience` of them in a row stop
the run. The core keeps a checkpoint of the last finite state when the first one appears."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from altgrad_core.hookspecs import Action, SkipStep, Stop
from altgrad_policies import NanGuardOptions


class NanGuard:
    """Counts consecutive non-finite steps; see the module's text."""

    needs: tuple[str, ...] = ()

    def __init__(self, options: NanGuardOptions) -> None:
        self.patience = options.nan_patience
        self.consecutive = 0

    def decide(self, step: int, metrics: Mapping[str, float]) -> Action | None:
        """Return SkipStep, Stop, or None where loss and gradient are finite."""
        if metrics["train/loss_finite"] and metrics["train/gradient_finite"]:
            self.consecutive = 0
            return None
        self.consecutive += 1
        what, value = not_finite(metrics)
        if self.consecutive >= self.patience:
            return Stop(reason=f"the {what} was not finite ({value}) for {self.consecutive} steps in a row")
        return SkipStep(
            reason=f"the {what} is not finite ({value}), {self.consecutive} of {self.patience} in a row"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"consecutive": self.consecutive}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.consecutive = state["consecutive"]


def not_finite(metrics: Mapping[str, float]) -> tuple[str, float]:
    """Return which of loss and gradient is not finite, the loss if both are, and its value."""
    if metrics["train/loss_finite"]:
        return "gradient", metrics["train/gradient_norm"]
    return "loss", metrics["train/loss"]
