import copy
import math

import pytest
import torch
from torch import nn

from altgrad_core.format import Format
from altgrad_core.groups import param_groups
from altgrad_core.quantizer import quantizer_of
from altgrad_core.rules import Rule
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import quantize_model
from altgrad_optim import GridOptim
from altgrad_optim.rungs import grid_step, rung_coordinate, stochastic_round, value_step

HIGHEST = 1 - 2.0**-24  # the largest random number that there is


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def parameter(*values, dtype=torch.float32):
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def optimizer_of(weights, format, scale=1.0, **options):
    """An optimizer of weights that no quantizer knows; their scale is static."""
    weights = weights if isinstance(weights, list) else [weights]
    options = {"momentum": 0.0, "generator": generator()} | options
    return GridOptim([{"params": weights, "format": format, "scale": scale}], **options)


def push(optimizer, *gradients):
    """Step with these gradients; a number stands for a whole tensor of it."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = torch.as_tensor(gradient, dtype=weight.dtype).expand_as(weight).clone()
    optimizer.step()


def linear(values, format, **options):
    """A quantized Linear of these weights and an optimizer whose step_scale is 1."""
    model = nn.Sequential(nn.Linear(len(values), 1, bias=False))
    model[0].weight.data = torch.tensor([values])
    quantize_model(model, format)
    options = {"step_scale": 1.0, "momentum": 0.0, "generator": generator()} | options
    return model[0].weight, GridOptim(param_groups(model), **options)


def rungs_of(weight, format, scale=1.0):
    return format.rung(weight.detach() * scale)


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


# --- the rounding to whole rungs ------------------------------------------------------------------------


def test_integers_never_move():
    x = torch.tensor([0.0, 1.0, -1.0, 10.0, -10.0, 2.0**23])
    for r in (0.0, 0.5, HIGHEST):
        assert torch.equal(stochastic_round(x, torch.full_like(x, r)), x)


def test_rounding_is_on_the_magnitude_and_keeps_the_sign():
    x = torch.tensor([0.3, -0.3, 2.75, -2.75])
    for r, expected in (
        (0.0, [1, -1, 3, -3]),
        (0.29, [1, -1, 3, -3]),
        (0.31, [0, 0, 3, -3]),
        (0.75, [0, 0, 2, -2]),
    ):
        assert stochastic_round(x, torch.full_like(x, r)).tolist() == expected


def test_nan_stays_nan():
    assert stochastic_round(torch.tensor([math.nan]), torch.zeros(1)).isnan().all()


def test_a_mean_move_of_0_3_rungs_is_0_3_rungs(table):
    count = 200_000
    weight = nn.Parameter(torch.ones(count))
    push(optimizer_of(weight, table("E4M3"), step_scale=1.0), 0.3)
    moved = (56 - rungs_of(weight, table("E4M3"))).double()
    assert set(moved.unique().tolist()) == {0, 1}
    assert abs(moved.mean().item() - 0.3) < 4 * (0.3 * 0.7 / count) ** 0.5


def test_weights_steps_and_tensors_draw_different_numbers(table):
    weights = [nn.Parameter(torch.ones(4000)) for _ in range(2)]
    optimizer = optimizer_of(weights, table("E4M3"), step_scale=1.0)
    seen = []
    for _ in range(2):
        for weight in weights:
            weight.data.fill_(1.0)
        push(optimizer, 0.5, 0.5)
        seen += [weight.detach() < 1 for weight in weights]
    for index, one in enumerate(seen):
        assert all(0.45 < (one ^ other).float().mean() < 0.55 for other in seen[:index])


# --- the step in rungs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 256.0])
def test_one_less_ten_rungs_is_0_4375_in_e4m3(table, scale):
    weight = parameter(1.0, -1.0)
    push(optimizer_of(weight, table("E4M3"), scale, step_scale=1.0), [1000.0, -1000.0])
    assert weight.tolist() == [0.4375, -0.4375]


@pytest.mark.parametrize("rounding", ["rung", "value"])
def test_a_move_of_exactly_the_clip_is_exactly_that_always(table, rounding):
    for name in ("E0M7", "E4M3", "E5M2"):
        format = table(name)
        start = format.from_rung(torch.full((5000,), 60))
        weight = nn.Parameter(start.clone())
        optimizer = optimizer_of(weight, format, step_scale=1.0, rounding="rung")
        for step in range(1, 4):
            push(optimizer, 10.0)
            assert (rungs_of(weight, format) == 60 - 10 * step).all(), name


def test_signs_go_against_the_gradient(table):
    weight = parameter(1.0, 1.0, -1.0, -1.0)
    push(optimizer_of(weight, table("E4M3"), step_scale=1.0), [2.0, -2.0, 2.0, -2.0])
    assert (rungs_of(weight, table("E4M3"))).tolist() == [54, 58, -58, -54]


def test_a_weight_crosses_zero_rung_by_rung(table):
    weight = parameter(2.0**-9)  # the smallest positive
    push(optimizer_of(weight, table("E4M3"), step_scale=1.0), 3.0)
    assert weight.item() == -2 * 2.0**-9


def test_the_clip_is_as_asked_and_may_be_a_fraction(table):
    for clip, expected in ((3, {3}), (0.5, {0, 1}), (2.5, {2, 3})):
        for rounding in ("rung", "value"):
            weight = nn.Parameter(torch.full((500,), 1.5))
            optimizer = optimizer_of(weight, table("E4M3"), step_scale=1.0, rung_clip=clip, rounding=rounding)
            push(optimizer, -1e6)
            assert set((rungs_of(weight, table("E4M3")) - 60).tolist()) == expected, (clip, rounding)


def test_a_zero_gradient_moves_nothing(formats):
    for format in formats:
        for normalize in ("none", "adam"):
            weight = nn.Parameter(format.values.clone())
            push(optimizer_of(weight, format, normalize=normalize), 0.0)
            assert torch.equal(weight.detach(), format.values), (format, normalize)


def test_starting_weights_are_snapped_to_nearest_even(table):
    weight = parameter(0.5 / 128, 1.5 / 128, 0.3, 2.0)
    optimizer_of(weight, table("E0M7"))
    assert (weight * 128).tolist() == [0, 2, 38, 127]


@pytest.mark.parametrize("storage", ["grid", pytest.param("master", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rounding", ["rung", pytest.param("value", marks=pytest.mark.slow)])
@pytest.mark.parametrize("normalize", ["none", "adam"])
def test_finite_gradients_give_finite_weights_at_zero_and_at_both_ends_of_every_format(
    formats, storage, rounding, normalize
):
    for format in formats:
        for gradient in (1e30, -1e30, 1e-30, 0.0):
            start = format.values[[0, 1, len(format.values) // 2, -2, -1]]
            weights = [nn.Parameter(start.clone()), nn.Parameter(torch.zeros(3))]
            options = {"normalize": normalize, "storage": storage, "rounding": rounding, "momentum": 0.9}
            optimizer = optimizer_of(weights, format, **options)
            for _ in range(20):
                push(optimizer, gradient, gradient)
                assert all(torch.isin(weight.detach(), format.values).all() for weight in weights)


def test_a_weight_stays_finite_across_a_switch_of_formats(table):
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    rules = [Rule("0", table("E7M0"))]
    quantize_model(model, rules=rules)
    optimizer = GridOptim(model.parameters(), step_scale=1.0, generator=generator())
    push(optimizer, 10.0)
    from altgrad_core.surgery import dequantize_model

    quantize_model(dequantize_model(model), table("E4M3"))
    for _ in range(5):
        push(optimizer, 10.0)
        quantizer = quantizer_of(model[0].weight)
        assert torch.isin(model[0].weight.detach() * quantizer.scale, table("E4M3").values).all()
        assert quantizer.on_grid


# --- the direction, by hand -----------------------------------------------------------------------------


def test_the_founding_rule_by_hand(table):
    """velocity = 0.5*velocity + g + decay*w, r = 4*velocity."""
    weight = parameter(32 / 128)
    optimizer = optimizer_of(weight, table("E0M7"), step_scale=4.0, momentum=0.5, weight_decay=2.0)
    push(optimizer, 0.5)  # velocity 0.5 + 0.5 = 1: 4 rungs
    assert weight.item() == 28 / 128
    push(optimizer, -1.9375)  # velocity 0.5 - 1.9375 + 0.4375 = -1: -4 rungs
    assert weight.item() == 32 / 128
    push(optimizer, 0.75)  # velocity -0.5 + 0.75 + 0.5 = 0.75: 3 rungs
    assert weight.item() == 29 / 128


def test_the_adam_direction_by_hand(table):
    """Constant gradients: m/c1 = g and v/c2 = g^2, so that the direction is g/(|g| + eps)."""
    weight = parameter(32 / 128, 32 / 128)
    optimizer = optimizer_of(weight, table("E0M7"), step_scale=8.0, normalize="adam", eps=1.0)
    for step in range(1, 4):
        push(optimizer, [1.0, -3.0])  # directions 1/2 and -3/4: 4 and -6 rungs
        assert (weight * 128).tolist() == [32 - 4 * step, 32 + 6 * step]


def test_under_adam_the_step_scale_is_in_rungs_per_step(table):
    weight = nn.Parameter(torch.full((1000,), 0.5))
    optimizer = optimizer_of(weight, table("E0M7"), step_scale=2.0, normalize="adam")
    push(optimizer, 1e-3)
    assert set((weight * 128).tolist()) <= {61, 62, 63}
    assert (weight * 128).mean().item() == pytest.approx(62, abs=0.02)


def test_decay_under_adam_is_in_rungs_and_decoupled(table):
    weight = parameter(1.5, -1.5, 0.0)  # of spacing 1/8: 12 spacings
    optimizer = optimizer_of(weight, table("E4M3"), normalize="adam", weight_decay=0.5, decay_lr=0.5)
    push(optimizer, 0.0)  # 0.25*12 = 3 rungs
    assert weight.tolist() == [1.125, -1.125, 0.0]


def test_decay_under_adam_is_within_the_clip_and_follows_the_schedule(table):
    weight = parameter(1.5)
    optimizer = optimizer_of(
        weight, table("E4M3"), normalize="adam", weight_decay=0.5, decay_lr=1.0, rung_clip=3
    )
    push(optimizer, 0.0)  # 6 rungs, clipped
    assert weight.item() == 1.125
    weight = parameter(1.5)
    optimizer = optimizer_of(weight, table("E4M3"), normalize="adam", weight_decay=0.5, decay_lr=1.0)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    push(optimizer, 0.0)
    assert weight.item() == 1.125


def test_decay_knows_the_scale(table):
    weight = parameter(1.5 / 256)
    optimizer = optimizer_of(weight, table("E4M3"), 256.0, normalize="adam", weight_decay=0.5, decay_lr=0.5)
    push(optimizer, 0.0)
    assert weight.item() == 1.125 / 256


def test_the_moments_are_kept_in_float32_weight_units(table):
    weight = parameter(0.5)
    optimizer = optimizer_of(weight, table("E0M7"), step_scale=0.0, momentum=0.5)
    push(optimizer, 1.0)
    push(optimizer, 0.25)
    assert optimizer.state[weight]["velocity"].tolist() == [0.75]


# --- rounding of values ---------------------------------------------------------------------------------


def test_value_rounding_takes_the_target_between_its_neighbors(table):
    e4m3 = table("E4M3")
    start = torch.full((3,), 1.5)  # of spacing 1/8; 2.4 spacings down is 1.2
    for r, expected in ((0.59, 1.25), (0.61, 1.125)):
        landed, past = value_step(start, torch.full((3,), 2.4), e4m3, torch.full((3,), r))
        assert landed.tolist() == [expected] * 3
        assert not past.any()


def test_value_rounding_is_unbiased_in_the_value(table):
    count = 200_000
    weight = nn.Parameter(torch.full((count,), 1.0))
    optimizer = optimizer_of(weight, table("E4M3"), step_scale=1.0, rounding="value")
    push(optimizer, 0.3)  # of spacings of 1/8: the grid below 1 has spacings of 1/16
    moved = (1.0 - weight.detach().double()) * 8
    assert abs(moved.mean().item() - 0.3) < 4 * moved.std().item() / count**0.5


def test_a_target_beyond_zero_becomes_zero(table):
    for format in (table("E4M3"), table("E7M0"), table("E0M7")):
        smallest = format.smallest
        start = torch.tensor([smallest, -smallest])
        landed, _ = value_step(start, torch.tensor([3.0, -3.0]), format, torch.full((2,), 0.5))
        assert landed.tolist() == [0, 0], format


def test_a_target_beyond_zero_is_seen_where_products_underflow():
    tiny = Format(name="TINY", bits=3, values=[-(2.0**-120), 0.0, 2.0**-120, 2.0**-119])
    landed, _ = value_step(torch.tensor([2.0**-120]), torch.tensor([1.5]), tiny, torch.tensor([0.1]))
    assert landed.tolist() == [0]


def test_from_zero_a_value_may_go_either_way(table):
    landed, _ = value_step(torch.zeros(2), torch.tensor([2.0, -2.0]), table("E0M7"), torch.zeros(2))
    assert (landed * 128).tolist() == [-2, 2]


def test_a_value_moves_at_most_the_clip_in_rungs(table):
    e7m0 = table("E7M0")  # 10 spacings up from 1 is 11: 3 rungs; half a spacing down of 2^20 is -1 rung
    landed, _ = value_step(torch.ones(1), torch.tensor([-10.0]), e7m0, torch.tensor([0.5]), rung_clip=2)
    assert landed.item() == 4
    landed, _ = value_step(torch.ones(1), torch.tensor([0.999]), e7m0, torch.tensor([0.5]), rung_clip=10)
    assert landed.item() == 2.0**-10


# --- master: the rung coordinate ------------------------------------------------------------------------


def test_the_coordinate_is_linear_between_neighboring_rungs(formats):
    for format in formats:
        values, rungs = format.values, format.rung(format.values).float()
        torch.testing.assert_close(rung_coordinate(values, format), rungs, rtol=0, atol=0)
        quarter = values[:-1] + (values[1:] - values[:-1]) / 4
        torch.testing.assert_close(rung_coordinate(quarter, format), rungs[:-1] + 0.25, rtol=0, atol=2.0**-16)
        ends = torch.tensor([4 * float(values[-1]), 4 * float(values[0])])
        assert torch.equal(rung_coordinate(ends, format), rungs[[-1, 0]])


def test_the_coordinate_of_narrow_floats_is_float32(table):
    u = rung_coordinate(torch.tensor([100.5 / 128], dtype=torch.bfloat16), table("E0M7"))
    assert u.dtype == torch.float32
    assert rung_coordinate(torch.tensor([0.5], dtype=torch.float64), table("E0M7")).dtype == torch.float64


def test_u_starts_by_interpolation_and_the_weight_is_the_nearest_rung(table):
    weight = parameter(10.25 / 128, -10.75 / 128, 0.4 / 128)
    optimizer = optimizer_of(weight, table("E0M7"), storage="master")
    assert optimizer.state[weight]["rung_coordinate"].tolist() == [10.25, -10.75, pytest.approx(0.4)]
    assert (weight * 128).tolist() == [10, -11, 0]


def test_updates_below_a_rung_add_up(table):
    weight = parameter(10 / 128)
    optimizer = optimizer_of(weight, table("E0M7"), step_scale=1.0, storage="master")
    seen = []
    for _ in range(8):
        push(optimizer, 0.25)
        seen.append(weight.item() * 128)
    assert optimizer.state[weight]["rung_coordinate"].item() == 8
    assert seen == [10, 10, 9, 9, 9, 8, 8, 8], "9.5 and 8.5 round to the even rung"


def test_signs_cross_through_zero(table):
    weight = parameter(2.0**-62)  # the smallest of E7M0
    optimizer = optimizer_of(weight, table("E7M0"), step_scale=1.0, storage="master")
    seen = []
    for _ in range(8):
        push(optimizer, 0.25)
        seen.append(weight.item() * 2.0**62)
    assert seen == [1, 0, 0, 0, 0, 0, -1, -1], "|u| up to a half is zero"


@pytest.mark.parametrize("normalize", ["none", "adam"])
def test_the_parameter_is_always_the_value_of_the_rounded_coordinate(formats, normalize):
    for format in formats:
        weight = nn.Parameter(format.largest / 8 * torch.randn(200, generator=generator(1)))
        options = {"step_scale": 1.5, "storage": "master", "normalize": normalize, "bound": 2.0}
        optimizer = optimizer_of(weight, format, 0.5, **options)
        for step in range(10):
            push(optimizer, torch.randn(200, generator=generator(step)))
            u = optimizer.state[weight]["rung_coordinate"]
            assert torch.equal(weight.detach(), format.from_rung(u.round()) / 0.5)
            assert (u.round() == format.rung(weight.detach() * 0.5)).all()


def test_the_coordinate_is_clamped_at_the_ends(formats):
    for format in formats:
        weight = parameter(float(format.values[0]), 0.0, format.largest)
        optimizer = optimizer_of(weight, format, step_scale=1.0, storage="master")
        lowest, highest = (int(one) for one in format.rung(format.values[[0, -1]]))
        for _ in range(40):
            push(optimizer, [10.0, 0.0, -10.0])
        assert optimizer.state[weight]["rung_coordinate"].tolist() == [lowest, 0, highest]
        push(optimizer, [-2.0, 0.0, 2.0])
        assert rungs_of(weight, format).tolist() == [lowest + 2, 0, highest - 2], "nothing to undo first"


def test_the_master_draws_no_random_number(table):
    results = []
    for seed in (1, 2):
        weight = nn.Parameter(torch.linspace(-0.9, 0.9, 100))
        optimizer = optimizer_of(weight, table("E0M7"), storage="master", generator=generator(seed))
        for step in range(5):
            push(optimizer, torch.randn(100, generator=generator(step)) / 7)
        results.append(weight.detach())
    assert torch.equal(*results)


def test_the_scale_of_a_master_is_the_initial_one(table):
    weight, optimizer = linear([0.5, 0.25], table("E0M7"), storage="master")
    for _ in range(20):
        push(optimizer, -10.0)
    assert quantizer_of(weight).scale.item() == 1
    assert weight.tolist() == [[127 / 128, 127 / 128]]
    assert optimizer.scales.rescales.tolist() == [0]


def test_the_scale_of_a_master_is_fitted_when_the_optimizer_is_made(table):
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    quantize_model(model, table("E0M7"))
    model[0].weight.data = torch.tensor([[100.0, -50.0]])  # such as from a checkpoint
    GridOptim(model.parameters(), storage="master")
    assert quantizer_of(model[0].weight).scale.item() == 2.0**-7
    assert model[0].weight.tolist() == [[100, -50]]


# --- NaN ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["grid", "master"])
@pytest.mark.parametrize("normalize", ["none", "adam"])
@pytest.mark.parametrize("rounding", ["rung", "value"])
def test_a_nan_gradient_makes_its_weight_nan_and_no_other(table, storage, normalize, rounding):
    weight, optimizer = linear(
        [0.5, 0.25, 0.0], table("E4M3"), storage=storage, normalize=normalize, rounding=rounding
    )
    push(optimizer, [[math.nan, 0.0, 1.0]])
    push(optimizer, [[0.0, 0.0, 1.0]])
    assert weight.isnan().tolist() == [[True, False, False]]


# --- bound ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["grid", "master"])
def test_the_bound_is_the_rung_of_the_largest_value_not_above_it(formats, storage):
    for format in formats:
        start = torch.full((50,), format.largest / 4)
        weight = nn.Parameter(start.clone())
        optimizer = optimizer_of(weight, format, step_scale=1.0, bound=1.7, storage=storage)
        limit = 1.7 * format.largest / 4
        for sign in (-1, 1):
            for _ in range(30):
                push(optimizer, sign * 10.0)
            within = format.values[format.values.abs() <= limit]
            assert weight.detach().unique().tolist() == [float(within[0 if sign > 0 else -1])], format


def test_the_bound_refers_to_the_weights_before_their_first_snap(table):
    weight = parameter(0.75, -0.75)  # in E7M0: 1 and -1, or 0.5
    optimizer = optimizer_of(weight, table("E7M0"), step_scale=1.0, bound=2.0)
    push(optimizer, [-10.0, 10.0])
    assert weight.tolist() == [1, -1]


@pytest.mark.parametrize("storage", ["grid", "master"])
def test_the_first_snap_ends_at_the_bound(table, storage):
    weight = parameter(4.0, 1.0, 1.0, 1.0)  # their rms is 2.18
    optimizer_of(weight, table("E7M0"), bound=1.0, storage=storage)
    assert weight.tolist() == [2, 1, 1, 1]


def test_a_weight_that_starts_at_zero_has_no_bound(table):
    weight = parameter(0.0, 0.0)
    optimizer = optimizer_of(weight, table("E0M7"), step_scale=1.0, bound=1.0)
    for _ in range(30):
        push(optimizer, -10.0)
    assert weight.tolist() == [127 / 128] * 2


# --- the scale ------------------------------------------------------------------------------------------


def test_a_weight_pushed_past_the_end_halves_the_scale(table):
    weight, optimizer = linear([127 / 128, 0.25], table("E0M7"))
    scale = quantizer_of(weight).scale
    push(optimizer, [[-1.0, 0.0]])
    assert scale.item() == 0.5
    assert weight.tolist() == [[1.0, 0.25]], "127/256 rounds to the even 64/128"
    push(optimizer, [[-3.0, 0.0]])
    assert (scale.item(), weight[0, 0].item()) == (0.5, 67 / 64)
    assert optimizer.scales.rescales.tolist() == [1]


def test_up_to_the_end_the_scale_stays(table):
    weight, optimizer = linear([120 / 128, 0.25], table("E0M7"))
    push(optimizer, [[-7.0, 0.0]])
    assert (quantizer_of(weight).scale.item(), weight[0, 0].item()) == (1, 127 / 128)


def test_value_rounding_counts_a_target_past_the_end(table):
    weight, optimizer = linear([120 / 128, 0.25], table("E0M7"), rounding="value")
    push(optimizer, [[-9.0, 0.0]])
    assert quantizer_of(weight).scale.item() == 0.5


@pytest.mark.parametrize("rounding", ["rung", "value"])
def test_a_weight_that_stays_at_the_end_does_not_change_the_scale(table, rounding):
    weight, optimizer = linear([127 / 128, 0.25], table("E0M7"), rounding=rounding)
    push(optimizer, [[0.0, 1.0]])
    assert quantizer_of(weight).scale.item() == 1
    assert weight.tolist()[0][0] == 127 / 128


def test_the_scale_grows_by_one_binade_a_step(table):
    weight, optimizer = linear([0.5, 0.015625], table("E0M7"))
    for _ in range(7):  # 64 rungs down to 0; what is left is 2/128
        push(optimizer, [[10.0, 0.0]])
    assert quantizer_of(weight).scale.item() >= 2
    for _ in range(10):
        push(optimizer, 0.0)
    assert quantizer_of(weight).scale.item() * weight.abs().max().item() > 0.49 / 2


def test_an_initial_scale_stays(table):
    weight, optimizer = linear([127 / 128, 0.25], table("E0M7"), scale_mode="initial")
    push(optimizer, -9.0)
    assert (quantizer_of(weight).scale.item(), weight[0, 0].item()) == (1, 127 / 128)


def test_a_weight_without_gradient_keeps_scale_and_bits():
    codebook = Format(name="CODEBOOK", bits=3, values=[-3.0, -1.0, 0.0, 0.25, 1.75, 3.0])
    model = nn.Sequential(*(nn.Linear(2, 1, bias=False) for _ in range(2)))
    for layer in model:
        layer.weight.data = torch.tensor([[3.0, 0.25]])
    quantize_model(model, codebook)
    optimizer = GridOptim(model.parameters(), step_scale=1.0, momentum=0.0, rung_clip=4)
    model[0].weight.data[0, 0] = 0.25  # a fit would give another scale
    model[1].weight.grad = torch.full((1, 2), 1.0)
    optimizer.step()
    assert quantizer_of(model[0].weight).scale.item() == 1
    assert model[0].weight.tolist() == [[0.25, 0.25]]


@pytest.mark.parametrize("storage_rounding", ["nearest_even", "stochastic"])
def test_after_every_step_the_weights_are_on_their_grids(formats, storage_rounding):
    for format in formats:
        for rounding in ("rung", "value"):
            model = quantize_model(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), format)
            options = {"rounding": rounding, "storage_rounding": storage_rounding, "bound": 8.0}
            optimizer = GridOptim(
                param_groups(model), step_scale=2.0, normalize="adam", generator=generator(), **options
            )
            for step in range(30):
                for index, one in enumerate(model.parameters()):
                    one.grad = torch.randn(one.shape, generator=generator(100 * step + index)) - 0.5
                optimizer.step()
                for layer in model:
                    on_grid = layer.weight.detach() * quantizer_of(layer.weight).scale
                    assert torch.isin(on_grid, format.values).all(), (format, rounding)


def test_a_margin_leaves_room(table):
    model = nn.Sequential(nn.Linear(2, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.5, 0.25]])
    quantize_model(model, table("E0M7"), margin=4.0)
    GridOptim(model.parameters())
    assert quantizer_of(model[0].weight).scale.item() == 0.25


@pytest.mark.parametrize(("storage_rounding", "scale"), [("nearest_even", 1.0), ("stochastic", 0.5)])
def test_the_margin_is_kept_as_storage_behind_other_optimizers_keeps_it(table, storage_rounding, scale):
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    model[0].weight.data = torch.tensor([[0.2421875]])
    quantize_model(model, table("E0M7"), margin=4.0)
    optimizer = GridOptim(
        model.parameters(), step_scale=1.0, generator=generator(), storage_rounding=storage_rounding
    )
    push(optimizer, -10.0)
    assert quantizer_of(model[0].weight).scale.item() == scale


def test_a_static_scale_of_a_group_stays(table):
    weight = parameter(127 / 128 / 8)
    scale = torch.tensor(8.0)
    optimizer = optimizer_of(weight, table("E0M7"), scale, step_scale=1.0)
    push(optimizer, -5.0)
    assert (scale.item(), weight.item() * 8) == (8.0, 127 / 128)


def test_the_forward_pass_uses_the_weights_as_they_are(table):
    for storage in ("grid", "master"):
        weight, optimizer = linear([0.3, 0.2], table("E0M7"), storage=storage)
        push(optimizer, 1.0)
        assert quantizer_of(weight).on_grid
        assert quantizer_of(weight).quantized(weight) is weight


# --- counters and what monitors see ---------------------------------------------------------------------


def test_flips_and_updates_are_counted(table):
    weights = [parameter(0.5, 0.25, 0.125), parameter(0.5, 0.5)]
    optimizer = optimizer_of(weights, table("E0M7"), step_scale=1.0)
    push(optimizer, [1.0, 0.0, 2.0], [0.0, 0.0])
    assert (optimizer.flips.item(), optimizer.updates.item()) == (2, 2)
    assert [one.item() for one in optimizer.counts[weights[1]]] == [0, 0]
    push(optimizer, [1e-9, 1e-9, 0.0], [1.0, 1.0])
    assert (optimizer.flips.item(), optimizer.updates.item()) == (2, 4)
    assert optimizer.flips.shape == ()


def test_a_step_without_gradients_counts_nothing(table):
    weight = parameter(0.5)
    optimizer = optimizer_of(weight, table("E0M7"), step_scale=1.0)
    push(optimizer, 1.0)
    weight.grad = None
    optimizer.step()
    assert (optimizer.flips.item(), optimizer.updates.item(), optimizer.counts) == (0, 0, {})


def test_the_update_in_rungs_before_rounding_is_kept_where_it_is_watched(table):
    weight = parameter(0.5, 0.5)
    optimizer = optimizer_of(weight, table("E0M7"), step_scale=1.0)
    push(optimizer, [0.25, -50.0])
    assert optimizer.intended == {}
    optimizer.watch = True
    push(optimizer, [0.25, -50.0])
    assert optimizer.intended[weight].tolist() == [-0.25, 10]


# --- groups, learning rates, schedules ------------------------------------------------------------------


def model_of(format, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 4))
    return quantize_model(model, format, **options) if format is not None else model


def gradients(model, seed):
    for index, one in enumerate(model.parameters()):
        one.grad = torch.randn(one.shape, generator=generator(100 * seed + index))


def test_groups_without_a_format_train_at_other_lr(table):
    optimizer = GridOptim(param_groups(model_of(table("E4M3"))), other_lr=0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [6.0, 0.01, 0.01]


@pytest.mark.parametrize("prepare", [param_groups, lambda model: list(model.parameters())])
@pytest.mark.parametrize("schedule", [None, 0.5])
def test_parameters_without_a_format_are_torchs_adamw_at_other_lr_on_the_schedule(table, prepare, schedule):
    model, twin = model_of(table("E4M3")), model_of(None)
    optimizer = GridOptim(prepare(model), other_lr=0.01)
    options = {"betas": (0.9, 0.95), "weight_decay": 0.0, "fused": True}
    reference = torch.optim.AdamW(twin.parameters(), lr=0.01 * (schedule or 1.0), **options)
    if schedule:
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule)
    for step in range(5):
        gradients(model, step)
        gradients(twin, step)
        optimizer.step()
        reference.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other) == (quantizer_of(mine) is None)


def test_weights_whose_rule_says_master_are_adamws_at_other_lr(table):
    model, twin = model_of(None), model_of(None)
    quantize_model(model, rules=[Rule("1", table("E4M3"), storage="master"), Rule("3", table("E4M3"))])
    optimizer = GridOptim(param_groups(model), other_lr=0.01)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(3):
        gradients(model, step)
        gradients(twin, step)
        optimizer.step()
        reference.step()
    assert torch.equal(model[1].weight, twin[1].weight)
    assert not quantizer_of(model[1].weight).on_grid
    assert quantizer_of(model[3].weight).on_grid


def test_a_schedule_drives_the_rungs(table):
    weight = parameter(0.5)
    optimizer = optimizer_of(weight, table("E0M7"), step_scale=8.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for expected in (64 - 8, 64 - 12, 64 - 14):
        push(optimizer, 1.0)
        schedule.step()
        assert weight.item() * 128 == expected


def test_a_group_may_have_its_own_options(table):
    first, second = parameter(0.5), parameter(0.5)
    groups = [
        {"params": [first], "format": table("E0M7"), "rung_clip": 2},
        {"params": [second], "format": table("E0M7"), "lr": 3.0},
    ]
    push(GridOptim(groups, step_scale=8.0, momentum=0.0), 1.0, 1.0)
    assert [one.item() * 128 for one in (first, second)] == [62, 61]


def test_a_group_added_later_leaves_the_others_state(table):
    for storage in ("grid", "master"):
        runs = []
        for late in (False, True):
            model = model_of(table("E4M3"))
            extra = quantize_model(nn.Sequential(nn.Linear(6, 6, bias=False)), table("E4M3"))
            options = {"step_scale": 0.4, "storage": storage, "bound": 3.0, "generator": generator()}
            optimizer = GridOptim([model[1].weight, model[3].weight], **options)
            for step in range(12):
                if late and step == 6:
                    optimizer.add_param_group({"params": [extra[0].weight]})
                    assert quantizer_of(extra[0].weight).on_grid, "snapped at once"
                gradients(model, step)
                optimizer.step()
            runs.append([model[1].weight.detach(), model[3].weight.detach(), optimizer.scales.rms[:2]])
        assert same(*runs)


def test_one_number_is_drawn_from_the_generator_and_none_means_seed_zero(table):
    seeds = [
        GridOptim(model_of(table("E4M3")).parameters(), generator=given).seed
        for given in (generator(1), generator(1), generator(2), None)
    ]
    assert seeds[0] == seeds[1] != seeds[2]
    assert seeds[3] == 0


def test_it_trains_a_model(table):
    for options in (
        {},
        {"storage": "master"},
        {"rounding": "value"},
        {"normalize": "none", "step_scale": 20.0},
    ):
        model = model_of(table("E4M3"))
        given = {"normalize": "adam", "step_scale": 1.0, "other_lr": 1e-2, "bound": 8.0} | options
        optimizer = GridOptim(param_groups(model), generator=generator(), **given)
        losses = []
        for step in range(60):
            tokens = torch.randint(5, (40,), generator=generator(step))
            loss = nn.functional.cross_entropy(model(tokens), tokens % 4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0], options


# --- state ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["grid", "master"])
def test_a_run_of_other_weights_and_seed_resumes_to_the_bit(table, storage):
    def fresh(seed, factor):
        model = model_of(None)
        for layer in (model[1], model[3]):
            layer.weight.data.mul_(factor)
        quantize_model(model, table("E4M3"))
        options = {"step_scale": 0.4, "storage": storage, "bound": 3.0, "storage_rounding": "stochastic"}
        return model, GridOptim(param_groups(model), generator=generator(seed), **options)

    def steps(model, optimizer, start):
        for step in range(start, start + 8):
            gradients(model, step)
            optimizer.step()
        return [one.detach().clone() for one in model.parameters()]

    model, optimizer = fresh(1, 1.0)
    steps(model, optimizer, 0)
    other, resumed = fresh(2, 9.0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(steps(other, resumed, 8), steps(model, optimizer, 8))
    for layer in (1, 3):
        scales = [quantizer_of(one[layer].weight).scale.item() for one in (model, other)]
        assert scales[0] == scales[1]


def test_the_rung_coordinate_of_narrow_weights_is_saved_in_float32(table):
    weights = [nn.Parameter(torch.tensor([0.5, 0.25], dtype=torch.bfloat16)) for _ in range(2)]
    optimizers = [optimizer_of(weight, table("E0M7"), step_scale=1.0, storage="master") for weight in weights]
    push(optimizers[0], 0.3)
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    saved, loaded = (
        one.state[weight]["rung_coordinate"] for one, weight in zip(optimizers, weights, strict=True)
    )
    assert saved.dtype == loaded.dtype == torch.float32
    assert torch.equal(saved, loaded)


def test_a_state_of_another_optimizer_is_refused(table):
    weight = parameter(0.5)
    optimizer = optimizer_of(weight, table("E0M7"))
    with pytest.raises(ValueError, match="not that of a GridOptim"):
        optimizer.load_state_dict(torch.optim.AdamW([weight]).state_dict())


def test_the_storage_behind_other_optimizers_refuses_it(table):
    optimizer = GridOptim(model_of(table("E4M3")).parameters())
    with pytest.raises(ValueError, match="GridOptim keeps its weights on the grid by itself"):
        store_on_grid(optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step_scale": -1.0}, r"Invalid step_scale value: -1\.0"),
        ({"momentum": 1.0}, r"Invalid momentum value: 1\.0"),
        ({"eps": -1.0}, r"Invalid epsilon value: -1\.0"),
        ({"betas": (0.9, 1.0)}, r"Invalid beta parameter at index 1: 1\.0"),
        ({"weight_decay": -1.0}, r"Invalid weight_decay value: -1\.0"),
        ({"decay_lr": -1.0}, r"Invalid decay_lr value: -1\.0"),
        ({"other_lr": -1.0}, r"Invalid other_lr value: -1\.0"),
        ({"rung_clip": 0}, "Invalid rung_clip value: 0"),
        ({"rung_clip": math.inf}, "Invalid rung_clip value: inf"),
        ({"bound": -1.0}, r"Invalid bound value: -1\.0"),
        ({"bound": math.inf}, "Invalid bound value: inf"),
        ({"normalize": "rms"}, "Invalid normalize value: 'rms'; use one of none, adam"),
        ({"rounding": "nearest"}, "Invalid rounding value: 'nearest'; use one of rung, value"),
        ({"storage": "disk"}, "Invalid storage value: 'disk'; use one of grid, master"),
        ({"storage_rounding": "eco"}, "Invalid storage_rounding value: 'eco'; use one of nearest_even"),
        ({"scale_mode": "current"}, "Invalid scale_mode value: 'current'; use one of adaptive, initial"),
    ],
)
def test_bad_options_are_refused_in_torchs_words(options, message):
    with pytest.raises(ValueError, match=message):
        GridOptim([nn.Parameter(torch.ones(2))], **options)


# --- the pure functions on every format -----------------------------------------------------------------


def test_grid_step_moves_by_whole_rungs_between_all_values(formats):
    for format in formats:
        rungs = format.rung(format.values)
        for move in (-10, -3, 0, 1, 10):
            asked = torch.full_like(format.values, float(move))
            landed, past = grid_step(format.values, asked, format, torch.zeros_like(asked))
            expected = (rungs - move).clamp(int(rungs[0]), int(rungs[-1]))
            assert torch.equal(format.rung(landed), expected), format
            assert bool(past.any()) == (move != 0)


@pytest.mark.parametrize("together", [True, False])
def test_a_copy_of_a_model_alone_quantizes_and_one_with_its_optimizer_uses_the_grid(table, together):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    quantize_model(model, table("E4M3"))
    optimizer = GridOptim(param_groups(model))
    copied = copy.deepcopy((model, optimizer))[0] if together else copy.deepcopy(model)
    assert quantizer_of(model[0].weight).on_grid
    assert quantizer_of(copied[0].weight).on_grid == together
    with torch.no_grad():
        copied[0].weight.mul_(1.01)  # off the grid: only a copy on its own sees to it
    x = torch.eye(8)
    as_it_is = torch.nn.functional.linear(x, copied[0].weight, copied[0].bias)
    assert torch.equal(copied(x), as_it_is) == together
