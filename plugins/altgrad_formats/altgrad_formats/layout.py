"""How the bits of an ExMy code are laid out, and which layouts are formats. Imports no torch.

A code is a sign, an exponent field e of E bits and a mantissa field m of M bits. Its magnitude is

    E = 0            m · 2^(-M - bias)                    fixed point
    E > 0, e = 0     2^(1 - bias) · m / 2^M               zero and subnormals
    E > 0, e > 0     2^(e - bias) · (1 + m / 2^M)

`specials` takes codes away from that: `finite` none; `ieee` the top exponent field (m = 0 is inf, the
rest NaN); `fn` the all-ones magnitude, which is NaN (OCP's E4M3).

Every finite value must be a float32. A table of them is long, so the range is checked here by its two
ends, which suffices: all values are at most 16 significant bits times a power of two in between.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs

SPECIALS = ("finite", "ieee", "fn")
FEWEST_BITS, MOST_BITS = 3, 16
FLOAT32_TOP_EXPONENT = 127
FLOAT32_BOTTOM_EXPONENT = -149
"""Of the smallest float32 subnormal."""


def default_bias(exponent_bits: int, mantissa_bits: int) -> int:
    """Return the bias of the named format of that shape, else IEEE's 2^(E-1) - 1 (0 for E = 0)."""
    named = NAMED.get(f"E{exponent_bits}M{mantissa_bits}")
    if named is not None:
        return named.bias
    whole = isinstance(exponent_bits, int)  # what is not, the layout refuses
    return (1 << (exponent_bits - 1)) - 1 if whole and exponent_bits > 0 else 0


@attrs.frozen
class Layout:
    """The four facts that make an ExMy format. Raises ValueError where they do not make one."""

    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: str = "finite"

    def __attrs_post_init__(self) -> None:
        self._check_fields()
        self._check_range()

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def shape(self) -> str:
        return f"E{self.exponent_bits}M{self.mantissa_bits}"

    @property
    def name(self) -> str:
        """The catalog's name for this layout, else one that says it all, as `E4M5(bias=7,fn)`."""
        for name, layout in NAMED.items():
            if layout == self:
                return name
        return f"{self.shape}(bias={self.bias}{'' if self.specials == 'finite' else ',' + self.specials})"

    @property
    def is_uniform(self) -> bool:
        """Whether the spacing is one and the same everywhere: with no exponent field, or one bit of it."""
        return self.exponent_bits <= 1

    @property
    def lowest_exponent(self) -> int:
        """The exponent below which the spacing no longer shrinks; that spacing is 2^(this - M)."""
        return (1 if self.exponent_bits else 0) - self.bias

    @property
    def magnitudes(self) -> int:
        """How many magnitude codes there are, special ones included."""
        return 1 << (self.bits - 1)

    @property
    def inf_code(self) -> int | None:
        """The magnitude code of inf."""
        return self.magnitudes - (1 << self.mantissa_bits) if self.specials == "ieee" else None

    @property
    def nan_code(self) -> int | None:
        """The magnitude code that NaN is encoded as: the quiet one where there are several."""
        if self.specials == "fn":
            return self.magnitudes - 1
        if self.specials == "ieee" and self.mantissa_bits:
            return self.magnitudes - (1 << (self.mantissa_bits - 1))
        return None

    @property
    def largest_code(self) -> int:
        """The magnitude code of the largest finite value, which is also its rung."""
        reserved = {"finite": 0, "ieee": 1 << self.mantissa_bits, "fn": 1}
        return self.magnitudes - reserved[self.specials] - 1

    def split(self, magnitude: int) -> tuple[int, int]:
        """Return (significand, exponent of its unit): the value is significand · 2^exponent."""
        field, mantissa = divmod(magnitude, 1 << self.mantissa_bits)
        unit = self.lowest_exponent - self.mantissa_bits
        if field == 0 or self.exponent_bits == 0:
            return magnitude, unit
        return mantissa + (1 << self.mantissa_bits), unit + field - 1

    def _check_fields(self) -> None:
        for name in ("exponent_bits", "mantissa_bits", "bias"):
            given = getattr(self, name)
            whole = isinstance(given, int) and not isinstance(given, bool)
            if not whole:
                raise ValueError(f"{name}={given!r} is not a whole number")
        if self.specials not in SPECIALS:
            raise ValueError(f"specials={self.specials!r} is not one of {', '.join(map(repr, SPECIALS))}")
        if self.exponent_bits < 0 or self.mantissa_bits < 0:
            raise ValueError(
                f"exponent_bits={self.exponent_bits}, mantissa_bits={self.mantissa_bits}:"
                " a format cannot have a negative number of bits"
            )
        if not FEWEST_BITS <= self.bits <= MOST_BITS:
            raise ValueError(
                f"{self.shape} has {self.bits} bits with its sign; a format has {FEWEST_BITS} to {MOST_BITS}"
            )
        if self.specials == "ieee" and self.exponent_bits == 0:
            raise ValueError(
                f"{self.shape} has no exponent field, of which specials='ieee' takes the top one"
            )

    def _check_range(self) -> None:
        usual = self.bias == default_bias(self.exponent_bits, self.mantissa_bits)
        shape = self.shape if usual else f"{self.shape}(bias={self.bias})"
        significand, unit = self.split(self.largest_code)
        top = unit + significand.bit_length() - 1
        if top > FLOAT32_TOP_EXPONENT:
            raise ValueError(
                f"{shape} needs exponents up to 2^{top}; float32 ends at 2^{FLOAT32_TOP_EXPONENT}"
            )
        bottom = self.lowest_exponent - self.mantissa_bits
        if bottom < FLOAT32_BOTTOM_EXPONENT:
            raise ValueError(
                f"{shape} needs values down to 2^{bottom}; float32 ends at 2^{FLOAT32_BOTTOM_EXPONENT}"
            )


NAMED: Mapping[str, Layout] = {}  # so that `default_bias` finds none while the catalog itself is built
NAMED = {
    "E0M7": Layout(0, 7, bias=0),
    "E1M6": Layout(1, 6, bias=0),
    "E2M5": Layout(2, 5, bias=1),
    "E3M4": Layout(3, 4, bias=1),
    "E3M4_IEEE": Layout(3, 4, bias=3, specials="ieee"),
    "E4M3": Layout(4, 3, bias=7, specials="fn"),
    "E5M2": Layout(5, 2, bias=15, specials="ieee"),
    "E6M1": Layout(6, 1, bias=31),
    "E7M0": Layout(7, 0, bias=63),
    "E2M1": Layout(2, 1, bias=1),
    "E2M3": Layout(2, 3, bias=1),
    "E3M2": Layout(3, 2, bias=3),
    "FP16": Layout(5, 10, bias=15, specials="ieee"),
    "BF16": Layout(8, 7, bias=127, specials="ieee"),
    "E0M15": Layout(0, 15, bias=0),
    "E1M14": Layout(1, 14, bias=0),
    "E2M13": Layout(2, 13, bias=1),
    "E3M12": Layout(3, 12, bias=3),
    "E4M11": Layout(4, 11, bias=7),
    "E6M9": Layout(6, 9, bias=31),
    "E7M8": Layout(7, 8, bias=63),
}
"""Every format that has a name of its own."""

SECOND_NAMES: Mapping[str, str] = {"E5M10": "FP16", "E8M7": "BF16"}
"""Other names of the same formats."""
