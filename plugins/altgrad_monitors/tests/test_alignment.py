"""Weights on and off a grid of eighths, worked out by hand, and code distributions against scipy's."""

import math

import numpy as np
import pytest
import torch

from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_monitors import AlignmentOptions
from altgrad_monitors.alignment import OCTAVES, Alignment

LAYER = "h.0.mlp.c_fc"
NAN = math.nan

EIGHTHS = Format(name="EIGHTHS", bits=4, values=[rung / 8 for rung in range(-7, 8)])
POWERS = Format(name="POWERS", bits=5, values=[0.0, *(2.0**k for k in range(-9, 4))])
"""No values below zero, 14 codes, thirteen octaves."""


def observed(layers, format=EIGHTHS, scale=1.0, per="layer"):
    layers = layers if isinstance(layers, dict) else {LAYER: layers}
    weights = {
        f"{layer}.weight": Weight(
            value=torch.as_tensor(one), layer=layer, format=format, scale=torch.as_tensor(scale)
        )
        for layer, one in layers.items()
    }
    seen = Step(
        index=100, loss=torch.tensor(1.0), weights=weights, gradients={}, before={}, intended={}
    )  # fmt: skip
    metrics = Alignment(AlignmentOptions(per=per)).observe(seen)
    return {name.removeprefix("alignment/"): float(value) for name, value in metrics.items()}


def octaves(seen, layer="total"):
    return [seen[f"{name}/{layer}"] for name in (*(f"octave_{k}" for k in range(OCTAVES)), "octave_below")]


def test_weights_on_the_grid_have_no_distance():
    seen = observed([0.125, -0.875, 0.0, -0.0])
    assert seen[f"distance_mean/{LAYER}"] == seen[f"distance_max/{LAYER}"] == 0
    assert seen[f"on_grid_fraction/{LAYER}"] == 1


def test_distances_are_in_units_of_the_local_spacing():
    seen = observed([0.125, 0.15625, -0.3125, 1.0])
    assert seen["distance_mean/total"] == pytest.approx((0 + 0.25 + 0.5 + 1) / 4)
    assert seen["distance_max/total"] == 1
    assert seen["on_grid_fraction/total"] == 0.25


def test_the_spacing_is_the_one_at_the_weight():
    """5 lies between 4 and 8, 1/4 of a gap away; 3 halfway between 2 and 4."""
    seen = observed([5.0, 3.0], format=POWERS)
    assert seen["distance_mean/total"] == pytest.approx((0.25 + 0.5) / 2)


def test_the_grid_is_the_formats_divided_by_the_scale():
    seen = observed([0.25, 0.5, 0.53125], scale=0.5)
    assert seen["on_grid_fraction/total"] == pytest.approx(2 / 3)
    assert seen["distance_max/total"] == pytest.approx(0.125)


def test_the_spacing_is_that_of_the_scaled_weight():
    """0.625 is 5 under the scale, a quarter of the gap from 4 to 8."""
    assert observed([0.625], format=POWERS, scale=8.0)["distance_max/total"] == 0.25


def test_scales_for_each_element_count_one_by_one():
    seen = observed([0.25, 0.25], scale=torch.tensor([0.5, 0.25]))
    assert seen["on_grid_fraction/total"] == 0.5
    assert seen["distance_max/total"] == 0.5


def test_weights_stored_under_a_scale_that_is_no_power_of_two_are_on_their_grid():
    scale = torch.tensor(0.7)
    seen = observed(EIGHTHS.values / scale, scale=scale)
    assert seen["on_grid_fraction/total"] == 1
    assert seen["distance_max/total"] == 0


def test_codes_in_use_are_a_share_of_the_formats():
    seen = observed([0.125, 0.125, -0.875, 0.0, -0.0, 0.14])
    assert seen["code_utilization/total"] == pytest.approx(3 / 15)


def test_weights_in_every_code_alike_are_uniform():
    seen = observed(EIGHTHS.values.repeat(3))
    assert seen["code_utilization/total"] == 1
    assert seen["code_ks_distance/total"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("weights", "distance"),
    [([-5.0], 14 / 15), ([5.0], 14 / 15), ([0.0], 7 / 15), ([-0.875, 0.875], 6.5 / 15)],
)
def test_the_distance_from_uniform_worked_out_by_hand(weights, distance):
    assert observed(weights)["code_ks_distance/total"] == pytest.approx(distance)


@pytest.mark.parametrize("format", [EIGHTHS, POWERS])
@pytest.mark.parametrize("seed", range(3))
def test_the_distance_from_uniform_is_scipys(format, seed):
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    weights = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * 0.3
    every_code, used = format.values.numpy(), format.quantize(weights).numpy() + 0.0
    expected = stats.ks_2samp(used, every_code).statistic
    assert observed(weights, format=format)["code_ks_distance/total"] == pytest.approx(expected)


@pytest.mark.parametrize("format", [EIGHTHS, POWERS])
def test_codes_are_those_of_the_nearest_values(format):
    weights = torch.randn(500, generator=torch.Generator().manual_seed(1))
    expected = len(np.unique(format.quantize(weights).numpy() + 0.0)) / len(format.values)
    assert observed(weights, format=format)["code_utilization/total"] == pytest.approx(expected)


def test_octaves_are_counted_down_from_that_of_the_largest_value():
    seen = observed([8.0, 8.5, 4.0, 2.0**-4, 2.0**-5, 2.0**-9, 0.0, 0.0], format=POWERS)
    assert octaves(seen) == [0.25, 0.125, 0, 0, 0, 0, 0, 0.125, 0.25]
    assert seen["zeros/total"] == 0.25


def test_octaves_hold_values_of_several_mantissas_and_signs():
    seen = observed([0.875, -0.5, 0.375, 0.25, -0.125, 0.125, 0.125, 0.0])
    assert octaves(seen)[:4] == [0.25, 0.25, 0.375, 0]
    assert seen["zeros/total"] == 0.125


def test_a_nan_weight_has_no_code_and_is_off_the_grid():
    seen = observed([NAN, 0.125])
    assert seen["on_grid_fraction/total"] == 0.5
    assert math.isnan(seen["distance_mean/total"])
    assert math.isnan(seen["distance_max/total"])
    assert seen["code_utilization/total"] == pytest.approx(1 / 15)
    assert seen["octave_2/total"] == 1


def test_weights_that_are_all_nan_are_nowhere():
    seen = observed([NAN])
    assert seen["on_grid_fraction/total"] == 0
    assert math.isnan(seen["code_ks_distance/total"])
    assert math.isnan(seen["zeros/total"])


def test_an_infinite_weight_is_infinitely_far_and_has_the_code_at_the_end():
    seen = observed([math.inf])
    assert seen["distance_max/total"] == math.inf
    assert seen["octave_0/total"] == 1


def test_a_weight_far_beyond_the_range_of_its_scale_is_finitely_far():
    """2^100 under a scale of 2^60: their product is no float32; the last gap of POWERS is 4."""
    assert observed([2.0**100], format=POWERS, scale=2.0**60)["distance_max/total"] == 2.0**100 / 4 * 2.0**60


def test_over_layers_shares_are_of_all_elements_and_extremes_the_largest():
    seen = observed({"a": [0.125, 0.125, 0.125], "b": [0.1875]})
    assert seen["on_grid_fraction/total"] == 0.75
    assert seen["distance_mean/total"] == pytest.approx(0.125)
    assert seen["distance_max/total"] == 0.5
    assert seen["octave_2/total"] == 0.75


def test_over_layers_what_hangs_on_the_format_is_averaged():
    seen = observed({"a": EIGHTHS.values, "b": [0.0, 0.0]})
    assert seen["code_utilization/total"] == pytest.approx((1 + 1 / 15) / 2)
    assert seen["code_ks_distance/total"] == pytest.approx(7 / 15 / 2)


def test_types_of_layers_are_summed_up_like_all_of_them():
    seen = observed({"h.0.mlp.c_fc": [0.1], "h.1.mlp.c_fc": [0.125], "lm_head": [0.0]}, per="type")
    assert seen["on_grid_fraction/mlp"] == 0.5
    assert seen["zeros/classifier"] == 1


def test_half_precision_weights_keep_their_codes():
    seen = observed(torch.tensor([0.125, 0.25]).bfloat16())
    assert seen["on_grid_fraction/total"] == 1
    assert seen["code_utilization/total"] == pytest.approx(2 / 15)


def test_half_precision_weights_may_be_in_a_format_that_it_does_not_hold():
    fine = Format(name="FINE", bits=3, values=[0.0, 1.0, 1 + 2.0**-9])
    assert observed(torch.tensor([1.0]).bfloat16(), format=fine)["on_grid_fraction/total"] == 1


def test_unquantized_weights_have_no_grid():
    assert observed([1.0], format=None) == {}
