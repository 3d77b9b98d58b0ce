"""Controls of the experiments that must come out as stated, whatever a training run says."""

import itertools
import math

import pytest
import torch
from torch import nn

from altgrad_core.groups import param_groups
from altgrad_core.registry import discover
from altgrad_core.rules import Rule
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import quantize_model
from altgrad_optim import GridOptim, Madam, ManifoldAdamW, RiemannianAdam

ARMS = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.02, fused=True),
    "gradient": lambda groups: ManifoldAdamW(groups, lr=0.02, placement="gradient", normalize="none"),
    "update": lambda groups: ManifoldAdamW(groups, lr=0.02, other_lr=0.02),
    "update in ULPs": lambda groups: ManifoldAdamW(groups, lr=0.7, other_lr=0.02, normalize="none"),
    "both": lambda groups: ManifoldAdamW(groups, lr=0.02, placement="both", normalize="max"),
    "q = 1/2": lambda groups: ManifoldAdamW(groups, lr=0.02, placement=(0, 0.5), normalize="mean"),
    "decaying": lambda groups: ManifoldAdamW(groups, lr=0.7, normalize="none", weight_decay=0.1),
    "founding rungs": lambda groups: GridOptim(groups, generator=generator(1)),
    "rungs": lambda groups: GridOptim(groups, 0.5, normalize="adam", bound=4.0, generator=generator(1)),
    "rungs by value": lambda groups: GridOptim(
        groups, 0.5, normalize="adam", rounding="value", storage_rounding="stochastic", generator=generator(1)
    ),
    "decaying rungs": lambda groups: GridOptim(groups, 0.5, normalize="adam", weight_decay=0.1),
    "rungs as masters": lambda groups: GridOptim(groups, 0.5, normalize="adam", storage="master"),
    "Madam": lambda groups: Madam(groups, lr=0.05, other_lr=0.02),
    "RiemannianAdam": lambda groups: RiemannianAdam(groups, lr=0.7, other_lr=0.02),
}
ON_THEIR_OWN = {name for name in ARMS if "rungs" in name}
"""Optimizers that see to the storage of their weights."""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def arm(name):
    if name == "RiemannianAdam":
        pytest.importorskip("geoopt", reason="geoopt is not installed: pip install 'altgrad-optim[geoopt]'")
    return ARMS[name]


def model_of(format):
    model = nn.Sequential(nn.Linear(12, 24), nn.GELU(), nn.LayerNorm(24), nn.Linear(24, 6))
    for index, parameter in enumerate(model.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator(index)) / 4
    return model if format is None else quantize_model(model, format)


def trained(model, optimizer, steps):
    """Return the losses of a small regression, and the weights after every step."""
    x, y = (torch.randn(32, width, generator=generator(width)) for width in (12, 6))
    losses, weights = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    return losses, weights


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def stepped(start, gradients, optimizer_of):
    """Return a weight after one step for each gradient."""
    weight = nn.Parameter(start.clone())
    optimizer = optimizer_of(weight)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


# --- the two uniform formats are one --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        (name, storage)
        for name in ARMS
        for storage in (["its own"] if name in ON_THEIR_OWN else ["master", "nearest_even", "stochastic"])
    ],
)
def test_e0m7_and_e1m6_train_alike_to_the_bit_from_the_first_step(table, name, storage):
    runs = []
    for format in ("E0M7", "E1M6", "E4M3"):
        model = model_of(table(format))
        optimizer = arm(name)(param_groups(model))
        if storage in ("nearest_even", "stochastic"):
            store_on_grid(optimizer, storage, generator(3), bound=4.0)
        runs.append(trained(model, optimizer, 12))
    (losses, weights), (others, other_weights), (floating, _) = runs
    assert losses == others
    assert all(map(same, weights, other_weights))
    assert losses != floating, "a format matters"
    assert not any(map(torch.equal, weights[0], weights[-1])), "every tensor moves"


# --- a power of two before the moments ------------------------------------------------------------------


def founding(format, factor, eps):
    """An optimizer with S 2^k times the spacing, before the moments."""

    def stiffness(weight, format, scale):
        return factor * format.spacing(weight * scale) / scale

    options = {"placement": "gradient", "normalize": "none", "stiffness": stiffness}
    return lambda weight: ManifoldAdamW(
        [{"params": [weight], "format": format, "scale": 1.0}], lr=1e-3, eps=eps, **options
    )


@pytest.mark.parametrize("power", [-20, -3, 1, 15])
def test_a_power_of_two_times_s_changes_no_bit_before_the_moments_and_with_eps_it_does(formats, power):
    draws = generator(7)
    start = (0.1 + torch.rand(300, generator=draws)) * (torch.randint(2, (300,), generator=draws) * 2 - 1)
    gradients = [1e-2 * torch.randn(300, generator=draws) for _ in range(12)]
    assert all((gradient.abs() > 1e-8).all() for gradient in gradients)  # (S*g)^2 stays a normal float32
    for format in formats:
        plain, scaled = (stepped(start, gradients, founding(format, one, 0.0)) for one in (1.0, 2.0**power))
        assert torch.equal(plain, scaled), format.name
        plain, scaled = (stepped(start, gradients, founding(format, one, 1e-6)) for one in (1.0, 2.0**power))
        assert not torch.equal(plain, scaled), format.name


# --- E7M0: one ULP is the weight itself -----------------------------------------------------------------


def sign_step(weight, lr, format, stiffness, scale=4.0):
    """Return the update of a sign direction under `update`, lr in ULPs."""
    gradient = torch.where(torch.arange(weight.numel()) % 2 == 0, 1.0, -1.0).to(weight.dtype)
    group = {"format": format, "scale": scale}
    moved = stepped(
        weight,
        [gradient],
        lambda one: ManifoldAdamW(
            [{"params": [one], **group}], lr=lr, eps=0.0, stiffness=stiffness, normalize="none"
        ),
    )
    return (moved - weight) / -gradient, gradient


def smooth_e7m0():
    registry = discover()
    names = {(entry.kind, entry.name) for entry in registry.registered}
    if not {("format", "E7M0"), ("stiffness", "smooth")} <= names:
        pytest.skip("smooth is the formats plugin's, which is not installed")
    return registry.find("format", "E7M0").load()


def test_on_e7m0_the_step_at_a_power_of_two_is_lr_times_the_weight(table):
    weight = torch.exp2(torch.arange(-40, 20).double())
    for signed in (weight, -weight):
        for lr in (2.0**-4, 0.1):
            step, _ = sign_step(signed, lr, table("E7M0"), "grid")
            torch.testing.assert_close(step, lr * weight, rtol=1e-14, atol=0)


def test_on_e7m0_the_smooth_step_is_lr_ln2_times_any_weight():
    e7m0 = smooth_e7m0()
    weight = torch.randn(500, generator=generator(8), dtype=torch.float64)
    step, _ = sign_step(weight, 0.1, e7m0, "smooth")
    torch.testing.assert_close(step, 0.1 * math.log(2) * weight.abs(), rtol=1e-14, atol=0)


def madam_step(weight, lr, gradient, format):
    moved = stepped(
        weight,
        [gradient],
        lambda one: Madam([{"params": [one], "format": format}], lr=lr, eps=0.0, bound=0.0),
    )
    return (moved - weight) / -gradient


def test_madam_agrees_with_the_smooth_step_to_first_order():
    e7m0 = smooth_e7m0()
    weight = torch.randn(500, generator=generator(9), dtype=torch.float64)
    for lr in (0.1, 0.01, 0.001):
        smooth, gradient = sign_step(weight, lr / math.log(2), e7m0, "smooth")
        error = madam_step(weight, lr, gradient, e7m0) - smooth
        second_order = -(lr**2) / 2 * weight * gradient  # of exp, whose third is at most lr/3 of it
        assert ((error / second_order - 1).abs() < lr / 2).all()


def test_madam_agrees_with_the_grids_step_at_powers_of_two_to_first_order(table):
    weight = torch.exp2(torch.arange(-20, 11).double())
    for lr in (0.1, 0.01, 0.001):
        grid, gradient = sign_step(weight, lr, table("E7M0"), "grid")
        error = madam_step(weight, lr, gradient, table("E7M0")) - grid
        assert ((error / (-(lr**2) / 2 * weight * gradient) - 1).abs() < lr / 2).all()


# --- FP32 everywhere is the unquantized run -------------------------------------------------------------


@pytest.mark.parametrize("name", ARMS)
def test_with_every_format_fp32_training_is_that_of_the_unquantized_model(name, table):
    models = [
        model_of(None),
        model_of("FP32"),
        quantize_model(model_of(None), rules=[Rule(".*", "FP32")], activations="FP32", gradients="FP32"),
        model_of(table("E4M3")),
    ]
    (losses, weights), *others, quantized = [
        trained(model, arm(name)(param_groups(model)), 6) for model in models
    ]
    for other_losses, other_weights in others:
        assert other_losses == losses
        assert all(map(same, other_weights, weights))
    assert quantized[0] != losses, "a format would be seen"


# --- an effect that vanishes with eps is one of eps -----------------------------------------------------

SWEEP = [10.0**-power for power in range(8, 16)]


def effects(format, *, gradient_size, lr):
    """Return max|w(gradient) - w(AdamW)|/lr at each eps of the sweep, after 20 steps in float64."""
    draws = generator(11)
    start = torch.randn(200, generator=draws, dtype=torch.float64)
    gradients = gradient_size * torch.randn(20, 200, generator=draws, dtype=torch.float64)
    found = []
    for eps in SWEEP:
        options = {"lr": lr, "eps": eps, "placement": "gradient", "normalize": "none"}
        arms = [
            stepped(
                start,
                list(gradients),
                lambda one, s=stiffness, o=options: ManifoldAdamW(
                    [{"params": [one], "format": format, "scale": 0.25}], stiffness=s, **o
                ),
            )
            for stiffness in ("grid", "uniform")
        ]
        found.append(float((arms[0] - arms[1]).abs().max()) / lr)
    return found


def test_where_s_is_constant_the_founding_design_is_an_effect_of_eps_alone(table):
    found = effects(table("E0M7"), gradient_size=1e-5, lr=1e-3)
    assert found[0] > 0.1, "at eps 1e-8 it looks like an effect of geometry"
    assert all(after < before for before, after in itertools.pairwise(found))
    tails = [after / before for before, after in itertools.pairwise(found[4:])]
    assert tails == pytest.approx([0.1] * len(tails), rel=0.05), "it vanishes in proportion to eps"


def test_where_s_changes_under_way_a_lag_remains_when_eps_has_vanished(table):
    found = effects(table("E4M3"), gradient_size=1e-5, lr=0.3)
    assert found[-1] == pytest.approx(found[-2], rel=1e-3)
    assert found[-1] > 0.1
