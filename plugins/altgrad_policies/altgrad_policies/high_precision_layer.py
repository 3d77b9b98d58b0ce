"""`high_precision_layer`: a layer whose activations keep having outliers gets a wide format.

The monitor `kurtosis` raises an alert where the excess kurtosis of a layer's inputs is above its own option
`alert`. A layer with an alert in `patience` checks in a row moves to the format `to`; it never moves back.
A check without an alert and without a value (NaN: no kurtosis, such as that of constant inputs) changes no
count.

What moves are the layer's weights: that is what a change of format is about. A layer whose inputs are
quantized too keeps the format of its inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from altgrad_core.hookspecs import Action, SwitchFormat
from altgrad_policies import HighPrecisionLayerOptions
from altgrad_policies.quantized_layers import (
    by_format,
    looked_up,
    named,
    of_layers,
    refuse_types,
    refuse_unwatched,
)

EXCESS, ALERT = "kurtosis/excess", "kurtosis/alert"


class HighPrecisionLayer:
    """Counts each layer's alerts; see the module's text.

    Attributes:
        every: steps between its looks: the metrics that it needs matter in these only.
    """

    def __init__(self, options: HighPrecisionLayerOptions) -> None:
        self.options = options
        self.every = options.every
        self.alerts: dict[str, int] = {}
        """Layer that has ever had a value to its checks in a row with an alert."""
        self._run: Any = None
        self._target: str | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        """The totals; from the start of a run on, those of each layer that may move."""
        layers = self._candidates() if self._run is not None else []
        return tuple(f"{metric}/{layer}" for layer in ("total", *layers) for metric in (EXCESS, ALERT))

    def start(self, run: Any) -> None:
        """Look up the format. Raises UsageError for an unknown one, and for a monitor that tells nothing."""
        self._run = run
        self._target = looked_up(run, self.options.to, "high_precision_layer: to")
        if run.step:
            return
        refuse_unwatched(run, "high_precision_layer", "kurtosis", self._candidates(), each=True)
        if not by_format(run):
            run.warn("high_precision_layer has no layer to move: no weights are quantized")

    def decide(self, step: int, metrics: Mapping[str, float]) -> Action | None:
        """Return SwitchFormat for the layers that have had enough alerts, or None."""
        if (step - 1) % self.every:
            return None
        candidates = self._candidates()
        excess = of_layers(EXCESS, candidates, metrics)
        if candidates and not self.alerts:
            refuse_types(EXCESS, candidates, metrics)
        for layer, value in excess.items():
            if metrics.get(f"{ALERT}/{layer}", 0.0) > 0:
                self.alerts[layer] = self.alerts.get(layer, 0) + 1
            elif math.isfinite(value):
                self.alerts[layer] = 0
        hot = [layer for layer in excess if self.alerts.get(layer, 0) >= self.options.patience]
        if not hot:
            return None
        self.alerts |= dict.fromkeys(hot, 0)
        numbers = ", ".join(f"{layer}: {excess[layer]:.3g}" for layer in hot)
        return SwitchFormat(
            layers=named(hot),
            to=self.options.to,
            reason=f"excess kurtosis of the activations above the alert in {self.options.patience} checks in "
            f"a row ({numbers})",
        )

    def _candidates(self) -> list[str]:
        """Return the quantized layers that do not have the format already."""
        formats = by_format(self._run)
        return [layer for name, layers in formats.items() if name != self._target for layer in layers]

    def state_dict(self) -> dict[str, Any]:
        return {"alerts": self.alerts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.alerts = dict(state["alerts"])
