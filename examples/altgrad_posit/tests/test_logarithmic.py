"""The values of LNS, against integer arithmetic; and LNS with gamma = 1 against E7M0."""

from fractions import Fraction

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core.format import ROUNDINGS
from altgrad_core.registry import UsageError
from altgrad_core.testing import check_format

GAMMAS = range(1, 127)


def test_gamma_1_is_zero_and_powers_of_two(lns):
    expected = [2.0**exponent for exponent in range(-62, 65)]
    assert lns(1).values[127:].tolist() == [0, *expected]


def test_gamma_2_has_the_square_root_of_two(lns):
    assert lns(2).quantize(torch.tensor([1.4])).item() == float.fromhex("0x1.6a09e6p+0")


def test_gamma_8_reaches_up_to_256_in_eight_rungs_to_a_binade(lns):
    assert lns(8).largest == 256
    assert lns(8).rung(torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])).tolist() == [-63, 0, 55, 63, 71]


@pytest.mark.parametrize("gamma", GAMMAS)
def test_each_value_is_the_float32_nearest_to_its_power_by_integer_arithmetic(lns, gamma):
    values = lns(gamma).values
    assert torch.equal(values, -values.flip(0))
    for k, value in zip(range(-62, 65), values[128:], strict=True):
        low, high = (torch.nextafter(value, torch.tensor(end)) for end in (0.0, torch.inf))
        between = [(Fraction(one.item()) + Fraction(value.item())) / 2 for one in (low, high)]
        assert between[0] ** gamma < Fraction(2) ** k < between[1] ** gamma


@pytest.mark.parametrize("gamma", [1, 2, 3, 8, 20, 126])
def test_it_keeps_the_contract_of_a_format(lns, gamma):
    check_format(lns(gamma))


def test_bfloat16_holds_the_powers_of_two_and_no_other_magnitudes(lns):
    x = torch.ones(1, dtype=torch.bfloat16)
    assert lns(1).quantize(x).item() == 1
    with pytest.raises(ValueError, match=r"bfloat16 cannot hold every value of LNS\(gamma=2\)"):
        lns(2).quantize(x)


def test_more_steps_are_more_precise_until_the_range_is_too_short(relative_error):
    errors = [relative_error({"plugin": "LNS", "gamma": gamma}) for gamma in (1, 8, 16, 20, 32, 126)]
    assert errors == pytest.approx([0.197, 0.025, 0.0125, 0.0123, 0.066, 0.958], rel=0.02)


@pytest.mark.parametrize("gamma", [0, -1, 127])
def test_a_gamma_that_is_too_large_or_too_small_is_refused(gamma):
    with pytest.raises(UsageError, match=rf"gamma: expected 1 .* to 126 .*, got {gamma}; try 8"):
        altgrad.get_format({"plugin": "LNS", "gamma": gamma})


def test_a_gamma_that_is_no_whole_number_is_refused():
    with pytest.raises(UsageError, match=r"gamma: expected a whole number, got 2\.5"):
        altgrad.get_format({"plugin": "LNS", "gamma": 2.5})


def test_with_the_largest_gamma_a_power_of_two_scale_still_reaches_the_magnitudes(lns):
    assert lns(126).smallest == lns(126).largest / 2


# --- gamma = 1 against E7M0 --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def E7M0():
    return pytest.importorskip("altgrad_formats").E7M0


@pytest.fixture(scope="module")
def inputs():
    """Return all values, all midpoints, the numbers beside both, zeros, NaN and 10^5 random bit patterns."""
    values = torch.tensor([2.0**exponent for exponent in range(-64, 67)])
    points = torch.cat((values, 1.5 * values, torch.tensor([0.0, torch.inf, torch.nan])))
    beside = [torch.nextafter(points, torch.full_like(points, end)) for end in (0.0, torch.inf)]
    generator = torch.Generator().manual_seed(0)
    anything = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).int().view(torch.float32)
    return torch.cat((points, -points, *beside, anything))


def bits(x):
    return x.nan_to_num(nan=-7.0, posinf=torch.inf, neginf=-torch.inf).view(torch.int32)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_gamma_1_rounds_as_E7M0_bit_for_bit(lns, E7M0, inputs, rounding):
    uniform = None
    if rounding == "stochastic":
        uniform = torch.rand(inputs.shape, generator=torch.Generator().manual_seed(1))
    seen, expected = (one.quantize(inputs, rounding, uniform=uniform) for one in (lns(1), E7M0))
    assert torch.equal(bits(seen), bits(expected))


def test_gamma_1_has_the_values_and_rungs_of_E7M0(lns, E7M0, inputs):
    assert torch.equal(lns(1).values, E7M0.values)
    assert torch.equal(lns(1).rung(inputs), E7M0.rung(inputs))
