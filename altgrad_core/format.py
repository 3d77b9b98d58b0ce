"""What a number format is, and everything that can be derived from its table of values.

A format is a finite, sorted set of values with zero among them. That table is enough: a posit, a
codebook, a logarithmic format says `Format(name=..., bits=..., values=[...])` and can be trained with. A
format with structure (ExMy) subclasses `Format` and overrides the methods named `_...` below with
arithmetic that gives the same bits faster; the public methods, which check and convert, stay.

Three integer or real views of one value:

- the *value* itself, a float32;
- its *rung*: the signed index from zero (0, +1 the smallest positive value, ...). Neighbors differ by
  one rung, so rungs are the uniform integer domain of which the grid is a warped image;
- its *code*: the bit pattern that stores it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from altgrad_core.elementwise import bounded, nan_where_, working
from altgrad_core.format_arguments import check_choice, check_floating, check_pair, check_uniform, given
from altgrad_core.native import BlockLoops
from altgrad_core.random_bits import draw_seed, stream_key_tensor, uniform_like
from altgrad_core.table_rounding import TableRounding
from altgrad_core.value_table import FEWEST_BITS, MOST_BITS, checked_table

ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "up", "down", "stochastic")
OVERFLOWS = ("saturate", "ieee")
NAN_RUNG = -(2**31)
"""The rung of NaN: no format has it, and `from_rung` maps it back to NaN."""

_UNSIGNED = (torch.uint32, torch.uint64)  # more than int32 holds


class Format:
    """A number format: `name`, `bits` and `values` (sorted float32, read-only).

    Two formats are equal, and hash alike, when class, name, bits and content are.

    Raises ValueError, with the reason, for a table that is no format.
    """

    name: str
    bits: int
    has_inf: bool = False
    """Whether inf has a code. A table never has one."""
    has_nan: bool = False
    """Whether NaN has a code. A table never has one."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        torch.serialization.add_safe_globals([cls])  # optimizers' groups name formats, and are saved

    def __init__(self, *, name: str, bits: int, values: Sequence[float] | Tensor | np.ndarray) -> None:
        if not name:
            raise ValueError("a format needs a name")
        if not (isinstance(bits, int) and FEWEST_BITS <= bits <= MOST_BITS):
            raise ValueError(f"format {name!r}: bits is {bits!r}; a format has {FEWEST_BITS} to {MOST_BITS}")
        self.name = name
        self.bits = bits
        self._values = checked_table(name, bits, values)
        self._held: dict[torch.dtype, bool] = {}

    @property
    def values(self) -> Tensor:
        """The finite values, strictly increasing, 1-d float32 on the CPU. Read it; never write it."""
        return self._values

    @cached_property
    def largest(self) -> float:
        """The largest finite value."""
        return float(self.values[-1])

    @cached_property
    def smallest(self) -> float:
        """The smallest positive value."""
        return float(self.values[self.values > 0][0])

    def _identity(self) -> tuple[object, ...]:
        """What equality and hash compare."""
        return (type(self), self.name, self.bits, self.values.numpy().tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Format) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}: {self.bits} bits, {self.smallest:g} to {self.largest:g}>"

    def __getstate__(self) -> dict[str, Any]:
        derived = {
            name for name in self.__dict__ if isinstance(getattr(type(self), name, None), cached_property)
        }
        return {name: value for name, value in self.__dict__.items() if name not in derived}

    @torch.no_grad()
    def quantize(
        self,
        x: Tensor,
        rounding: str = "nearest_even",
        generator: torch.Generator | None = None,
        overflow: str = "saturate",
        *,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """Return the grid value of each element, in x's shape, dtype and device. No gradient flows.

        NaN stays NaN and a zero keeps its sign, as does what rounds to zero. float64 is rounded once.

        `rounding`: `nearest_even` sends a tie to the even rung; `nearest_away`, `toward_zero`, `up`
        and `down` are as named; `stochastic` rounds |x| between its neighbors lo < hi up with
        probability (|x| - lo)/(hi - lo), to a resolution of 2^-24. It draws one seed from `generator`,
        or takes its numbers from `uniform`: float32 of x's shape, multiples of 2^-24 in [0, 1).

        `overflow`: `saturate` clamps to the ends, infinities too; `ieee` gives inf, or NaN where the
        format has no inf, to what rounds past an end, were there one value more at the last gap's
        distance: a tie at the end goes to the even rung, existing or not. A finite x never overflows in
        a mode that rounds it toward zero (IEEE 754: `up` for negative x, `down` for positive x); an
        infinite one is no overflow but a value, and stays inf or becomes NaN in every mode.

        Raises TypeError for an input that is not floating point; ValueError for an unknown mode,
        stochastic rounding without random numbers, or a dtype that cannot hold the format's values.
        """
        self._check_holds(x)
        check_choice("rounding", rounding, ROUNDINGS)
        check_choice("overflow", overflow, OVERFLOWS)
        if rounding != "stochastic" and uniform is not None:
            raise ValueError(f"`uniform` is for rounding='stochastic', not {rounding!r}")
        if rounding == "stochastic" and uniform is None:
            keys = stream_key_tensor((draw_seed(given(generator)), 0, 0), x.device)
            return self._fake_quantize(working(x), None, rounding, overflow, keys, None).to(x.dtype)
        if uniform is not None:
            check_uniform(x, uniform, generator)
        return self._quantize(working(x), rounding, overflow, uniform).to(x.dtype)

    @torch.no_grad()
    def fake_quantize(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        rounding: str = "nearest_even",
        overflow: str = "saturate",
        *,
        keys: Tensor | None = None,
        limit: Tensor | None = None,
    ) -> Tensor:
        """Return quantize(x·scale)/scale in one pass over memory, in x's shape, dtype and device.

        `scale` broadcasts against x; None is 1. `keys`, of `random_bits.stream_key_tensor`, name the random
        numbers of stochastic rounding: element i of x, in row-major order, takes the stream's i-th.
        `limit`, (lowest, highest) in the format's own units, clamps what is rounded, before the division.
        float16 and bfloat16 are scaled in float32.

        Raises as `quantize` does.
        """
        self._check_holds(x)
        check_choice("rounding", rounding, ROUNDINGS)
        check_choice("overflow", overflow, OVERFLOWS)
        if (keys is None) == (rounding == "stochastic"):
            raise ValueError(f"stochastic rounding, and no other, takes keys; rounding={rounding!r}")
        check_pair("keys", keys, torch.int32)
        check_pair("limit", limit, None)
        keys = None if keys is None else keys.contiguous()
        return self._fake_quantize(working(x), scale, rounding, overflow, keys, limit).to(x.dtype)

    @torch.no_grad()
    def spacing(self, x: Tensor) -> Tensor:
        """Return the local gap of the grid at each element, positive, in x's dtype.

        It is the gap [lo, hi) that holds |x|, on x's own side of zero: the first gap at zero, the last
        one at and beyond the end, infinities included; NaN for NaN.

        Raises TypeError and ValueError as `quantize` does.
        """
        self._check_holds(x)
        return self._spacing(working(x)).to(x.dtype)

    @torch.no_grad()
    def rung(self, x: Tensor) -> Tensor:
        """Return the signed index from zero of each element's nearest grid value (ties to even), int32.

        Beyond the ends it is the end's; NaN gives `NAN_RUNG`. Raises TypeError as `quantize` does.
        """
        check_floating(x)
        nan = x.isnan().to(torch.int32)
        return self._rung(working(x)).bitwise_and_(nan - 1).bitwise_or_(nan << 31)

    @torch.no_grad()
    def from_rung(self, rungs: Tensor) -> Tensor:
        """Return the float32 values of the rungs, clamped to both ends; `NAN_RUNG` and NaN give NaN.

        `rungs` is an integer tensor, or a floating-point one that holds whole numbers (a fraction is
        cut off). Raises TypeError for bool and complex.
        """
        if rungs.dtype == torch.bool or rungs.is_complex():
            raise TypeError(f"from_rung needs integers or whole floats, not {rungs.dtype}")
        if not rungs.is_floating_point() and rungs.dtype not in (torch.int32, torch.int64):
            rungs = rungs.to(torch.int64 if rungs.dtype in _UNSIGNED else torch.int32)
        nan = rungs == NAN_RUNG
        if rungs.is_floating_point():
            nan |= rungs.isnan()
            rungs = rungs.nan_to_num(0.0)
        inside = rungs.clamp(*self._rung_range()).to(torch.int32)
        return nan_where_(self._from_rung(inside), nan)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Return each element's code: uint8 up to 8 bits, else int16 holding the bit pattern.

        What is off the grid is rounded to nearest even first, saturating. A table's code is the index
        into `values`; it has one zero only.

        Raises TypeError as `quantize` does; ValueError for a NaN where the format has no code for it.
        """
        check_floating(x)
        return self._encode(working(x)).to(torch.uint8 if self.bits <= 8 else torch.int16)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of the codes; a code that stands for no value gives NaN.

        Takes what `encode` gives, or codes in any wider integer type. (NaN, not an exception: telling
        would make the host wait for the device.) Raises TypeError for what is not an integer tensor.
        """
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise TypeError(f"decode needs integer codes, not {codes.dtype}")
        return self._decode(codes)

    def block_loops(self) -> BlockLoops | None:
        """Return the format's arithmetic as C functions, for loops that do more than rounding in one pass.

        None where there are none: no compiler, or a format that they do not cover.
        """
        if type(self)._quantize is Format._quantize:  # else the arithmetic is a subclass's own
            return self._table.block_loops()
        return None

    # The arithmetic, here by table: what a format with structure overrides. x is float32 or float64; every
    # method returns a new tensor.

    def _quantize(self, x: Tensor, rounding: str, overflow: str, uniform: Tensor | None) -> Tensor:
        """Round x, keeping its dtype; `uniform` is given exactly when `rounding` is stochastic."""
        return self._table.quantize(x, rounding, overflow, uniform)

    def _fake_quantize(
        self,
        x: Tensor,
        scale: Tensor | None,
        rounding: str,
        overflow: str,
        keys: Tensor | None,
        limit: Tensor | None,
    ) -> Tensor:
        """Round x·scale, limit it, and divide by the scale; `keys` are given exactly under stochastic."""
        if type(self)._quantize is Format._quantize:  # else the arithmetic is a subclass's own
            fused = self._table.fake_quantize(x, scale, rounding, overflow, keys, limit)
            if fused is not None:
                return fused
        return self._in_passes(x, scale, rounding, overflow, keys, limit)

    def _in_passes(
        self,
        x: Tensor,
        scale: Tensor | None,
        rounding: str,
        overflow: str,
        keys: Tensor | None,
        limit: Tensor | None,
    ) -> Tensor:
        """Do what `_fake_quantize` does by `_quantize`."""
        uniform = None if keys is None else uniform_like(x, keys)
        scaled = x if scale is None else x * scale
        rounded = bounded(self._quantize(scaled, rounding, overflow, uniform), limit)
        return rounded if scale is None else rounded / scale

    def _spacing(self, x: Tensor) -> Tensor:
        return self._table.spacing(x)

    def _rung(self, x: Tensor) -> Tensor:
        """Return int32 rungs; NaN may give anything."""
        return self._table.rung(x)

    def _rung_range(self) -> tuple[int, int]:
        return self._table.rung_range()

    def _from_rung(self, rungs: Tensor) -> Tensor:
        """Return float32 values of int32 rungs within `_rung_range`."""
        return self._table.from_rung(rungs)

    def _encode(self, x: Tensor) -> Tensor:
        """Return codes in [0, 2^bits), of any integer type that holds them; refuse NaN without a code."""
        self._refuse_nan(x)
        return self._table.encode(x)

    def _decode(self, codes: Tensor) -> Tensor:
        """Return float32 values of codes of any integer type, NaN for those without a value."""
        return self._table.decode(codes)

    @cached_property
    def _table(self) -> TableRounding:
        return TableRounding(self.values)

    def _check_holds(self, x: Tensor) -> None:
        """Refuse a dtype that cannot hold every value of the format."""
        check_floating(x)
        if x.dtype not in (torch.float32, torch.float64) and not self._held_by(x.dtype):
            raise ValueError(
                f"{x.dtype} cannot hold every value of {self.name} ({self.smallest:g} to {self.largest:g});"
                " convert the input to torch.float32 first"
            )

    def _refuse_nan(self, x: Tensor) -> None:
        """Raise ValueError where x holds a NaN and NaN has no code."""
        if not self.has_nan and bool(x.isnan().any()):
            raise ValueError(
                f"{self.name} has no code for NaN, and {int(x.isnan().sum())} elements are NaN; replace them "
                "first, by torch.nan_to_num"
            )

    def _held_by(self, dtype: torch.dtype) -> bool:
        if dtype not in self._held:
            self._held[dtype] = bool((self.values.to(dtype).float() == self.values).all())
        return self._held[dtype]


torch.serialization.add_safe_globals([Format])
