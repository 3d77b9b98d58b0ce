"""Any format at all, on any input: hypothesis picks both, the value table and fractions judge."""

from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from altgrad_core.format import Format
from altgrad_core.random_bits import uniform
from altgrad_core.testing.formats import check_format
from altgrad_formats.exmy import ExMy
from altgrad_formats.layout import SPECIALS


@st.composite
def formats(draw, most_bits=9):
    exponent_bits = draw(st.integers(0, most_bits - 1))
    mantissa_bits = draw(st.integers(max(0, 2 - exponent_bits), max(0, most_bits - 1 - exponent_bits)))
    bias = draw(st.one_of(st.none(), st.integers(-127, 149)))
    specials = draw(st.sampled_from(SPECIALS))
    try:
        return ExMy(exponent_bits, mantissa_bits, bias, specials)
    except ValueError:
        assume(False)


unhurried = settings(deadline=None)  # the first call of a format makes its table
floats = st.floats(width=32) | st.floats()


def tensor(x):
    return torch.tensor([x], dtype=torch.float64)


@unhurried
@given(formats(most_bits=7), st.floats(allow_nan=False, allow_infinity=False))
def test_the_result_is_the_nearest_value(format, x):
    values = [Fraction(v) for v in format.values.tolist()]
    distances = [abs(v - Fraction(x)) for v in values]
    rungs = [i - len(values) // 2 for i, distance in enumerate(distances) if distance == min(distances)]
    rung = rungs[0] if len(rungs) == 1 else next(r for r in rungs if r % 2 == 0)
    assert format.rung(tensor(x)).item() == rung
    assert format.quantize(tensor(x)).item() == values[rung + len(values) // 2]


@unhurried
@given(formats(), floats, floats)
def test_order_is_kept(format, x, y):
    assume(x <= y)
    low, high = format.quantize(tensor(x)), format.quantize(tensor(y))
    assert low.item() <= high.item()


@unhurried
@given(formats(), floats, st.sampled_from(["nearest_even", "nearest_away", "toward_zero", "up", "down"]))
def test_once_is_enough(format, x, rounding):
    once = format.quantize(tensor(x), rounding)
    assert torch.equal(format.quantize(once, rounding).nan_to_num(7.7), once.nan_to_num(7.7))


@unhurried
@given(formats(), st.floats(allow_nan=False))
def test_down_and_up_enclose(format, x):
    assume(abs(x) <= format.largest)
    down, up = format.quantize(tensor(x), "down").item(), format.quantize(tensor(x), "up").item()
    assert down <= x <= up
    assert format.rung(tensor(up)).item() - format.rung(tensor(down)).item() == (down != up)


@unhurried
@given(formats(), st.lists(floats, min_size=1, max_size=20), st.integers(0, 2**40))
def test_the_table_gives_the_same_random_rounding(format, xs, seed):
    table = Format(name=format.name, bits=format.bits, values=format.values)
    x = torch.tensor(xs, dtype=torch.float64)
    numbers = uniform((seed, 0, 0), len(xs))
    seen, expected = (f.quantize(x, "stochastic", uniform=numbers) for f in (format, table))
    assert torch.equal(seen.nan_to_num(7.7), expected.nan_to_num(7.7))


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(formats(most_bits=12), st.integers(0, 2**40))
def test_every_format_conforms(format, seed):
    check_format(format, seed=seed)
