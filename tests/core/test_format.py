import copy
import math
import pickle

import numpy as np
import pytest
import torch

from altgrad_core.format import NAN_RUNG, ROUNDINGS, Format
from altgrad_core.random_bits import draw_seed, uniform
from altgrad_core.testing.formats import check_format

pytestmark = pytest.mark.usefixtures("one_thread")


# rungs:     -3  -2  -1  0  1  2  3  4
LADDER = Format(name="LADDER", bits=3, values=[-4, -2, -1, 0, 1, 2, 4, 8])
UNSIGNED = Format(name="UNSIGNED", bits=3, values=[0, 1, 2, 5])
WIDE = Format(name="WIDE", bits=3, values=[-1, 0, 2.0**-149, 2.0**127])
LOGARITHMIC = Format(
    name="LOGARITHMIC",
    bits=6,
    values=np.array(
        [-(2.0 ** (j / 2)) for j in range(15, -16, -1)] + [0.0] + [2.0 ** (j / 2) for j in range(-15, 16)]
    ).astype(np.float32),
)
WORDS = Format(name="WORDS", bits=16, values=torch.arange(-30000, 30000) / 1024)
EXAMPLES = [LADDER, UNSIGNED, WIDE, LOGARITHMIC, WORDS]
by_name = pytest.mark.parametrize("format", EXAMPLES, ids=lambda format: format.name)

NAN, INF = math.nan, math.inf


def same(a, b):
    """Equal to the bit, any NaN counting as any other."""
    a, b = a.double(), torch.as_tensor(b, dtype=torch.float64)
    return bool(((a.isnan() & b.isnan()) | ((a == b) & (a.signbit() == b.signbit()))).all())


# --- what is a format ---------------------------------------------------------------------------------


def test_a_sorted_row_of_numbers_is_enough():
    assert LADDER.values.tolist() == [-4, -2, -1, 0, 1, 2, 4, 8]
    assert LADDER.values.dtype == torch.float32
    assert (LADDER.name, LADDER.bits, LADDER.largest, LADDER.smallest) == ("LADDER", 3, 8.0, 1.0)
    assert (LADDER.has_inf, LADDER.has_nan) == (False, False)
    assert isinstance(LADDER.largest, float)
    assert isinstance(LADDER.smallest, float)


@pytest.mark.parametrize(
    "values",
    [(-1, 0, 3), np.array([-1.0, 0, 3]), torch.tensor([-1, 0, 3]), torch.tensor([-1.0, 0, 3]).double()],
)
def test_any_sequence_array_or_tensor_will_do(values):
    assert Format(name="T", bits=3, values=values).values.tolist() == [-1, 0, 3]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ([-1.0, 0.0, 0.1], r"0\.1 is not exactly representable in float32; round it yourself"),
        ([-1.0, 0.0, 2.0**128], "not exactly representable in float32"),
        ([-1.0, 0.0, 2.0**-150], "not exactly representable in float32"),
        ([1.0, 2.0], "must contain 0"),
        ([-1.0, 0.0], "must contain a positive number"),
        ([0.0, 1.0, 1.0], r"must increase strictly, but 1\.0 follows 1\.0 at index 2"),
        ([0.0, 2.0, 1.0], r"must increase strictly, but 1\.0 follows 2\.0 at index 2"),
        ([-0.0, 0.0, 1.0], "must increase strictly"),
        ([0.0, 1.0, INF], "list the finite values only"),
        ([NAN, 0.0, 1.0], "list the finite values only"),
        (list(range(9)), "9 values; 3 bits hold at most 8"),
        ([[0.0, 1.0]], r"values has shape \(1, 2\)"),
        ([0.0], r"values has shape \(1,\)"),
    ],
)
def test_a_table_that_is_no_format_is_refused_with_the_reason(values, reason):
    with pytest.raises(ValueError, match=f"format 'T': .*{reason}"):
        Format(name="T", bits=3, values=values)


@pytest.mark.parametrize("bits", [2, 17, 8.0])
def test_a_width_out_of_range_is_refused(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}; a format has 3 to 16"):
        Format(name="T", bits=bits, values=[0, 1])


def test_a_negative_zero_in_the_table_is_zero():
    assert not Format(name="T", bits=3, values=[-0.0, 1.0]).values[0].signbit()


def test_formats_are_values():
    twin = Format(name="LADDER", bits=3, values=LADDER.values)
    assert twin == LADDER
    assert hash(LADDER) == hash(twin)
    assert pickle.loads(pickle.dumps(LADDER)) == LADDER
    assert copy.deepcopy(LADDER) == LADDER
    assert Format(name="OTHER", bits=3, values=LADDER.values) != LADDER
    assert Format(name="LADDER", bits=4, values=LADDER.values) != LADDER
    assert Format(name="LADDER", bits=3, values=[-4, -2, -1, 0, 1, 2, 4, 7]) != LADDER
    assert LADDER != "LADDER"


def test_a_used_format_pickles_as_small_as_a_fresh_one():
    fresh = Format(name="T", bits=3, values=LADDER.values)
    size = len(pickle.dumps(fresh))
    fresh.quantize(torch.randn(100))
    assert len(pickle.dumps(fresh)) == size


def test_torch_s_defaults_do_not_matter():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            format = Format(name="LADDER", bits=3, values=[-4, -2, -1, 0, 1, 2, 4, 8])
            x = torch.tensor([3.0, 9.5], device="cpu")
            assert format.quantize(x, overflow="ieee").tolist() == [2.0, 8.0]
            assert format.quantize(x, "stochastic", torch.Generator()).device == x.device
            assert format.spacing(x).tolist() == [2.0, 4.0]
    finally:
        torch.set_default_dtype(before)
    assert format == LADDER


def test_its_repr_tells_what_it_is():
    assert repr(LADDER) == "<Format LADDER: 3 bits, 1 to 8>"


# --- rounding -----------------------------------------------------------------------------------------

X = [-9.0, -5.0, -3.0, -1.5, -0.5, -0.0, 0.0, 0.5, 1.5, 3.0, 5.9, 6.0, 9.0, 10.0, 12.0, -INF, INF, NAN]


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        ("nearest_even", [-4, -4, -2, -2, -0.0, -0.0, 0, 0, 2, 2, 4, 8, 8, 8, 8, -4, 8, NAN]),
        ("nearest_away", [-4, -4, -4, -2, -1, -0.0, 0, 1, 2, 4, 4, 8, 8, 8, 8, -4, 8, NAN]),
        ("toward_zero", [-4, -4, -2, -1, -0.0, -0.0, 0, 0, 1, 2, 4, 4, 8, 8, 8, -4, 8, NAN]),
        ("up", [-4, -4, -2, -1, -0.0, -0.0, 0, 1, 2, 4, 8, 8, 8, 8, 8, -4, 8, NAN]),
        ("down", [-4, -4, -4, -2, -1, -0.0, 0, 0, 1, 2, 4, 4, 8, 8, 8, -4, 8, NAN]),
    ],
)
def test_each_mode_rounds_as_computed_by_hand(rounding, expected):
    assert same(LADDER.quantize(torch.tensor(X), rounding), expected)


@pytest.mark.parametrize(
    ("rounding", "expected"),
    [
        # the value after 8 would be 12 and have an even rung if 8 had an odd one; 8 has rung 4, -4 has -3
        ("nearest_even", [NAN, NAN, -4, 8, 8, NAN, NAN, NAN, NAN]),
        ("nearest_away", [NAN, NAN, -4, 8, NAN, NAN, NAN, NAN, NAN]),
        ("toward_zero", [-4, -4, -4, 8, 8, 8, 8, NAN, NAN]),
        ("up", [-4, -4, -4, NAN, NAN, NAN, NAN, NAN, NAN]),
        ("down", [NAN, NAN, NAN, 8, 8, 8, 8, NAN, NAN]),
    ],
)
def test_overflow_by_ieee_as_computed_by_hand(rounding, expected):
    x = torch.tensor([-6.0, -5.0, -4.5, 9.0, 10.0, 10.1, 3e38, -INF, INF])
    assert same(LADDER.quantize(x, rounding, overflow="ieee"), expected)


def test_a_midpoint_that_no_float_holds_is_no_tie():
    # between 2^-149 and 2^127 it is 2^126 + 2^-150: 2^126 is below it
    x = torch.tensor([2.0**126, 2.0**126 * (1 + 2.0**-23)])
    assert WIDE.quantize(x).tolist() == [2.0**-149, 2.0**127]
    assert WIDE.quantize(x, "nearest_away").tolist() == [2.0**-149, 2.0**127]
    x = torch.tensor([2.0**126, 2.0**126 * (1 + 2.0**-52)], dtype=torch.float64)
    assert WIDE.quantize(x).tolist() == [2.0**-149, 2.0**127]


def test_float64_is_rounded_once():
    x = torch.tensor([3.0 + 2.0**-40, 3.0, 3.0 - 2.0**-40], dtype=torch.float64)
    assert LADDER.quantize(x).tolist() == [4.0, 2.0, 2.0]
    assert LADDER.quantize(x).dtype == torch.float64
    assert LADDER.quantize(x.float()).tolist() == [2.0, 2.0, 2.0]


def test_the_smallest_numbers_round_up_and_down_too():
    for dtype in (torch.float32, torch.float64):
        tiny = torch.nextafter(torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype))
        assert LADDER.quantize(tiny, "up").item() == 1
        assert LADDER.quantize(-tiny, "down").item() == -1


def test_below_an_unsigned_table_is_its_zero():
    x = torch.tensor([-3.0, -0.1, -INF])
    assert same(UNSIGNED.quantize(x), [-0.0, -0.0, -0.0])
    assert UNSIGNED.rung(x).tolist() == [0, 0, 0]


@by_name
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept_or_refused(format, dtype):
    x = torch.tensor([0.3, -2.0, NAN]).to(dtype)
    if torch.equal(format.values.to(dtype).float(), format.values):
        assert format.quantize(x).dtype == dtype
        assert same(format.quantize(x), format.quantize(x.double()))
        assert same(format.spacing(x), format.spacing(x.double()))
        return
    for method in (format.quantize, format.spacing):
        with pytest.raises(ValueError, match=f"{dtype} cannot hold every value of {format.name}"):
            method(x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e5m2])
def test_what_is_not_floating_point_is_refused(dtype):
    x = torch.zeros(3).to(dtype)
    for method in (LADDER.quantize, LADDER.spacing, LADDER.rung, LADDER.encode):
        with pytest.raises(TypeError, match=f"not {dtype}"):
            method(x)


def test_what_is_no_tensor_is_refused_by_its_type(table):
    with pytest.raises(TypeError, match=r"expected a float32, .* tensor, not list"):
        table("E4M3").quantize([0.1])


def test_an_unknown_mode_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="rounding='nearest' is not one of 'nearest_even', 'nearest_away'"):
        LADDER.quantize(torch.zeros(1), "nearest")
    with pytest.raises(ValueError, match="overflow='inf' is not one of 'saturate', 'ieee'"):
        LADDER.quantize(torch.zeros(1), overflow="inf")


def test_no_gradient_flows_and_the_input_keeps_its_graph():
    x = torch.randn(5, requires_grad=True)
    assert not LADDER.quantize(x).requires_grad
    assert x.requires_grad


def test_empty_and_strided_inputs():
    x = torch.arange(24.0).reshape(2, 3, 4) / 3
    assert LADDER.quantize(torch.empty(0, 3)).shape == (0, 3)
    assert torch.equal(LADDER.quantize(x.mT), LADDER.quantize(x).mT)
    assert torch.equal(LADDER.quantize(x[:, ::2]), LADDER.quantize(x)[:, ::2])


# --- stochastic rounding ------------------------------------------------------------------------------


def test_stochastic_rounding_goes_outward_where_the_number_is_below_the_share():
    x = torch.tensor(
        [5.0, 5.0, -2.5, -2.5, 0.25, -0.25]
    )  # shares 1/4 of [4, 8], 1/4 of [2, 4], 1/4 of [0, 1]
    r = torch.tensor([0.25, 0.25 - 2**-24, 0.25, 0.25 - 2**-24, 0.25, 0.0])
    assert same(LADDER.quantize(x, "stochastic", uniform=r), [4, 8, -2, -4, 0, -1])


@by_name
@pytest.mark.parametrize("r", [0.0, 0.5, 1 - 2**-24])
def test_stochastic_rounding_keeps_grid_values(format, r):
    seen = format.quantize(format.values, "stochastic", uniform=torch.full_like(format.values, r))
    assert torch.equal(seen, format.values)


def test_stochastic_rounding_saturates_or_overflows():
    x, r = torch.tensor([9.0, 9.0, 13.0, INF, -9.0, NAN]), torch.tensor([0.0, 0.25, 0.9, 0.0, 0.9, 0.5])
    assert same(LADDER.quantize(x, "stochastic", uniform=r), [8, 8, 8, 8, -4, NAN])
    assert same(LADDER.quantize(x, "stochastic", overflow="ieee", uniform=r), [NAN, 8, NAN, NAN, NAN, NAN])


def test_one_seed_is_drawn_per_call_and_expanded():
    x, generator = torch.randn(50), torch.Generator().manual_seed(3)
    numbers = uniform((draw_seed(torch.Generator().manual_seed(3)), 0, 0), 50)
    seen = LADDER.quantize(x, "stochastic", generator)
    assert torch.equal(seen, LADDER.quantize(x, "stochastic", uniform=numbers))
    twin = torch.Generator().manual_seed(3)
    draw_seed(twin)
    assert torch.equal(generator.get_state(), twin.get_state())


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    for rounding in ROUNDINGS:
        LADDER.quantize(torch.randn(9, generator=torch.Generator()), rounding, torch.Generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_random_numbers_are_asked_for():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=r"needs a torch\.Generator"):
        LADDER.quantize(x, "stochastic")
    with pytest.raises(ValueError, match="not both"):
        LADDER.quantize(x, "stochastic", torch.Generator(), uniform=x)
    with pytest.raises(ValueError, match=r"uniform is torch\.float32 of shape \(2,\)"):
        LADDER.quantize(x, "stochastic", uniform=x[:2])
    with pytest.raises(ValueError, match=r"uniform is torch\.float64"):
        LADDER.quantize(x, "stochastic", uniform=x.double())
    with pytest.raises(ValueError, match="`uniform` is for rounding='stochastic'"):
        LADDER.quantize(x, uniform=x)


# --- rungs, codes, spacing ----------------------------------------------------------------------------


def test_rungs_count_from_zero_and_ties_go_to_even():
    x = torch.tensor([-INF, -4, -3, -1.5, -0.5, -0.0, 0, 1.5, 3, 6, 8, 1e30, NAN])
    rungs = LADDER.rung(x)
    assert rungs.dtype == torch.int32
    assert rungs.tolist() == [-3, -3, -2, -2, 0, 0, 0, 2, 2, 4, 4, 4, NAN_RUNG]


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16]
)
def test_from_rung_takes_integers_and_whole_floats_and_clamps(dtype):
    rungs = torch.tensor([-100, -3, -1, 0, 2, 4, 5, 100], dtype=dtype)
    values = LADDER.from_rung(rungs)
    assert values.dtype == torch.float32
    assert values.tolist() == [-4, -4, -1, 0, 2, 8, 8, 8]


def test_from_rung_takes_unsigned_integers_and_the_widest():
    assert LADDER.from_rung(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [0, 8]
    assert LADDER.from_rung(torch.tensor([2**40, -(2**40)])).tolist() == [8, -4]
    assert LADDER.from_rung(torch.tensor([1e30, -INF])).tolist() == [8, -4]


def test_nan_has_its_own_rung():
    assert LADDER.from_rung(torch.tensor([NAN_RUNG, 1], dtype=torch.int32)).isnan().tolist() == [True, False]
    assert LADDER.from_rung(torch.tensor([NAN_RUNG])).isnan().all()
    assert LADDER.from_rung(torch.tensor([NAN, float(NAN_RUNG)])).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_from_rung_refuses_what_is_no_number(dtype):
    with pytest.raises(TypeError, match=f"not {dtype}"):
        LADDER.from_rung(torch.zeros(2).to(dtype))


def test_a_code_is_the_index_in_the_table():
    codes = LADDER.encode(torch.tensor([-INF, -4, -0.0, 0.4, 3, 99]))
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [0, 0, 3, 3, 5, 7]
    assert LADDER.decode(codes).tolist() == [-4, -4, 0, 0, 2, 8]


def test_wide_codes_are_int16_bit_patterns():
    codes = WORDS.encode(WORDS.values)
    assert codes.dtype == torch.int16
    assert codes[[0, 32767, 32768]].tolist() == [0, 32767, -32768]
    assert torch.equal(WORDS.decode(codes), WORDS.values)
    assert torch.equal(WORDS.decode(torch.arange(60000)), WORDS.values)


def test_a_code_without_a_value_decodes_to_nan():
    codes = torch.tensor([3, 4, 7, 8, 255, -1, 2**40])
    assert same(UNSIGNED.decode(codes), [5, NAN, NAN, NAN, NAN, NAN, NAN])
    assert WORDS.decode(torch.tensor([-5], dtype=torch.int16)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_decode_refuses_what_is_no_code(dtype):
    with pytest.raises(TypeError, match=f"needs integer codes, not {dtype}"):
        LADDER.decode(torch.zeros(2).to(dtype))


def test_encode_refuses_nan_and_counts_them():
    with pytest.raises(ValueError, match="LADDER has no code for NaN, and 2 elements are NaN"):
        LADDER.encode(torch.tensor([NAN, 1.0, NAN]))


def test_spacing_is_the_gap_outward_on_the_own_side():
    x = torch.tensor([-INF, -9, -4, -3, -2, -1, -0.5, 0, 0.5, 1, 3.9, 4, 8, 100, INF, NAN])
    expected = [2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 2, 4, 4, 4, 4, NAN]
    assert same(LADDER.spacing(x), expected)


def test_spacing_below_an_unsigned_table_is_its_first_gap():
    assert UNSIGNED.spacing(torch.tensor([-3.0, 0.0, 1.0, 2.0, 9.0])).tolist() == [1, 1, 1, 3, 3]


# --- everything at once -------------------------------------------------------------------------------


@by_name
@pytest.mark.parametrize("seed", [0, 1])
def test_tables_conform(format, seed):
    check_format(format, seed=seed)
