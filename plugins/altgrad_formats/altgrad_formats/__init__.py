"""Number formats for AltGrad: every ExMy format, to the last bit; and stiffness formulas.

    from altgrad_formats import E4M3, ExMy

    E4M3.quantize(x)
    ExMy(4, 5).largest

This module imports no torch; the formats load when they are first asked for.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import attrs
from attrs.validators import ge, in_, instance_of, le, optional

from altgrad_core.hookspecs import Component, NoOptions, hookimpl
from altgrad_core.options import at_least, option
from altgrad_formats.layout import MOST_BITS, NAMED, SECOND_NAMES, SPECIALS, Layout, default_bias

__all__ = [*NAMED, *SECOND_NAMES, "ExMy", "ExMyOptions", "ScrambledOptions"]


@attrs.frozen(kw_only=True)
class ExMyOptions:
    """A format by its numbers: 1 sign bit, `exponent_bits`, `mantissa_bits`; 3 to 16 bits in all."""

    exponent_bits: int = option(
        "width of the exponent field",
        unit="bits",
        validator=[instance_of(int), ge(0), le(MOST_BITS)],
        example=4,
    )
    mantissa_bits: int = option(
        "width of the mantissa field",
        unit="bits",
        validator=[instance_of(int), ge(0), le(MOST_BITS)],
        example=5,
    )
    bias: int | None = option(
        "exponent bias; left out: the named format's of that shape, else 2^(E-1) - 1",
        default=None,
        validator=optional(instance_of(int)),
    )
    specials: Literal["finite", "ieee", "fn"] = option(
        "codes for inf and NaN: finite (none), ieee (the top exponent field), fn (one NaN)",
        default="finite",
        validator=in_(SPECIALS),
    )

    def __attrs_post_init__(self) -> None:
        self.layout()

    @property
    def bits(self) -> int:
        """The width of a code; the core asks for it before the format itself is built."""
        return self.layout().bits

    def layout(self) -> Layout:
        """Return the layout described. Raises ValueError where there is no such format."""
        bias = default_bias(self.exponent_bits, self.mantissa_bits) if self.bias is None else self.bias
        return Layout(self.exponent_bits, self.mantissa_bits, bias, self.specials)


@attrs.frozen(kw_only=True)
class ScrambledOptions:
    """The true spacings, dealt out to the wrong weights."""

    seed: int = option("picks the permutation", default=0, validator=at_least(0))


_NOTES = {
    "E0M7": ("uniform grid: fixed point", ""),
    "E1M6": ("uniform grid too: E0M7 times 4", ""),
    "E2M5": ("all codes finite", ""),
    "E3M4": ("bias 1, all codes finite: AltGrad's own; the IEEE-style one is E3M4_IEEE", ""),
    "E3M4_IEEE": ("bias 3 with inf and NaN, as in ml_dtypes", "ml_dtypes.float8_e3m4"),
    "E4M3": ("no inf, one NaN", "OCP 8-bit Floating Point Specification 1.0, E4M3 (E4M3FN)"),
    "E5M2": ("with inf and NaN", "OCP 8-bit Floating Point Specification 1.0, E5M2"),
    "E6M1": ("one mantissa bit, all codes finite", ""),
    "E7M0": ("zero and powers of two only", ""),
    "E2M1": ("FP4", "OCP Microscaling Formats (MX) Specification 1.0"),
    "E2M3": ("FP6", "OCP Microscaling Formats (MX) Specification 1.0"),
    "E3M2": ("FP6", "OCP Microscaling Formats (MX) Specification 1.0"),
    "FP16": ("IEEE half precision", "IEEE 754-2019, binary16"),
    "BF16": ("bfloat16", "Google Brain"),
}
_CONTROL = ("16-bit control, all codes finite", "")


def _component(name: str, constant: str) -> Component:
    note, source = _NOTES.get(constant, _CONTROL)
    return Component(
        name=name,
        summary=note if name == constant else f"{note}; the same as {constant}",
        options=NoOptions,
        target=f"altgrad_formats.catalog:{constant}",
        source=source,
        bits=NAMED[constant].bits,
    )


@hookimpl
def altgrad_formats() -> list[Component]:
    """Register every named format, and `ExMy` for all others."""
    by_numbers = Component(
        name="ExMy",
        summary="any format by its numbers: exponent_bits, mantissa_bits, bias, specials",
        options=ExMyOptions,
        target="altgrad_formats.exmy:from_options",
    )
    first = [_component(name, name) for name in NAMED]
    return [*first, *(_component(*names) for names in SECOND_NAMES.items()), by_numbers]


@hookimpl
def altgrad_stiffness() -> list[Component]:
    """Register the formulas beside the core's `grid` and `uniform`."""
    return [
        Component(
            name="ideal",
            summary="2^(floor(log2|w|) - M): the founding formula, blind to subnormals, bias and scale",
            target="altgrad_formats.stiffness:ideal",
        ),
        Component(
            name="smooth",
            summary="|w|*ln2/2^M, floored at the subnormal spacing: grid without its jumps",
            target="altgrad_formats.stiffness:smooth",
            source="the logarithmic number system's spacing, as in LNS-Madam, arXiv 2106.13914",
        ),
        Component(
            name="scrambled",
            summary="grid, permuted over the tensor: the control with the spread but not the geometry",
            options=ScrambledOptions,
            target="altgrad_formats.stiffness:scrambled",
        ),
    ]


def __getattr__(name: str) -> Any:
    if name == "ExMy":
        return importlib.import_module("altgrad_formats.exmy").ExMy
    if name in NAMED or name in SECOND_NAMES:
        return getattr(importlib.import_module("altgrad_formats.catalog"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
