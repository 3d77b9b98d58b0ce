"""A logarithmic number system: the logarithm of a magnitude is a fixed-point number.

    magnitude = 2^(k / gamma),  k = -62 ... 64          (after LNS-Madam, arXiv 2106.13914)

Neighbors differ by one factor, 2^(1/gamma), over the whole range: a rung up is a multiplication, where an
ExMy format adds within a binade. Zero, which has no logarithm, has a code of its own. With gamma = 1 the
values are E7M0's, and so is every saturating rounding to them.

Limits:

- All magnitudes but the powers of two are irrational; the values are the float32 numbers nearest to them.
  They take all of float32's 24 bits, and bfloat16 cannot hold them: for gamma > 1 a run needs
  `dtype = "float32"`.
- 127 magnitudes reach over 126/gamma binades: 15.75 for gamma = 8, one for 126. The gap between the smallest
  and zero is 1/(2^(1/gamma) - 1) times the next one, 11 times for gamma = 8. Normally distributed weights are
  rounded best with gamma from 16 to 20; with 32 too many of them lie in that gap.
"""

from __future__ import annotations

import torch

from altgrad_core.format import Format
from altgrad_posit import BITS, LNSOptions

STEPS = range(-62, 65)
"""The logarithms in units of 1/gamma: E7M0's exponents, 2^7 - 1 of them."""


def from_options(options: LNSOptions) -> Format:
    """Return the format of 255 values."""
    magnitudes = [2.0 ** (step / options.gamma) for step in STEPS]
    values = [*(-one for one in reversed(magnitudes)), 0.0, *magnitudes]
    nearest = torch.tensor(values, dtype=torch.float32)
    return Format(name=f"LNS(gamma={options.gamma})", bits=BITS, values=nearest)
