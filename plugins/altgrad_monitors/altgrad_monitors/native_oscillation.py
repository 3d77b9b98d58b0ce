"""The loop of oscillation.c, called for all weights of a step at once.

What goes in is a table of integers, a row for each weight: the struct Weight of oscillation.c, whose fields
are all eight bytes wide.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from altgrad_core import native

_SOURCE = Path(__file__).with_name("oscillation.c")
_CODES = (torch.int8, torch.int16)

Rows = tuple[Tensor, Tensor, Tensor, Tensor]
"""Codes before and after the step, frequency, direction: rows of one length. The last two are written."""


@functools.cache
def _loops() -> ctypes.CDLL | None:
    """Return the compiled file with the types of its arguments declared; None where there is none."""
    loops = native.library(_SOURCE)
    if loops is not None:
        number, pointer, count = ctypes.c_float, ctypes.c_void_p, ctypes.c_int64
        loops.oscillations.argtypes = [count, pointer, number, number, number, pointer]
        loops.oscillations.restype = None
    return loops


def serves(rows: Rows) -> bool:
    """Whether the loop can take a weight: contiguous rows on a CPU, seen by nobody else, and compiled."""
    alike = all(row.is_cpu and row.is_contiguous() for row in rows) and rows[0].dtype in _CODES
    return alike and not native.recording() and _loops() is not None


def advanced(weights: Sequence[Rows], momentum: float, threshold: float) -> list[Tensor]:
    """Take a step of weights that it `serves`; return how many elements of each oscillate, 0-d int64."""
    loops, table = _loops(), torch.tensor([_row(rows) for rows in weights], dtype=torch.int64, device="cpu")
    found = torch.empty(len(weights), dtype=torch.int64, device="cpu")
    if loops is None:
        raise RuntimeError("there is no compiled loop; ask `serves` first")
    numbers = 1 - momentum, momentum, threshold
    loops.oscillations(len(weights), native.address(table), *numbers, native.address(found))
    return list(found.unbind())


def _row(rows: Rows) -> list[int]:
    return [*(row.data_ptr() for row in rows), rows[0].dtype == torch.int16, rows[0].numel()]
