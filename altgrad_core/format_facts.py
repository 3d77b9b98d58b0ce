"""What there is to say of a number format, from the `Format` contract alone.

A table of values is enough: range, spacing and codes follow from it. Whoever has more to tell has an
attribute `layout` with `exponent_bits`, `mantissa_bits`, `bias` and `specials`.

Numbers are written exactly, in the notation that is shortest to read: 448, 0.0625, 2^-9, 1.5*2^32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

import attrs
import torch

from altgrad_core.format import Format

_DECIMAL, _FRACTION = 6, 7
"""The most characters of a decimal: of a power of two or whole number, and of any other."""
_SIGNIFICAND = 4
"""The most characters of a c in c*2^e: 1.5 or 1.75."""
_INTEGER = 9999
"""The greatest n in n*2^e."""


@attrs.frozen(kw_only=True)
class FormatFacts:
    """A format in numbers; None where it has no such thing."""

    bits: int
    exponent_bits: int | None
    mantissa_bits: int | None
    bias: int | None
    specials: str | None
    count: int
    """Of the finite values, zero and the negative ones included."""
    lowest: float
    smallest: float
    smallest_normal: float | None
    largest: float
    finest: float
    """The least distance between neighbors."""
    coarsest: float
    has_inf: bool
    has_nan: bool

    @property
    def uniform(self) -> bool:
        """Whether all neighbors are equally far apart."""
        return self.finest == self.coarsest

    def plain(self) -> dict[str, Any]:
        """Return the facts for JSON."""
        return {**attrs.asdict(self), "uniform": self.uniform}


def facts(format: Format) -> FormatFacts:
    """Return the facts of a format."""
    layout = getattr(format, "layout", None)
    exponent_bits, bias = getattr(layout, "exponent_bits", None), getattr(layout, "bias", None)
    normal = 2.0 ** (1 - bias) if exponent_bits and bias is not None else None  # specials may leave none
    gaps = format.values.double().diff()
    return FormatFacts(
        bits=format.bits,
        exponent_bits=exponent_bits,
        mantissa_bits=getattr(layout, "mantissa_bits", None),
        bias=bias,
        specials=getattr(layout, "specials", None),
        count=len(format.values),
        lowest=float(format.values[0]),
        smallest=format.smallest,
        smallest_normal=normal if normal is not None and normal <= format.largest else None,
        largest=format.largest,
        finest=float(gaps.min()),
        coarsest=float(gaps.max()),
        has_inf=format.has_inf,
        has_nan=format.has_nan,
    )


@attrs.frozen(kw_only=True)
class Codes:
    """What every bit pattern stands for."""

    of_value: Mapping[float, int]
    """Finite value to its code; zero to that of +0."""
    negative_zero: tuple[int, ...]
    inf: tuple[int, ...]
    nan: tuple[int, ...]
    unused: tuple[int, ...]
    """Patterns without a value in a format without NaN."""


def codes(format: Format) -> Codes:
    """Return the meaning of all 2^bits codes."""
    decoded = format.decode(torch.arange(2**format.bits, dtype=torch.int32, device="cpu"))
    of_value: dict[float, int] = {}
    for code, value in enumerate(decoded.tolist()):
        if math.isfinite(value) and not _is_negative_zero(value):
            of_value.setdefault(value, code)
    nan = _where(decoded.isnan())
    return Codes(
        of_value=of_value,
        negative_zero=_where((decoded == 0) & decoded.signbit()),
        inf=_where(decoded.isinf()),
        nan=nan if format.has_nan else (),
        unused=() if format.has_nan else nan,
    )


def _is_negative_zero(value: float) -> bool:
    return value == 0 and math.copysign(1, value) < 0


def _where(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero().flatten().tolist())


def is_symmetric(format: Format) -> bool:
    """Whether the negative values mirror the positive ones."""
    return torch.equal(format.values, -format.values.flip(0))


def same_grid(formats: Mapping[str, Format]) -> list[tuple[str, str, float]]:
    """Return (name, earlier name, factor) where the values are the earlier format's times the factor.

    Exact: the quotients by the largest value are one real number each, rounded once.
    """
    first: dict[bytes, str] = {}
    found = []
    for name, format in formats.items():
        identity = (format.values.double() / format.largest).numpy().tobytes()
        earlier = first.setdefault(identity, name)
        if earlier != name:
            found.append((name, earlier, format.largest / formats[earlier].largest))
    return found


def exact(x: float) -> str:
    """Return a finite number exactly; after a `~`, to six digits, where that would be long."""
    if x <= 0:
        return "0" if x == 0 else _negative(exact(-x))
    odd, exponent = odd_times_power(x)
    decimal = format(Decimal(x), "f")
    if len(decimal) <= (_DECIMAL if odd == 1 or exponent >= 0 else _FRACTION):
        return decimal
    if odd == 1:
        return f"2^{exponent}"
    top = exponent + odd.bit_length()  # of the first power of two above
    significand = format(Decimal(odd) / 2 ** (odd.bit_length() - 1), "f")
    if len(significand) <= _SIGNIFICAND:
        return f"{significand}*2^{top - 1}"
    written = [f"{odd}*2^{exponent}"] if odd <= _INTEGER else []
    if odd == 2 ** odd.bit_length() - 1:
        written.append(f"{exact(2.0**top)}-2^{exponent}")
    return min(written, key=len, default=f"~{x:.6g}")


def _negative(written: str) -> str:
    return f"-({written})" if "-2^" in written else f"-{written}"


def odd_times_power(x: float) -> tuple[int, int]:
    """Return (n, e) of a positive x = n*2^e with n odd."""
    numerator, denominator = x.as_integer_ratio()
    zeros = (numerator & -numerator).bit_length() - 1
    return numerator >> zeros, zeros - (denominator.bit_length() - 1)


def hexadecimal(codes: Iterable[int], bits: int) -> str:
    """Return sorted codes in hexadecimal digits, neighbors joined: `00, 7d..7f`."""
    runs: list[list[int]] = []
    for code in codes:
        if runs and runs[-1][-1] == code - 1:
            runs[-1][1:] = [code]
        else:
            runs.append([code])
    digits = -(-bits // 4)
    return ", ".join("..".join(f"{code:0{digits}x}" for code in run) for run in runs)
