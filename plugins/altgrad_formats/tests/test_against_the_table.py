"""The arithmetic of ExMy against what the core derives from nothing but the sorted values."""

import pytest
import torch

from altgrad_core.format import ROUNDINGS, Format
from altgrad_core.random_bits import uniform
from altgrad_formats import NAMED, catalog

SMALL = [format for format in (getattr(catalog, name) for name in NAMED) if format.bits <= 8]
BF16_TABLE = [catalog.E2M13, catalog.BF16]
by_name = pytest.mark.parametrize("format", SMALL + BF16_TABLE, ids=lambda format: format.name)
DTYPES = [torch.float32, torch.float64]


def table_of(format):
    return Format(name=format.name, bits=format.bits, values=format.values)


def ends_in_a_new_binade(format):
    """Whether the gap above the largest value would be twice the last one, which a table cannot know."""
    return format.layout.mantissa_bits == 0


@pytest.fixture(scope="module")
def inputs(edges, random_patterns):
    def make(format, dtype):
        return torch.cat((edges(format, dtype), random_patterns(format, 20_000).to(dtype)))

    return make


@by_name
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_quantize(format, rounding, dtype, inputs, assert_same_bits):
    x, table = inputs(format, dtype), table_of(format)
    numbers = uniform((1, 2, 3), len(x)) if rounding == "stochastic" else None
    seen = format.quantize(x, rounding, uniform=numbers)
    assert_same_bits(x, seen, table.quantize(x, rounding, uniform=numbers))
    if ends_in_a_new_binade(format):
        x = x.clamp(-format.largest, format.largest)
    seen = format.quantize(x, rounding, overflow="ieee", uniform=numbers)
    seen = torch.where(seen.isinf(), torch.nan, seen)
    assert_same_bits(x, seen, table.quantize(x, rounding, overflow="ieee", uniform=numbers))


@by_name
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spacing(format, dtype, inputs, assert_same_bits):
    x = inputs(format, dtype)
    if ends_in_a_new_binade(format):
        x = x[x.abs() < format.largest]
    assert_same_bits(x, format.spacing(x), table_of(format).spacing(x))


def test_only_the_spacing_at_the_end_of_e7m0_is_not_the_table_s():
    end = torch.tensor([2.0**64, 2.0**65, torch.inf])
    assert catalog.E7M0.spacing(end).tolist() == [2.0**64] * 3
    assert table_of(catalog.E7M0).spacing(end).tolist() == [2.0**63] * 3


@by_name
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rung(format, dtype, inputs):
    x = inputs(format, dtype)
    assert torch.equal(format.rung(x), table_of(format).rung(x))


@by_name
def test_from_rung(format, assert_same_bits):
    top = format.layout.largest_code
    rungs = torch.cat((torch.arange(-top - 3, top + 4), torch.tensor([-(2**31), 2**31 - 1])))
    assert_same_bits(rungs, format.from_rung(rungs), table_of(format).from_rung(rungs))


@by_name
def test_codes_name_the_same_values(format, inputs):
    x, table = inputs(format, torch.float32), table_of(format)
    x = x[x.isfinite()]
    assert torch.equal(format.decode(format.encode(x)), table.decode(table.encode(x)))
