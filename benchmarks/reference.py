"""The exact rounding of float32 values to a format, and values worth trying.

This knows none of AltGrad's arithmetic. It lists a format's values by the formula, in the order of their
codes, and searches that list in float64, which holds every float32 and every midpoint exactly: the nearest
value, a tie to the even code, saturation beyond the largest value, NaN for NaN, the sign of x kept.
"""

from __future__ import annotations

import math

import numpy as np

from altgrad_formats.layout import Layout

CLASSES = ("normal", "subnormal", "tie", "near tie", "overflow", "infinity", "NaN", "signed zero")
NANS = (0x7FC00000, 0xFFC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001, 0x7FC12345)
FLOAT32_LARGEST = float(np.finfo(np.float32).max)
FLOAT32_SMALLEST = 2.0**-149


def magnitudes(layout: Layout) -> np.ndarray:
    """Return the finite magnitudes in the order of their codes, which is ascending: float64, exact."""
    codes = 2 ** (layout.exponent_bits + layout.mantissa_bits)
    reserved = {"finite": 0, "fn": 1, "ieee": 2**layout.mantissa_bits}[layout.specials]
    return np.array([_magnitude(layout, code) for code in range(codes - reserved)])


def _magnitude(layout: Layout, code: int) -> float:
    exponent, mantissa = divmod(code, 2**layout.mantissa_bits)
    if layout.exponent_bits == 0:
        return math.ldexp(mantissa, -layout.mantissa_bits - layout.bias)
    hidden = 2**layout.mantissa_bits if exponent > 0 else 0
    return math.ldexp(hidden + mantissa, max(exponent, 1) - layout.bias - layout.mantissa_bits)


def exact(x: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return float32 x rounded to the nearest of ±grid, a tie to the even index, saturating."""
    with np.errstate(invalid="ignore"):  # of signaling NaNs
        magnitude = np.abs(x.astype(np.float64))
    low = np.clip(np.searchsorted(grid, magnitude, side="right") - 1, 0, len(grid) - 1)
    high = np.minimum(low + 1, len(grid) - 1)
    middle = (grid[low] + grid[high]) / 2  # exact: a value has at most 16 bits, its neighbor is near
    outward = (magnitude > middle) | ((magnitude == middle) & (low % 2 == 1))
    rounded = grid[np.where(outward, high, low)].astype(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), np.copysign(rounded, x))


# --- the values tried ---------------------------------------------------------------------------------


def inputs(layout: Layout, count: int) -> dict[str, np.ndarray]:
    """Return float32 values by class, about `count` in each large one, with both signs."""
    random = np.random.default_rng(0)
    grid = magnitudes(layout)
    normal_from = 0.0 if layout.exponent_bits == 0 else math.ldexp(1.0, 1 - layout.bias)
    middles = ((grid[:-1] + grid[1:]) / 2).astype(np.float32)
    positive = {
        "normal": _within(random, max(normal_from, grid[1]), grid[-1], count, grid),
        "subnormal": _within(random, grid[1] / 2, normal_from, count, grid),
        "tie": middles,
        "near tie": np.concatenate([_moved(middles, ulps) for ulps in (-3, -1, 1, 3)]),
        "overflow": _beyond(random, grid[-1], count),
        "infinity": np.array([np.inf], np.float32),
    }
    classes = {name: np.concatenate([values, -values]) for name, values in positive.items()}
    classes["NaN"] = np.array(NANS, np.uint32).view(np.float32)
    tiny = np.exp2(random.uniform(math.log2(FLOAT32_SMALLEST), math.log2(grid[1] / 2), count // 2))
    rounding_to_zero = np.append(tiny.clip(FLOAT32_SMALLEST), grid[1] / 2)
    zeros = np.concatenate([np.zeros(count // 2), rounding_to_zero]).astype(np.float32)
    classes["signed zero"] = np.concatenate([zeros, -zeros])
    return classes


def _within(random: np.random.Generator, low: float, high: float, count: int, grid: np.ndarray) -> np.ndarray:
    """Return values in [low, high]: the grid's own, and random ones, as many in each binade or evenly."""
    if low >= high:
        return np.empty(0, np.float32)
    by_binade = np.exp2(random.uniform(math.log2(low), math.log2(high), count // 4))
    evenly = random.uniform(low, high, count // 4)
    own = grid[(grid >= low) & (grid <= high)]
    return np.concatenate([by_binade.clip(low, high), evenly, own]).astype(np.float32)


def _beyond(random: np.random.Generator, largest: float, count: int) -> np.ndarray:
    """Return finite values above the largest: half within the next two binades."""
    top = FLOAT32_LARGEST
    near = random.uniform(largest, min(4 * largest, top), count // 4)
    far = np.exp2(random.uniform(math.log2(largest), math.log2(top), count // 4)).clip(largest, top)
    values = np.concatenate([near, far]).astype(np.float32)
    return values[values > largest]


def _moved(values: np.ndarray, ulps: int) -> np.ndarray:
    """Return positive float32 values moved by so many units in the last place."""
    return (values.view(np.int32) + np.int32(ulps)).view(np.float32)
