import pytest
import torch

from altgrad_core import stiffness
from altgrad_core.hookspecs import NoOptions

FORMATS = ("E0M7", "E1M6", "E4M3", "E5M2", "E7M0")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", [1.0, 0.25, 64.0])
def test_grid_is_the_gap_of_the_table_in_weight_units(table, name, scale):
    format = table(name)
    values = format.values.double()
    lower, upper = values[:-1], values[1:]
    inside = lower + (upper - lower) / 4
    seen = stiffness.grid_stiffness(inside / scale, format, scale)
    torch.testing.assert_close(seen, (upper - lower) / scale, rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_grid_is_finite_and_positive_everywhere(table, name):
    format = table(name)
    weights = torch.tensor([0.0, -0.0, format.smallest / 8, format.largest, -4 * format.largest])
    seen = stiffness.grid_stiffness(weights, format, torch.tensor(0.5))
    assert (seen > 0).all()
    assert seen.isfinite().all()
    assert seen[0] == format.smallest / 0.5


def test_on_uniform_formats_grid_is_constant(table):
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for name, unit in (("E0M7", 2.0**-7), ("E1M6", 2.0**-5)):
        assert stiffness.grid_stiffness(weights, table(name), 4.0).unique().tolist() == [unit / 4]


def test_grid_keeps_shape_and_dtype(table):
    for dtype in (torch.float32, torch.float64):
        weights = torch.zeros(2, 3, dtype=dtype)
        for formula in (stiffness.grid_stiffness, stiffness.uniform_stiffness):
            seen = formula(weights, table("E4M3"), torch.tensor(2.0))
            assert (seen.shape, seen.dtype) == (weights.shape, dtype)


def test_uniform_is_one(table):
    weights = torch.tensor([0.0, 3.0, -1e9])
    assert stiffness.uniform_stiffness(weights, table("E4M3"), 2.0).tolist() == [1, 1, 1]


def test_both_are_built_from_options():
    assert stiffness.grid(NoOptions()) is stiffness.grid_stiffness
    assert stiffness.uniform(NoOptions()) is stiffness.uniform_stiffness
