"""Rounding by a table of values, whatever they are: what a format has that is nothing but its values.

The values, and one virtual value beyond each end, are cells: 0 below the lowest value, 1 to n the values,
n + 1 above the highest. Every mode sends x to the cell that a search in its thresholds finds (`value_table`).
On a CPU a loop in C looks the cell up instead, in one pass (`native_table`): the same cells, sooner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from altgrad_core import native, native_table
from altgrad_core.elementwise import wide_codes
from altgrad_core.value_table import round_up_to, thresholds

_NO_SLOTS = torch.empty(0, dtype=torch.int32, device="cpu")


class TableRounding:
    """The arithmetic of `Format` by its values: (n,) float32, strictly increasing, on the CPU.

    x is float32 or float64; every method returns a new tensor.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.zero = int(torch.searchsorted(values, 0.0))
        self._cache: dict[Any, Tensor] = {}

    def quantize(self, x: Tensor, rounding: str, overflow: str, uniform: Tensor | None) -> Tensor:
        """Round x, keeping its dtype; `uniform` is given exactly when `rounding` is stochastic."""
        fused = self.fake_quantize(x, None, rounding, overflow, None, None)
        if fused is not None:
            return fused
        cell = self._cell(x, rounding) if uniform is None else self._stochastic_cell(x, uniform)
        return self._of_cells(cell, overflow, x)

    def fake_quantize(
        self,
        x: Tensor,
        scale: Tensor | None,
        rounding: str,
        overflow: str,
        keys: Tensor | None,
        limit: Tensor | None,
    ) -> Tensor | None:
        """Round x·scale, limit it and divide by the scale, in C; None where there is no loop for it."""
        if (
            rounding == "nearest_even"
            and native.one_a_row(scale, x)
            and len(slots := self._slots(x, rounding))
        ):
            return native_table.quantize(x, scale, limit, slots, self._outputs(overflow, x))
        if (
            keys is not None
            and scale is None
            and limit is None
            and len(slots := self._slots(x, "toward_zero"))
        ):
            tables = self._cells(), self._gaps(x.device)
            cell = native_table.stochastic_cells(x, slots, len(self.values) + 1, *tables, keys)
            return self._of_cells(cell, overflow, x)
        return None

    def spacing(self, x: Tensor) -> Tensor:
        """Return the gap that holds |x|, the last one at and beyond the end."""
        cell = self._cell(x, "toward_zero").clamp_(1, len(self.values))
        return torch.where(x.isnan(), x, self._outward_gap(x, cell).to(x.dtype))

    def rung(self, x: Tensor) -> Tensor:
        """Return int32 rungs; NaN may give anything."""
        return self._cell(x, "nearest_even").clamp_(1, len(self.values)).sub_(1 + self.zero)

    def rung_range(self) -> tuple[int, int]:
        return -self.zero, len(self.values) - 1 - self.zero

    def from_rung(self, rungs: Tensor) -> Tensor:
        """Return float32 values of int32 rungs within `rung_range`."""
        return self._outputs("saturate", rungs, torch.float32)[rungs + (1 + self.zero)]

    def encode(self, x: Tensor) -> Tensor:
        """Return the indices of the nearest values, int32."""
        return self.rung(x).add_(self.zero)

    def decode(self, codes: Tensor) -> Tensor:
        """Return float32 values of indices of any integer type, NaN for those without a value."""
        if native_table.decodes(codes):
            return native_table.decode(codes, self.values)
        codes = wide_codes(codes)
        valid = (codes >= 0) & (codes < len(self.values))
        table = self._outputs("saturate", codes, torch.float32)
        return torch.where(valid, table[codes.clamp(0, len(self.values) - 1) + 1], torch.nan)

    def block_loops(self) -> native.BlockLoops | None:
        """Return the loops in C over blocks; None where values lie too close, or without a compiler."""
        like = torch.empty(native.FEWEST_ELEMENTS, dtype=torch.float32, device="cpu")
        nearest, inward = self._slots(like, "nearest_even"), self._slots(like, "toward_zero")
        if not (len(nearest) and len(inward)):
            return None
        cells = self._cells(), self._gaps(like.device)
        outputs = self._outputs("saturate", like)
        return native_table.block_loops(nearest, inward, outputs, *cells, self.zero)

    def _of_cells(self, cell: Tensor, overflow: str, x: Tensor) -> Tensor:
        """Return what the cells of x turn into: NaN where x is, a zero with x's sign."""
        return torch.where(x.isnan(), x, self._outputs(overflow, x)[cell].copysign_(x))

    def _cell(self, x: Tensor, rounding: str) -> Tensor:
        """Return the int32 cell that x rounds to."""
        if len(slots := self._slots(x, rounding)):
            return native_table.cells(x, slots, len(self.values) + 1)
        return torch.bucketize(x.contiguous(), self._thresholds(x, rounding), out_int32=True, right=True)

    def _thresholds(self, x: Tensor, rounding: str) -> Tensor:
        """Return the thresholds between the cells, in x's dtype and on its device."""
        key = (rounding, x.dtype, x.device)
        if key not in self._cache:
            exact = thresholds(self._cells(), self.zero, rounding)
            self._cache[key] = round_up_to(x.dtype, exact).to(x.device)
        return self._cache[key]

    def _slots(self, x: Tensor, rounding: str) -> Tensor:
        """Return the slots for the loop in C; empty where it does not serve x, or cannot serve the table."""
        if not native_table.serves(x):
            return _NO_SLOTS
        key = ("slots", rounding)
        if key not in self._cache:
            self._cache[key] = native_table.slots(self._thresholds(x, rounding))
        return self._cache[key]

    def _stochastic_cell(self, x: Tensor, uniform: Tensor) -> Tensor:
        """Return the cell toward zero, or its outer neighbor where r·gap < |x| - lo.

        In float64, where both sides are exact for gaps of up to 29 bits; an on-grid x never moves.
        """
        cell = self._cell(x, "toward_zero")
        above_lo = (x.double() - self._cells(x.device)[cell]).abs_()
        outward = uniform.double() * self._outward_gap(x, cell) < above_lo
        return torch.where(x < 0, cell - outward.int(), cell + outward.int())

    def _outward_gap(self, x: Tensor, cell: Tensor) -> Tensor:
        """Return the float64 gap from the cell's value away from zero, on x's side; inf past the ends."""
        return self._gaps(x.device)[torch.where(x < 0, cell, cell + 1)]

    def _gaps(self, device: torch.device) -> Tensor:
        """Return the float64 gaps between cells, [c] below cell c and [c + 1] above it; inf past the ends."""
        key = ("gaps", device)
        if key not in self._cache:
            self._cache[key] = torch.nn.functional.pad(self._cells(device).diff(), (1, 1), value=torch.inf)
        return self._cache[key]

    def _cells(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the n + 2 cells' values in float64, the outermost two virtual."""
        key = ("cells", torch.device(device))
        if key not in self._cache:
            table = self.values.double()
            below, above = 2 * table[:1] - table[1:2], 2 * table[-1:] - table[-2:-1]
            self._cache[key] = torch.cat((below, table, above)).to(device)
        return self._cache[key]

    def _outputs(self, overflow: str, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return what each cell turns into, with both outer cells saturated or NaN."""
        key = (overflow, dtype or like.dtype, like.device)
        if key not in self._cache:
            ends = self.values[[0, -1]] if overflow == "saturate" else self.values.new_full((2,), torch.nan)
            outputs = torch.cat((ends[:1], self.values, ends[1:]))
            self._cache[key] = outputs.to(dtype=key[1], device=key[2])
        return self._cache[key]
