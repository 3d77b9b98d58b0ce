"""Scales: how a tensor is mapped onto a format's range.

Quantising a tensor x means Q(x) = quantize(x*s)/s. Under the rule `fit`, s = 2^k with
k = floor(log2(largest/(amax*margin))): the largest power of two at which nothing saturates. k comes from
exponents (frexp), never from a float32 quotient, which overflows for E7M0 and for BF16 at every real
weight tensor; it is clamped to [-126, 126], where 2^k and 2^-k are both normal float32.

A scale that follows grid-stored weights moves with hysteresis (`adapted`), so that weights do not leave
their grid at every fluctuation. Everything is tensors on the tensor's device; nothing synchronises.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from altgrad_core.format import Format

LARGEST_EXPONENT = 126
"""|k| never exceeds this: 2^126 and 2^-126 are normal float32."""

UNSCALED = ("BF16", "FP16", "FP32")
"""Formats that cover the range of real tensors by themselves and always use s = 1."""


def amax(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude of each tensor: (n,) float64, exact; 0 for one without elements.

    NaN where a tensor holds NaN.
    """
    filled = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    return torch.stack([norm.double() for norm in torch._foreach_norm(filled, math.inf)])


def fit_exponent(amax: Tensor, format: Format, margin: float = 1.0) -> Tensor:
    """Return k of the `fit` rule, clamped: int32, of amax's shape. Nonsense where amax is 0 or not finite."""
    mantissa, exponent = torch.frexp(amax.double() * margin)
    top, top_exponent = math.frexp(format.largest)
    k = top_exponent - exponent - (mantissa > top).to(torch.int32)
    return k.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT)


def empty_exponent(format: Format) -> int:
    """Return k where there is no amax yet: as if amax were 1 under a power-of-two largest value."""
    k = math.frexp(format.largest)[1] - 1
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
    return granularity != "none" and format.name not in UNSCALED


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
