"""The loops of stiffness.c, for optimizers that work on blocks of weights on a CPU."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import torch

from altgrad_core import native
from altgrad_core.format import Format

_SOURCE = Path(__file__).with_name("stiffness.c")


@functools.cache
def _loops() -> ctypes.CDLL | None:
    return native.library(_SOURCE)


@functools.lru_cache(maxsize=64)
def loop(formula: str, format: Format) -> native.SpacingLoop | None:
    """Return the loop of `ideal` or `smooth` for a format; None without a compiler or a mantissa width."""
    mantissa_bits = getattr(getattr(format, "layout", None), "mantissa_bits", None)
    loops = None if mantissa_bits is None else _loops()
    if loops is None:
        return None
    ulp = 2.0**-mantissa_bits
    facts = torch.tensor([ulp, math.log(2) * ulp, format.smallest], dtype=torch.float32, device="cpu")
    return native.SpacingLoop(function=native.entry(loops, formula), context=facts.data_ptr(), owner=facts)
