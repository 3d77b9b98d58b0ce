"""Fallback policies for AltGrad: nan_guard.

This module is light: options and registration; policies need no torch.
"""

from __future__ import annotations

import attrs

from altgrad_core.hookspecs import Component, hookimpl
from altgrad_core.options import at_least, option


@attrs.frozen(kw_only=True)
class NanGuardOptions:
    """Skip a step whose loss or gradient is not finite; stop after several in a row."""

    nan_patience: int = option(
        "consecutive non-finite losses that end the run", unit="steps", default=10, validator=at_least(1)
    )


@hookimpl
def altgrad_fallbacks() -> list[Component]:
    return [
        Component(
            name="nan_guard",
            summary="skip a non-finite step, stop after several in a row",
            options=NanGuardOptions,
            target="altgrad_policies.nan_guard:NanGuard",
        )
    ]
