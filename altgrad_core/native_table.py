"""The loops of table.c, called on tensors: what a format known by its values does on a CPU, in one pass."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from altgrad_core import native

_SOURCE = Path(__file__).with_name("table.c")
_SLOTS = 2**16
_LOWER_BITS = 16  # of a float32 pattern: those that do not name its slot


@functools.cache
def _loops() -> ctypes.CDLL | None:
    """Return the compiled file with the types of its arguments declared; None where there is none."""
    loops = native.library(_SOURCE)
    if loops is not None:
        pointer, count, number, word = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int32
        loops.cells.argtypes = [pointer, pointer, count, pointer, word]
        loops.stochastic_cells.argtypes = [*loops.cells.argtypes, pointer, pointer, pointer]
        loops.quantize.argtypes = [pointer, pointer, count, count, pointer, number, number, pointer, pointer]
        loops.decode.argtypes = [pointer, pointer, count, pointer, word]
    return loops


def serves(x: Tensor) -> bool:
    """Whether there is a loop for this tensor."""
    return native.serves(x) and _loops() is not None


def decodes(codes: Tensor) -> bool:
    """Whether there is a loop for these codes."""
    return codes.dtype == torch.uint8 and native.plain(codes) and _loops() is not None


def slots(thresholds: Tensor) -> Tensor:
    """Return the slots of sorted float32 thresholds, (65536, 2) int32: a threshold's bits, and a cell.

    Empty where some slot would hold two thresholds: values closer than 2^-7 of themselves.
    """
    patterns = torch.arange(_SLOTS, dtype=torch.int32, device="cpu") << _LOWER_BITS
    ends = torch.stack((patterns, patterns | (2**_LOWER_BITS - 1))).view(torch.float32)
    infinities = torch.where(
        patterns < 0, -math.inf, math.inf
    )  # share their slots with NaN, which is not read
    ends = torch.where(ends.isnan(), infinities, ends)
    lowest, highest = ends.amin(dim=0), ends.amax(dim=0)
    first, last = (torch.bucketize(end, thresholds, out_int32=True, right=True) for end in (lowest, highest))
    if bool((last - first > 1).any()):
        return torch.empty(0, dtype=torch.int32, device="cpu")
    inside = thresholds[first.clamp(max=len(thresholds) - 1)]
    threshold = torch.where(last > first, inside, math.nan)  # NaN: no number reaches it
    return torch.stack((threshold.view(torch.int32), first), dim=1).contiguous()


def cells(x: Tensor, slots: Tensor, last: int) -> Tensor:
    """Return the int32 cell of each element; `last` for NaN."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.int32, device="cpu")
    native.in_use(_loops()).cells(
        native.address(x), native.address(out), x.numel(), native.address(slots), last
    )
    return out


def stochastic_cells(
    x: Tensor, slots: Tensor, last: int, values: Tensor, gaps: Tensor, keys: Tensor
) -> Tensor:
    """Return the int32 cells of stochastic rounding by the stream of `keys`; see table.c."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.int32, device="cpu")
    addresses = [native.address(one) for one in (values, gaps, keys)]
    cells_of = native.address(x), native.address(out), x.numel(), native.address(slots), last
    native.in_use(_loops()).stochastic_cells(*cells_of, *addresses)
    return out


def quantize(x: Tensor, scale: Tensor | None, limit: Tensor | None, slots: Tensor, outputs: Tensor) -> Tensor:
    """Return x rounded as `Format.fake_quantize` says; scale: None, 0-d, or (..., 1) for rows of x."""
    x = x.contiguous()
    out = torch.empty_like(x)
    scales = torch.ones(1, dtype=torch.float32, device="cpu") if scale is None else scale.contiguous()
    low, high = (-math.inf, math.inf) if limit is None else limit.tolist()
    sizes = scales.numel(), x.numel() // scales.numel()
    addresses = [native.address(one) for one in (scales, slots, outputs)]
    native.in_use(_loops()).quantize(
        native.address(x), native.address(out), *sizes, addresses[0], low, high, *addresses[1:]
    )
    return out


def decode(codes: Tensor, values: Tensor) -> Tensor:
    """Return the values of uint8 codes, NaN for those beyond."""
    codes = codes.contiguous()
    out = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
    pointers = native.address(codes), native.address(out)
    native.in_use(_loops()).decode(*pointers, codes.numel(), native.address(values), len(values))
    return out


def block_loops(
    nearest: Tensor, inward: Tensor, outputs: Tensor, values: Tensor, gaps: Tensor, zero: int
) -> native.BlockLoops | None:
    """Return the loops over blocks; None without a compiler.

    nearest, inward: the slots of rounding to nearest even and toward zero. outputs: of the cells, saturated.
    values, gaps: of the cells, float64. zero: number of values below zero.
    """
    loops = _loops()
    if loops is None:
        return None
    counts = torch.tensor([len(values) - 2, zero], dtype=torch.int32, device="cpu")
    tables = nearest, inward, outputs, values, gaps, counts
    context = torch.tensor([table.data_ptr() for table in tables], dtype=torch.int64, device="cpu")
    return native.block_loops(loops, context, owner=tables)
