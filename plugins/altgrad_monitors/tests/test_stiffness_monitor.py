"""Fields of stiffness worked out by hand on small tables, and against numpy's and scipy's own."""

import math
import types

import numpy as np
import pytest
import torch

from altgrad_core.format import Format
from altgrad_core.hookspecs import Component, Step, Weight
from altgrad_core.options import FormatChoice, GeometryOptions, StiffnessChoice
from altgrad_core.registry import Registered, Registry, discover
from altgrad_monitors import StiffnessOptions
from altgrad_monitors.stiffness import OCTAVES, QUANTILES, VIOLATIONS, StiffnessField

LAYER = "h.0.mlp.c_fc"
NAN = math.nan

POWERS = Format(
    name="POWERS", bits=5, values=sorted([0, *(s * 2.0**k for k in range(-6, 8) for s in (1, -1))])
)
"""Its spacing at w is 2^floor(log2|w|), and 2^-6 below 2^-6."""
EVEN = Format(name="EVEN", bits=4, values=[rung / 8 for rung in range(-7, 8)])


def step(values, gradients=None, format=POWERS, scale=1.0, after=None):
    """A step of weights before and after it, by layer; values and gradients: by layer, or of one layer."""
    values = values if isinstance(values, dict) else {LAYER: values}
    gradients = gradients if isinstance(gradients, dict) else {LAYER: gradients}
    return Step(
        index=100,
        loss=torch.tensor(1.0),
        weights={
            f"{layer}.weight": Weight(
                value=torch.as_tensor(one if after is None else after),
                layer=layer, format=format, scale=torch.as_tensor(scale),
            )
            for layer, one in values.items()
        },
        gradients={
            f"{layer}.weight": torch.as_tensor(one) for layer, one in gradients.items() if one is not None
        },
        before={f"{layer}.weight": torch.as_tensor(one) for layer, one in values.items()},
        intended={},
    )  # fmt: skip


def observed(*arguments, formula="grid", geometry=None, per="layer", **keywords):
    choice = StiffnessChoice(formula, geometry=geometry or GeometryOptions())
    monitor = StiffnessField(StiffnessOptions(formula=choice, per=per))
    monitor.start(types.SimpleNamespace(registry=discover()))
    metrics = monitor.observe(step(*arguments, **keywords))
    return {name.removeprefix("stiffness/"): float(value) for name, value in metrics.items()}


def shares(seen, layer="total"):
    return [seen[f"{name}/{layer}"] for name in OCTAVES]


def test_quantiles_are_those_of_log2_of_the_spacing():
    weights = [2.0**-4] * 1 + [1.0] * 4 + [4.0] * 10 + [-16.0] * 4 + [64.0] * 1
    seen = observed(weights)
    assert [seen[f"{name}/{LAYER}"] for name in QUANTILES] == [-4, 0, 2, 2, 4]


def test_the_histogram_counts_octaves_from_the_medians():
    weights = [1.0, 1.0, 2.0, 4.0, 4.0, 4.0, 4.0, 8.0, 32.0, 64.0]
    assert shares(observed(weights)) == pytest.approx([0, 0.2, 0.1, 0.4, 0.1, 0, 0.2])


def test_the_scale_moves_the_field_into_weight_units():
    seen = observed([1.0, 1.0, 2.0], scale=8.0)
    assert seen["log2_p50/total"] == 0
    assert observed([2.0**-3] * 2, scale=2.0**-4)["log2_p50/total"] == -2  # spacing 2^-6 below the smallest


def test_scales_for_each_element_count_one_by_one():
    seen = observed([1.0, 1.0, 1.0], scale=torch.tensor([1.0, 2.0, 0.5]), format=EVEN)
    assert shares(seen) == pytest.approx([0, 0, 1 / 3, 1 / 3, 1 / 3, 0, 0])


def test_a_spacing_that_is_no_power_of_two_is_rounded_down_to_an_eighth_of_an_octave():
    thirds = Format(name="THIRDS", bits=3, values=[-6.0, -3.0, 0.0, 3.0, 6.0])
    assert observed([3.0], format=thirds)["log2_p50/total"] == math.log2(3.0)
    assert observed([3.0], format=thirds, scale=0.7)["log2_p50/total"] == math.log2(4.0)  # 3/0.7 = 4.29


def test_the_stiffness_is_that_of_the_weights_before_the_step():
    assert observed([1.0, 1.0], after=[64.0, 64.0])["log2_p50/total"] == 0
    assert StiffnessField(StiffnessOptions()).needs == ("before",)


def test_gradients_that_follow_the_spacing_correlate_with_it():
    weights = [1.0, 2.0, 4.0, 8.0]
    assert observed(weights, [0.1, -0.2, 0.4, 0.8])["correlation/total"] == pytest.approx(1)
    assert observed(weights, [0.8, 0.4, -0.2, 0.1])["correlation/total"] == pytest.approx(-1)
    assert observed(weights, [1.0, 2.0, 2.0, 1.0])["correlation/total"] == pytest.approx(0, abs=1e-6)


def test_zeros_among_weights_and_gradients_do_not_count():
    seen = observed([0.0, -1.0, 2.0, 4.0, 8.0], [1e9, 0.1, 0.2, 0.0, 0.8])
    assert seen["correlation/total"] == pytest.approx(1)


def test_the_correlation_is_scipys_and_over_layers_that_of_all_elements():
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed: pip install scipy")
    made = torch.Generator().manual_seed(1)
    weights = {name: 2.0 ** (torch.randn(n, generator=made) + n / 100) for name, n in (("a", 90), ("b", 200))}
    gradients = {name: torch.randn(len(one), generator=made) * one * 1e-5 for name, one in weights.items()}
    seen = observed(weights, gradients)
    for layer, names in (("a", ["a"]), ("b", ["b"]), ("total", ["a", "b"])):
        x = np.concatenate([np.log(gradients[name].abs().double().numpy()) for name in names])
        y = np.concatenate([np.floor(np.log2(weights[name].double().numpy())) for name in names])
        assert seen[f"correlation/{layer}"] == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-6)


@pytest.mark.parametrize(
    ("weights", "gradients", "format"),
    [
        ([0.1, 0.2, 0.7], [1.0, 2.0, 3.0], EVEN),
        ([1.0, 2.0, 4.0], [0.3, -0.3, 0.3], POWERS),
        ([0.0, 0.0], [1.0, 2.0], POWERS),
        ([1.0, 2.0], [0.0, 0.0], POWERS),
        ([1.0, 2.0], [1.0, 0.0], POWERS),
    ],
)
def test_without_variation_there_is_no_correlation(weights, gradients, format):
    assert math.isnan(observed(weights, gradients, format=format)["correlation/total"])
    assert StiffnessField(StiffnessOptions()).undefined_is_nan


def test_a_constant_spacing_that_is_no_power_of_two_does_not_vary_either():
    gradients = torch.randn(1001, generator=torch.Generator().manual_seed(1))
    weights = torch.linspace(-0.9, 0.9, 1001)
    assert math.isnan(observed(weights, gradients, format=EVEN, scale=0.7)["correlation/total"])


def test_layers_that_are_constant_alike_do_not_vary_together():
    weights = {"a": torch.full((7,), 0.3), "b": torch.full((1001,), 0.3)}
    gradients = {name: torch.full_like(one, 0.7) for name, one in weights.items()}
    for spread in ({"a": torch.linspace(-0.9, 0.9, 7)}, {}):
        seen = observed(weights, gradients | spread, format=EVEN, scale=0.7)
        assert math.isnan(seen["correlation/total"])


def test_layers_without_variation_still_correlate_with_one_another():
    seen = observed({"a": [1.0, 1.0], "b": [8.0, 8.0]}, {"a": [0.1, 0.1], "b": [0.2, 0.2]})
    assert math.isnan(seen["correlation/a"])
    assert seen["correlation/total"] == pytest.approx(1)


def test_a_layer_of_zeros_does_not_spoil_the_total():
    seen = observed({"a": [1.0, 2.0], "b": [0.0, 0.0]}, {"a": [0.1, 0.2], "b": [0.2, 0.2]})
    assert seen["correlation/total"] == pytest.approx(1)


def test_over_layers_the_histograms_add_up():
    weights = {"a": torch.tensor([1.0] * 3), "b": torch.tensor([4.0] * 7)}
    seen = observed(weights)
    assert (seen["log2_p25/total"], seen["log2_p50/total"]) == (0, 2)
    assert shares(seen) == pytest.approx([0, 0.3, 0, 0.7, 0, 0, 0])
    assert shares(seen, "a") == [0, 0, 0, 1, 0, 0, 0]


def test_quantiles_are_numpys_inverted_distribution():
    weights = 2.0 ** torch.randint(-6, 7, (777,), generator=torch.Generator().manual_seed(1)).float()
    seen = observed(weights)
    for name, share in QUANTILES.items():
        expected = np.quantile(weights.log2().numpy(), share, method="inverted_cdf")
        assert seen[f"{name}/total"] == expected


def test_types_of_layers_are_summed_up_like_all_of_them():
    seen = observed({"h.0.mlp.c_fc": [1.0], "h.1.mlp.c_fc": [4.0], "lm_head": [8.0]}, per="type")
    assert shares(seen, "mlp") == [0, 0, 0, 0.5, 0, 0.5, 0]
    assert seen["log2_p50/classifier"] == 3


def test_a_nan_weight_leaves_its_layer_undefined():
    seen = observed({"a": [1.0, NAN], "b": [1.0, 2.0]}, {"a": [1.0, 1.0], "b": [1.0, 2.0]})
    field = {name: value for name, value in seen.items() if not name.startswith(VIOLATIONS)}
    assert all(math.isnan(value) for name, value in field.items() if not name.endswith("/b"))
    assert not any(math.isnan(value) for name, value in field.items() if name.endswith("/b"))
    assert [seen[f"{name}/{of}"] for name in VIOLATIONS for of in ("a", "b", "total")] == [1, 0, 1] * 2


def test_a_metric_that_float32_does_not_hold_and_a_weight_beyond_the_end_are_counted():
    seen = observed([1.0, 2.0, 128.0], after=[1.0, 128.0, -129.0])
    assert [seen[f"{name}/total"] for name in VIOLATIONS] == [0, 1]  # the largest is 2^7
    assert observed([1.0, 1.0], scale=2.0**80)["metric_violations/total"] == 2  # S = 2^-73, 1/S^2 = 2^146


def test_unquantized_weights_have_no_stiffness():
    assert observed([1.0], [1.0], format=None) == {}


def test_a_layer_without_a_gradient_has_a_field_and_no_correlation():
    seen = observed([1.0, 2.0])
    assert "log2_p50/total" in seen
    assert not any("correlation" in name for name in seen)


def test_another_formula_is_looked_up_by_name():
    seen = observed([1.0, 2.0, 64.0], [1.0, 2.0, 3.0], formula="uniform")
    assert [seen[f"{name}/total"] for name in QUANTILES] == [0] * 5
    assert math.isnan(seen["correlation/total"])


def test_the_formula_is_that_of_the_runs_own_registry():
    component = Component(name="mine", summary="", target="altgrad_core.stiffness:uniform")
    mine = Registered(kind="stiffness", component=component, distribution="mine", version="1")
    monitor = StiffnessField(StiffnessOptions(formula=StiffnessChoice("mine")))
    monitor.start(types.SimpleNamespace(registry=Registry(registered=(mine,))))
    assert float(monitor.observe(step([64.0]))["stiffness/log2_p50/total"]) == 0


def test_a_formula_that_keeps_the_initial_field_is_refused():
    with pytest.raises(ValueError, match=r"leave out refresh"):
        StiffnessOptions(formula=StiffnessChoice("grid", geometry=GeometryOptions(refresh="never")))


def test_the_geometry_of_another_format_can_be_asked_for():
    pytest.importorskip("altgrad_formats", reason="the core registers no format by name")
    seen = observed([0.5, 1.0], geometry=GeometryOptions(of_format=FormatChoice("E0M7")))
    assert seen["log2_p05/total"] == seen["log2_p95/total"] == -6  # 1 fits E0M7 at scale 1, steps of 2^-6
