"""How each peer is called: (layout, mode, device) -> a function of a tensor.

None where the peer cannot express that very format in that mode. Settings are the best that the peer
documents: ties to even, subnormals, saturation, where it has them. A peer is imported when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import numpy as np
import torch
from torch import Tensor

import altgrad_core as altgrad
from altgrad_formats.layout import NAMED, Layout

MODES = ("nearest_even", "stochastic", "encode", "decode")
"""`decode` takes what the same peer's `encode` returns."""

Call = Callable[[Any], Any]
Adapter = Callable[[Layout, str, str], Call | None]


def largest(layout: Layout) -> float:
    """Return the largest finite value of a layout."""
    significand, unit = layout.split(layout.largest_code)
    return float(significand * 2.0**unit)


def _usual_bias(layout: Layout) -> bool:
    """Whether the bias is IEEE 754's, the only one that many peers have."""
    return layout.exponent_bits > 0 and layout.bias == 2 ** (layout.exponent_bits - 1) - 1


def altgrad_calls(layout: Layout, mode: str, device: str) -> Call | None:
    numbers = attrs.asdict(layout)
    format = altgrad.get_format(layout.name if layout.name in NAMED else numbers)
    generator = torch.Generator().manual_seed(0)
    calls: dict[str, Call] = {
        "nearest_even": format.quantize,
        "stochastic": lambda x: format.quantize(x, "stochastic", generator=generator),
        "encode": format.encode,
        "decode": format.decode,
    }
    return calls[mode]


_TORCH_DTYPES = {
    NAMED["E4M3"]: torch.float8_e4m3fn,
    NAMED["E5M2"]: torch.float8_e5m2,
    NAMED["FP16"]: torch.float16,
    NAMED["BF16"]: torch.bfloat16,
}


def torch_calls(layout: Layout, mode: str, device: str) -> Call | None:
    dtype = _TORCH_DTYPES.get(layout)
    if dtype is None:
        return None
    calls: dict[str, Call] = {
        "nearest_even": lambda x: x.to(dtype).float(),
        "encode": lambda x: x.to(dtype),
        "decode": lambda codes: codes.float(),
    }
    return calls.get(mode)


def ml_dtypes_calls(layout: Layout, mode: str, device: str) -> Call | None:
    import ml_dtypes

    dtypes = {
        "E4M3": "float8_e4m3fn",
        "E5M2": "float8_e5m2",
        "E3M4_IEEE": "float8_e3m4",
        "E2M3": "float6_e2m3fn",
        "E3M2": "float6_e3m2fn",
        "E2M1": "float4_e2m1fn",
        "BF16": "bfloat16",
    }
    if layout.name not in dtypes:
        return None
    dtype = getattr(ml_dtypes, dtypes[layout.name])
    calls: dict[str, Call] = {
        "nearest_even": lambda x: torch.from_numpy(x.numpy().astype(dtype).astype(np.float32)),
        "encode": lambda x: x.numpy().astype(dtype),
        "decode": lambda codes: codes.astype(np.float32),
    }
    return calls.get(mode)


def gfloat_calls(layout: Layout, mode: str, device: str) -> Call | None:
    import gfloat
    from gfloat.types import Domain

    info = gfloat.FormatInfo(
        layout.name,
        layout.bits,
        layout.mantissa_bits + 1,
        bias=layout.bias + (layout.exponent_bits == 0),  # gfloat counts a field of no bits as subnormal
        is_signed=True,
        domain=Domain.Extended if layout.specials == "ieee" else Domain.Finite,
        has_nz=True,
        num_high_nans={"finite": 0, "fn": 1, "ieee": 2**layout.mantissa_bits - 1}[layout.specials],
        has_subnormals=True,
        is_twos_complement=False,
    )
    random = np.random.default_rng(0)

    def rounded(v: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):  # it scales before it clamps
            return gfloat.round_ndarray(info, v, gfloat.RoundMode.TiesToEven, sat=True)

    def stochastic(x: Tensor) -> Tensor:
        bits = random.integers(0, 2**16, x.numel())
        modes = gfloat.RoundMode
        result = gfloat.round_ndarray(info, x.numpy(), modes.Stochastic, sat=True, srbits=bits, srnumbits=16)
        return torch.from_numpy(result)

    calls: dict[str, Call] = {
        "nearest_even": lambda x: torch.from_numpy(rounded(x.numpy())),
        "stochastic": stochastic,
        "encode": lambda x: gfloat.encode_ndarray(info, rounded(x.numpy())),
        "decode": lambda codes: gfloat.decode_ndarray(info, codes),
    }
    return calls[mode]


def torchao_calls(layout: Layout, mode: str, device: str) -> Call | None:
    from torchao.float8.float8_utils import to_fp8_saturated
    from torchao.prototype.mx_formats import kernels

    if layout in (NAMED["E4M3"], NAMED["E5M2"]):
        dtype = _TORCH_DTYPES[layout]
        encode: Call = lambda x: to_fp8_saturated(x, dtype)  # noqa: E731 - one of two pairs
        decode: Call = lambda codes: codes.float()  # noqa: E731
    elif layout.name in ("E2M1", "E2M3", "E3M2"):
        name = {"E2M1": "f4", "E2M3": "f6_e2m3", "E3M2": "f6_e3m2"}[layout.name]
        encode = getattr(kernels, f"f32_to_{name}_unpacked")
        decode = getattr(kernels, f"{name}_unpacked_to_f32")
    else:
        return None
    calls: dict[str, Call] = {
        "nearest_even": lambda x: decode(encode(x)),
        "encode": encode,
        "decode": decode,
    }
    return calls.get(mode)


def brevitas_calls(layout: Layout, mode: str, device: str) -> Call | None:
    from brevitas.core import function_wrapper as wrappers
    from brevitas.core.bit_width import BitWidthConst
    from brevitas.core.bit_width.float import StaticExponentBias, StaticMaxMantissa
    from brevitas.core.function_wrapper.stochastic_round import StochasticRoundSte
    from brevitas.core.quant.float import FloatQuant

    if layout.exponent_bits == 0 or mode not in ("nearest_even", "stochastic"):
        return None
    rounds = {
        "nearest_even": wrappers.RoundSte,
        "stochastic": lambda: StochasticRoundSte(deterministic_inference=False, seed=0, device=device),
    }
    quantizer = FloatQuant(
        signed=True,
        exponent_bit_width_impl=BitWidthConst(layout.exponent_bits),
        mantissa_bit_width_impl=BitWidthConst(layout.mantissa_bits),
        exponent_bias_impl=StaticExponentBias(layout.bias),
        float_clamp_impl=wrappers.FloatClamp(
            wrappers.TensorClamp(), signed=True, max_available_float=largest(layout), saturating=True
        ),
        input_view_impl=wrappers.Identity(),
        compute_max_mantissa=StaticMaxMantissa(layout.mantissa_bits),
        float_to_int_impl=rounds[mode](),
    ).to(device)
    return lambda x: quantizer(x)[0]


def qtorch_calls(layout: Layout, mode: str, device: str) -> Call | None:
    from qtorch.quant import fixed_point_quantize, float_quantize

    rounding = {"nearest_even": "nearest", "stochastic": "stochastic"}.get(mode)
    if rounding is None or layout.specials != "finite":
        return None
    if layout.is_uniform:
        fraction_bits = layout.mantissa_bits - layout.lowest_exponent
        numbers = {"wl": layout.bits, "fl": fraction_bits, "clamp": True, "symmetric": True}
        return lambda x: fixed_point_quantize(x, **numbers, rounding=rounding)
    if layout.mantissa_bits == 0 or not _usual_bias(layout):
        return None
    return lambda x: float_quantize(x, layout.exponent_bits, layout.mantissa_bits, rounding)


def pychop_calls(layout: Layout, mode: str, device: str) -> Call | None:
    import pychop

    rounding = {"nearest_even": 1, "stochastic": 5}.get(mode)
    if rounding is None or layout.specials != "ieee" or not _usual_bias(layout):
        return None
    return pychop.Chop(exp_bits=layout.exponent_bits, sig_bits=layout.mantissa_bits, rmode=rounding)


def p3109_calls(layout: Layout, mode: str, device: str) -> Call | None:
    import pychop

    if layout.specials != "finite" or layout.bias != 2**layout.exponent_bits // 2 or not layout.bias:
        return None
    if mode == "stochastic":
        return None  # it wants the random bits as an argument
    numbers = pychop.P3109Format(k=layout.bits, precision=layout.mantissa_bits + 1, domain="finite")
    quantizer = pychop.P3109(numbers, saturate=True)
    calls: dict[str, Call] = {
        "nearest_even": quantizer,
        "encode": quantizer.encode,
        "decode": quantizer.decode,
    }
    return calls[mode]


def microxcaling_calls(nearest: str) -> Adapter:
    def adapter(layout: Layout, mode: str, device: str) -> Call | None:
        from mx.elemwise_ops import _quantize_elemwise

        names = {
            "E4M3": "fp8_e4m3",
            "E5M2": "fp8_e5m2",
            "E3M2": "fp6_e3m2",
            "E2M3": "fp6_e2m3",
            "E2M1": "fp4_e2m1",
            "FP16": "float16",
            "BF16": "bfloat16",
        }
        rounding = {"nearest_even": nearest, "stochastic": "dither"}.get(mode)
        if rounding is None or layout.name not in names:
            return None
        return lambda x: _quantize_elemwise(x, names[layout.name], rounding, saturate_normals=True)

    return adapter
