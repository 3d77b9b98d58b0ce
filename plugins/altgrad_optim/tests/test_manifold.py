import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from altgrad_core.groups import param_groups
from altgrad_core.quantizer import quantizer_of
from altgrad_core.registry import PluginError, discover
from altgrad_core.stiffness import Geometry, fit_scale
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import quantize_model
from altgrad_core.testing import check_optimizer
from altgrad_optim import ManifoldAdamW
from altgrad_optim.placement import exponents

ROUNDING = 2.0**-24  # of one float32 operation, relative


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def constant(value):
    return lambda weight, format, scale: torch.full_like(weight, value)


def ideal(mantissa_bits):
    """The founding formula: 2^(floor(log2|w|) - M), and 1 at zero."""

    def stiffness(weight, format, scale):
        exponent = torch.frexp(weight.double()).exponent - 1
        return torch.where(weight == 0, 1.0, torch.exp2((exponent - mantissa_bits).double())).to(weight.dtype)

    return stiffness


def optimizer_of(weights, format, scale=1.0, **options):
    """An optimizer of weights that no quantizer knows."""
    given = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 0.0} | options
    return ManifoldAdamW([{"params": weights, "format": format, "scale": scale}], **given)


def random_weights(dtype=torch.float32, shapes=((40, 10), (30,)), size=0.1):
    return [
        nn.Parameter(size * torch.randn(shape, generator=generator(index), dtype=dtype))
        for index, shape in enumerate(shapes)
    ]


def run(weights, optimizer, steps=30, size=1.0, start=0):
    """Step with the same random gradients for everyone; returns the weights."""
    for step in range(start, start + steps):
        for index, weight in enumerate(weights):
            draws = torch.randn(weight.shape, generator=generator(1000 * step + index), dtype=torch.float64)
            weight.grad = (size * draws).to(weight.dtype)
        optimizer.step()
    return [weight.detach().clone() for weight in weights]


def trained(format, *, dtype=torch.float32, steps=30, size=1.0, scale=1.0, **options):
    weights = random_weights(dtype)
    return run(weights, optimizer_of(weights, format, scale, **options), steps, size)


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# --- with uniform stiffness it is AdamW ---------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("placement", ["gradient", "update", "both", (0, 0)])
def test_with_uniform_stiffness_it_is_torchs_adamw(table, placement, decay):
    options = {"lr": 1e-2, "eps": 1e-8, "weight_decay": decay}
    mine = trained(table("E4M3"), stiffness="uniform", placement=placement, steps=50, **options)
    weights = random_weights()
    torchs = run(weights, torch.optim.AdamW(weights, betas=(0.9, 0.95), foreach=False, **options), steps=50)
    # a step of at most 4.5*lr errs by some ten roundings, and w by two
    tolerance = 50 * ROUNDING * (10 * 4.5 * 1e-2 + 2 * 0.6)
    for one, other in zip(mine, torchs, strict=True):
        assert (one - other).abs().max() < tolerance
        assert not torch.equal(one, random_weights()[0])


def test_in_float64_it_is_torchs_adamw_to_thirteen_digits(table):
    options = {"lr": 1e-2, "eps": 1e-8, "weight_decay": 0.1}
    mine = trained(table("E4M3"), stiffness="uniform", dtype=torch.float64, steps=50, **options)
    weights = random_weights(torch.float64)
    torchs = run(weights, torch.optim.AdamW(weights, betas=(0.9, 0.95), foreach=False, **options), steps=50)
    for one, other in zip(mine, torchs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)


# --- gradient: Adam divides the stiffness out again -----------------------------------------------------


@pytest.mark.parametrize("value", [1.0, 2.0**-7])
def test_a_constant_stiffness_before_the_moments_changes_no_bit(table, value):
    adamw = trained(table("E4M3"), stiffness="uniform", weight_decay=0.1)
    assert same(
        trained(table("E4M3"), placement="gradient", stiffness=constant(value), weight_decay=0.1), adamw
    )


def test_a_power_of_two_times_the_spacing_changes_no_bit(table):
    def eight_times(weight, format, scale):
        return 8 * format.spacing(weight * scale) / scale

    options = {"placement": "gradient", "scale": 128.0}
    grid = trained(table("E4M3"), stiffness="grid", **options)
    assert same(trained(table("E4M3"), stiffness=eight_times, **options), grid)
    with_eps = trained(table("E4M3"), stiffness="grid", eps=1e-2, **options)
    assert not same(trained(table("E4M3"), stiffness=eight_times, eps=1e-2, **options), with_eps)


def test_what_remains_of_a_constant_stiffness_is_a_larger_eps(table):
    def founding(value, eps):
        return trained(table("E4M3"), placement="gradient", stiffness=constant(value), eps=eps, size=1e-2)

    assert same(founding(2.0**-7, eps=2.0**-16), founding(1.0, eps=2.0**-9))
    assert not same(founding(2.0**-7, eps=2.0**-16), founding(1.0, eps=2.0**-16))


def test_the_moments_lag_when_the_stiffness_jumps(table):
    factors = [1.0] * 10 + [2.0**-3] * 5
    steps = iter(factors)

    def jumping(weight, format, scale):
        return torch.full_like(weight, next(steps))

    (weight,) = weights = random_weights(shapes=((100,),))
    expected, optimizer = (
        weight.detach().clone(),
        optimizer_of(weights, table("E4M3"), stiffness=jumping, placement="gradient"),
    )
    m, v = torch.zeros(100), torch.zeros(100)
    for step, factor in enumerate(factors, 1):
        (seen,) = run(weights, optimizer, 1, start=step)
        g = factor * weight.grad
        m = m + 0.1 * (g - m)
        v = 0.95 * v + 0.05 * g * g
        expected = expected - 1e-3 * (m / (1 - 0.9**step)) / (v / (1 - 0.95**step)).sqrt()
        torch.testing.assert_close(seen, expected, rtol=0, atol=step * ROUNDING * (0.5 + 20 * 4e-3))


def test_gradient_does_not_move_weights_by_equal_ulps_but_update_does(table):
    format, scale, draws = table("E4M3"), 2.0**7, generator(7)
    size = torch.exp2(8 * torch.rand(40_000, generator=draws) - 8)
    start = size * (torch.randint(2, size.shape, generator=draws) * 2 - 1)
    arms = {"uniform": {"stiffness": "uniform"}}
    arms |= {placement: {"placement": placement} for placement in ("gradient", "update", "both")}
    weights = {name: nn.Parameter(start.clone()) for name in arms}
    optimizers = [
        optimizer_of([weights[name]], format, scale, normalize="none", **options)
        for name, options in arms.items()
    ]
    for _ in range(301):
        gradient = torch.randn(start.shape, generator=draws)
        for weight, optimizer in zip(weights.values(), optimizers, strict=True):
            weight.data.copy_(start)  # held fixed
            weight.grad = gradient
            optimizer.step()
    spacing = format.spacing(start * scale) / scale
    for name, variation, error, octaves, tolerance in (
        ("uniform", 1.78, 0.05, 128, 6),
        ("gradient", 1.78, 0.05, 128, 6),
        ("update", 0.73, 0.03, 1.00, 0.05),
        ("both", 0.73, 0.03, 1.00, 0.05),
    ):
        ulps = (weights[name].detach() - start).abs().double() / spacing
        assert float(ulps.std() / ulps.mean()) == pytest.approx(variation, abs=error), name
        lowest_over_highest = ulps[size < 2.0**-7].mean() / ulps[size >= 0.5].mean()
        assert float(lowest_over_highest) == pytest.approx(octaves, abs=tolerance), name


# --- update: constant ULPs ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E6M1", "E7M0", "E0M7"])
def test_a_first_step_moves_every_weight_by_lr_spacings_in_every_octave(table, name):
    format, lr = table(name), 2.0**-4
    values = format.values.double()
    middle = ((values[1:] + values[:-1]) / 2)[len(values) // 2 :]  # of every gap from zero outward
    gaps = values.diff()[len(values) // 2 :]
    for sign in (1, -1):
        weight = nn.Parameter(sign * middle / 4)
        optimizer = optimizer_of([weight], format, 4.0, lr=lr, normalize="none", max_stiffness=2.0**64)
        weight.grad = torch.ones_like(weight)
        before = weight.detach().clone()
        optimizer.step()
        moved = (before - weight.detach()) / (gaps / 4)
        torch.testing.assert_close(moved, torch.full_like(moved, lr), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "unit"), [("E0M7", 2.0**-7), ("E1M6", 2.0**-5)])
@pytest.mark.parametrize("placement", ["gradient", "update", "both"])
@pytest.mark.parametrize("stiffness", ["grid", "scrambled"])
def test_on_uniform_formats_the_stiffness_is_a_learning_rate(table, name, unit, placement, stiffness):
    if stiffness not in {entry.name for entry in discover().of_kind("stiffness")}:
        pytest.skip(f"{stiffness} is another plugin's, which is not installed")
    scales = [0.5, 4.0]

    def result(lrs=(0.3, 0.3), **options):
        weights = random_weights()
        groups = [
            {"params": [weight], "format": table(name), "scale": scale, "lr": lr}
            for weight, scale, lr in zip(weights, scales, lrs, strict=True)
        ]
        return run(weights, ManifoldAdamW(groups, eps=0.0, **options))

    adamw = result(stiffness="uniform")
    in_ulps = result([0.3 * unit / scale for scale in scales], stiffness="uniform")
    expected = adamw if placement == "gradient" else in_ulps
    geometry = {"placement": placement, "stiffness": stiffness}
    assert same(result(normalize="none", **geometry), expected)
    for normalize in ("rms", "mean", "max"):
        assert same(result(normalize=normalize, **geometry), adamw), normalize


def _steps_to_arrive(make, limit):
    """Return after how many steps a weight that starts at zero is 0.05 on average; limit + 1: not yet."""
    weight, draws = nn.Parameter(torch.zeros(100)), generator(3)
    optimizer = make([weight])
    for step in range(1, limit + 1):
        weight.grad = -1e-2 + 1e-3 * torch.randn(100, generator=draws)
        optimizer.step()
        if weight.detach().mean() >= 0.05:
            return step
    return limit + 1


def test_from_zero_update_on_the_grid_is_as_fast_as_adamw_and_the_founding_configuration_is_not(table):
    e5m2 = table("E5M2")

    def steps(limit, **options):
        return _steps_to_arrive(lambda weights: optimizer_of(weights, e5m2, eps=1e-8, **options), limit)

    adamw = steps(200, stiffness="uniform")
    assert adamw == pytest.approx(51, abs=1)
    assert steps(2 * adamw) <= 2 * adamw
    founding = {"placement": "gradient", "stiffness": ideal(2), "normalize": "none"}
    assert steps(3 * adamw, **founding) > 3 * adamw


@pytest.mark.parametrize(
    "stiffness", ["grid", pytest.param(ideal(2), marks=pytest.mark.slow)], ids=["grid", "ideal"]
)
def test_from_zero_with_lr_in_ulps_a_weight_does_not_arrive(table, stiffness):
    def make(weights):
        return optimizer_of(weights, table("E5M2"), eps=1e-8, stiffness=stiffness, normalize="none")

    assert _steps_to_arrive(make, 3000) == 3001


# --- both: Riemannian Adam ------------------------------------------------------------------------------


@pytest.mark.parametrize("transported", [True, False])
def test_both_is_riemannian_adam_with_metric_one_over_s_squared(table, transported):
    format, lr, eps = table("E4M3"), 1.0, 1e-8

    def spacing(x):
        return format.spacing(x * 16) / 16

    (weight,) = weights = random_weights(torch.float64, shapes=((500,),))
    optimizer = optimizer_of(weights, format, 16.0, lr=lr, eps=eps, placement="both", normalize="none")
    x, m, v = weight.detach().clone(), torch.zeros(500).double(), torch.zeros(500).double()
    for step in range(1, 41):
        run(weights, optimizer, 1, start=step)
        s = spacing(x)
        gradient = s**2 * weight.grad  # egrad2rgrad
        m = 0.9 * m + 0.1 * gradient
        v = 0.95 * v + 0.05 * gradient**2 / s**2  # the inner product
        y = x - lr * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + eps)
        if transported:
            m = m * spacing(y) / s
        x = y
    error = (weight.detach() - x).abs()
    if transported:
        assert error.max() < 1e-12
    else:
        assert (error > 1e-6).float().mean() > 0.5, "the identity is not the transport"


# --- the options ----------------------------------------------------------------------------------------


def one_step(weight, gradient, format, scale=1.0, **options):
    """Return a float64 weight after one step."""
    parameter = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
    parameter.grad = torch.tensor(gradient, dtype=torch.float64)
    optimizer_of([parameter], format, scale, **options).step()
    return parameter.detach()


@pytest.mark.parametrize("normalize", ["rms", "mean", "max"])
@pytest.mark.parametrize("q", [-1, -0.5, 0.3, 0.5, 2 / 3, 1])
@pytest.mark.parametrize("name", ["E0M7", "E1M6"])
def test_on_uniform_formats_every_power_of_the_stiffness_over_its_norm_is_one(table, name, q, normalize):
    given = {"scale": 4.0, "lr": 0.01, "steps": 10}
    seen = trained(table(name), placement=(0, q), normalize=normalize, **given)
    assert same(seen, trained(table(name), stiffness="uniform", **given))


def test_what_the_step_is_divided_by(table):
    e7m0, start = table("E7M0"), [1.0, 2.0, 4.0]  # spacings 1, 2, 4
    for normalize, divisor in (("rms", 7**0.5), ("mean", 7 / 3), ("max", 4.0), ("none", 1.0)):
        moved = one_step(start, [1.0, -1.0, 1.0], e7m0, lr=0.1, normalize=normalize)
        expected = torch.tensor([1 - 0.1 / divisor, 2 + 0.2 / divisor, 4 - 0.4 / divisor]).double()
        torch.testing.assert_close(moved, expected, rtol=1e-7, atol=0)


def test_the_exponents_of_the_placement(table):
    moved = one_step([1.0, 4.0], [1.0, 1.0], table("E7M0"), lr=0.1, normalize="none", placement=(0, 0.5))
    torch.testing.assert_close(moved, torch.tensor([0.9, 3.8]).double())
    moved = one_step([1.0, 4.0], [1.0, 1.0], table("E7M0"), lr=0.1, normalize="none", placement={"q": -1.0})
    torch.testing.assert_close(moved, torch.tensor([0.9, 3.975]).double())


def test_the_stiffness_acts_on_the_gradient_by_its_exponent(table):
    for placement, effective in (("gradient", 4.0), ((0.5, 0), 2.0), ((0, 0), 1.0)):
        moved = one_step([4.0], [1.0], table("E7M0"), lr=0.1, eps=1.0, placement=placement)
        assert moved.item() == pytest.approx(4 - 0.1 * effective / (effective + 1))


NORMS = {
    "rms": lambda powers: powers.square().mean().sqrt(),
    "mean": torch.mean,
    "max": torch.amax,
    "none": lambda powers: 1.0,
}


@pytest.mark.parametrize("placement", [(1, 0), (0, 1), (1, 1), (0, 0.5), (-0.5, 0), (0.3, -0.7), (2, -1)])
@pytest.mark.parametrize("normalize", NORMS)
@pytest.mark.parametrize("name", ["E4M3", "E7M0"])
def test_steps_are_those_of_the_formula(table, name, normalize, placement):
    (p, q), format, scale, lr, decay_lr, eps = placement, table(name), 8.0, 0.01, 0.005, 1e-8
    weights = random_weights(torch.float64, shapes=((9, 7),))
    given = {"placement": placement, "normalize": normalize, "max_stiffness": 0.02, "eps": eps}
    optimizer = optimizer_of(weights, format, scale, lr=lr, decay_lr=decay_lr, weight_decay=0.1, **given)
    (weight,), m, v = weights, 0.0, 0.0
    for t in range(1, 6):
        w, steps = weight.detach().clone(), format.values.double().diff()
        below = torch.searchsorted(format.values.double(), w.abs() * scale, right=True) - 1
        stiffness = (steps[below] / scale).clamp(max=0.02)
        run([weight], optimizer, steps=1, start=t)
        gradient = weight.grad * stiffness**p
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        move = (m / (1 - 0.9**t)) / ((v / (1 - 0.95**t)).sqrt() + eps) * stiffness**q
        rate = decay_lr if q and normalize == "none" else lr
        expected = w * (1 - rate * 0.1) - lr * move / (NORMS[normalize](stiffness**q) if q else 1.0)
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-12, atol=1e-14)


def test_the_stiffness_is_in_weight_units(table):
    for scale in (1.0, 8.0):
        moved = one_step([1.0], [1.0], table("E0M7"), scale, lr=1.0, normalize="none")
        assert moved.item() == pytest.approx(1 - 1 / (128 * scale), abs=1e-15)


def test_the_stiffness_is_clamped(table):
    for largest, expected in (({}, 1e6), ({"max_stiffness": 3.0}, 3.0)):
        moved = one_step(
            [0.0], [-1.0], table("E4M3"), lr=1.0, stiffness=constant(1e9), normalize="none", **largest
        )
        assert moved.item() == pytest.approx(expected)


def test_the_norm_is_taken_of_the_clamped_stiffness(table):
    moved = one_step([1.0, 64.0], [-1.0, -1.0], table("E7M0"), lr=1.0, normalize="max", max_stiffness=2.0)
    torch.testing.assert_close(moved, torch.tensor([1.5, 65.0]).double())


def test_the_norm_is_accumulated_in_float64(table):
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.ones(4)
    optimizer_of([weight], table("E0M7"), 2.0**90, lr=1.0, normalize="rms").step()
    assert weight.tolist() == pytest.approx([-1.0] * 4, rel=1e-6), "the square of 2^-97 is no float32"


def test_the_stiffness_is_that_before_decay(table):
    moved = one_step([1.0], [1.0], table("E7M0"), lr=0.25, normalize="rms", weight_decay=1.0)
    assert moved.item() == 1 - 0.25 - 0.25
    moved = one_step([1.0], [1.0], table("E7M0"), lr=0.25, normalize="none", weight_decay=1.0, decay_lr=0.5)
    assert moved.item() == 1 - 0.5 - 0.25, "half a spacing below 1 the spacing is 1/2"


@pytest.mark.parametrize(
    ("placement", "normalize", "rate"),
    [
        ("update", "rms", 0.2),
        ("update", "none", 0.01),
        ("both", "none", 0.01),
        ((0, 0.5), "none", 0.01),
        ("gradient", "none", 0.2),
        ("gradient", "rms", 0.2),
    ],
)
def test_decay_is_by_lr_where_that_is_in_weight_units_and_else_by_decay_lr(table, placement, normalize, rate):
    options = {"placement": placement, "normalize": normalize, "lr": 0.2, "decay_lr": 0.01, "eps": 1e-8}
    moved = one_step([1.0, 4.0], [0.0, 0.0], table("E7M0"), weight_decay=0.5, **options)
    torch.testing.assert_close(
        moved, torch.tensor([1.0, 4.0]).double() * (1 - rate * 0.5), rtol=1e-15, atol=0
    )


def test_decay_lr_follows_the_schedule(table):
    (weight,) = weights = random_weights(torch.float64, shapes=((4,),))
    optimizer = optimizer_of(
        weights, table("E7M0"), eps=1e-8, normalize="none", weight_decay=0.5, decay_lr=0.4
    )
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25)
    before, weight.grad = weight.detach().clone(), torch.zeros(4).double()
    optimizer.step()
    torch.testing.assert_close(weight.detach(), before * (1 - 0.1 * 0.5), rtol=1e-15, atol=0)


def test_moments_are_in_weight_units_so_that_a_change_of_scale_leaves_them(table):
    states = []
    for scales in ((8.0, 8.0), (8.0, 0.25)):
        weights = random_weights(shapes=((50,),))
        optimizer = optimizer_of(weights, table("E4M3"), placement="update")
        for step, scale in enumerate(scales):
            optimizer.param_groups[0]["scale"] = scale
            run(weights, optimizer, 1, start=step)
        states.append(optimizer.state[weights[0]])
    assert torch.equal(states[0]["exp_avg"], states[1]["exp_avg"])
    assert torch.equal(states[0]["exp_avg_sq"], states[1]["exp_avg_sq"])


def test_a_nan_gradient_makes_its_weight_nan_and_no_other(table):
    moved = one_step([1.0, 2.0], [float("nan"), 1.0], table("E4M3"))
    assert moved.isnan().tolist() == [True, False]


@pytest.mark.parametrize("refresh", ["step", "never"])
@pytest.mark.parametrize("wrong", [lambda weight: 0.5, lambda weight: weight[0], lambda weight: weight[None]])
def test_a_stiffness_that_is_not_like_its_weight_is_refused_and_named(wrong, refresh, table):
    def crooked(weight, format, scale):
        return wrong(weight)

    weight = torch.nn.Parameter(torch.ones(4, 4))
    stiffness = Geometry(crooked, refresh=refresh)
    optimizer = optimizer_of([weight], table("E4M3"), stiffness=stiffness)
    weight.grad = torch.ones(4, 4)
    with pytest.raises(PluginError, match=r"crooked gave .* for a weight of the shape \(4, 4\)"):
        optimizer.step()


def test_the_stiffness_is_a_name_a_table_or_a_callable(table):
    weights = random_weights()
    for spec in ("grid", "uniform", {"plugin": "grid"}, constant(1.0)):
        assert callable(optimizer_of(weights, table("E4M3"), stiffness=spec).stiffness)
    with pytest.raises(ValueError, match=r"grdi.*did you mean 'grid'"):
        optimizer_of(weights, table("E4M3"), stiffness="grdi")


# --- groups and learning rates --------------------------------------------------------------------------


def model_of(format):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    return quantize_model(layers, format) if format is not None else layers


def lrs(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def test_groups_without_a_format_train_at_other_lr(table):
    groups = param_groups(model_of(table("E4M3")))
    assert lrs(ManifoldAdamW(groups, lr=0.5, other_lr=0.01)) == [0.5, 0.01, 0.01]
    groups = param_groups(model_of(table("E4M3")))
    groups[1]["lr"] = 0.2
    assert lrs(ManifoldAdamW(groups, lr=0.5, other_lr=0.01)) == [0.5, 0.2, 0.01]


@pytest.mark.parametrize("prepare", [param_groups, lambda model: list(model.parameters())])
@pytest.mark.parametrize("schedule", [None, 0.5])
def test_parameters_without_a_format_are_torchs_adamw_at_other_lr_on_the_schedule(table, prepare, schedule):
    model, twin = model_of(table("E4M3")), model_of(None)
    options = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = ManifoldAdamW(prepare(model), lr=0.5, other_lr=0.01, **options)
    groups = [{"params": list(twin.parameters()), "weight_decay": 0.1}]
    if prepare is param_groups:  # vectors do not decay
        groups = param_groups(twin)
    reference = torch.optim.AdamW(groups, lr=0.01 * (schedule or 1.0), fused=True, **options)
    if schedule:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule)
    run(list(model.parameters()), optimizer, 5)
    run(list(twin.parameters()), reference, 5)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other) == (quantizer_of(mine) is None)


def test_a_mixed_group_trains_its_plain_parameters_at_other_lr_when_the_others_have_no_gradient(table):
    model = model_of(table("E4M3"))
    optimizer = ManifoldAdamW(model.parameters(), lr=100.0, other_lr=0.01)
    before = model[2].weight.detach().clone()
    model[2].weight.grad = torch.ones(6)
    optimizer.step()
    torch.testing.assert_close(model[2].weight.detach(), before - 0.01)


def test_a_schedule_by_hand_is_followed_too(table):
    model = model_of(table("E4M3"))
    optimizer = ManifoldAdamW(model.parameters(), lr=0.5, other_lr=0.01)
    optimizer.param_groups[0]["lr"] = 0.25
    before = model[2].weight.detach().clone()
    model[2].weight.grad = torch.ones(6)
    optimizer.step()
    torch.testing.assert_close(model[2].weight.detach(), before - 0.005)


def test_a_scheduler_starts_from_the_lr_it_finds(table):
    optimizer = optimizer_of(random_weights(), table("E4M3"), lr=0.5)
    optimizer.param_groups[0]["lr"] = 0.25
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    assert lrs(optimizer) == [0.25]


def test_a_model_may_be_quantized_after_its_optimizer_was_made(table):
    late, early = model_of(None), model_of(table("E4M3"))
    options = {"lr": 0.5, "other_lr": 0.01, "eps": 1e-8}
    optimizers = [ManifoldAdamW(late.parameters(), **options), ManifoldAdamW(early.parameters(), **options)]
    quantize_model(late, table("E4M3"))
    results = [
        run(list(model.parameters()), optimizer, 3)
        for model, optimizer in zip((late, early), optimizers, strict=True)
    ]
    assert same(*results)


def test_a_tied_head_is_trained_as_the_embedding_that_it_is(table):
    from altgrad_core.rules import Rule

    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    model = quantize_model(nn.Sequential(embedding, head), rules=[Rule("1", table("E4M3"))])
    optimizer = ManifoldAdamW(model.parameters(), lr=100.0, other_lr=0.01)
    before = head.weight.detach().clone()
    head.weight.grad = torch.ones(5, 4)
    optimizer.step()
    torch.testing.assert_close(head.weight.detach(), before - 0.01)


def test_a_group_may_name_its_format(table):
    with pytest.raises(ValueError, match="nowhere"):
        optimizer_of(random_weights(), "nowhere")
    assert optimizer_of(random_weights(), "FP32").param_groups[0]["format"] is None


def test_the_scale_of_a_group_is_one_number_or_one_each(table):
    results = []
    for scale in (4.0, [4.0, 4.0], [torch.tensor(4.0), torch.tensor(4.0)], torch.tensor(4.0)):
        weights = random_weights()
        results.append(run(weights, optimizer_of(weights, table("E4M3"), scale), 3))
    assert all(same(results[0], other) for other in results[1:])
    with pytest.raises(ValueError, match=r"Invalid scale value: 0\.0"):
        optimizer_of(random_weights(), table("E4M3"), 0.0)


# --- state ----------------------------------------------------------------------------------------------


def test_the_saved_state_has_neither_format_nor_scale(table):
    model = model_of(table("E4M3"))
    optimizer = ManifoldAdamW(param_groups(model))
    for group in optimizer.state_dict()["param_groups"]:
        assert not {"format", "scale"} & set(group)
    assert optimizer.param_groups[0]["format"] == table("E4M3"), "the live group keeps them"


def test_loading_keeps_the_groups_own_format_and_scale(table):
    weights = random_weights()
    optimizer = optimizer_of(weights, table("E4M3"), 4.0)
    run(weights, optimizer, 2)
    other = optimizer_of(random_weights(), table("E5M2"), 2.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert (other.param_groups[0]["format"], other.param_groups[0]["scale"]) == (table("E5M2"), 2.0)


def test_a_deep_copy_keeps_its_stiffness(table):
    weights = random_weights()
    optimizer = optimizer_of(weights, table("E4M3"))
    twin = copy.deepcopy(optimizer)
    twins = twin.param_groups[0]["params"]
    assert same(run(twins, twin, 3), run(weights, optimizer, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"Invalid learning rate: -1\.0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"lr": "0.1"}, "Invalid learning rate: '0.1'"),
        ({"eps": -1.0}, r"Invalid epsilon value: -1\.0"),
        ({"betas": (1.0, 0.9)}, r"Invalid beta parameter at index 0: 1\.0"),
        ({"betas": (0.9, -0.1)}, r"Invalid beta parameter at index 1: -0\.1"),
        ({"betas": (0.9,)}, r"Invalid betas value: \(0\.9,\)"),
        ({"betas": 0.9}, r"Invalid betas value: 0\.9"),
        ({"weight_decay": -0.1}, r"Invalid weight_decay value: -0\.1"),
        ({"other_lr": -0.1}, r"Invalid other_lr value: -0\.1"),
        ({"decay_lr": -0.1}, r"Invalid decay_lr value: -0\.1"),
        ({"max_stiffness": 0.0}, r"Invalid max_stiffness value: 0\.0"),
        ({"normalize": "l2"}, "Invalid normalize value: 'l2'; use one of rms, mean, max, none"),
        ({"placement": "before"}, "Invalid placement: 'before'; use one of gradient, update, both"),
    ],
)
def test_bad_options_are_refused_in_torchs_words(options, message):
    with pytest.raises(ValueError, match=message):
        ManifoldAdamW([nn.Parameter(torch.ones(2))], **options)


def test_a_placement_is_a_name_a_pair_or_a_table():
    assert exponents("update") == (0, 1)
    assert exponents((0.5, -0.5)) == exponents({"p": 0.5, "q": -0.5}) == (0.5, -0.5)
    assert exponents({"q": 0.5}) == (0.0, 0.5)
    for wrong in ((1, 2, 3), ("a", 1), {"r": 1}, None, 3):
        with pytest.raises(ValueError, match="Invalid placement"):
            exponents(wrong)


# --- on the grid: two uniform formats are one -----------------------------------------------------------


@pytest.mark.parametrize("placement", ["gradient", "update", "both"])
@pytest.mark.parametrize("rounding", ["stochastic", None])
def test_e0m7_and_e1m6_train_alike_to_the_bit(table, placement, rounding):
    runs = []
    for name in ("E0M7", "E1M6"):
        model = model_of(table(name))
        options = {"lr": 0.02, "placement": placement, "normalize": "rms"}
        optimizer = ManifoldAdamW(param_groups(model), **options)
        if rounding:
            store_on_grid(optimizer, rounding, generator())
        losses = []
        for step in range(25):
            tokens = torch.randint(5, (40,), generator=generator(step))
            loss = nn.functional.cross_entropy(model(tokens), tokens % 4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0] == runs[1]
    assert runs[0][-1] < 0.7 * runs[0][0]


# --- another format's geometry, and a frozen one --------------------------------------------------------


class Recorded:
    """A formula that notes what it is asked; S grows with the scale, so that a change of either shows."""

    def __init__(self):
        self.asked = []

    def __call__(self, weight, format, scale):
        self.asked.append((weight.detach().clone(), format, float(scale)))
        return (1.0 + weight.abs()) * scale


def hand_made(start, gradients, stiffnesses, lr=0.1):
    """Return the weights after steps under `update` and `none`, betas (0, 0): w -= lr * S * sign(g)."""
    weight = start.clone()
    for gradient, stiffness in zip(gradients, stiffnesses, strict=True):
        weight = weight - lr * stiffness * gradient.sign()
    return weight


def test_of_format_takes_the_other_formats_geometry_at_its_fit_scale(table):
    formula = Recorded()
    weights = [nn.Parameter(torch.tensor([0.25, -0.6]))]
    geometry = Geometry(formula, of_format=table("E5M2"))
    optimizer = optimizer_of(weights, table("E4M3"), 8.0, stiffness=geometry)
    run(weights, optimizer, 1)
    ((_, format, scale),) = formula.asked
    assert (format, scale) == (table("E5M2"), 2.0**16)


def test_a_mismatched_geometry_trains_as_that_format_at_that_scale_would(table):
    options = {"normalize": "rms", "steps": 1}
    mismatched = {"plugin": "grid", "of_format": table("E5M2")}
    borrowed = trained(table("E0M7"), scale=1.0, stiffness=mismatched, **options)
    weights = random_weights()
    scales = [fit_scale(weight, table("E5M2")) for weight in weights]
    assert same(borrowed, run(weights, optimizer_of(weights, table("E5M2"), scales, normalize="rms"), 1))
    assert not same(borrowed, trained(table("E0M7"), scale=1.0, **options))


@pytest.mark.parametrize("placement", ["gradient", "update", "both"])
def test_a_frozen_stiffness_stays_that_of_the_initial_weights_whatever_the_scale(table, placement):
    formula = Recorded()
    (weight,) = weights = random_weights(shapes=((50,),))
    start = weight.detach().clone()
    geometry = Geometry(formula, refresh="never")
    optimizer = optimizer_of(weights, table("E4M3"), 2.0, stiffness=geometry, placement=placement)
    run(weights, optimizer, 3)
    optimizer.param_groups[0]["scale"] = 16.0
    run(weights, optimizer, 3, start=3)
    ((asked, _, scale),) = formula.asked
    assert torch.equal(asked, start)
    assert scale == 2.0
    assert torch.equal(optimizer.state[weight]["stiffness"], (1 + start.abs()) * 2)


def test_the_steps_of_a_frozen_and_of_a_fresh_stiffness_by_hand(table):
    start, gradients = torch.tensor([1.0, 3.0]).double(), [torch.tensor([1.0, -1.0]).double()] * 2
    fresh = [torch.tensor([1.0, 2.0]), torch.tensor([0.5, 2.0])]  # E7M0 at 1 and 3, then at 0.9 and 3.2
    for refresh, stiffnesses in (("step", fresh), ("never", fresh[:1] * 2)):
        weight = nn.Parameter(start.clone())
        stiffness = {"plugin": "grid", "refresh": refresh}
        optimizer = optimizer_of(
            [weight], table("E7M0"), lr=0.1, betas=(0.0, 0.0), normalize="none", stiffness=stiffness
        )
        for gradient in gradients:
            weight.grad = gradient
            optimizer.step()
        torch.testing.assert_close(weight.detach(), hand_made(start, gradients, stiffnesses))


def test_a_weight_whose_gradient_comes_late_is_frozen_before_its_own_first_step(table):
    weights = random_weights()
    optimizer = optimizer_of(weights, table("E4M3"), stiffness={"plugin": "grid", "refresh": "never"})
    weights[0].grad, start = torch.ones_like(weights[0]), weights[1].detach().clone()
    optimizer.step()
    assert "stiffness" not in optimizer.state[weights[1]]
    run(weights, optimizer, 2)
    expected = table("E4M3").spacing(start)
    assert torch.equal(optimizer.state[weights[1]]["stiffness"], expected)


FROZEN = {"plugin": "grid", "refresh": "never"}

RESUME = """
import sys, torch
from torch import nn
from altgrad_core.format import Format
from altgrad_optim import ManifoldAdamW

values = torch.load(sys.argv[1] + "/values.pt")
saved = torch.load(sys.argv[1] + "/state.pt")
weight = nn.Parameter(saved["weight"])
group = {"params": [weight], "format": Format(name="E4M3", bits=8, values=values), "scale": 16.0}
optimizer = ManifoldAdamW([group], lr=0.05, stiffness={"plugin": "grid", "refresh": "never"})
optimizer.load_state_dict(saved["optimizer"])
for gradient in saved["gradients"]:
    weight.grad = gradient
    optimizer.step()
torch.save(weight.detach(), sys.argv[1] + "/result.pt")
"""


@pytest.mark.slow
def test_a_frozen_stiffness_resumes_to_the_bit_in_a_fresh_process(table, tmp_path):
    gradients = torch.randn(6, 200, generator=generator(5))

    def steps(weight, optimizer, some):
        for gradient in some:
            weight.grad = gradient.clone()
            optimizer.step()

    (weight,) = weights = random_weights(shapes=((200,),))
    optimizer = optimizer_of(weights, table("E4M3"), 16.0, lr=0.05, eps=1e-8, stiffness=FROZEN)
    steps(weight, optimizer, gradients[:3])
    saved = {"weight": weight.detach().clone(), "optimizer": copy.deepcopy(optimizer.state_dict())}
    torch.save(table("E4M3").values, tmp_path / "values.pt")
    torch.save({**saved, "gradients": list(gradients[3:])}, tmp_path / "state.pt")
    steps(weight, optimizer, gradients[3:])
    subprocess.run([sys.executable, "-c", RESUME, str(tmp_path)], check=True)
    assert torch.equal(torch.load(tmp_path / "result.pt"), weight.detach())
    anew = nn.Parameter(saved["weight"].clone())  # what resuming without S would do
    steps(anew, optimizer_of([anew], table("E4M3"), 16.0, lr=0.05, eps=1e-8), gradients[3:])
    assert not torch.equal(anew, weight)


def test_a_state_without_the_initial_stiffness_cannot_be_gone_on_with(table):
    weights = random_weights()
    optimizer = optimizer_of(weights, table("E4M3"))
    run(weights, optimizer, 2)
    frozen = optimizer_of(weights, table("E4M3"), stiffness=FROZEN)
    frozen.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(RuntimeError, match=r"refresh='never' .* has taken 2 steps .* use refresh='step'"):
        run(weights, frozen, 1)


def test_a_callable_of_your_own_can_be_frozen_and_is_clamped_all_the_same(table):
    weights = random_weights()
    geometry = Geometry(constant(8.0), refresh="never")
    clamped = optimizer_of(weights, table("E4M3"), stiffness=geometry, max_stiffness=2.0, normalize="none")
    seen = run(weights, clamped)
    assert same(seen, trained(table("E4M3"), stiffness=constant(2.0), normalize="none"))


@pytest.mark.parametrize(
    "options", [{"refresh": "never"}, {"of_format": True}, {"of_format": True, "refresh": "never"}]
)
def test_with_these_options_it_keeps_the_contract(table, options):
    given = {**options, "of_format": table("E5M2")} if "of_format" in options else options
    stiffness = {"plugin": "grid", **given}
    check_optimizer(lambda groups: ManifoldAdamW(groups, lr=0.05, other_lr=0.05, stiffness=stiffness))


def test_under_grid_storage_a_frozen_stiffness_is_that_of_the_snapped_weights(table):
    model = model_of(table("E4M3"))
    optimizer = ManifoldAdamW(param_groups(model), lr=0.02, stiffness=FROZEN)
    store_on_grid(optimizer, "stochastic", generator())
    weight, quantizer = model[1].weight, quantizer_of(model[1].weight)
    expected = table("E4M3").spacing(weight.detach() * quantizer.scale) / quantizer.scale
    run(list(model.parameters()), optimizer, 5)
    assert torch.equal(optimizer.state[weight]["stiffness"], expected)


# --- a geometry on weights that are not quantized ---------------------------------------------------------


def borrowing(format):
    return {"plugin": "grid", "of_format": format}


def test_without_any_quantized_weight_matrices_take_the_geometry_of_of_format_at_lr(table):
    model, twin = model_of(None), model_of(None)
    optimizer = ManifoldAdamW(param_groups(model), lr=0.5, other_lr=0.01, stiffness=borrowing(table("E5M2")))
    groups = param_groups(twin)
    for group in groups:
        if group["params"][0].dim() >= 2:
            group["format"] = table("E5M2")
            group["scale"] = [fit_scale(one, table("E5M2")) for one in group["params"]]
    by_hand = ManifoldAdamW(groups, lr=0.5, other_lr=0.01)
    expected = run(list(twin.parameters()), by_hand, 1)
    assert same(run(list(model.parameters()), optimizer, 1), expected)
    plain = model_of(None)
    adamw = ManifoldAdamW(param_groups(plain), lr=0.5, other_lr=0.01)
    for seen, other in zip(expected, run(list(plain.parameters()), adamw, 1), strict=True):
        assert torch.equal(seen, other) == (seen.dim() < 2), "vectors are plain AdamW at other_lr"


def test_a_group_made_by_hand_borrows_the_geometry_with_everything_in_it(table):
    format, (vector, twin) = table("E5M2"), (nn.Parameter(torch.linspace(-1, 1, 40)) for _ in range(2))
    borrower = ManifoldAdamW([vector], lr=0.5, other_lr=0.01, stiffness=borrowing(format))
    fitted = [{"params": [twin], "format": format, "scale": fit_scale(twin, format)}]
    assert torch.equal(run([vector], borrower, 1)[0], run([twin], ManifoldAdamW(fitted, lr=0.5), 1)[0])


def test_beside_a_quantized_weight_the_others_stay_plain(table):
    arms = []
    for stiffness in ("grid", borrowing(table("E5M2"))):
        model = model_of(table("E4M3"))
        optimizer = ManifoldAdamW(model.parameters(), lr=0.5, other_lr=0.01, stiffness=stiffness)
        run(list(model.parameters()), optimizer, 2)
        for parameter in model.parameters():  # nor where a step has no gradient for the quantized ones
            parameter.grad = None if quantizer_of(parameter) else torch.ones_like(parameter)
        optimizer.step()
        arms.append(model)
    for one, other in zip(*(arm.parameters() for arm in arms), strict=True):
        assert torch.equal(one, other) == (quantizer_of(one) is None)


def test_only_covered_weights_take_the_geometry_of_of_format_at_lr(table):
    def trained(covers, **options):
        model = model_of(None)
        linear = [one.weight for one in model.modules() if isinstance(one, nn.Linear)]
        groups = param_groups(model, linear if covers else ())
        run(list(model.parameters()), ManifoldAdamW(groups, other_lr=0.01, **options), 2)
        return model, {id(one) for one in linear}

    model, linear = trained(True, lr=0.5, stiffness=borrowing(table("E5M2")))
    everywhere, _ = trained(False, lr=0.5, stiffness=borrowing(table("E5M2")))
    nowhere, _ = trained(True, lr=0.5)
    kinds = {"linear": 0, "matrix": 0}
    for one, other, plain in zip(*(net.parameters() for net in (model, everywhere, nowhere)), strict=True):
        assert torch.equal(one, plain) == (id(one) not in linear)
        assert torch.equal(one, other) == (id(one) in linear or one.dim() < 2)
        kinds["linear" if id(one) in linear else "matrix"] += one.dim() >= 2
    assert all(kinds.values())


@pytest.mark.parametrize("stiffness", ["E4M3", None])
def test_a_group_with_an_of_format_of_its_own_takes_that_geometry(table, stiffness):
    def trained(first, stiffness):
        weights = random_weights()
        groups = [{"params": [one], "covered": True, "of_format": first} for one in weights]
        groups[1]["of_format"] = None
        optimizer = ManifoldAdamW(groups, lr=0.5, other_lr=0.01, stiffness=stiffness)
        assert "of_format" not in optimizer.state_dict()["param_groups"][0]
        return run(weights, optimizer, 2)

    others = "grid" if stiffness is None else borrowing(table(stiffness))
    seen = trained(table("E5M2"), others)
    assert torch.equal(seen[0], trained(None, borrowing(table("E5M2")))[0])
    assert torch.equal(seen[1], trained(None, others)[1])


def test_param_groups_tell_covered_weights_by_the_geometry_they_take(table):
    model = model_of(None)
    first, second = (one.weight for one in model.modules() if isinstance(one, nn.Linear))
    groups = [one for one in param_groups(model, {first: table("E5M2"), second: None}) if one["covered"]]
    assert [(len(one["params"]), one.get("of_format")) for one in groups] == [(1, table("E5M2")), (1, None)]


def test_covered_weights_without_a_format_or_a_geometry_are_plain_adamw_at_other_lr():
    def trained(lr):
        model = model_of(None)
        groups = param_groups(model, [one.weight for one in model.modules() if isinstance(one, nn.Linear)])
        return run(list(model.parameters()), ManifoldAdamW(groups, lr=lr, other_lr=0.01), 2)

    assert same(trained(0.5), trained(0.01)), "lr may be in ULPs, which float32 weights have not"


def test_the_learning_rate_of_a_borrowed_geometry_is_the_groups_own_or_lr_on_the_schedule(table):
    def moved(own, factor):
        weight = nn.Parameter(torch.ones(2, 2).double())
        group = {"params": [weight]} | ({} if own is None else {"lr": own})
        optimizer = ManifoldAdamW([group], lr=0.5, other_lr=0.01, eps=0.0, stiffness=borrowing(table("E5M2")))
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor)
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        return 1 - float(weight.detach()[0, 0])

    assert moved(None, 1.0) == pytest.approx(0.5)
    assert moved(None, 0.5) == pytest.approx(0.25)
    assert moved(0.2, 0.5) == pytest.approx(0.1)
    assert moved(0.0, 1.0) == 0


def test_its_moment_and_rate_are_what_a_step_takes_from_a_weight(table):
    model = nn.Sequential(nn.Linear(64, 4, bias=False))
    quantize_model(model, table("E4M3"))
    (weight,) = model.parameters()
    optimizer = ManifoldAdamW(param_groups(model), lr=0.01, stiffness=constant(0.25), normalize="none")
    assert optimizer.momentum_of(weight) is None
    for step in range(3):
        before = weight.detach().clone()
        weight.grad = torch.randn(weight.shape, generator=generator(step))
        optimizer.step()
    momentum = optimizer.momentum_of(weight)
    torch.testing.assert_close(before - weight.detach(), momentum.rate * momentum.buffer)
    assert momentum.beta == 0.9


@pytest.mark.slow
def test_error_compensation_brings_it_to_a_minimum_where_nearest_rounding_stalls(table):
    def bias(rounding):
        target = torch.rand(1, 512, generator=generator(3)) / 2 + 0.25
        model = nn.Sequential(nn.Linear(512, 1, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(target + (torch.rand(1, 512, generator=generator(4)) - 0.5) * 0.5)
        format = table("E0M7")
        quantize_model(model, format)
        (weight,) = model.parameters()
        optimizer = ManifoldAdamW(param_groups(model), lr=2e-3)
        store_on_grid(optimizer, rounding, scale_mode="initial")
        for step in range(1000):
            optimizer.param_groups[0]["lr"] = 2e-3 * (1 - 0.9 * step / 1000)
            weight.grad = weight.detach() - target
            optimizer.step()
        scale = quantizer_of(weight).scale
        return ((weight.detach() - target).abs() * scale / format.spacing(target * scale)).mean()

    assert bias("nearest_even") > 5
    assert bias("eco") < 1.5
