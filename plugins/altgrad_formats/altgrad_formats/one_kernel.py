"""Rounding with the format as data: one compiled kernel that serves every ExMy format, as on a GPU.

`torch.compile` makes a kernel for each set of Python numbers it meets, and gives up silently at the eighth.
Here the layout comes as a tensor of integers, so that dtype and rounding alone decide on a compilation.

The arithmetic is that of exmy.c, on the bits of float32. A magnitude code counts the values from zero. In
the normal range it is the pattern shifted right by 23 - M, less an offset; below, a multiple of one spacing.
Its value is a shift back; the codes of subnormals, read as if they had the hidden bit, are n where 2n less
the smallest normal is meant, which is the lesser of the two exactly there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from altgrad_core.elementwise import bounded
from altgrad_core.kernels import flat, kernel
from altgrad_core.random_bits import uniform_like
from altgrad_formats.layout import Layout

FEWEST_ELEMENTS = 2**16
"""Below this a kernel's launch costs more than eager passes do."""

FLOAT32_MANTISSA, FLOAT32_BIAS = 23, 127
_MINUS_INF = -(2**23)  # the bits of float32's -inf, as an int32
_MAGNITUDE, _EXPONENT = 0x7FFFFFFF, 0x7F800000
_TWICE_ONE = 0x7F000000  # less the bits of a power of two: those of its reciprocal
_SHIFT, _HALF, _OFFSET, _MAGIC, _NORMAL, _SUBTRAHEND, _LARGEST = range(7)


def constants(layout: Layout) -> list[int]:
    """Return the struct Layout of exmy.c, whose comments say what is what."""
    shift, lowest = FLOAT32_MANTISSA - layout.mantissa_bits, layout.lowest_exponent
    unit = lowest - layout.mantissa_bits
    normal = (lowest + FLOAT32_BIAS) << FLOAT32_MANTISSA
    infinity = layout.largest_code if layout.inf_code is None else layout.inf_code
    return [
        shift,
        (1 << (shift - 1)) - 1,
        (lowest + FLOAT32_BIAS - 1) << layout.mantissa_bits,
        (FLOAT32_MANTISSA + unit + FLOAT32_BIAS) << FLOAT32_MANTISSA,
        normal,
        _MINUS_INF if lowest == 1 - FLOAT32_BIAS else normal,
        layout.largest_code,
        infinity,
        -1 if layout.nan_code is None else layout.nan_code,
        layout.magnitudes,
    ]


def in_reach(layout: Layout, rounding: str) -> bool:
    """Whether the arithmetic on float32's bits is exact for this layout, and there is one for the rounding.

    It is if codes are float32 patterns and the smallest spacing is at most 1; stochastic rounding also needs
    spacings that are normal float32 and have a normal reciprocal, up to the value after the largest.
    """
    unit = layout.lowest_exponent - layout.mantissa_bits  # exponent of the smallest spacing
    exact = layout.lowest_exponent >= 1 - FLOAT32_BIAS and unit <= 0
    if rounding != "stochastic":
        return exact and rounding == "nearest_even"
    top = layout.split(layout.largest_code + 1)[1]  # exponent of the spacing after the largest value
    return exact and unit > -FLOAT32_BIAS and top < FLOAT32_BIAS


def quantized(
    x: Tensor, scale: Tensor | None, keys: Tensor | None, limit: Tensor | None, beyond: Tensor, k: Tensor
) -> Tensor:
    """Return what `Format.fake_quantize` says: to nearest even, or stochastic where there are keys.

    x: float32. beyond: 0-d, what rounds past the largest value becomes. k: `constants`, int32.
    """
    scaled = x if scale is None else x * scale
    magnitude = scaled.view(torch.int32) & _MAGNITUDE
    if keys is None:
        code = _nearest_even(magnitude, k)
        rounded = _value(torch.minimum(code, k[_LARGEST]), k)
        past = code > k[_LARGEST]
    else:
        rounded = _stochastic(magnitude.view(torch.float32), uniform_like(x, keys), beyond, k)
        past = rounded > _value(k[_LARGEST], k)
    rounded = bounded(torch.where(past, beyond, rounded).copysign(scaled), limit)
    rounded = torch.where(scaled.isnan(), scaled, rounded)
    return rounded if scale is None else rounded / scale


compiled = kernel(quantized, always=True)


class OneKernel:
    """The compiled kernel for one layout, on any device."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._constants: dict[torch.device, Tensor] = {}
        self._beyond: dict[tuple[torch.device, float], Tensor] = {}

    def serves(self, x: Tensor, rounding: str, scale: Tensor | None) -> bool:
        """Whether the kernel is for this tensor: a large float32 one of a GPU, outside of a trace."""
        large = x.is_cuda and x.dtype == torch.float32 and x.numel() >= FEWEST_ELEMENTS
        one_scale = scale is None or scale.dim() == 0
        return large and one_scale and in_reach(self._layout, rounding) and not torch.compiler.is_compiling()

    def quantize(
        self, x: Tensor, scale: Tensor | None, keys: Tensor | None, limit: Tensor | None, beyond: float
    ) -> Tensor:
        """Return x rounded as `Format.fake_quantize` says."""
        if x.device not in self._constants:
            self._constants[x.device] = torch.tensor(constants(self._layout), dtype=torch.int32).to(x.device)
        if (x.device, beyond) not in self._beyond:
            self._beyond[x.device, beyond] = torch.tensor(beyond, dtype=torch.float32, device="cpu").to(
                x.device
            )
        past, layout = self._beyond[x.device, beyond], self._constants[x.device]
        return compiled(flat(x), scale, keys, limit, past, layout).view(x.shape)


def _value(code: Tensor, k: Tensor) -> Tensor:
    normal = ((code + k[_OFFSET]) << k[_SHIFT]).view(torch.float32)
    return torch.minimum(normal, (normal + normal) - k[_SUBTRAHEND].view(torch.float32))


def _nearest_even(magnitude: Tensor, k: Tensor) -> Tensor:
    odd = ((magnitude >> k[_SHIFT]) - k[_OFFSET]) & 1
    normal = ((magnitude + (k[_HALF] + odd)) >> k[_SHIFT]) - k[_OFFSET]
    subnormal = (magnitude.view(torch.float32) + k[_MAGIC].view(torch.float32)).view(torch.int32) - k[_MAGIC]
    return torch.where(magnitude < k[_NORMAL], subnormal, normal)


def _stochastic(magnitude: Tensor, uniform: Tensor, beyond: Tensor, k: Tensor) -> Tensor:
    largest = _value(k[_LARGEST], k)
    cut = torch.where(beyond == largest, largest, _value(k[_LARGEST] + 1, k))
    inside = torch.minimum(magnitude, cut)
    binade = torch.maximum(inside.view(torch.int32) & _EXPONENT, k[_NORMAL])
    ulp = binade - ((FLOAT32_MANTISSA - k[_SHIFT]) << FLOAT32_MANTISSA)
    y = inside * (_TWICE_ONE - ulp).view(torch.float32)  # inside / ulp, exactly: a power of two
    whole = y.floor()
    return (whole + (uniform < y - whole).to(torch.float32)) * ulp.view(torch.float32)
