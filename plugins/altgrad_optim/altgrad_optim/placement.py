"""Where ManifoldAdamW puts the stiffness: the exponents (p, q) by name, pair or table."""

from __future__ import annotations

import math
from typing import Any

from altgrad_optim import PLACEMENTS


def exponents(placement: Any) -> tuple[float, float]:
    """Return (p, q) of a placement given by name, pair, table or object with p and q. Raises ValueError."""
    if isinstance(placement, str):
        if placement not in PLACEMENTS:
            raise ValueError(
                f"Invalid placement: {placement!r}; use one of {', '.join(PLACEMENTS)} or a pair (p, q)"
            )
        return PLACEMENTS[placement]
    if isinstance(placement, dict) and set(placement) <= {"p", "q"}:
        pair: Any = (placement.get("p", 0.0), placement.get("q", 0.0))
    else:
        pair = (placement.p, placement.q) if hasattr(placement, "q") else placement
    if not (
        isinstance(pair, tuple | list)
        and len(pair) == 2
        and all(isinstance(one, int | float) and math.isfinite(one) for one in pair)
    ):
        raise ValueError(f"Invalid placement: {placement!r}; a pair is (p, q), two numbers")
    return float(pair[0]), float(pair[1])
