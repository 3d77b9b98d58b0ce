"""The values of posit8, against the standard's formula and Gustafson's construction; and where it rounds."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core.registry import UsageError
from altgrad_core.testing import check_format

ES = range(5)


@pytest.mark.parametrize(
    ("string", "value"),
    [
        ("0_0000001", 2**-24),  # no room for an exponent: 16^-6
        ("0_0000010", 2**-20),
        ("0_0000011", 2**-18),  # exponent 1., the missing bit is 0
        ("0_01_11_100", 3 / 4),  # 16^-1 · 2^3 · 1.5
        ("0_10_00_000", 1),
        ("0_10_00_001", 9 / 8),
        ("0_10_00_100", 3 / 2),
        ("0_10_01_000", 2),
        ("0_10_01_101", 13 / 4),
        ("0_110_00_00", 16),
        ("0_1111110", 2**20),
        ("0_1111111", 2**24),
        ("1_10_00_000", -1),
        ("1_0000001", -(2**24)),
        ("1_1111111", -(2**-24)),
    ],
)
def test_a_bit_string_has_the_value_worked_out_by_hand(posit, string, value):
    code = int(string.replace("_", ""), 2)
    signed = code - 256 if code > 127 else code
    assert posit().from_rung(torch.tensor([signed])).item() == value


def test_the_same_string_has_another_value_with_another_exponent_width(posit):
    rung = torch.tensor([0b0_10_01_000])
    assert [posit(es).from_rung(rung).item() for es in (0, 1, 2)] == [1.25, 1.5, 2.0]


def by_the_standard(code, es):
    """Return ((1 - 3s) + f) · 2^((1 - 2s)·(2^es·r + e + s)), the formula for either sign; None for NaR."""
    if code in (0, 128):
        return 0 if code == 0 else None
    bits = [code >> place & 1 for place in range(7, -1, -1)]
    run = len(list(next(itertools.groupby(bits[1:]))[1]))
    r = run - 1 if bits[1] else -run
    tail = [*bits[run + 2 :], *([0] * 8)]
    e = sum(bit << place for place, bit in enumerate(reversed(tail[:es])))
    f = sum(Fraction(bit, 2**place) for place, bit in enumerate(tail[es:], start=1))
    s = bits[0]
    return (1 - 3 * s + f) * Fraction(2) ** ((1 - 2 * s) * (2**es * r + e + s))


@pytest.mark.parametrize("es", ES)
def test_the_values_are_those_of_the_standards_formula_in_the_order_of_their_strings(posit, es):
    expected = [by_the_standard(code % 256, es) for code in range(-127, 128)]
    assert posit(es).values.tolist() == expected
    assert by_the_standard(128, es) is None


def ring(bits, es):
    """Return the positive posits by Gustafson's construction: each bit more adds a value between any two.

    Between neighbors a factor of more than 2 apart it is their geometric mean, else the arithmetic one;
    beyond the ends it is a factor of 2^2^es further out.
    """
    useed = Fraction(2) ** 2**es
    values = [1 / useed, Fraction(1), useed]
    for _ in range(bits - 3):
        added = [mean(*pair) for pair in itertools.pairwise(values)]
        inner = [one for pair in zip(values, added, strict=False) for one in pair]
        values = [values[0] / useed, *inner, values[-1], values[-1] * useed]
    return values


def mean(low, high):
    if high <= 2 * low:
        return (low + high) / 2
    return Fraction(2) ** (round(math.log2(low * high)) // 2)


@pytest.mark.parametrize("es", ES)
def test_the_values_are_those_of_gustafsons_construction(posit, es):
    assert posit(es).values[128:].tolist() == ring(8, es)


@pytest.mark.parametrize("es", ES)
def test_it_keeps_the_contract_of_a_format(posit, es):
    check_format(posit(es))


# --- rounding, here and in the standard ------------------------------------------------------------------


def steps_of_the_standard():
    """Yield (low, threshold, high) for neighboring posits; the threshold is the 9-bit posit between them."""
    longer = ring(9, 2)
    return zip(longer[1:-2:2], longer[2:-1:2], longer[3::2], strict=True)


def test_from_2_to_the_minus_16_to_2_to_the_16_it_rounds_as_the_standard_does(posit):
    steps = [step for step in steps_of_the_standard() if step[0] >= 2**-16 and step[2] <= 2**16]
    low, threshold, high = torch.tensor([[*map(float, step)] for step in steps]).T
    below, above = (torch.nextafter(threshold, end) for end in (low, high))
    assert len(steps) == 120
    assert torch.equal(posit().quantize(below), low)
    assert torch.equal(posit().quantize(above), high)
    even = torch.where(posit().rung(low) % 2 == 0, low, high)
    assert torch.equal(posit().quantize(threshold), even)


def test_further_from_1_every_threshold_of_the_standard_is_nearer_to_the_lower_value():
    outside = [step for step in steps_of_the_standard() if step[0] < 2**-16 or step[2] > 2**16]
    assert [math.log2(threshold) for _, threshold, _ in outside] == [-22, -19, -17, 17, 19, 22]
    assert all(threshold < (low + high) / 2 for low, threshold, high in outside)


def test_between_2_to_the_16_and_2_to_the_18_the_nearest_value_is_taken_not_the_standards(posit):
    x = torch.tensor([144179.0])  # past 2^17, where the standard goes to 2^18; before 2.5 · 2^16
    assert posit().quantize(x).item() == 2**16


def test_what_is_nearer_to_zero_than_to_the_smallest_value_becomes_zero_unlike_in_the_standard(posit):
    assert posit().quantize(torch.tensor([2.0**-26, 2.0**-25, 1.5 * 2.0**-25])).tolist() == [0, 0, 2.0**-24]


# --- its use ---------------------------------------------------------------------------------------------


def test_a_margin_brings_weights_to_where_posits_are_precise(relative_error):
    assert relative_error("posit8") > 0.7
    assert relative_error("posit8", margin=2.0**22) < 0.027


def test_nan_passes_through_quantize_and_has_no_code(posit):
    nan = torch.tensor([torch.nan])
    assert posit().quantize(nan).isnan().all()
    with pytest.raises(ValueError, match="posit8 has no code for NaN"):
        posit().encode(nan)


def test_bfloat16_holds_every_posit(posit):
    x = torch.linspace(-9, 9, 99, dtype=torch.bfloat16)
    for es in ES:
        assert torch.equal(posit(es).quantize(x).float(), posit(es).quantize(x.float()))


def test_an_exponent_too_wide_for_float32_is_refused():
    with pytest.raises(UsageError, match="es: expected 0 to 4, got 5"):
        altgrad.get_format({"plugin": "posit8", "es": 5})
