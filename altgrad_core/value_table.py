"""Which tables of values are formats, and the thresholds at which a table rounds.

Put one virtual value beyond each end, at the last gap's distance: n values become n + 2 cells. In every
deterministic mode x belongs to a cell or to the next, decided at one threshold between the two: the
midpoint, or the upper value, or the number just above the lower one. "x rounds up" is `x >= threshold`
exactly, ties included, if the threshold is the smallest float with that property; midpoints that float64
cannot hold are no exception. So rounding is one binary search.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

FEWEST_BITS, MOST_BITS = 3, 16


def checked_table(name: str, bits: int, values: Sequence[float] | Tensor | np.ndarray) -> Tensor:
    """Return the table as float32, or raise ValueError with what is wrong with it."""
    table = torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
    if table.ndim != 1 or len(table) < 2:
        raise ValueError(f"format {name!r}: values has shape {tuple(table.shape)}; it is one row of numbers")
    if len(table) > 2**bits:
        raise ValueError(f"format {name!r}: {len(table)} values; {bits} bits hold at most {2**bits}")
    if not bool(table.isfinite().all()):
        raise ValueError(f"format {name!r}: values holds NaN or inf; list the finite values only")
    falls = (table.diff() <= 0).nonzero()
    if len(falls):
        at = int(falls[0])
        raise ValueError(
            f"format {name!r}: values must increase strictly, but {float(table[at + 1])!r} follows"
            f" {float(table[at])!r} at index {at + 1}"
        )
    inexact = table[table.float().double() != table]
    if len(inexact):
        raise ValueError(
            f"format {name!r}: {float(inexact[0])!r} is not exactly representable in float32; "
            "round it yourself: values=torch.tensor(values, dtype=torch.float32)"
        )
    if not bool((table == 0).any()):
        raise ValueError(f"format {name!r}: values must contain 0; add 0.0")
    if table[-1] <= 0:
        raise ValueError(f"format {name!r}: values must contain a positive number, which scaling aims at")
    return table.float() + 0.0  # turns a -0.0 into 0.0


def thresholds(cells: Tensor, zero: int, rounding: str) -> Tensor:
    """Return the n + 1 float64 thresholds t between n + 2 cells: x goes to the upper one where x >= t."""
    lower, upper = cells[:-1], cells[1:]
    rungs = torch.arange(len(lower), device="cpu") - 1 - zero  # the lower cell's
    just_above_lower = _next_up(lower)
    if rounding in ("nearest_even", "nearest_away"):
        tie_goes_up = rungs % 2 == 1 if rounding == "nearest_even" else rungs >= 0
        near, missing = midpoints(lower, upper)
        return torch.where((missing > 0) | ((missing == 0) & ~tie_goes_up), _next_up(near), near)
    if rounding == "up":
        found = just_above_lower.clone()
    elif rounding == "down":
        found = upper.clone()
    else:
        found = torch.where(rungs >= 0, upper, just_above_lower)
    if rounding != "up":
        found[-1] = torch.inf  # only inf itself is past an end that x is rounded back to
    if rounding != "down":
        found[0] = torch.finfo(torch.float64).min
    return found


def midpoints(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Return (nearest float64, what is missing to the exact midpoint), by Knuth's TwoSum."""
    a, b = lower / 2, upper / 2
    near = a + b
    virtual_b = near - a
    return near, (a - (near - virtual_b)) + (b - virtual_b)


def _next_up(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def round_up_to(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Return the smallest number of `dtype` that is at least x (float64)."""
    near = x.to(dtype)
    return torch.where(near.double() < x, _next_up(near), near)
