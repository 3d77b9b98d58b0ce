"""The formats with names, as constants: `from altgrad_formats.catalog import E4M3`."""

from __future__ import annotations

from altgrad_formats.exmy import ExMy
from altgrad_formats.layout import NAMED


def _named(name: str) -> ExMy:
    layout = NAMED[name]
    return ExMy(layout.exponent_bits, layout.mantissa_bits, layout.bias, layout.specials, name)


E0M7 = _named("E0M7")
E1M6 = _named("E1M6")
E2M5 = _named("E2M5")
E3M4 = _named("E3M4")
E3M4_IEEE = _named("E3M4_IEEE")
E4M3 = _named("E4M3")
E5M2 = _named("E5M2")
E6M1 = _named("E6M1")
E7M0 = _named("E7M0")

E2M1 = _named("E2M1")
E2M3 = _named("E2M3")
E3M2 = _named("E3M2")

FP16 = E5M10 = _named("FP16")
BF16 = E8M7 = _named("BF16")
E0M15 = _named("E0M15")
E1M14 = _named("E1M14")
E2M13 = _named("E2M13")
E3M12 = _named("E3M12")
E4M11 = _named("E4M11")
E6M9 = _named("E6M9")
E7M8 = _named("E7M8")
