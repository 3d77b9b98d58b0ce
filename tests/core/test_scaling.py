import math
from fractions import Fraction

import pytest
import torch

from altgrad_core import scaling
from altgrad_core.format import Format

CODEBOOK = Format(name="CODEBOOK", bits=3, values=[-3.0, -1.0, 0.0, 0.5, 1.75, 3.0])
AMAXES = (2.0**-149, 1e-30, 1.0, 3e38)


@pytest.fixture(scope="session")
def formats(table, named):
    return [*map(table, named), CODEBOOK]


def floats(*values):
    return torch.tensor(values)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


# --- amax -------------------------------------------------------------------------------------------


def test_amax_is_the_largest_magnitude_of_each_tensor():
    found = scaling.amax([floats(1.0, -3.0), torch.zeros(2, 2), floats(2.0**-149).reshape(1, 1, 1)])
    assert found.tolist() == [3.0, 0.0, 2.0**-149]


def test_amax_of_float64_is_exact():
    above_one = 1 + 2.0**-52
    assert scaling.amax([torch.tensor([above_one], dtype=torch.float64), floats(1.0)]).tolist() == [
        above_one,
        1,
    ]


def test_amax_of_a_tensor_without_elements_is_zero():
    assert scaling.amax([torch.empty(0, 3), floats(1.0)]).tolist() == [0, 1]


def test_amax_shows_nan_and_inf():
    found = scaling.amax([floats(1.0, math.nan), floats(-math.inf, 1.0), floats(math.inf, math.nan)])
    assert found.isfinite().tolist() == [False, False, False]
    assert found.isnan().tolist() == [True, False, True]


# --- fit --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amax", AMAXES)
def test_under_fit_nothing_saturates_and_under_twice_the_scale_it_would(formats, amax):
    for format in formats:
        k = int(scaling.fit_exponent(floats(amax), format))
        amax_exactly, largest = Fraction(floats(amax).item()), Fraction(format.largest)
        if k < scaling.LARGEST_EXPONENT:
            assert amax_exactly * Fraction(2) ** (k + 1) > largest, format
        if k > -scaling.LARGEST_EXPONENT:
            assert amax_exactly * Fraction(2) ** k <= largest, format


@pytest.mark.parametrize("amax", AMAXES)
def test_the_scaled_amax_rounds_to_a_finite_value(formats, amax):
    for format in formats:
        k = scaling.fit_exponent(floats(amax), format)
        if int(k) == -scaling.LARGEST_EXPONENT:
            continue  # clamped: there it may saturate
        scaled = floats(amax) * scaling.power_of_two(k)
        assert format.quantize(scaled, overflow="ieee").isfinite().all(), format


@pytest.mark.parametrize(
    ("name", "amax", "k"),
    [
        ("E4M3", 1.0, 8),  # 448 < 512
        ("E4M3", 1.75, 8),  # 448 exactly
        ("E4M3", 1.75 + 2.0**-23, 7),
        ("E0M7", 1.0, -1),
        ("E0M7", 127 / 128, 0),
        ("E1M6", 127 / 128, 2),
        ("E7M0", 1.0, 64),
        ("E7M0", 1e-20, 126),  # 2^130 is clamped
        ("BF16", 0.02, 126),
        ("E2M1", 3e38, -126),  # 6/2^127.8 is 2^-125.2
        ("E0M7", 3e38, -126),  # 2^-128 is clamped, and saturates
        ("E5M2", 2.0**-149, 126),
    ],
)
def test_the_exponent_by_hand(table, name, amax, k):
    assert int(scaling.fit_exponent(floats(amax), table(name))) == k


def test_margin_is_head_room(uniform):
    assert scaling.fit_exponent(floats(0.5), uniform).tolist() == [0]
    assert scaling.fit_exponent(floats(0.5), uniform, margin=1.9).tolist() == [0]
    assert scaling.fit_exponent(floats(0.5), uniform, margin=2.0).tolist() == [-1]
    assert scaling.fit_exponent(floats(0.5), uniform, margin=0.25).tolist() == [2]


def test_fit_is_vectorized_over_tensors(formats):
    amaxes = torch.exp2(torch.linspace(-140, 127, 1001)) * 1.3
    for format in formats:
        one_by_one = [int(scaling.fit_exponent(amax, format)) for amax in amaxes[::100]]
        assert scaling.fit_exponent(amaxes, format)[::100].tolist() == one_by_one


def test_exponents_stay_where_both_powers_are_normal(formats):
    extremes = floats(0.0, 2.0**-149, 3.4e38, math.inf, math.nan)
    for format in formats:
        k = scaling.fitted_exponent(extremes, format)
        assert k.dtype == torch.int32
        assert k.abs().max() <= scaling.LARGEST_EXPONENT


def test_powers_of_two_are_exact():
    exponents = torch.arange(-126, 128)
    assert scaling.power_of_two(exponents).tolist() == [2.0**k for k in range(-126, 128)]
    assert scaling.power_of_two(torch.tensor(-3)).shape == ()


@pytest.mark.parametrize(
    ("name", "k"), [("E0M7", -1), ("E1M6", 1), ("E4M3", 8), ("E5M2", 15), ("E7M0", 64), ("BF16", 126)]
)
def test_without_an_amax_the_scale_is_that_of_one(table, name, k):
    format = table(name)
    assert scaling.empty_exponent(format) == k
    without = scaling.fitted_exponent(floats(0.0, math.nan, math.inf), format)
    assert without.tolist() == [k] * 3


def test_formats_as_wide_as_real_tensors_are_not_scaled(table):
    assert not scaling.scaled(table("BF16"))
    assert not scaling.scaled(table("FP16"))
    assert scaling.scaled(table("E0M15"))
    assert scaling.scaled(CODEBOOK)
    assert not scaling.scaled(CODEBOOK, "none")


def test_it_is_the_values_that_make_a_format_wide_not_its_name(table):
    assert scaling.scaled(Format(name="BF16", bits=4, values=[-1.0, 0.0, 1.0, 2.0]))
    assert not scaling.scaled(Format(name="ANOTHER", bits=16, values=table("BF16").values))


# --- the scale that follows grid-stored weights -----------------------------------------------------


def next_k(format, k, amax, *, seen=True, margin=1.0, shrink_early=True):
    how = format, margin, shrink_early
    (found,) = scaling.adapted(ints(k), torch.tensor([seen]), floats(amax), *how).tolist()
    assert scaling.adapted_number(k, seen, floats(amax).item(), *how) == found
    return found


@pytest.mark.parametrize(
    ("amax", "expected"),
    [
        (0.9, 0),  # k* = k
        (0.6, 0),
        (0.4, 0),  # k* = k + 1: stays, so that weights do not flutter
        (0.25, 0),
        (0.24, 1),  # k* = k + 2: one step
        (0.01, 1),  # k* = k + 6: one step only
        (1.9, -1),  # k* = k - 1
        (7.9, -3),  # k* = k - 3: at once
    ],
)
def test_the_scale_moves_with_hysteresis(uniform, amax, expected):
    assert next_k(uniform, 0, amax) == expected
    assert next_k(uniform, 0, amax, shrink_early=False) == expected


@pytest.mark.parametrize("amax", [0.0, math.inf, math.nan])
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("shrink_early", [True, False])
def test_an_amax_of_zero_or_not_finite_leaves_the_scale(uniform, amax, seen, shrink_early):
    assert next_k(uniform, 5, amax, seen=seen, shrink_early=shrink_early) == 5


def test_the_first_positive_amax_after_zeros_is_fitted_at_once(uniform):
    assert next_k(uniform, -1, 2.0**-10, seen=False) == 9
    assert next_k(uniform, -1, 2.0**-10, seen=True) == 0
    assert next_k(uniform, -1, 3.9, seen=False) == -2


def test_under_nearest_rounding_the_scale_shrinks_only_when_the_largest_is_rounded_past(uniform):
    below, tie, above = 127.25 / 128, 127.5 / 128, 127.75 / 128
    assert [next_k(uniform, 0, amax) for amax in (below, tie, above)] == [-1, -1, -1]
    assert [next_k(uniform, 0, amax, shrink_early=False) for amax in (below, tie, above)] == [0, -1, -1]


def test_the_tie_past_the_largest_value_goes_to_the_even_code(table):
    e4m3 = table("E4M3")  # 448 is code 126: the tie at 464 stays
    assert next_k(e4m3, 0, 464.0, shrink_early=False) == 0
    assert next_k(e4m3, 0, 464.1, shrink_early=False) == -1


def test_a_margin_does_not_shrink_the_scale_under_nearest_rounding(uniform):
    assert next_k(uniform, 0, 0.6, margin=2.0, shrink_early=False) == 0
    assert next_k(uniform, 0, 0.6, margin=2.0) == -1


def test_far_past_the_largest_the_scale_shrinks_whatever_the_format(formats):
    for format in formats:
        amax = 3e38
        if not scaling.scaled(format):
            continue
        k = int(scaling.fit_exponent(floats(1e-3), format))
        fitted = int(scaling.fit_exponent(floats(amax), format))
        assert next_k(format, k, amax, shrink_early=False) == next_k(format, k, amax) == fitted, format


@pytest.mark.parametrize("margin", [1.0, 1.3])
@pytest.mark.parametrize("shrink_early", [True, False])
def test_around_every_limit_numbers_and_tensors_move_alike(formats, margin, shrink_early):
    for format in formats:
        last, past = format.largest, scaling.last_midpoint(format)[0]
        for limit in (last, last / margin, past, past / margin, last / 4, last / 4 / margin):
            for amax in (math.nextafter(limit, 0), limit, math.nextafter(limit, math.inf)):
                found = scaling.adapted(
                    ints(-3),
                    torch.tensor([True]),
                    torch.tensor([amax * 8], dtype=torch.float64),
                    *(format, margin, shrink_early),
                )
                assert scaling.adapted_number(-3, True, amax * 8, format, margin, shrink_early) == found


def test_all_tensors_move_at_once_each_by_its_own_rule(uniform):
    k = ints(0, 0, 0, 5, -1, 0)
    seen = torch.tensor([True, True, True, True, False, True])
    amax = floats(0.9, 0.01, 7.9, 0.0, 0.01, math.nan)
    moved = scaling.adapted(k, seen, amax, uniform, 1.0, True)
    assert moved.tolist() == [0, 1, -3, 5, 6, 0]
    assert moved.dtype == torch.int32
    assert k.tolist() == [0, 0, 0, 5, -1, 0], "the given exponents are not written to"


def test_a_weight_that_fluctuates_keeps_its_scale(uniform):
    k, seen = ints(0), torch.tensor([True])
    for amax in torch.rand(200, generator=torch.Generator().manual_seed(0)) * 0.74 + 0.25:
        k = scaling.adapted(k, seen, amax.reshape(1), uniform, 1.0, True)
        assert k.tolist() == [0]


# --- what shares a scale ------------------------------------------------------------------------------


def test_amax_per_tensor_channel_and_block():
    x = torch.zeros(2, 40)
    x[0, 3], x[0, 33], x[1, 39] = -3.0, 2.0, 5.0
    assert scaling.amax_per(x, "tensor", 32).tolist() == 5.0
    assert scaling.amax_per(x, "channel", 32).tolist() == [[3.0], [5.0]]
    assert scaling.amax_per(x, "block", 32).tolist() == [[3.0, 2.0], [0.0, 5.0]]
    assert scaling.amax_per(x, "block", 16).tolist() == [[3.0, 0.0, 2.0], [0.0, 0.0, 5.0]]


def test_a_channel_of_a_batch_is_a_token():
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert scaling.amax_per(x, "channel", 32).flatten().tolist() == [3, 7, 11, 15, 19, 23]


def test_nan_shows_in_its_own_part_only():
    x = torch.ones(2, 40)
    x[1, 35] = math.nan
    assert scaling.amax_per(x, "block", 32).isnan().tolist() == [[False, False], [False, True]]
    assert scaling.amax_per(x, "channel", 32).isnan().flatten().tolist() == [False, True]
    assert scaling.amax_per(x, "tensor", 32).isnan()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 32, 33])
def test_what_a_block_has_is_spread_over_its_elements(length):
    blocks = -(-length // 16)
    found = scaling.spread(torch.arange(3 * blocks).reshape(3, blocks), length, 16)
    assert found.shape == (3, length)
    assert all(found[row, at] == row * blocks + at // 16 for row in range(3) for at in range(length))


# --- rules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amax", AMAXES)
def test_ocp_is_the_difference_of_two_floored_logarithms(formats, amax):
    for format in formats:
        floored = [math.frexp(value)[1] - 1 for value in (format.largest, floats(amax).item())]
        expected = max(-126, min(126, floored[0] - floored[1]))
        assert int(scaling.ocp_exponent(floats(amax), format)) == expected, format


@pytest.mark.parametrize("amax", AMAXES)
def test_ocp_is_fit_or_twice_fit(formats, amax):
    for format in formats:
        difference = scaling.ocp_exponent(floats(amax), format) - scaling.fit_exponent(floats(amax), format)
        assert int(difference) in (0, 1), format


@pytest.mark.parametrize("amax", AMAXES)
def test_exact_is_the_largest_float32_at_which_amax_does_not_pass_the_largest_value(formats, amax):
    for format in formats:
        exactly, largest = Fraction(floats(amax).item()), Fraction(format.largest)
        s = scaling.scale(floats(amax), format, "exact")
        after = Fraction(torch.nextafter(s, floats(math.inf)).item())
        assert exactly * Fraction(s.item()) <= largest or s.item() == 2.0**-126, format
        assert exactly * after > largest or s.item() == 2.0**126, format


def test_under_exact_no_amax_ends_an_ulp_past_the_largest_value(table):
    e4m3 = table("E4M3")
    amax = torch.rand(20_000, generator=torch.Generator().manual_seed(0)) + 0.5
    s = scaling.scale(amax, e4m3, "exact")
    assert e4m3.quantize(amax * s, rounding="up", overflow="ieee").isfinite().all()
    assert ((448 / amax.double()).float() * amax > 448).any(), "rounded to nearest, some would"


@pytest.mark.parametrize(("margin", "expected"), [(1e308, 2.0**-126), (1e-308, 2.0**126)])
@pytest.mark.parametrize("rule", ["fit", "exact"])
def test_a_margin_that_no_product_can_hold_is_clamped(table, rule, margin, expected):
    amax = floats(1e-5, 3.0, 3e38) if margin > 1 else floats(1e-30, 1e-38, 2.0**-149)
    assert scaling.scale(amax, table("E4M3"), rule, margin).tolist() == [expected] * 3


@pytest.mark.parametrize("rule", scaling.RULES)
def test_without_an_amax_every_rule_takes_that_of_one(table, rule):
    found = scaling.scale(floats(0.0, math.nan, math.inf, 1.0), table("E7M0"), rule)
    assert found.tolist() == [2.0**64] * 4
    assert scaling.scale(floats(0.0), table("E4M3"), rule).tolist() == [2.0**8]


def test_the_step_of_a_block_is_rounded_from_its_exact_quotient(table):
    whole = 3.0 / 7  # 448*6/amax is no float32
    blocks = floats(whole, whole / 448 * 17, whole / 448 * 18.999)
    steps = 448 * 6 / (whole * scaling.two_level(blocks, table("E2M1"), table("E4M3")).double())
    assert [round(step, 4) for step in steps.tolist()] == [448.0, 16.0, 18.0]
