"""Monitors for AltGrad: flip, stall, descent.

This module is light: options and registration; the monitors themselves import torch.
"""

from __future__ import annotations

from typing import Literal

import attrs

from altgrad_core.hookspecs import Component, hookimpl
from altgrad_core.options import at_least, option, regexes


@attrs.frozen(kw_only=True)
class MonitorOptions:
    """What every monitor can be told."""

    every: int = option("interval between observations", unit="steps", default=1, validator=at_least(1))
    layers: str = option(
        "regex over full module paths: the layers to observe", default=".*", validator=regexes
    )
    per: Literal["layer", "type"] = option(
        "one metric for each layer, or for each type of layer: attention, attention_output, mlp, "
        "classifier, embedding, other",
        default="layer",
    )


@hookimpl
def altgrad_monitors() -> list[Component]:
    return [
        Component(
            name="flip",
            summary="codes that changed in a step, and elements that had a gradient",
            options=MonitorOptions,
            target="altgrad_monitors.flip:Flip",
        ),
        Component(
            name="stall",
            summary="share of updates that changed no code, beside what chance predicts",
            options=MonitorOptions,
            target="altgrad_monitors.stall:Stall",
        ),
        Component(
            name="descent",
            summary="how much of the intended update arrives in the weights",
            options=MonitorOptions,
            target="altgrad_monitors.descent:Descent",
        ),
    ]
