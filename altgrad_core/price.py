"""What an hour of this machine costs, as its user says."""

from __future__ import annotations

import math
import os

from altgrad_core.registry import UsageError

PRICE_VARIABLE = "ALTGRAD_PRICE_PER_HOUR"
"""Environment variable: what an hour of this machine costs, in any currency; unset: no cost is stated."""


def cost(seconds: float) -> str:
    """Return `, cost 0.12` at the price of $ALTGRAD_PRICE_PER_HOUR; empty where none is set."""
    price = price_per_hour()
    return f", cost {price * seconds / 3600:.2f}" if price else ""


def price_per_hour() -> float:
    """Return the price of $ALTGRAD_PRICE_PER_HOUR, 0 where none is set. Raises UsageError for no number."""
    given = os.environ.get(PRICE_VARIABLE) or "0"
    try:
        price = float(given)
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise UsageError(f"${PRICE_VARIABLE} is {given!r}; set it to a number, 0 or more, or unset it")
    return price
