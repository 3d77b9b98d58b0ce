"""What rounding does at the ends of a format, counted where it happens from what went in and what came out.

Of x, rounded to q under the scale s, are counted

    overflow     elements whose x*s rounds past an end of the format (or past a bound on the weights), with
                 the values going on beyond, each a last gap from the next: they saturate, or become inf or
                 NaN. It is what `clip_gradient` gives no gradient; infinities overflow, NaN does not. Under
                 stochastic rounding it is whatever lies past the end itself: there it is not unbiased.
    underflow    elements that are not zero and became zero
    non-finite   elements that are NaN or infinite before they are rounded

and, over the finite elements, the largest |x| and |q| and the smallest non-zero |q| are kept.

A `RangeTable` has the counters of all places of a run as two tensors on its device, one row for each place;
a `RangeCounts` is one of the rows, and hangs on the quantizer that counts in it. A quantizer without one,
which is the usual case, counts nothing and pays for nothing. The counters begin anew with each step that is
counted, and add up over its micro-batches: `held_weights`, which is told whether it is around a training
step, begins it. Counting reads tensors and writes counters: nothing else changes, and nothing synchronizes.
On a CPU one pass of a loop in C (range_counts.c) does it; elsewhere one fused kernel.
"""

from __future__ import annotations

import ctypes
import functools
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from altgrad_core import native
from altgrad_core.elementwise import wide
from altgrad_core.format import Format
from altgrad_core.kernels import flat, kernel

ELEMENTS, OVERFLOW, UNDERFLOW, NONFINITE = range(4)
"""Columns of `RangeTable.totals`."""

AMAX, LARGEST, SMALLEST = range(3)
"""Columns of `RangeTable.ends`."""

_NOTHING_SEEN = (0.0, 0.0, math.inf)
_SOURCE = Path(__file__).with_name("range_counts.c")


class RangeTable:
    """The counters of a run's places.

    step: returns the index of the step that is being taken. due: whether a step is to be counted.

    Attributes:
        on: whether the step that is being taken is counted.
        index: the step that the counters are of; 0 for none.
        totals: (places, 4) int64: elements, overflow, underflow, non-finite.
        seconds: what counting has taken on the host since somebody set it to 0.
        ends: (places, 3) float32: largest |x|, largest |q|, smallest non-zero |q| (inf where there is none).
    """

    def __init__(
        self, places: int, device: torch.device, step: Callable[[], int], due: Callable[[int], bool]
    ) -> None:
        self._step, self._due = step, due
        self.on, self.index, self.seconds = False, 0, 0.0
        self.totals = torch.zeros((places, 4), dtype=torch.int64, device=device)
        self._nothing = torch.tensor([_NOTHING_SEEN] * places, device=device)
        self.ends = self._nothing.clone()

    def begin(self) -> bool:
        """Begin a step, once however often it is called, and return whether the step is counted."""
        index = self._step()
        if index != self.index:
            self.index, self.on = index, self._due(index)
            if self.on:
                self.totals.zero_()
                self.ends.copy_(self._nothing)
        return self.on


class RangeCounts:
    """One place's row of counters.

    Attributes:
        index: the last step in which something was counted here; 0 for none.
    """

    def __init__(self, table: RangeTable, row: int) -> None:
        self.table, self.index = table, 0
        self._totals, self._ends = table.totals[row], table.ends[row]
        self._of: tuple[Format, str] | None = None
        self._kept: dict[torch.dtype, Tensor] = {}

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        """Make None of a copy: what counts for one run does not for another."""
        return _nobody, ()

    @property
    def on(self) -> bool:
        """Whether the step that is being taken is counted."""
        return self.table.on

    def begin(self, format: Format, rounding: str) -> None:
        """Begin a step in which tensors are rounded to the whole of a format."""
        if not self.table.begin():
            return
        self.index = self.table.index
        if not (self._of and self._of[0] is format and self._of[1] == rounding):
            ends = format.values[[0, -1]].to(self._totals.device)
            self._kept = {
                dtype: last_kept(format, ends, rounding, dtype) for dtype in (torch.float32, torch.float64)
            }
            self._of = format, rounding

    @torch.no_grad()
    def add(self, x: Tensor, q: Tensor, scale: Tensor, kept: Tensor | None = None) -> None:
        """Count what rounding x to q under a scale did, if this step is counted.

        scale: broadcasts against x. kept: the numbers that `last_kept` returns; None: those of the format.
        """
        if not self.on or not x.numel() or _transformed():
            return
        if torch.compiler.is_compiling():
            self._add(x, q, scale, kept)
        else:
            begun = time.perf_counter()
            self._add(x, q, scale, kept)
            self.table.seconds += time.perf_counter() - begun

    def _add(self, x: Tensor, q: Tensor, scale: Tensor, kept: Tensor | None) -> None:
        x, q = wide(x).detach(), wide(q).detach()
        kept = self._kept[x.dtype] if kept is None else kept
        if not _count_in_c(x, q, scale, kept, self._totals, self._ends):
            if x.is_cuda and not scale.dim():
                self.add_found(x.numel(), *_fused(flat(x), flat(q), scale, kept))
            else:
                self.add_found(x.numel(), *_seen(x, q, scale, kept))

    def add_found(self, elements: int, counts: Tensor, ends: Tensor) -> None:
        """Add what somebody else counted: (3,) overflow, underflow, non-finite; (3,) extremes."""
        self._totals[ELEMENTS].add_(elements)
        self._totals[OVERFLOW:].add_(counts)
        both = torch.stack((self._ends, ends))
        self._ends[:SMALLEST].copy_(both[:, :SMALLEST].amax(dim=0))
        self._ends[SMALLEST:].copy_(both[:, SMALLEST:].amin(dim=0))


def _nobody() -> None:
    """Return what a copy of counters is."""


def last_kept(format: Format, ends: Tensor, rounding: str, dtype: torch.dtype) -> Tensor:
    """Return the lowest and the largest number of a dtype that round to within two grid values.

    As if the grid went on beyond them: what is further out overflows. Under stochastic rounding, the two
    values themselves.

    ends: (..., 2), on the grid, in the format's own units. Exact: no number is on the wrong side.
    """
    end = ends.double()
    outward = torch.arange(-1, 2, 2, dtype=torch.float64, device=ends.device)  # made there: no transfer
    gap = format.spacing(end) * outward
    if rounding in ("nearest_even", "nearest_away"):
        edge = end + gap / 2
        inside = format.rung(end) % 2 == 0 if rounding == "nearest_even" else torch.zeros_like(end).bool()
    else:
        inside = torch.where(outward < 0, *_all_beyond_overflows(rounding)).expand(end.shape)
        edge = torch.where(inside, end, end + gap)
    found = edge.to(dtype)
    past = (found.double() - edge) * outward > 0
    return torch.where(past | ((found == edge) & ~inside), found.nextafter(torch.zeros_like(found)), found)


def _all_beyond_overflows(rounding: str) -> tuple[bool, bool]:
    """Return whether all that is past the lowest, and the largest, value overflows: it is not cut inward."""
    return rounding in ("stochastic", "down"), rounding in ("stochastic", "up")


def _seen(x: Tensor, q: Tensor, scale: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return overflow, underflow, non-finite, (3,) int64; and the three extremes, (3,) float32."""
    scaled = x * scale
    finite, size = x.isfinite(), q.abs()
    counts = torch.stack(
        (
            ((scaled > kept[1]) | (scaled < kept[0])).sum(),
            ((q == 0) & (x != 0)).sum(),
            (~finite).sum(),
        )
    )
    used = (size > 0) & size.isfinite()
    ends = torch.stack(
        (
            torch.where(finite, x.abs(), 0.0).amax(),
            torch.where(used, size, 0.0).amax(),
            torch.where(used, size, math.inf).amin(),
        )
    )
    return counts, ends.float()


_fused = kernel(_seen)


def _count_in_c(x: Tensor, q: Tensor, scale: Tensor, kept: Tensor, totals: Tensor, ends: Tensor) -> bool:
    """Count in one pass on a CPU, and return whether there was a loop for such tensors."""
    each = x.dim() > 0 and scale.shape == x.shape
    if not (native.serves(x) and (each or native.one_a_row(scale, x))) or (loops := _loops()) is None:
        return False
    x, q, scale = x.contiguous(), q.contiguous(), scale.contiguous()
    if not native.readable(x, q, scale, kept, ends):
        return False
    rows = 1 if each else scale.numel()
    tensors, counters = map(native.address, (x, q)), map(native.address, (kept, totals, ends))
    loops.count_ranges(*tensors, rows, x.numel() // rows, native.address(scale), each, *counters)
    return True


def _transformed() -> bool:
    """Whether a transform of torch.func is at work: counters outside of it cannot be written."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


@functools.cache
def _loops() -> ctypes.CDLL | None:
    """Return the compiled file with the types of its arguments declared; None where there is none."""
    loops = native.library(_SOURCE)
    if loops is not None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        loops.count_ranges.argtypes = [
            *(pointer, pointer, count, count, pointer, ctypes.c_int32),
            *(pointer, pointer, pointer),
        ]
        loops.count_ranges.restype = None
    return loops
