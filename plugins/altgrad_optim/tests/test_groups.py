"""Options of groups, schedules, what is loaded into what, and compiled steps."""

import copy
import math

import pytest
import torch
from torch import nn

import altgrad_core as altgrad
from altgrad_optim import GridOptim, Madam, ManifoldAdamW, RiemannianAdam


@pytest.fixture
def model(table):
    """One quantized weight and one that is not."""
    own = nn.Sequential(nn.Linear(16, 16, bias=False), nn.LayerNorm(16, bias=False))
    rules = [altgrad.Rule(layers="0", format=table("E4M3"))]
    return altgrad.quantize_model(own, rules=rules)


def moved(parameter, optimizer):
    """Return how far a step moves a parameter whose gradient is 1, first step of Adam: its learning rate."""
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return (parameter.detach() - before).abs().max().item()


@pytest.mark.parametrize("make", [ManifoldAdamW, Madam, GridOptim])
def test_a_schedule_that_begins_low_scales_the_other_parameters_alike(make, model):
    optimizer = make(model.parameters(), 0.1, other_lr=2e-3)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=100, cycle_momentum=False)
    assert moved(model[1].weight, optimizer) == pytest.approx(2e-3 / 25, rel=1e-3)


def test_a_group_names_its_own_placement(model, table):
    groups = [{"params": [model[0].weight], "placement": "gradient"}, {"params": [model[1].weight]}]
    optimizer = ManifoldAdamW(groups, placement="update")
    assert [(group["p"], group["q"]) for group in optimizer.param_groups] == [(1, 0), (0, 1)]


def test_a_group_names_its_own_step_scale(model):
    optimizer = GridOptim([{"params": [model[0].weight], "step_scale": 0.5}])
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (ManifoldAdamW, {"stiffness": "ideal"}),
        (GridOptim, {"bound": 3.0}),
        (GridOptim, {"storage": "master"}),
    ],
)
def test_an_option_that_all_groups_share_is_refused_in_a_group(make, option, model):
    with pytest.raises(ValueError, match="is one for all groups"):
        make([{"params": [model[0].weight], **option}])


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (ManifoldAdamW, {"normalize": "bogus"}),
        (ManifoldAdamW, {"lr": -1.0}),
        (ManifoldAdamW, {"betas": (1.0, 0.9)}),
        (ManifoldAdamW, {"placement": "sideways"}),
        (GridOptim, {"normalize": "bogus"}),
        (GridOptim, {"rounding": "bogus"}),
        (GridOptim, {"rung_clip": -3}),
        (Madam, {"beta": 1.5}),
    ],
)
def test_a_groups_options_are_checked_as_the_constructors_and_leave_no_group_behind(make, option, model):
    optimizer = make([model[1].weight])
    with pytest.raises(ValueError, match="Invalid"):
        optimizer.add_param_group({"params": [model[0].weight], **option})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    "scale", [0.0, -2.0, math.nan, torch.tensor(-1.0), torch.ones(3), [1.0, 2.0]], ids=repr
)
def test_a_groups_own_scale_is_one_positive_number(scale, table):
    with pytest.raises(ValueError, match="Invalid scale value"):
        ManifoldAdamW([{"params": [nn.Parameter(torch.ones(3))], "format": table("E4M3"), "scale": scale}])


def test_numbers_of_numpy_are_numbers(model):
    numpy = pytest.importorskip("numpy")
    assert ManifoldAdamW(model.parameters(), numpy.float32(0.5)).defaults["lr"] == 0.5


def test_masters_are_not_loaded_over_grid_values(model, table):
    def trained(own, **options):
        optimizer = GridOptim(altgrad.param_groups(own), **options)
        moved(own[0].weight, optimizer)
        return optimizer

    other = altgrad.quantize_model(
        nn.Sequential(nn.Linear(16, 16, bias=False), nn.LayerNorm(16, bias=False)), table("E4M3")
    )
    saved = trained(model).state_dict()
    with pytest.raises(ValueError, match="storage='grid', this is storage='master'"):
        trained(other, storage="master").load_state_dict(saved)


def test_anothers_state_is_refused(model):
    saved = torch.optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(ValueError, match="not that of a ManifoldAdamW"):
        ManifoldAdamW(model.parameters()).load_state_dict(saved)


def test_an_empty_parameter_takes_a_step_under_every_norm(table):
    for normalize in ("rms", "mean", "max", "none"):
        weight = nn.Parameter(torch.ones(0, 4))
        weight.grad = torch.ones(0, 4)
        ManifoldAdamW([{"params": [weight], "format": table("E4M3")}], normalize=normalize).step()
        assert weight.shape == (0, 4)


def test_half_precision_parameters_take_steps(table):
    weight = nn.Parameter(torch.ones(8, dtype=torch.float16))
    weight.grad = torch.ones(8, dtype=torch.float16)
    ManifoldAdamW([{"params": [weight], "format": table("E4M3")}], 0.1).step()
    torch.testing.assert_close(weight.detach(), torch.full((8,), 0.9, dtype=torch.float16))


@pytest.mark.parametrize("arm", ["GridOptim", "RiemannianAdam", "stochastic", "eco"])
def test_a_step_under_torch_compile_is_the_step(arm, table):
    def trained(compiled):
        torch.manual_seed(0)
        own = altgrad.quantize_model(nn.Linear(32, 32, bias=False), table("E4M3"))
        if arm == "GridOptim":
            optimizer = GridOptim(altgrad.param_groups(own), 0.3, normalize="adam")
        elif arm == "RiemannianAdam":
            pytest.importorskip("geoopt")
            optimizer = RiemannianAdam(altgrad.param_groups(own))
        else:
            optimizer = torch.optim.AdamW(own.parameters(), 0.05)
            altgrad.store_on_grid(optimizer, arm)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        draws = torch.Generator().manual_seed(1)
        for _ in range(3):
            own.weight.grad = torch.randn(32, 32, generator=draws)
            step()
        return own.weight.detach()

    torch._dynamo.reset()
    assert torch.equal(trained(compiled=True), trained(compiled=False))


@pytest.mark.parametrize("make", [GridOptim, ManifoldAdamW, Madam])
def test_a_copy_of_an_optimizer_takes_up_a_state_as_the_optimizer_does(make):
    optimizer = make([{"params": [nn.Parameter(torch.ones(3))]}])
    copied = copy.deepcopy(optimizer)
    optimizer.param_groups[0]["lr"] = 0.25
    copied.load_state_dict(optimizer.state_dict())
    assert copied.param_groups[0]["lr"] == 0.25
