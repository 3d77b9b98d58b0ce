"""Fallback policies for AltGrad: nan_guard, emergency_shift, partition_clip, scale_backoff,
high_precision_layer, loss_spike.

This module is light: options and registration; it imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs

from altgrad_core.hookspecs import Component, hookimpl
from altgrad_core.options import above, at_least, between, option

STOP = "stop"
"""What a chain says instead of a format: end the run."""

CHAIN: Mapping[str, str] = {
    "E7M0": "E5M2",
    "E1M6": "E3M4",
    "E0M7": "E3M4",
    "E3M4": "E5M2",
    "E5M2": STOP,
}
"""Format to the one that takes over from it."""


@attrs.frozen(kw_only=True)
class NanGuardOptions:
    """Skip a step whose loss or gradient is not finite; stop after several in a row."""

    nan_patience: int = option(
        "consecutive non-finite losses that end the run", unit="steps", default=10, validator=at_least(1)
    )


def _ends(_: Any, field: Any, chain: Mapping[str, str]) -> None:
    """Attrs validator: from no format does the chain lead back to it."""
    for name in chain:
        passed = [name]
        while (following := chain.get(passed[-1])) is not None:
            passed.append(following)
            if passed.count(following) > 1:
                raise ValueError(f'the chain never ends: {" -> ".join(passed)}; let one of them be "{STOP}"')


@attrs.frozen(kw_only=True)
class EmergencyShiftOptions:
    """Move the layers of a format that does not train to the next format of a chain."""

    measure: Literal["descent", "ratio"] = option(
        "stall is 1 - descent/delivered (descent), or stall/stall_ratio, high in healthy runs too (ratio)",
        default="descent",
    )
    stall_threshold: float = option(
        "average stall above which a format is given up", default=0.5, validator=between(0, 1)
    )
    patience: int = option("steps to average the stall over", unit="steps", default=50, validator=at_least(1))
    warmup: int = option(
        "first steps whose stall is not looked at", unit="steps", default=20, validator=at_least(0)
    )
    schedule_floor: float = option(
        "share of the schedule's highest learning rate below which the stall is not looked at (descent)",
        default=0.5,
        validator=between(0, 1),
    )
    nan_patience: int = option(
        "consecutive non-finite losses that give the format up",
        unit="steps",
        default=3,
        validator=at_least(1),
    )
    chain: dict[str, str] = option(
        'format to the next one, to "none" (high precision) or to "stop"; a format without an entry stops; '
        "a table given here replaces the whole default",
        default=attrs.Factory(lambda: dict(CHAIN)),
        validator=_ends,
    )


@attrs.frozen(kw_only=True)
class PartitionClipOptions:
    """Clip the gradients to what the format's range allows, while many values overflow."""

    overflow_threshold: float = option(
        "share of overflowing elements from which on gradients are clipped",
        default=0.01,
        validator=between(0, 1),
    )
    base_clip: float = option("L2 norm to clip to, times f(format)", default=1.0, validator=above(0))
    factor: Literal["octaves", "max"] = option(
        "f(format): its range in octaves over that of E5M2, or its largest value over 57344",
        default="octaves",
    )
    flow: Literal["backward", "forward"] = option(
        "whose overflow, and whose format: gradients (backward), or weights and activations (forward)",
        default="backward",
    )


@attrs.frozen(kw_only=True)
class ScaleBackoffOptions:
    """Halve the scale of the gradients where they saturate; double it again when they no longer do."""

    threshold: float = option(
        "share of saturated gradient elements above which the scale is halved",
        default=1e-5,
        validator=between(0, 1),
    )
    clean_steps: int = option(
        "steps in a row without saturation after which the scale is doubled, up to where it began",
        unit="steps",
        default=1000,
        validator=at_least(1),
    )


@attrs.frozen(kw_only=True)
class HighPrecisionLayerOptions:
    """Give the weights of a layer with outliers in its activations a wide format."""

    patience: int = option(
        "checks in a row with an alert that move a layer", unit="checks", default=3, validator=at_least(1)
    )
    every: int = option("interval between checks", unit="steps", default=100, validator=at_least(1))
    to: str = option('the format to move to; "none": high precision', default="BF16")


@attrs.frozen(kw_only=True)
class LossSpikeOptions:
    """Halve the learning rate when the loss jumps."""

    factor: float = option(
        "multiple of its own moving average above which a loss is a spike", default=1.5, validator=above(1)
    )
    ema: float = option(
        "weight of the newest loss in the moving average", default=0.1, validator=between(0.001, 1)
    )
    warmup: int = option(
        "first steps, which only feed the average", unit="steps", default=20, validator=at_least(1)
    )
    cooldown: int = option(
        "steps after an answer without another", unit="steps", default=100, validator=at_least(1)
    )


@hookimpl
def altgrad_fallbacks() -> list[Component]:
    return [
        Component(
            name="nan_guard",
            summary="skip a non-finite step, stop after several in a row",
            options=NanGuardOptions,
            target="altgrad_policies.nan_guard:NanGuard",
        ),
        Component(
            name="emergency_shift",
            summary="move layers whose updates are lost, or whose loss is not finite, to the next format",
            options=EmergencyShiftOptions,
            target="altgrad_policies.emergency_shift:EmergencyShift",
        ),
        Component(
            name="partition_clip",
            summary="clip the gradients by the format's range while many values overflow",
            options=PartitionClipOptions,
            target="altgrad_policies.partition_clip:PartitionClip",
        ),
        Component(
            name="scale_backoff",
            summary="halve the scale of gradients that saturate, double it again after many clean steps",
            options=ScaleBackoffOptions,
            target="altgrad_policies.scale_backoff:ScaleBackoff",
        ),
        Component(
            name="high_precision_layer",
            summary="give layers with outliers in their activations a wide format",
            options=HighPrecisionLayerOptions,
            target="altgrad_policies.high_precision_layer:HighPrecisionLayer",
        ),
        Component(
            name="loss_spike",
            summary="halve the learning rate when the loss jumps above its moving average",
            options=LossSpikeOptions,
            target="altgrad_policies.loss_spike:LossSpike",
        ),
    ]
