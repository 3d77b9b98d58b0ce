"""Hand-made gradients whose norms, ratios and idle elements are known."""

import io
import math

import numpy as np
import pytest
import torch

from altgrad_core.hookspecs import Step, Weight
from altgrad_monitors import GradientOptions
from altgrad_monitors.gradient import Gradient

LAYER = "h.0.mlp.c_fc"
NAN, INF = math.nan, math.inf


def step(gradients, index=1, values=None, before=None, names=None):
    """A step of some parameters; names: the parameters', else one weight for each layer of `gradients`."""
    gradients = {f"{layer}.weight": torch.as_tensor(one) for layer, one in gradients.items()}
    gradients = dict(zip(names, gradients.values(), strict=True)) if names else gradients
    values = {name: torch.zeros_like(one) for name, one in gradients.items()} if values is None else values
    return Step(
        index=index,
        loss=torch.tensor(1.0),
        weights={
            name: Weight(value=torch.as_tensor(one), layer=name.rpartition(".")[0])
            for name, one in values.items()
        },
        gradients=gradients,
        before={name: torch.tensor(one) for name, one in (before or {}).items()},
        intended={},
    )


def numbers(metrics):
    return {name.removeprefix("gradient/"): float(value) for name, value in metrics.items()}


def observed(gradient, monitor=None, **more):
    return numbers((monitor or Gradient(GradientOptions())).observe(step({LAYER: gradient}, **more)))


@pytest.mark.parametrize(
    ("gradient", "l2", "linf", "snr"),
    [
        ([3.0, -4.0], 5.0, 4.0, 0.5 / 3.5),
        ([1.0, 3.0], math.sqrt(10), 3.0, 2.0),
        ([1.0, -1.0], math.sqrt(2), 1.0, 0.0),
        ([0.1, 0.1, 0.1], math.sqrt(0.03), 0.1, INF),
        ([-2.0], 2.0, 2.0, INF),
        ([[0.0, 0.0], [0.0, 0.0]], 0.0, 0.0, NAN),
        ([1e-30, 3e-30], math.sqrt(10) * 1e-30, 3e-30, 2.0),
        ([1e30, 3e30], math.sqrt(10) * 1e30, 3e30, 2.0),
    ],
)
def test_norms_and_ratios_worked_out_by_hand(gradient, l2, linf, snr):
    seen = observed(gradient)
    for layer in (LAYER, "total"):
        assert seen[f"l2/{layer}"] == pytest.approx(l2)
        assert seen[f"linf/{layer}"] == pytest.approx(linf)
        assert seen[f"snr/{layer}"] == pytest.approx(snr, nan_ok=True)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1000.0])
def test_the_ratio_is_numpys_where_the_mean_is_far_from_zero_too(offset):
    gradient = torch.randn(4000, generator=torch.Generator().manual_seed(1)) + offset
    wide = gradient.double().numpy()
    assert observed(gradient)[f"snr/{LAYER}"] == pytest.approx(abs(wide.mean()) / wide.std(), rel=1e-8)


def test_long_sums_are_float64():
    """In float32 a large element swallows the million small ones."""
    gradient = torch.ones(2**20 + 1)
    gradient[0] = 2.0**13
    assert observed(gradient)[f"l2/{LAYER}"] == math.sqrt(2**20 + 2**26)


@pytest.mark.parametrize("wrong", [NAN, INF])
def test_gradients_that_are_not_finite_are_reported_as_they_are(wrong):
    seen = observed([1.0, wrong])
    assert seen[f"l2/{LAYER}"] == pytest.approx(wrong, nan_ok=True)
    assert seen["linf/total"] == pytest.approx(wrong, nan_ok=True)
    assert math.isnan(seen[f"snr/{LAYER}"])


def test_over_layers_everything_is_that_of_one_long_vector():
    made = torch.Generator().manual_seed(1)
    parts = {name: torch.randn(size, generator=made) + size for name, size in (("a", 3), ("b", 40))}
    seen = numbers(Gradient(GradientOptions()).observe(step(parts)))
    whole = torch.cat(list(parts.values())).double().numpy()
    assert seen["l2/total"] == pytest.approx(np.linalg.norm(whole))
    assert seen["linf/total"] == pytest.approx(np.abs(whole).max())
    assert seen["snr/total"] == pytest.approx(abs(whole.mean()) / whole.std())


def test_the_parameters_of_a_layer_count_as_one():
    names = ["a.c_fc.weight", "a.c_fc.bias"]
    seen = numbers(Gradient(GradientOptions()).observe(step({"w": [3.0], "b": [-4.0]}, names=names)))
    assert seen["l2/a.c_fc"] == 5
    assert seen["snr/a.c_fc"] == pytest.approx(0.5 / 3.5)


def test_types_of_layers_are_summed_up_like_all_of_them():
    monitor = Gradient(GradientOptions(per="type"))
    seen = numbers(monitor.observe(step({"h.0.mlp.c_fc": [3.0], "h.1.mlp.c_proj": [4.0], "lm_head": [1.0]})))
    assert seen["l2/mlp"] == 5
    assert seen["l2/classifier"] == 1


def test_parameters_without_a_gradient_and_layers_outside_of_the_pattern_are_left_out():
    monitor = Gradient(GradientOptions(layers="a"))
    seen = monitor.observe(step({"b": [1.0]}, values={"a.weight": [1.0], "b.weight": [1.0]}))
    assert seen == {}


def test_an_element_is_dead_after_so_many_checks_in_a_row():
    monitor = Gradient(GradientOptions(window=3))
    gradients = [[0.0, 0.0, 1.0, 9e-9], [0.0, 1.0, 1.0, -9e-9], [-0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    gradients += [[0.0, 0.0, 0.0, 1.1e-8]]
    seen = [observed(one, monitor).get("dead_fraction/total") for one in gradients]
    assert seen == [None, None, 0.5, 0.5, 0.5]


def test_a_window_of_one_check_looks_at_that_check_alone():
    monitor = Gradient(GradientOptions(window=1))
    assert [observed(one, monitor)["dead_fraction/total"] for one in ([0.0, 1.0], [1.0, 1.0])] == [0.5, 0]


def test_counters_do_not_run_over():
    monitor = Gradient(GradientOptions(window=254))
    seen = [observed([0.0, 1.0], monitor).get("dead_fraction/total") for _ in range(600)]
    assert seen == [None] * 253 + [0.5] * 347


def test_a_nan_is_not_dead():
    assert observed([NAN, 0.0], Gradient(GradientOptions(window=1)))["dead_fraction/total"] == 0.5


def test_a_layer_that_had_no_gradient_has_made_no_check():
    monitor = Gradient(GradientOptions(window=2))
    monitor.observe(step({"a": [0.0], "b": [0.0]}))
    monitor.observe(step({"a": [0.0]}))
    seen = numbers(
        monitor.observe(
            step(
                {
                    "a": [0.0],
                    "b": [
                        1.0,
                    ],
                }
            )
        )
    )
    assert seen["dead_fraction/a"] == 1
    assert seen["dead_fraction/b"] == 0
    assert seen["dead_fraction/total"] == 0.5


def test_updates_that_changed_nothing_are_a_share_of_all_elements():
    name = f"{LAYER}.weight"
    before = {name: [0.5, 0.25, -0.0, NAN, 1.0]}
    seen = observed([1.0] * 5, values={name: torch.tensor([0.5, 0.26, 0.0, NAN, 1.0])}, before=before)
    assert seen["zero_update_fraction/total"] == 0.6


def test_only_weights_whose_state_before_is_known_have_a_zero_update_fraction():
    assert not any("zero_update" in name for name in observed([1.0]))
    assert Gradient(GradientOptions()).needs == ("before",)


def test_a_resumed_monitor_goes_on_bit_for_bit():
    made = torch.Generator().manual_seed(1)
    steps = [step({"a": torch.randn(50, generator=made) * 1e-8}) for _ in range(8)]
    whole, first, second = (Gradient(GradientOptions(window=3)) for _ in range(3))
    expected = [whole.observe(one) for one in steps]
    for one in steps[:4]:
        first.observe(one)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    second.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    assert [second.observe(one) for one in steps[4:]] == expected[4:]
    assert 0 < expected[-1]["gradient/dead_fraction/total"] < 1
