"""Scales: how a tensor is mapped onto a format's range.

Quantizing a tensor x means Q(x) = quantize(x*s)/s, with s from amax, the largest magnitude of what shares
the scale. The rules:

    fit     s = 2^k, k = floor(log2(largest/(amax*margin))): the largest power of two at which nothing
            saturates;
    ocp     s = 2^(floor(log2 largest) - floor(log2 amax)), OCP Microscaling (MX) 1.0, section 6.3: up to
            twice `fit`, elements above the largest value saturate;
    exact   s = largest/(amax*margin), no power of two: a control. Rounded toward zero to float32, so that
            amax does not end an ulp past the largest value.

k comes from exponents (float64's bits), never from a float32 quotient, which overflows for E7M0 and for BF16
at every real weight tensor. All scales are clamped to [2^-126, 2^126], where s and 1/s are both normal
float32. Where there is no amax yet (nothing but zeros), s is 2^floor(log2 largest).

One scale serves a tensor, a channel (a row along the last dimension) or a block of the last dimension.
`two_level` gives blocks a scale that is itself quantized, as in NVFP4.

A scale that follows grid-stored weights moves with hysteresis (`adapted`), so that weights do not leave
their grid at every fluctuation. Everything is tensors on the tensor's device; nothing synchronizes.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from altgrad_core.format import Format

GRANULARITIES = ("none", "tensor", "channel", "block")
RULES = ("fit", "ocp", "exact")
BLOCKS = (16, 32)

LARGEST_EXPONENT = 126
"""|k| never exceeds this: 2^126 and 2^-126 are normal float32."""

UNSCALED = {
    "BF16": (16, 2.0**-133, (2 - 2.0**-7) * 2.0**127),
    "FP16": (16, 2.0**-24, 65504.0),
}
"""Formats that cover the range of real tensors by themselves, and always use s = 1: name to bits, smallest
positive and largest value, which make the format whatever its name."""

_MANTISSA_BITS = 52
"""Of float64."""


def amax(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude of each tensor: (n,) float64, exact; 0 for one without elements.

    NaN where a tensor holds NaN.
    """
    filled = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    if not filled[0].is_cpu:  # one kernel for all; on a CPU it takes twenty times as long
        return torch.stack(torch._foreach_norm(filled, math.inf, dtype=torch.float64))
    ends = torch.stack([end for tensor in filled for end in torch.aminmax(tensor)]).double()
    return ends.view(-1, 2).abs().amax(dim=1)


def amax_per(x: Tensor, granularity: str, block: int) -> Tensor:
    """Return the largest magnitude of each part of x that shares a scale, exact, in x's dtype.

    Of shape () for "tensor", (..., 1) for "channel" and (..., blocks) for "block". NaN where a part holds
    NaN. x has elements.
    """
    if granularity == "tensor":
        lowest, highest = torch.aminmax(x)
        return torch.maximum(-lowest, highest)
    parts = _in_blocks(x, block) if granularity == "block" else x
    return parts.abs().amax(dim=-1, keepdim=granularity == "channel")


def _in_blocks(x: Tensor, block: int) -> Tensor:
    """Return x (..., n) as (..., blocks, block), a shorter last block filled up with zeros."""
    short = -x.shape[-1] % block
    padded = torch.nn.functional.pad(x, (0, short)) if short else x
    return padded.reshape(*x.shape[:-1], padded.shape[-1] // block, block)


def spread(per_block: Tensor, length: int, block: int) -> Tensor:
    """Return what each block has, (..., blocks), for each of its elements: (..., length).

    A shorter last block is put behind the others, not cut out of a whole one: torch.compile gets that wrong.
    """
    whole, short = divmod(length, block)
    each = per_block[..., :whole].unsqueeze(-1).expand(*per_block.shape[:-1], whole, block)
    filled = each.reshape(*per_block.shape[:-1], whole * block)
    if not short:
        return filled
    last = per_block[..., whole:].expand(*per_block.shape[:-1], short)
    return torch.cat((filled, last), dim=-1) if whole else last.contiguous()


def scale(amax: Tensor, format: Format, rule: str = "fit", margin: float = 1.0) -> Tensor:
    """Return the scale of each amax under a rule: float32, of its shape. `ocp` knows no margin."""
    if rule == "exact":
        magnitude = amax.double() * margin
        found = _within_normal(format.largest / magnitude)
        past = found.double() * magnitude > format.largest
        found = torch.where(past & (found > 2.0**-LARGEST_EXPONENT), _next_below(found), found)
    else:
        found = power_of_two(
            fit_exponent(amax, format, margin) if rule == "fit" else ocp_exponent(amax, format)
        )
    return torch.where(usable(amax), found, 2.0 ** empty_exponent(format))


def two_level(blocks: Tensor, format: Format, block_scale: Format) -> Tensor:
    """Return the scale t/d of each block: float32, of the shape of `blocks`, the blocks' amax.

    t = largest(block_scale)*largest(format)/amax maps the tensor's amax onto both formats, and
    d = block_scale(t*amax_block/largest(format)) is the block's step, so that an element becomes
    format(x*t/d)*d/t. NVFP4 has E2M1 elements and E4M3 steps over blocks of 16.

    d is rounded once, from a float64 quotient in which its ties are exact, and t/d once, to float32. A step
    that rounds to 0 is the smallest positive one instead: such a block, zeros or values some 2^-18 below the
    tensor's amax, keeps its zeros and makes no NaN. A NaN or an inf counts in no other block than its own.
    """
    seen = torch.where(usable(blocks), blocks, 0.0).double()
    whole = seen.max()
    whole = torch.where(whole > 0, whole, 1.0)
    step = block_scale.quantize(block_scale.largest * seen / whole).clamp(min=block_scale.smallest)
    return _within_normal(block_scale.largest * format.largest / (whole * step))


def _within_normal(scale: Tensor) -> Tensor:
    """Return float64 scales as float32, at least 2^-126 and at most 2^126."""
    return scale.clamp(2.0**-LARGEST_EXPONENT, 2.0**LARGEST_EXPONENT).float()


def _next_below(scale: Tensor) -> Tensor:
    """Return the next smaller float32 of each positive one."""
    return (scale.view(torch.int32) - 1).view(torch.float32)


def ocp_exponent(amax: Tensor, format: Format) -> Tensor:
    """Return k of the `ocp` rule, clamped: int32, of amax's shape. Nonsense where amax is 0 or not finite."""
    k = (_bits(format.largest) >> _MANTISSA_BITS) - (_patterns(amax.double()) >> _MANTISSA_BITS)
    return k.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).to(torch.int32)


def fit_exponent(amax: Tensor, format: Format, margin: float = 1.0) -> Tensor:
    """Return k of the `fit` rule, clamped: int32, of amax's shape. Nonsense where amax is 0 or not finite."""
    # patterns are exponent + mantissa in fixed point: a larger mantissa in amax borrows 1 from k
    k = (_bits(format.largest) - _patterns(amax.double() * margin)) >> _MANTISSA_BITS
    return k.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).to(torch.int32)


def _patterns(x: Tensor) -> Tensor:
    """Return the bit patterns of float64 numbers: int64, of their shape, in their order for x >= 0."""
    return x.view(torch.int64)


def _bits(x: float) -> int:
    """Return the bit pattern of a float64 number."""
    return int.from_bytes(struct.pack(">d", x))


# what torch.compiler.assume_constant_result does, which would import the compiler: a second
_bits._dynamo_marked_constant = True  # type: ignore[attr-defined]


def empty_exponent(format: Format) -> int:
    """Return k where there is no amax yet: as if amax were 1 under a power-of-two largest value."""
    return clamped(math.frexp(format.largest)[1] - 1)


def clamped(k: int) -> int:
    """Return the exponent of a scale, or the nearest at which it and its inverse are normal float32."""
    return max(-LARGEST_EXPONENT, min(LARGEST_EXPONENT, k))


def usable(amax: Tensor) -> Tensor:
    """Return where amax is finite and positive: bool, of its shape."""
    return torch.isfinite(amax) & (amax > 0)


def power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent exactly, float32, for exponents in [-126, 127]."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def fitted_exponent(amax: Tensor, format: Format, margin: float = 1.0) -> Tensor:
    """Return k of the `fit` rule, or of an empty tensor where amax is 0 or not finite: int32."""
    return torch.where(usable(amax), fit_exponent(amax, format, margin), empty_exponent(format))


def scaled(format: Format, granularity: str = "tensor") -> bool:
    """Whether tensors in this format have a scale other than 1."""
    return granularity != "none" and (format.bits, format.smallest, format.largest) not in UNSCALED.values()


def adapted(
    k: Tensor, seen: Tensor, amax: Tensor, format: Format, margin: float, shrink_early: bool
) -> Tensor:
    """Return the next exponents of grid-stored tensors, from the updated, unrounded amax.

    k* = fit(amax); k becomes k* where that is smaller, k + 1 where k* >= k + 2, else stays. Where nothing
    but zeros was `seen` before, k* is taken. amax 0 or not finite leaves k as it is.

    k, amax: (n,). seen: (n,) bool, whether the tensor ever had a positive amax.
    shrink_early: False under nearest rounding, where k decreases only if amax*s rounds past the largest.
    """
    fitted = fit_exponent(amax, format, margin)
    smaller = fitted < k
    if not shrink_early:
        rounded = format.quantize(amax * power_of_two(k), overflow="ieee")
        smaller = smaller & ~torch.isfinite(rounded)
    moved = torch.where(smaller, fitted, torch.where(fitted >= k + 2, k + 1, k))
    return torch.where(usable(amax), torch.where(seen, moved, fitted), k)


def adapted_number(k: int, seen: bool, amax: float, format: Format, margin: float, shrink_early: bool) -> int:
    """Return what `adapted` does of one tensor, from numbers: on a CPU in a hundredth of the time."""
    if not 0 < amax < math.inf:
        return k
    fitted = clamped((_bits(format.largest) - _bits(amax * margin)) >> _MANTISSA_BITS)
    if not seen:
        return fitted
    if fitted < k:
        return fitted if shrink_early or _rounds_past(amax * 2.0**k, format) else k
    return k + 1 if fitted >= k + 2 else k


def _rounds_past(x: float, format: Format) -> bool:
    """Whether a magnitude rounds past the largest value, to nearest even."""
    midpoint, tie_does = last_midpoint(format)
    return x > midpoint or (x == midpoint and tie_does)


@functools.lru_cache(maxsize=64)
def last_midpoint(format: Format) -> tuple[float, bool]:
    """Return half a gap past the largest value, and whether that rounds past it; what is below does not."""
    top = torch.tensor([format.largest], dtype=torch.float64, device="cpu")
    midpoint = top + format.spacing(top) / 2
    return float(midpoint), bool(format.quantize(midpoint, overflow="ieee").isfinite().logical_not())
