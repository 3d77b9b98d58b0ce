"""What storage on a grid may be asked for: roundings, and how scales go on."""

from __future__ import annotations

import math

STORAGE_ROUNDINGS = ("nearest_even", "stochastic")
"""The roundings that leave nothing behind; an optimizer that lands on the grid by itself has these."""

COMPENSATED = ("error_feedback", "eco")
"""Rounding to nearest, with the residual given back; behind other optimizers only."""

SCALE_MODES = ("adaptive", "initial")


def refuse_bad_options(rounding: str, bound: float, scale_mode: str) -> None:
    """Raise ValueError on what grid storage cannot be."""
    if rounding not in (*STORAGE_ROUNDINGS, *COMPENSATED):
        names = ", ".join((*STORAGE_ROUNDINGS, *COMPENSATED))
        raise ValueError(f"storage rounding is one of {names}, not {rounding!r}")
    if scale_mode not in SCALE_MODES:
        raise ValueError(
            f"the scale mode of grid storage is one of {', '.join(SCALE_MODES)}, not {scale_mode!r}"
        )
    if not (math.isfinite(bound) and bound >= 0):
        raise ValueError(f"bound is a multiple of the initial rms, 0 or more, not {bound!r}")
