"""The stiffness loops in C against the formulas in torch, bit for bit."""

import ctypes
import math

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core.format import Format
from altgrad_core.lookup import get_stiffness
from altgrad_formats import native_stiffness

LOOP = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p
)


def in_c(name, weights, format, scale):
    loop = get_stiffness(name).block_loop(format)
    if loop is None:
        pytest.skip("there is no C compiler here")
    out = torch.empty_like(weights)
    LOOP(loop.function)(weights.data_ptr(), out.data_ptr(), weights.numel(), scale, loop.context)
    return out


@pytest.mark.parametrize("scale", [1.0, 2.0**9, 2.0**-20, 3.0])
@pytest.mark.parametrize("format", ["E4M3", "E7M0", "E0M7", "BF16"])
@pytest.mark.parametrize("name", ["ideal", "smooth"])
def test_every_pattern_of_a_coarse_sweep_has_the_bits_of_the_formula(name, format, scale):
    format = altgrad.get_format(format)
    patterns = torch.arange(-(2**31), 2**31, 65537).to(torch.int32).view(torch.float32)
    ends = [0.0, -0.0, 1e-45, -1.1e-38, 2.0**-126, 3.4e38, math.inf, -math.inf, math.nan, 1.0, 0.99999994]
    weights = torch.cat([patterns, torch.tensor(ends)])
    expected = get_stiffness(name)(weights, format, scale)
    found = in_c(name, weights, format, scale)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


def test_a_table_of_values_has_no_loop():
    assert native_stiffness.loop("ideal", Format(name="TABLE", bits=3, values=[-1.0, 0.0, 1.0])) is None
