"""The loops for value tables against a binary search in the same thresholds, bit for bit."""

import math

import pytest
import torch

from altgrad_core import native_table
from altgrad_core.format import Format
from altgrad_core.random_bits import stream_key_tensor

E4M3_LIKE = [m * 2.0**e for e in range(-9, 6) for m in range(8, 16)]
SYMMETRIC = sorted({0.0, *E4M3_LIKE, *(-value for value in E4M3_LIKE)})
THIRDS = [float(torch.tensor(k / 3)) for k in range(-60, 61)]  # midpoints of all 24 bits
POWERS = [-(2.0**k) for k in range(63, -63, -1)] + [0.0] + [2.0**k for k in range(-62, 64)]
CLOSE = [0.0, 1.0, 1.0 + 2.0**-12, 1.0 + 2.0**-11]
LADDERS = {
    "EIGHT": Format(name="EIGHT", bits=8, values=SYMMETRIC),
    "THIRDS": Format(name="THIRDS", bits=8, values=THIRDS),
    "POWERS": Format(name="POWERS", bits=8, values=POWERS),
    "UNSIGNED": Format(name="UNSIGNED", bits=3, values=[0, 1, 2, 5]),
    "ENDS": Format(name="ENDS", bits=3, values=[-1, 0, 2.0**-149, 2.0**127]),
    "TWO": Format(name="TWO", bits=3, values=[0, 1.5 * 2.0**127]),
}
MODES = ["nearest_even", "nearest_away", "toward_zero", "up", "down"]
formats = pytest.mark.parametrize("name", LADDERS)


@pytest.fixture(autouse=True)
def loops():
    if native_table._loops() is None:
        pytest.skip("there is no C compiler here")


@pytest.fixture
def searching(monkeypatch):
    """Call a function as if there were no compiler."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(native_table, "_loops", lambda: None)
            return function()

    return call


def inputs(format):
    """Random patterns, special numbers, and the thresholds' own neighborhood."""
    bits = torch.randint(-(2**31), 2**31 - 1, (20_000,), generator=torch.Generator().manual_seed(1))
    values = format.values.double()
    near = torch.cat((values, (values[1:] + values[:-1]) / 2)).float()
    up = torch.full_like(near, math.inf)
    special = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-45, 3.4e38, -3.4e38]
    )
    around = torch.nextafter(near, up), torch.nextafter(near, -up)
    return torch.cat((special, near, *around, bits.to(torch.int32).view(torch.float32)))


def same_bits(a, b):
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(torch.int32), b[~nan].view(torch.int32))


@formats
@pytest.mark.parametrize("overflow", ["saturate", "ieee"])
@pytest.mark.parametrize("rounding", MODES)
def test_every_mode_gives_the_same_bits(name, rounding, overflow, searching):
    format = LADDERS[name]
    x = inputs(format)

    def rounded():
        return format.quantize(x, rounding, overflow=overflow)

    assert same_bits(rounded(), searching(rounded))


@formats
def test_stochastic_rounding_gives_the_same_bits(name, searching):
    format = LADDERS[name]
    x, keys = inputs(format), stream_key_tensor((1, 2, 3))

    def rounded():
        return format.fake_quantize(x, None, "stochastic", keys=keys)

    assert same_bits(rounded(), searching(rounded))


@formats
def test_the_tables_of_these_tests_have_slots(name):
    x = torch.zeros(2048)
    assert len(LADDERS[name]._table._slots(x, "nearest_even"))


@formats
def test_rungs_spacings_and_codes_are_the_same(name, searching):
    format = LADDERS[name]
    x = inputs(format)
    assert torch.equal(format.rung(x), searching(lambda: format.rung(x)))
    assert same_bits(format.spacing(x), searching(lambda: format.spacing(x)))
    codes = format.encode(x[~x.isnan()])
    assert torch.equal(codes, searching(lambda: format.encode(x[~x.isnan()])))
    assert same_bits(format.decode(codes), searching(lambda: format.decode(codes)))


def test_a_code_without_a_value_is_nan():
    codes = torch.arange(256, dtype=torch.uint8).repeat(8)
    assert torch.equal(LADDERS["UNSIGNED"].decode(codes)[:5].isnan(), torch.tensor([False] * 4 + [True]))


@pytest.mark.parametrize("scale", [torch.tensor(4.0), torch.tensor(0.3), torch.rand(50, 1) + 0.1])
def test_scale_and_limit_are_applied_in_the_same_pass(scale, searching):
    x, limit = torch.randn(50, 301), torch.tensor([-0.75, 0.5])

    def rounded():
        return LADDERS["EIGHT"].fake_quantize(x, scale, limit=limit)

    assert same_bits(rounded(), searching(rounded))


def test_values_too_close_for_a_slot_are_searched(searching):
    format = Format(name="CLOSE", bits=3, values=CLOSE)
    x = 1.0 + torch.arange(4096) * 2.0**-14
    assert not len(format._table._slots(x, "nearest_even"))
    assert same_bits(format.quantize(x), searching(lambda: format.quantize(x)))
