"""Excess kurtosis of activations: hand-computed, against scipy, and in a small model."""

import math

import pytest
import torch
from torch import nn

from altgrad_core.extra_pass import extra_passes, micro_batches
from altgrad_monitors import KurtosisOptions
from altgrad_monitors.kurtosis import Kurtosis, alert, excess_kurtosis

LINEARS = [
    *(
        f"transformer.h.{i}.{name}"
        for i in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ),
    "lm_head",
]


@pytest.mark.parametrize(
    ("values", "excess"),
    [
        ([-1.0, 1.0], -2.0),
        ([0.0, 0.0, 3.0], -1.5),  # moments 2 and 6 about the mean 1
        ([1.0] * 99 + [11.0], 100**2 / 99 - 6),
        ([1e10, 3e10], -2.0),
        ([1e30, 3e30], -2.0),  # beyond what float32 can square
    ],
)
def test_the_fourth_moment_over_the_square_of_the_second_less_three(values, excess):
    assert float(excess_kurtosis(torch.tensor(values))) == pytest.approx(excess, rel=1e-12)


def test_a_large_mean_does_not_drown_it():
    assert float(excess_kurtosis(torch.tensor([2.0**24, 2.0**24 + 2]))) == -2.0


@pytest.mark.parametrize("values", [[0.1] * 7, [1 / 3] * 9999, [2.0], [1.0, math.nan], [1.0, math.inf, 2.0]])
def test_constant_inputs_and_those_that_are_not_finite_have_none(values):
    assert excess_kurtosis(torch.tensor(values)).isnan()


@pytest.mark.parametrize(
    ("values", "limit", "answer"),
    [
        ([-1.0, 1.0], -2.0, 0.0),
        ([-1.0, 1.0], -2.1, 1.0),
        ([1.0, math.nan], 10.0, 1.0),
        ([1.0, -math.inf], 10.0, 1.0),
        ([1.0, 1.0], 10.0, 0.0),
    ],
)
def test_an_alert_is_an_excess_above_the_limit_or_inputs_that_are_not_finite(values, limit, answer):
    x = torch.tensor(values)
    assert alert(x, excess_kurtosis(x), limit) == answer


@pytest.mark.parametrize("shape", [(50,), (3, 4, 5), (2, 3000)])
@pytest.mark.parametrize("power", [1, 3, 7])
def test_it_agrees_with_scipy(shape, power):
    stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(power)) ** power
    assert float(excess_kurtosis(x)) == pytest.approx(stats.kurtosis(x.double(), axis=None), rel=1e-9)


def test_every_linear_reports_its_inputs_and_the_total_is_the_largest(run_of, observed):
    seen = observed(Kurtosis(KurtosisOptions()), run_of("E4M3", "E4M3"))
    assert {name for name in seen if "excess" in name} == {
        f"kurtosis/excess/{one}" for one in [*LINEARS, "total"]
    }
    assert seen["kurtosis/excess/total"] == max(value for name, value in seen.items() if "excess" in name)


def test_the_inputs_are_those_of_the_coming_steps_first_micro_batch_before_quantization(run_of, observed):
    run = run_of("E4M3", "E4M3")
    seen = observed(Kurtosis(KurtosisOptions()), run, index=4)
    with extra_passes(run), torch.no_grad():
        x = run.model.transformer.wte(next(micro_batches(run, 4))[0]) + run.model.transformer.wpe.weight
        x = run.model.transformer.h[0].ln_1(x)
    name = "kurtosis/excess/transformer.h.0.attn.c_attn"
    assert seen[name] == float(excess_kurtosis(x))


def test_one_outlier_channel_raises_the_alert_of_its_layer_alone(run_of, observed):
    run = run_of()
    with torch.no_grad():
        run.model.transformer.ln_f.weight[3] = 100.0
    seen = observed(Kurtosis(KurtosisOptions()), run)
    alerts = {name for name, value in seen.items() if "alert" in name and value == 1}
    assert alerts == {"kurtosis/alert/lm_head", "kurtosis/alert/total"}


def test_inputs_that_are_nan_are_no_health(run_of, observed):
    run = run_of()
    with torch.no_grad():
        run.model.transformer.ln_f.weight[0] = math.nan
    seen = observed(Kurtosis(KurtosisOptions()), run)
    assert math.isnan(seen["kurtosis/excess/lm_head"])
    assert math.isnan(seen["kurtosis/excess/total"])
    assert seen["kurtosis/alert/lm_head"] == seen["kurtosis/alert/total"] == 1


def test_layers_and_types_can_be_chosen(run_of, observed):
    options = KurtosisOptions(layers=r".*mlp.*", per="type")
    assert set(observed(Kurtosis(options), run_of())) == {
        f"kurtosis/{quantity}/{group}" for quantity in ("excess", "alert") for group in ("mlp", "total")
    }
    assert observed(Kurtosis(KurtosisOptions(layers="none of them")), run_of()) == {}


def test_no_hook_stays(run_of, observed):
    run = run_of()
    observed(Kurtosis(KurtosisOptions()), run)
    assert not any(module._forward_hooks for module in run.model.modules() if isinstance(module, nn.Linear))


def test_positions_that_are_not_there_do_not_count():
    x = torch.tensor([[[-1.0, 1.0], [100.0, math.nan]], [[-1.0, 1.0], [1.0, -1.0]]])
    there = torch.tensor([[True, False], [True, True]])
    assert float(excess_kurtosis(x.nan_to_num(7.0), there)) == -2.0
    assert alert(x, torch.tensor(0.0), 10.0, there) == 0
    assert alert(x, torch.tensor(0.0), 10.0) == 1
