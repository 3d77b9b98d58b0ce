"""Stiffness formulas to hold against the true spacing: the founding one, a smooth one, and a control.

The spacing of a format with M mantissa bits is ulp(x) = 2^(max(floor(log2|x|), e_min) - M), with x = w*s
and e_min its lowest exponent; the core's formula `grid` is ulp(w*s)/s. Beside it:

ideal       2^(floor(log2|w|) - M), and 1 at w = 0, where that is undefined. It knows no e_min and no s. At
            weights of size 0.02 and scale 1, every weight lies below the lowest exponent of E0M7, E1M6,
            E2M5 and E3M4, and `ideal` is wrong for all of them.
smooth      max(|w|*ln2/2^M, smallest/s): the derivative of w = 2^(u/2^M), the geometry of a logarithmic
            number system, down to the subnormals' spacing. No jumps at powers of two, where grid doubles;
            1.39 times grid just below one and 0.69 times at it. At E0M7 it is constant, at E1M6 not.
scrambled   grid of the current weights, permuted over the tensor by one fixed permutation: the same
            multiset of step sizes, at the wrong weights. What it loses against grid is due to geometry.

Exponents are exact: frexp splits |w| = m*2^e with m in [1/2, 1), and w/(2m) is 2^(e-1), a quotient that
needs no rounding. (log2 in float32 rounds up to the next whole number just below most powers of two.)
"""

from __future__ import annotations

import functools
import math

import attrs
import torch
from torch import Tensor

from altgrad_core import native
from altgrad_core.elementwise import wide
from altgrad_core.format import Format
from altgrad_core.hookspecs import NoOptions, Stiffness
from altgrad_core.stiffness import grid_stiffness, representable_
from altgrad_formats import ScrambledOptions, native_stiffness


@attrs.frozen
class Looped:
    """A formula that is also a loop in C over blocks of float32 weights, with the same bits."""

    formula: Stiffness
    loop_name: str

    def __call__(self, weight: Tensor, format: Format, scale: Tensor | float) -> Tensor:
        return self.formula(weight, format, scale)

    def block_loop(self, format: Format) -> native.SpacingLoop | None:
        """Return the loop for a format; None where there is none."""
        return native_stiffness.loop(self.loop_name, format)


@torch.no_grad()
def ideal_stiffness(weight: Tensor, format: Format, scale: Tensor | float) -> Tensor:
    """Return 2^(floor(log2|w|) - M), and 1 where w is 0; the scale is ignored.

    Raises ValueError for a format without a mantissa width.
    """
    mantissa_bits = _mantissa_bits(format, "ideal")
    w = wide(weight)
    w = w.clamp(-torch.finfo(w.dtype).max, torch.finfo(w.dtype).max)  # inf has no exponent
    binade = w / (2 * torch.frexp(w).mantissa)
    stiffness = torch.where(w == 0, 1.0, binade * 2.0**-mantissa_bits)
    return representable_(stiffness, weight.dtype)


@torch.no_grad()
def smooth_stiffness(weight: Tensor, format: Format, scale: Tensor | float) -> Tensor:
    """Return |w|*ln2/2^M, at least the spacing of the format's subnormals in weight units.

    Raises ValueError for a format without a mantissa width.
    """
    slope = math.log(2) * 2.0 ** -_mantissa_bits(format, "smooth")
    magnitude = wide(weight).abs()
    floor = torch.full_like(magnitude, format.smallest) / scale
    return representable_(torch.maximum(magnitude * slope, floor), weight.dtype)


@torch.no_grad()
def scrambled_stiffness(weight: Tensor, format: Format, scale: Tensor | float, *, seed: int = 0) -> Tensor:
    """Return the grid's stiffness, permuted over the tensor by the permutation of this seed and size."""
    spacing = grid_stiffness(weight, format, scale)
    return spacing.flatten()[_order(seed, spacing.numel(), spacing.device)].view(weight.shape)


@functools.lru_cache(maxsize=64)
def _order(seed: int, count: int, device: torch.device) -> Tensor:
    """Return the permutation of `count` elements: drawn on the CPU, so that every device has the same."""
    draws = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=draws, device="cpu").to(device)


def _mantissa_bits(format: Format, formula: str) -> int:
    mantissa_bits = getattr(getattr(format, "layout", None), "mantissa_bits", None)
    if mantissa_bits is None:
        raise ValueError(
            f"the stiffness {formula!r} needs a mantissa width, and {format.name} is a table of values"
            " without one; use 'grid', 'scrambled' or 'uniform', or name an ExMy format with of_format"
        )
    return int(mantissa_bits)


def ideal(options: NoOptions) -> Stiffness:
    """Return the formula `ideal`."""
    return Looped(ideal_stiffness, "ideal")


def smooth(options: NoOptions) -> Stiffness:
    """Return the formula `smooth`."""
    return Looped(smooth_stiffness, "smooth")


def scrambled(options: ScrambledOptions) -> Stiffness:
    """Return the formula `scrambled` of a permutation."""
    return functools.partial(scrambled_stiffness, seed=options.seed)
