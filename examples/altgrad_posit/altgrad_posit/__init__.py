"""Two number formats for AltGrad that are not ExMy: `posit8` and `LNS`.

This module is what AltGrad imports to list them, so it is light: option classes and registration, no torch.
The values are in the modules that `target` names, which are imported when somebody trains with them.
"""

from __future__ import annotations

import attrs

from altgrad_core.hookspecs import Component, hookimpl
from altgrad_core.options import between, option

BITS = 8
MOST_EXPONENT_BITS = 4
"""Of a posit: with 5 its largest value would be 2^192, and float32 ends at 2^127."""
MOST_STEPS = 126
"""Of LNS, to a binade: the 127 magnitudes then reach over just one. Over less, a scale that is a power of two
could leave a tensor's largest element below all of them."""


@attrs.frozen(kw_only=True)
class PositOptions:
    """An 8-bit posit. The Posit Standard (2022) fixes `es` at 2; older drafts and papers have others."""

    es: int = option(
        "width of the exponent field; 2 is the standard's",
        unit="bits",
        default=2,
        validator=between(0, MOST_EXPONENT_BITS),
    )


def _one_binade_or_more(_: object, field: object, gamma: int) -> None:
    """Attrs validator: the magnitudes are no sparser than powers of two, and reach over a binade."""
    if not 1 <= gamma <= MOST_STEPS:
        raise ValueError(
            f"expected 1 (powers of two only) to {MOST_STEPS} (all magnitudes within one binade),"
            f" got {gamma!r}; try 8, which reaches from 2^-7.75 to 2^8"
        )


@attrs.frozen(kw_only=True)
class LNSOptions:
    """A logarithmic number system: zero and, of each sign, the magnitudes 2^(k/gamma), k = -62 to 64."""

    gamma: int = option(
        "how finely a binade is divided; the range is 2^(126/gamma)",
        unit="steps per binade",
        default=8,
        validator=_one_binade_or_more,
    )


@hookimpl
def altgrad_formats() -> list[Component]:
    """Register both formats."""
    return [
        Component(
            name="posit8",
            summary="8-bit posit: most precise near 1; with es = 2 from 2^-24 to 2^24",
            options=PositOptions,
            target="altgrad_posit.posit:from_options",
            source="Standard for Posit Arithmetic (2022)",
            bits=BITS,
        ),
        Component(
            name="LNS",
            summary="logarithmic number system: zero and 127 magnitudes, a factor 2^(1/gamma) apart",
            options=LNSOptions,
            target="altgrad_posit.logarithmic:from_options",
            source="LNS-Madam, arXiv 2106.13914",
            bits=BITS,
        ),
    ]
