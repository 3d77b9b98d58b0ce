"""Every named format against implementations that are not ours: gfloat, ml_dtypes and torch's own casts.

What has to be known of them: gfloat raises on overflow where a format has neither inf nor NaN, so there it
is asked with one exponent bit more; ml_dtypes overflows to inf or NaN, so it is compared in range; torch's
E4M3 cast saturates in some builds and gives NaN in others, the same.
"""

import ml_dtypes
import numpy as np
import pytest
import torch

from altgrad_formats import NAMED, catalog

FORMATS = [getattr(catalog, name) for name in NAMED]
MODES = ["nearest_even", "nearest_away", "toward_zero", "up", "down"]
DTYPES = [torch.float32, torch.float64]
by_name = pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)

ML_DTYPES = {
    "E5M2": ml_dtypes.float8_e5m2,
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E3M4_IEEE": ml_dtypes.float8_e3m4,
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "BF16": ml_dtypes.bfloat16,
    "FP16": np.float16,
}
TORCH_DTYPES = {
    "E5M2": torch.float8_e5m2,
    "E4M3": torch.float8_e4m3fn,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
}


@by_name
def test_each_code_has_gfloat_s_value(format, gfloat_decodes):
    expected = gfloat_decodes(format)
    seen = format.decode(torch.arange(2**format.bits)).double()
    assert torch.equal(seen.nan_to_num(7.7), expected.double().nan_to_num(7.7))


@by_name
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_codes_midpoints_and_neighbors_round_as_in_gfloat(
    format, mode, dtype, edges, gfloat_rounds, assert_same_bits
):
    x = edges(format, dtype)
    assert_same_bits(x, format.quantize(x, mode), gfloat_rounds(format, x, mode))


@by_name
@pytest.mark.parametrize("mode", MODES)
def test_overflow_is_where_gfloat_with_one_exponent_bit_more_passes_the_end(
    format, mode, edges, gfloat_unbounded, assert_same_bits
):
    x = edges(format)
    x = x[~x.isnan()]
    unbounded = gfloat_unbounded(format, x, mode)
    inward = {"toward_zero": x.isfinite(), "up": x.isfinite() & (x < 0), "down": x.isfinite() & (x > 0)}
    cut = unbounded.clamp(-format.largest, format.largest)
    special = torch.full_like(cut, torch.inf if format.has_inf else torch.nan).copysign(cut)
    special = torch.where(inward.get(mode, torch.zeros(1) > 0), cut, special)
    expected = torch.where(unbounded.abs() > format.largest, special, unbounded).float()
    assert_same_bits(x, format.quantize(x, mode, overflow="ieee"), expected)


@pytest.mark.parametrize("format", [f for f in FORMATS if f.has_nan], ids=lambda format: format.name)
@pytest.mark.parametrize("mode", MODES)
def test_overflow_is_gfloat_s_own_where_it_has_nan(format, mode, edges, gfloat_rounds, assert_same_bits):
    x = edges(format)
    seen = format.quantize(x, mode, overflow="ieee")
    assert_same_bits(x, seen, gfloat_rounds(format, x, mode, "ieee"))


@by_name
def test_random_bit_patterns_round_as_in_gfloat(format, random_patterns, gfloat_rounds, assert_same_bits):
    x = random_patterns(format, 1_000_000 if format.bits <= 8 else 200_000)
    assert_same_bits(x, format.quantize(x), gfloat_rounds(format, x, "nearest_even"))


@pytest.mark.slow
@by_name
@pytest.mark.parametrize("mode", MODES)
def test_two_million_bit_patterns_round_as_in_gfloat(
    format, mode, random_patterns, gfloat_rounds, assert_same_bits
):
    for dtype in DTYPES:
        x = random_patterns(format, 2_000_000, seed=1).to(dtype)
        x = torch.cat((x, torch.nextafter(x, torch.zeros_like(x)))) if dtype == torch.float64 else x
        assert_same_bits(x, format.quantize(x, mode), gfloat_rounds(format, x, mode))


@pytest.mark.parametrize("name", ML_DTYPES)
def test_codes_are_ml_dtypes_codes(name):
    format = getattr(catalog, name)
    raw = np.arange(2**format.bits).astype(np.uint8 if format.bits <= 8 else np.uint16)
    expected = torch.from_numpy(raw.view(ML_DTYPES[name]).astype(np.float32))
    seen = format.decode(torch.from_numpy(raw.astype(np.int64)))
    assert torch.equal(seen.nan_to_num(7.7), expected.nan_to_num(7.7))


def in_range(format, x):
    """Keep what every cast agrees on: magnitudes that cannot round past the largest value."""
    return x[x.abs() <= format.largest]


@pytest.mark.parametrize("name", ML_DTYPES)
def test_rounding_in_range_is_ml_dtypes_rounding(name, edges, random_patterns, assert_same_bits):
    format = getattr(catalog, name)
    x = in_range(format, torch.cat((edges(format), random_patterns(format, 200_000))))
    expected = torch.from_numpy(x.numpy().astype(ML_DTYPES[name]).astype(np.float32))
    assert_same_bits(x, format.quantize(x), expected)


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_rounding_in_range_is_torch_s_cast(name, edges, random_patterns, assert_same_bits):
    format = getattr(catalog, name)
    x = in_range(format, torch.cat((edges(format), random_patterns(format, 200_000))))
    assert_same_bits(x, format.quantize(x), x.to(TORCH_DTYPES[name]).float())
    stored = format.encode(x).view(TORCH_DTYPES[name])
    assert_same_bits(x, stored.float(), format.quantize(x))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["E5M2", "E4M3", "E3M4"])
def test_all_float32_bit_patterns(name, gfloat_rounds, assert_same_bits):
    format = getattr(catalog, name)
    for start in range(-(2**31), 2**31, 2**24):
        x = torch.arange(start, start + 2**24).to(torch.int32).view(torch.float32)
        if name in TORCH_DTYPES:
            x = x[(x.abs() <= format.largest) | x.isnan()]
            expected = x.to(TORCH_DTYPES[name]).float()
        else:
            expected = gfloat_rounds(format, x, "nearest_even")
        assert_same_bits(x, format.quantize(x), expected)
