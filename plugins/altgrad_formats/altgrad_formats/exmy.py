"""ExMy formats in arithmetic: exact exponents instead of a table, the same bits.

For |x| in a binade [2^e, 2^(e+1)) the grid is the multiples of one power of two,

    ulp(x) = 2^(max(e, lowest exponent) - M),

so that quantizing is: y = x / ulp, a whole number n by the rounding mode, n · ulp. Both scalings are by
powers of two and exact; the only rounding is the one asked for. If n reaches the next binade's first
value it is that value: the carry needs no care. 2^e is x's own bit pattern with the mantissa masked off.

The magnitude code follows from the same two numbers, n + (e - lowest exponent) · 2^M, so rung and value
are linked without a search. A tie goes to the even code, which for M > 0 is the even n; for M = 0 all n
but zero's are 1, and the parity is that of the exponent field (IEEE P3109, gfloat).

Arithmetic is in float32 where that is exact, which it is if the smallest spacing is in [2^-126, 1]: then
no quotient underflows and no product is subnormal. Any other format, and float64 input, takes float64.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from altgrad_core import native
from altgrad_core.elementwise import nan_where_, wide_codes
from altgrad_core.format import Format
from altgrad_formats.layout import Layout, default_bias
from altgrad_formats.native_exmy import NativeExMy
from altgrad_formats.one_kernel import OneKernel

if TYPE_CHECKING:
    from altgrad_formats import ExMyOptions


@attrs.frozen
class _Word:
    """How a machine float is laid out."""

    floating: torch.dtype
    integer: torch.dtype
    mantissa_bits: int
    bias: int

    @property
    def exponent_mask(self) -> int:
        return (2 * self.bias + 1) << self.mantissa_bits


_FLOAT32 = _Word(torch.float32, torch.int32, 23, 127)
_FLOAT64 = _Word(torch.float64, torch.int64, 52, 1023)


class ExMy(Format):
    """A signed format of E exponent and M mantissa bits; `altgrad_formats.layout` has the formula.

    `bias` is by default that of the named format of this shape (1 for E3M4), else 2^(E-1) - 1, and 0 for
    E = 0. `specials` is `finite`, `ieee` or `fn`. `name` is for display only: by default the catalog's
    name for exactly these numbers, else one such as `E4M5(bias=7,fn)`.

    At and beyond the largest value the spacing is that of its binade: the last gap, but the gap to the
    value that would come next where the largest is the first of its binade (always so for M = 0).

    Raises ValueError where the numbers make no format, or one with values that are no float32.
    """

    def __init__(
        self,
        exponent_bits: int,
        mantissa_bits: int,
        bias: int | None = None,
        specials: str = "finite",
        name: str | None = None,
    ) -> None:  # the table, which super().__init__ would want, is made when somebody asks for it
        if bias is None:
            bias = default_bias(exponent_bits, mantissa_bits)
        self.layout = Layout(exponent_bits, mantissa_bits, bias, specials)
        self.name = name or self.layout.name
        self.bits = self.layout.bits
        self.has_inf = self.layout.inf_code is not None
        self.has_nan = self.layout.nan_code is not None
        self._held = {}
        made = {
            "largest": self.largest,
            "smallest": self.smallest,
            "_native": self._native,
            "_kernel": self._kernel,
        }
        vars(self).update(made)  # now, for no compiled kernel can enter a lock

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (*attrs.astuple(self.layout), self.name)

    def _identity(self) -> tuple[object, ...]:
        return (type(self), self.name, self.layout)

    @cached_property
    def values(self) -> Tensor:
        """The finite values, strictly increasing, 1-d float32 on the CPU. Read it; never write it."""
        codes = torch.arange(1, self.layout.largest_code + 1, dtype=torch.int32, device="cpu")
        positive = self._magnitude(codes)
        return torch.cat((-positive.flip(0), positive.new_zeros(1), positive))

    @cached_property
    def largest(self) -> float:
        """The largest finite value."""
        significand, unit = self.layout.split(self.layout.largest_code)
        return float(significand * 2.0**unit)

    @cached_property
    def smallest(self) -> float:
        """The smallest positive value."""
        return float(2.0**self._lowest_unit)

    def block_loops(self) -> native.BlockLoops | None:
        return self._native.block_loops()

    def _fake_quantize(
        self,
        x: Tensor,
        scale: Tensor | None,
        rounding: str,
        overflow: str,
        keys: Tensor | None,
        limit: Tensor | None,
    ) -> Tensor:
        if self._native.serves(x, rounding) and native.one_a_row(scale, x):
            return self._native.quantize(x, scale, keys, limit, self._beyond(overflow))
        if self._kernel.serves(x, rounding, scale):
            return self._kernel.quantize(x, scale, keys, limit, self._beyond(overflow))
        return self._in_passes(x, scale, rounding, overflow, keys, limit)

    def _quantize(self, x: Tensor, rounding: str, overflow: str, uniform: Tensor | None) -> Tensor:
        if uniform is None and self._native.serves(x, rounding):
            return self._native.quantize(x, None, None, None, self._beyond(overflow))
        if uniform is None and self._kernel.serves(x, rounding, None):
            return self._kernel.quantize(x, None, None, None, self._beyond(overflow))
        bound = self.largest if overflow == "saturate" else self._after_largest
        y = self._exact(x, bound).clamp(-bound, bound)
        ulp = self._ulp(y)
        y = self._whole(y.div_(ulp), ulp, rounding, uniform).mul_(ulp)
        return (y if overflow == "saturate" else self._overflowed(y, x, rounding)).to(x.dtype)

    def _spacing(self, x: Tensor) -> Tensor:
        y = self._exact(x).clamp(-self.largest, self.largest)
        ulp = self._ulp(y)
        filled = ulp if isinstance(ulp, Tensor) else torch.full_like(y, ulp)
        return filled.masked_fill_(y.isnan(), torch.nan).to(x.dtype)

    def _rung(self, x: Tensor) -> Tensor:
        y = self._exact(x).clamp(-self.largest, self.largest)
        ulp = self._ulp(y)
        n = self._whole(y.div_(ulp), ulp, "nearest_even", None)
        if isinstance(ulp, Tensor):
            n.add_(self._codes_below_binade(ulp).to(n.dtype).copysign_(n))
        return n.to(torch.int32)

    def _rung_range(self) -> tuple[int, int]:
        return -self.layout.largest_code, self.layout.largest_code

    def _from_rung(self, rungs: Tensor) -> Tensor:
        return self._magnitude(rungs.abs()).mul_(rungs.sign())

    def _encode(self, x: Tensor) -> Tensor:
        if self._native.serves(x):
            codes, holds_nan = self._native.encode(x)
            if holds_nan:
                self._refuse_nan(x)
            return codes
        self._refuse_nan(x)
        layout, codes = self.layout, self._rung(x).abs_()
        if layout.inf_code is not None:
            codes.masked_fill_(x.isinf(), layout.inf_code)
        codes.bitwise_or_(x.signbit().to(torch.int32).mul_(layout.magnitudes))
        return codes if layout.nan_code is None else codes.masked_fill_(x.isnan(), layout.nan_code)

    def _decode(self, codes: Tensor) -> Tensor:
        if self._native.decodes(codes):
            return self._native.decode(codes)
        layout, codes = self.layout, wide_codes(codes)
        codes = codes.clamp(-1, 2**self.bits).to(torch.int32)
        magnitude = codes & (layout.magnitudes - 1)
        value = self._magnitude(magnitude)
        if layout.inf_code is not None:
            value.masked_fill_(magnitude == layout.inf_code, torch.inf)
        value.view(torch.int32).bitwise_or_((codes & layout.magnitudes) << (32 - self.bits))
        none = (codes < 0) | (codes == 2**self.bits) | (magnitude > layout.largest_code)
        return nan_where_(value, none if layout.inf_code is None else none & (magnitude != layout.inf_code))

    @cached_property
    def _native(self) -> NativeExMy:
        return NativeExMy(self.layout)

    @cached_property
    def _kernel(self) -> OneKernel:
        return OneKernel(self.layout)

    def _beyond(self, overflow: str) -> float:
        """Return what the magnitudes past the largest become."""
        if overflow == "saturate":
            return self.largest
        return torch.inf if self.has_inf else torch.nan

    @property
    def _lowest_unit(self) -> int:
        """The exponent of the smallest spacing."""
        return self.layout.lowest_exponent - self.layout.mantissa_bits

    @property
    def _after_largest(self) -> float:
        """The value that would come next if exponents went on."""
        return float(self.largest + 2.0 ** self.layout.split(self.layout.largest_code)[1])

    def _exact(self, x: Tensor, bound: float = 0.0) -> Tensor:
        """Return x in a precision in which its quotients and products by spacings are exact."""
        if self._lowest_unit > 0:  # x/ulp may underflow, but must not become zero: push x off it
            return x.double().add(x.sign(), alpha=2.0**-900).copysign_(x)
        return x if self._lowest_unit >= -126 and bound < 2.0**128 else x.double()

    def _ulp(self, x: Tensor) -> Tensor | float:
        """Return the spacing at each in-range x; a number where it is the same everywhere."""
        if self.layout.is_uniform:
            return float(2.0**self._lowest_unit)
        word = _word(x)
        binade = x.view(word.integer).bitwise_and(word.exponent_mask).view(word.floating)
        return binade.clamp_(min=2.0**self.layout.lowest_exponent).mul_(2.0**-self.layout.mantissa_bits)

    def _whole(self, y: Tensor, ulp: Tensor | float, rounding: str, uniform: Tensor | None) -> Tensor:
        """Return y = x/ulp rounded to a whole number, in y's own memory or not."""
        if uniform is not None or rounding == "nearest_away":
            n = y.trunc()
            rest = (y - n).abs_()  # exact, where floor(y + uniform) would not be
            outward = rest >= 0.5 if uniform is None else uniform < rest
            return n.add_(outward.to(y.dtype).copysign_(y))
        if rounding == "nearest_even" and self.layout.mantissa_bits == 0 and isinstance(ulp, Tensor):
            even_field = self._codes_below_binade(ulp).bitwise_and_(1).to(y.dtype)  # counts from field 1
            tie_goes_in = (y.abs() == 1.5).to(y.dtype).mul_(even_field)
            return y.mul_(tie_goes_in.mul_(-0.25).add_(1.0)).round_()
        return _whole_in_place(y, rounding)

    def _codes_below_binade(self, ulp: Tensor) -> Tensor:
        """Return (e - lowest exponent) · 2^M, from the exponent bits of ulp = 2^(e - M)."""
        word, mantissa_bits = _word(ulp), self.layout.mantissa_bits
        lowest = (self._lowest_unit + word.bias) << mantissa_bits
        return (ulp.view(word.integer) >> (word.mantissa_bits - mantissa_bits)).sub_(lowest)

    def _magnitude(self, codes: Tensor) -> Tensor:
        """Return the float32 values of finite magnitude codes (int32)."""
        word = _FLOAT32 if -126 <= self._lowest_unit <= 0 else _FLOAT64
        if self.layout.is_uniform:
            return codes.to(word.floating).mul_(2.0**self._lowest_unit).float()
        mantissa_bits = self.layout.mantissa_bits
        binade = (codes >> mantissa_bits).sub_(1).clamp_(min=0)  # 0: the subnormals' and the next
        significand = codes - (binade << mantissa_bits)
        exponent_field = binade.to(word.integer).add_(self._lowest_unit + word.bias)
        ulp = (exponent_field << word.mantissa_bits).view(word.floating)
        return ulp.mul_(significand).float()

    def _overflowed(self, y: Tensor, x: Tensor, rounding: str) -> Tensor:
        """Return y with what is past the largest value made inf or NaN, or clamped if x was cut there."""
        special = torch.full_like(y, torch.inf if self.has_inf else torch.nan).copysign_(y)
        if rounding in ("toward_zero", "up", "down"):
            inward = {"toward_zero": x == x, "up": x < 0, "down": x > 0}[rounding]
            special = torch.where(x.isfinite() & inward, y.clamp(-self.largest, self.largest), special)
        return torch.where(y.abs() > self.largest, special, y)


def from_options(options: ExMyOptions) -> ExMy:
    """Build the format that an experiment file describes."""
    return ExMy(options.exponent_bits, options.mantissa_bits, options.bias, options.specials)


def _whole_in_place(y: Tensor, rounding: str) -> Tensor:
    if rounding == "nearest_even":
        return y.round_()
    if rounding == "toward_zero":
        return y.trunc_()
    return y.ceil_() if rounding == "up" else y.floor_()


def _word(x: Tensor) -> _Word:
    return _FLOAT64 if x.dtype == torch.float64 else _FLOAT32
