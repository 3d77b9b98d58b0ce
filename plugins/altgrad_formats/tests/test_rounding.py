"""Rounding, checked by hand: ties, carries, ends, signs, and what is refused."""

import math

import pytest
import torch

from altgrad_core.format import NAN_RUNG
from altgrad_formats import NAMED, catalog
from altgrad_formats.exmy import ExMy

E0M7, E3M4, E4M3, E5M2, E6M1, E7M0 = (
    getattr(catalog, name) for name in ("E0M7", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0")
)
FORMATS = [getattr(catalog, name) for name in NAMED]
by_name = pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
NAN, INF = math.nan, math.inf


def quantized(format, values, rounding="nearest_even", dtype=torch.float32, **options):
    return format.quantize(torch.tensor(values, dtype=dtype), rounding, **options).tolist()


def test_ties_of_e4m3_go_to_the_even_mantissa():
    # [1, 2) has steps of 1/8; the subnormals below 2^-6 have steps of 2^-9
    x = [1.0625, 1.1875, -1.0625, 2.0**-10, 3 * 2.0**-10, 5 * 2.0**-10]
    assert quantized(E4M3, x) == [1.0, 1.25, -1.0, 0.0, 2.0**-8, 2.0**-8]
    assert quantized(E4M3, x, "nearest_away") == [1.125, 1.25, -1.125, 2.0**-9, 2.0**-8, 3 * 2.0**-9]


def test_ties_of_e7m0_go_to_the_even_exponent_field():
    # bias 63: 2^0 has field 63, 2^1 has 64, 2^2 has 65
    assert quantized(E7M0, [1.5, 3.0, 6.0, 0.75, -1.5, -3.0]) == [2.0, 2.0, 8.0, 0.5, -2.0, -2.0]
    assert quantized(E7M0, [1.5, 3.0, -3.0], "nearest_away") == [2.0, 4.0, -4.0]
    assert quantized(E7M0, [1.49, 1.51, 2.99, 3.01]) == [1.0, 2.0, 2.0, 4.0]


def test_the_tie_between_zero_and_the_smallest_goes_to_zero():
    for format in FORMATS:
        half = torch.tensor([format.smallest / 2], dtype=torch.float64)
        assert format.quantize(half).item() == 0
        assert format.quantize(half * 1.001).item() == format.smallest


@pytest.mark.parametrize("bias", [62, 63, 64])
def test_the_parity_of_an_exponent_field_is_the_bias_s_too(bias):
    expected = 2.0 if bias % 2 else 1.0
    assert quantized(ExMy(7, 0, bias), [1.5]) == [expected]


def test_subnormals_carry_into_the_smallest_normal():
    # E4M3: the largest subnormal is 7 · 2^-9, the smallest normal 8 · 2^-9
    assert quantized(E4M3, [7.5 * 2.0**-9, 7.49 * 2.0**-9]) == [2.0**-6, 7 * 2.0**-9]
    assert quantized(E4M3, [7.01 * 2.0**-9], "up") == [2.0**-6]
    assert E4M3.rung(torch.tensor([7.5 * 2.0**-9])).item() == 8


def test_binades_carry_into_the_next():
    assert quantized(E4M3, [1.99, 1.9375, 1.93]) == [2.0, 2.0, 1.875]
    assert quantized(E6M1, [1.75, 1.74]) == [2.0, 1.5]


def test_saturation_clamps_infinities_too():
    for format in FORMATS:
        x = torch.tensor([INF, -INF, 3.4e38, -3.4e38])
        for rounding in ("nearest_even", "nearest_away", "toward_zero", "up", "down"):
            ends = [format.largest, -format.largest]
            assert format.quantize(x, rounding).tolist() == ends * 2 if format.largest < 1e38 else ends


@pytest.mark.parametrize(
    ("format", "x", "expected"),
    [
        (E4M3, [448.0, 463.9, 464.0, 464.1, INF], [448, 448, 448, NAN, NAN]),  # 448 is even, 480 would be NaN
        (E5M2, [61439.0, 61440.0, -61440.0, INF], [57344, INF, -INF, INF]),  # 57344 is odd
        (E3M4, [124.0, 125.9, 126.0, -126.0], [124, 124, NAN, NAN]),  # 124 is odd, NaN for want of inf
        (E7M0, [2.0**64, 1.49 * 2.0**64, 1.5 * 2.0**64, INF], [2.0**64, 2.0**64, NAN, NAN]),
        (E0M7, [127.49 / 128, 127.5 / 128, -5.0], [127 / 128, NAN, NAN]),
        (catalog.FP16, [65519.0, 65520.0, -INF], [65504, INF, -INF]),
        (catalog.BF16, [3.39e38, 3.4e38, -3.4e38], [255 * 2.0**120, INF, -INF]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_overflow_by_ieee(format, x, expected):
    seen = quantized(format, x, overflow="ieee")
    assert str(seen) == str([float(value) for value in expected])  # as text, NaN equals NaN


def test_directed_modes_overflow_only_outward():
    x = [60000.0, -60000.0, INF, -INF]
    assert quantized(E5M2, x, "toward_zero", overflow="ieee") == [57344, -57344, INF, -INF]
    assert quantized(E5M2, x, "up", overflow="ieee") == [INF, -57344, INF, -INF]
    assert quantized(E5M2, x, "down", overflow="ieee") == [57344, -INF, INF, -INF]
    assert quantized(E3M4, [125.0, -125.0], "up", overflow="ieee")[1] == -124
    assert math.isnan(quantized(E3M4, [125.0, -125.0], "up", overflow="ieee")[0])


def test_stochastic_overflow_takes_the_value_that_would_come_next():
    x, uniform = torch.tensor([61440.0, 61440.0]), torch.tensor([0.5 - 2.0**-24, 0.5])
    assert E5M2.quantize(x, "stochastic", overflow="ieee", uniform=uniform).tolist() == [INF, 57344]
    assert E5M2.quantize(x, "stochastic", uniform=uniform).tolist() == [57344, 57344]


def test_stochastic_rounding_compares_with_the_exact_share():
    x = torch.tensor([1.0 + 1 / 32] * 2 + [-(1.0 + 1 / 32)] * 2)  # a quarter of E4M3's step of 1/8
    uniform = torch.tensor([0.25 - 2.0**-24, 0.25] * 2)
    assert E4M3.quantize(x, "stochastic", uniform=uniform).tolist() == [1.125, 1.0, -1.125, -1.0]


@by_name
def test_the_largest_random_number_moves_nothing_on_the_grid(format):
    uniform = torch.full_like(format.values, 1 - 2.0**-24)
    for dtype in (torch.float32, torch.float64):
        x = format.values.to(dtype)
        assert torch.equal(format.quantize(x, "stochastic", uniform=uniform), x)


@by_name
def test_nan_and_signed_zeros_stay(format):
    x = torch.tensor([NAN, 0.0, -0.0, format.smallest / 8, -format.smallest / 8])
    uniform = torch.full_like(x, 0.5)
    for rounding in ("nearest_even", "nearest_away", "toward_zero", "stochastic"):
        numbers = uniform if rounding == "stochastic" else None
        seen = format.quantize(x, rounding, uniform=numbers)
        assert seen.isnan().tolist() == [True, False, False, False, False]
        assert seen[1:].tolist() == [0, 0, 0, 0]
        assert seen[1:].signbit().tolist() == [False, True, False, True]
    assert format.rung(x).tolist() == [NAN_RUNG, 0, 0, 0, 0]


def test_float64_is_rounded_once():
    # 2^-40 past a tie: rounding to float32 first would make it a tie, and take it down to 1
    assert quantized(E4M3, [1.0625 + 2.0**-40], dtype=torch.float64) == [1.125]
    assert quantized(E4M3, [1.1875 - 2.0**-40], dtype=torch.float64) == [1.125]
    assert quantized(E7M0, [3.0 + 2.0**-50, 1.5 - 2.0**-50], dtype=torch.float64) == [4.0, 1.0]


@by_name
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_round_as_in_float32_or_are_refused(format, dtype):
    every = torch.arange(-(2**15), 2**15).short().view(dtype)
    layout = format.layout
    held = layout.mantissa_bits <= 7
    if dtype == torch.float16:
        held = layout.mantissa_bits <= 10 and format.largest <= 65504 and format.smallest >= 2.0**-24
    if not held:
        with pytest.raises(ValueError, match=f"{dtype} cannot hold every value of {format.name}"):
            format.quantize(every)
        return
    for rounding in ("nearest_even", "down"):
        seen = format.quantize(every, rounding)
        assert seen.dtype == dtype
        expected = format.quantize(every.float(), rounding)
        assert torch.equal(seen.float().nan_to_num(7.7), expected.nan_to_num(7.7))


def test_spacing_is_that_of_the_binade():
    x = torch.tensor([0.0, 2.0**-9, 2.0**-6, 1.0, -1.9, 2.0, 300.0, 448.0, 1e6, INF, NAN])
    expected = [2.0**-9, 2.0**-9, 2.0**-9, 0.125, 0.125, 0.25, 32, 32, 32, 32]
    assert E4M3.spacing(x)[:-1].tolist() == expected
    assert E4M3.spacing(x)[-1].isnan()
    assert E0M7.spacing(x)[:-1].tolist() == [1 / 128] * 10
    assert E7M0.spacing(torch.tensor([0.0, 1.0, 3.0, -4.0, 1e30])).tolist() == [2.0**-62, 1, 2, 4, 2.0**64]


@by_name
def test_spacing_follows_the_formula(format):
    layout, x = format.layout, format.values[format.values >= 0].double()
    x = torch.cat((x, x * 1.3, x / 3)).clamp(max=format.largest)
    exponent = torch.frexp(x).exponent.double() - 1
    exponent = torch.where(x == 0, -2000.0, exponent).clamp(min=1 - layout.bias)
    expected = 2 ** (exponent - layout.mantissa_bits)
    if layout.exponent_bits == 0:
        expected = torch.full_like(x, 2.0 ** (-layout.mantissa_bits - layout.bias))
    assert torch.equal(format.spacing(x), expected)
    assert torch.equal(format.spacing(-x), expected)


def test_codes_are_sign_and_magnitude():
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, 448.0, 1e9, -INF, NAN])
    assert E4M3.encode(x).tolist() == [0, 0x80, 0x38, 0xB8, 0x7E, 0x7E, 0xFE, 0x7F]
    x = torch.tensor([1.0, 57344.0, 1e9, INF, -INF, NAN])
    assert E5M2.encode(x).tolist() == [0x3C, 0x7B, 0x7B, 0x7C, 0xFC, 0x7E]
    assert catalog.FP16.encode(x[:1]).tolist() == [0x3C00]
    assert catalog.BF16.encode(-x[:1]).tolist() == [0xBF80 - 0x10000]


@by_name
def test_every_code_survives_decode_and_encode(format):
    codes = torch.arange(2**format.bits)
    values = format.decode(codes)
    real = ~values.isnan()
    assert int(real.sum()) == 2 * (format.layout.largest_code + 1) + 2 * format.has_inf
    wrapped = format.encode(values[real]).long() & (2**format.bits - 1)
    assert torch.equal(wrapped, codes[real])
    assert torch.equal(values[real].isinf().sum(), torch.tensor(2 * format.has_inf))


def test_codes_of_other_widths_have_no_value():
    for format in (catalog.E2M1, catalog.E2M3, E4M3, E5M2):
        assert format.decode(torch.tensor([2**format.bits, -1, 2**40])).isnan().all()
    assert catalog.FP16.decode(torch.tensor([-0x8000 + 0x3C00], dtype=torch.int16)).item() == -1.0


@pytest.mark.parametrize("format", [f for f in FORMATS if not f.has_nan], ids=lambda format: format.name)
def test_nan_without_a_code_is_refused(format):
    with pytest.raises(ValueError, match=f"{format.name} has no code for NaN, and 1 elements are NaN"):
        format.encode(torch.tensor([1.0, NAN]))


@by_name
def test_rungs_are_magnitude_codes_with_a_sign(format):
    values = format.values
    top = format.layout.largest_code
    assert torch.equal(format.rung(values), torch.arange(-top, top + 1, dtype=torch.int32))
    beyond = torch.arange(-top - 9, top + 10)
    assert torch.equal(format.from_rung(beyond), values[beyond.clamp(-top, top) + top])


def test_rungs_and_ulps_differ_where_a_binade_ends():
    a, b = torch.tensor([1.0]), torch.tensor([0.9375])
    assert (E4M3.rung(b) - E4M3.rung(a)).item() == -1
    assert ((b - a) / E4M3.spacing(a)).item() == -0.5


AT_THE_LIMITS = [(8, 7, 127, "ieee"), (4, 3, 145), (5, 2, 147), (8, 0, 128), (0, 7, 141)]
COARSE = [(4, 3, -100), (2, 5, -20, "fn"), (0, 7, -121)]  # spacings above 1


@pytest.mark.parametrize("numbers", AT_THE_LIMITS + COARSE, ids=str)
def test_formats_at_the_limits_of_float32_are_exact_too(numbers):
    format = ExMy(*numbers)
    values = format.values.double()
    middle = (values[1:] + values[:-1]) / 2
    above = torch.nextafter(middle, torch.full_like(middle, INF))
    assert torch.equal(format.quantize(format.values), format.values)
    assert torch.equal(format.quantize(above), values[1:])
    assert torch.equal(format.from_rung(format.rung(values)), format.values)
    for tiny in (torch.tensor([2.0**-149]), torch.tensor([5e-324], dtype=torch.float64)):
        assert format.quantize(tiny, "up").item() == format.smallest
        assert format.quantize(-tiny, "down").item() == -format.smallest
        assert str(format.quantize(-tiny, "up").item()) == "-0.0"
        assert str(format.quantize(-0.0 * tiny).item()) == "-0.0"


def test_overflow_past_float32_is_seen():
    format = ExMy(7, 8, 0)  # the value after the largest would be 2^128
    largest = 2.0**128 - 2.0**119
    seen = quantized(format, [largest, 3.4028234663852886e38, INF], overflow="ieee")
    assert str(seen) == str([largest, NAN, NAN])
