"""How far weights have moved, in ULPs: by hand, and by a recursion over the sorted table of values."""

import copy
import io

import pytest
import torch
from torch import nn

from altgrad_core.groups import param_groups
from altgrad_core.quantizer import quantizer_of
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import dequantize_model, quantize_model
from altgrad_core.testing.optimizers import check_optimizer
from altgrad_optim import ManifoldAdamW, native_steps, position

BY_HAND = {"betas": (0.0, 0.0), "eps": 0.0, "normalize": "none", "track_position": True}
"""Each step moves each weight by lr spacings, against the sign of its gradient."""


def optimizer_of(weight, format, scale=1.0, **options):
    return ManifoldAdamW([{"params": [weight], "format": format, "scale": scale}], **options)


def stepped(optimizer, weight, *gradients):
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
    return optimizer.position_of(weight)


def hand(format, value, *gradients, scale=1.0, **options):
    """Return moved ULPs, rung and value of one weight after steps of lr = 1 ULP."""
    weight = nn.Parameter(torch.tensor([value]))
    found = stepped(
        optimizer_of(weight, format, scale, **{"lr": 1.0} | BY_HAND | options), weight, *gradients
    )
    return found.moved.item(), found.rung.item(), weight.item()


@pytest.fixture(params=["native", "eager"])
def path(request, monkeypatch):
    if request.param == "eager":
        monkeypatch.setattr(native_steps, "available", lambda: False)


@pytest.mark.usefixtures("path")
class TestByHand:
    def test_below_a_power_of_two_an_ulp_is_that_above_it(self, table):
        e4m3 = table("E4M3")
        assert hand(e4m3, 1.0, +1.0) == (-1.0, 54, 0.875), "1.0 is rung 56; its ULP is 0.125, two rungs down"
        assert hand(e4m3, 1.0, -1.0) == (+1.0, 57, 1.125)

    def test_going_down_and_up_again_is_no_movement_even_where_the_place_is_another(self, table):
        assert hand(table("E4M3"), 1.0, +1.0, -1.0) == (0.0, 55, 0.9375)

    def test_movements_add_up_with_their_signs(self, table):
        assert hand(table("E4M3"), 1.5, -1.0, -1.0, -1.0, +1.0)[0] == 2.0

    def test_a_weight_that_crosses_zero_goes_on_counting(self, table):
        assert hand(table("E4M3"), 2.0**-9, +1.0, +1.0, +1.0) == (-3.0, -2, -(2.0**-8))
        assert hand(table("E4M3"), 2.0**-9, +1.0, lr=2.0) == (-2.0, -1, -(2.0**-9))

    def test_under_a_scale_an_ulp_is_that_of_the_scaled_weight(self, table):
        assert hand(table("E4M3"), 2.0**-8, +1.0, scale=256.0) == (-1.0, 54, 0.875 * 2.0**-8)
        assert hand(table("E4M3"), 2.0**-8, +1.0, scale=1.0) == (-1.0, 1, 2.0**-9)

    def test_powers_of_two_move_by_their_own_size(self, table):
        assert hand(table("E7M0"), 4.0, -1.0) == (1.0, 66, 8.0)

    def test_part_of_an_ulp_counts_and_the_rung_is_the_nearest(self, table):
        assert hand(table("E4M3"), 1.0, -1.0, lr=0.25) == (0.25, 56, 1.03125)

    def test_decay_is_movement(self, table):
        moved, _, value = hand(table("E4M3"), 1.0, 0.0, eps=1.0, weight_decay=0.5, decay_lr=0.5)
        assert (moved, value) == (-2.0, 0.75)

    def test_nan_stays_nan_and_others_do_not_see_it(self, table):
        weight = nn.Parameter(torch.ones(2))
        optimizer = optimizer_of(weight, table("E4M3"), lr=1.0, **BY_HAND)
        weight.grad = torch.tensor([torch.nan, -1.0])
        optimizer.step()
        assert stepped(optimizer, weight, -1.0).moved.isnan().tolist() == [True, False]


# --- what is counted ------------------------------------------------------------------------------------


def spacing_by_table(format, x):
    """Return the gap [lo, hi) of the sorted table that holds |x| on x's side of zero."""
    values = format.values.double()
    side = values[values >= 0] if x >= 0 else -values[values <= 0].flip(0)
    place = int(torch.searchsorted(side, abs(x), right=True)) - 1
    return float(side[min(place, len(side) - 2) + 1] - side[min(place, len(side) - 2)])


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("scale", [1.0, 256.0])
def test_positions_are_the_recursion_over_the_table(formats, scale):
    for format in formats:
        draws = torch.Generator().manual_seed(0)
        weight = nn.Parameter(torch.randn((4, 9), generator=draws) * format.largest / scale / 8)
        optimizer, expected = optimizer_of(weight, format, scale, lr=0.3, **BY_HAND), torch.zeros(36)
        for _ in range(5):
            before = weight.detach().double().flatten()
            weight.grad = torch.randn(weight.shape, generator=draws)
            optimizer.step()
            moves = (weight.detach().double().flatten() - before).tolist()
            gaps = [spacing_by_table(format, x * scale) / scale for x in before.tolist()]
            expected += torch.tensor([move / gap for move, gap in zip(moves, gaps, strict=True)])
        found = optimizer.position_of(weight)
        torch.testing.assert_close(found.moved.flatten(), expected, rtol=0, atol=2e-5)
        assert torch.equal(found.rung, format.rung(weight.detach() * scale))


def test_on_a_uniform_format_the_position_is_the_distance_in_spacings(table):
    start = torch.linspace(-0.5, 0.5, 41)
    weight = nn.Parameter(start.clone())
    found = stepped(optimizer_of(weight, table("E0M7"), lr=0.3, **BY_HAND), weight, 1.0, 1.0, -1.0, 1.0)
    torch.testing.assert_close(found.moved, (weight.detach() - start) * 128, rtol=0, atol=2e-5)


def quantized(table, format="E4M3", width=6, **options):
    torch.manual_seed(0)
    return quantize_model(
        nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 2)), table(format), **options
    )


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn((16, 6), generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def positions(model, optimizer):
    return [optimizer.position_of(model[place].weight) for place in (0, 2)]


def moved(model, optimizer):
    return [one.moved for one in positions(model, optimizer)]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_what_nearest_rounding_takes_away_is_counted_all_the_same(table):
    model = quantized(table)
    weight = model[0].weight
    weight.data.fill_(1.0)
    optimizer = ManifoldAdamW(param_groups(model), lr=0.125, **BY_HAND)
    store_on_grid(optimizer, "nearest_even", scale_mode="initial")
    rung = weight_rung(model[0].weight, table)
    for _ in range(8):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    found = optimizer.position_of(weight)
    assert found.moved.unique().tolist() == [-1.0]
    assert torch.equal(found.rung, rung), "every step was lost, so that the weight is where it was"


def weight_rung(weight, table):
    return table("E4M3").rung(weight.detach() * 256)  # 1.0 at the scale that fits it: 448 >= 256


def test_a_residual_that_is_given_back_is_no_movement(table):
    found = []
    for residual in (None, "FP32"):
        model = quantized(table)
        optimizer = ManifoldAdamW(param_groups(model), lr=1e-2, track_position=True)
        if residual:
            store_on_grid(optimizer, "error_feedback", residual_format=residual, scale_mode="initial")
        train(model, optimizer, 5)
        found.append(moved(model, optimizer))
    assert same(*found), "in float32 the residuals make the run that of float32 masters"


def test_counting_changes_no_bit_of_the_training(table):
    ends = []
    for track in (False, True):
        model = quantized(table)
        optimizer = ManifoldAdamW(param_groups(model), lr=1e-2, track_position=track)
        store_on_grid(optimizer, "stochastic")
        train(model, optimizer, 5)
        ends.append([parameter.detach() for parameter in model.parameters()])
    assert same(*ends)


OPTIONS = {
    "update": {},
    "both": {"placement": "both", "weight_decay": 0.3},
    "plain": {"placement": (0.0, 0.0)},
    "no loop": {"stiffness": lambda weight, format, scale: 1 + weight.abs()},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_fused_loops_and_torchs_operations_count_alike_to_the_bit(formats, options, granularity, monkeypatch):
    found = []
    for available in (native_steps.available, lambda: False):
        monkeypatch.setattr(native_steps, "available", available)
        torch.manual_seed(0)
        model = nn.ModuleList(nn.Linear(53, 41) for _ in formats)
        for linear, format in zip(model, formats, strict=True):
            quantize_model(linear, format, granularity=granularity)
        optimizer = ManifoldAdamW(param_groups(model), lr=1e-2, track_position=True, **options)
        for step in range(5):
            for weight in model.parameters():
                weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
            model[0].weight.grad[0, 0] = torch.nan if step == 3 else 0.0
            optimizer.step()
        found += [torch.stack([optimizer.position_of(linear.weight).moved for linear in model])]
    fused, eager = found
    assert torch.equal(fused.nan_to_num(1e9), eager.nan_to_num(1e9))
    assert fused[0].isnan().any()
    assert (fused[1:] != 0).float().mean() > 0.9


def test_where_there_is_one_scale_the_loops_count_by_themselves(table, monkeypatch):
    model = nn.ModuleList([quantized(table), quantized(table, granularity="channel")])
    optimizer = ManifoldAdamW(param_groups(model), lr=1e-2, track_position=True)
    counted_in_torch = []
    monkeypatch.setattr(position, "ulps_moved", lambda before, *_: counted_in_torch.append(before) or before)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert sum(map(len, counted_in_torch)) == sum(model[1][place].weight.numel() for place in (0, 2))


def test_a_scale_for_each_channel_counts_in_each_channels_spacing(table):
    model = quantized(table)
    dequantize_model(model)
    model[0].weight.data.mul_(torch.tensor([[2.0**-channel] for channel in range(8)]))
    quantize_model(model, table("E0M7"), granularity="channel", scale_mode="initial")
    start = model[0].weight.detach().clone()
    scale = quantizer_of(model[0].weight).scale
    optimizer = ManifoldAdamW(param_groups(model), lr=1e-2, track_position=True)
    train(model, optimizer, 3)
    expected = (model[0].weight.detach() - start) * scale * 128
    assert scale.shape == (8, 1)
    assert len(scale.unique()) > 4
    torch.testing.assert_close(moved(model, optimizer)[0], expected, rtol=0, atol=1e-4)


def test_a_weight_that_is_not_contiguous_is_counted_in_its_shape(table):
    weight = nn.Parameter(torch.ones(3, 2).t())
    optimizer = optimizer_of(weight, table("E4M3"), lr=1.0, **BY_HAND)
    weight.grad = torch.tensor([[-1.0, 1.0, -1.0], [1.0, 1.0, 1.0]])
    optimizer.step()
    assert optimizer.position_of(weight).moved.tolist() == [[1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]]


def test_weights_in_bfloat16_are_counted_in_float32(formats):
    weight = nn.Parameter(torch.tensor([0.75], dtype=torch.bfloat16))
    codebook = formats[-1]  # ..., 0.75, 1.5, 3.0
    found = stepped(optimizer_of(weight, codebook, lr=1 / 6, **BY_HAND), weight, -1.0)
    assert weight.item() == 0.875
    assert found.moved.item() == torch.tensor(0.125 / 0.75).item()


# --- which weights are counted --------------------------------------------------------------------------


def test_nothing_is_kept_unless_it_is_asked_for(table):
    model = quantized(table)
    optimizer = ManifoldAdamW(param_groups(model), lr=1e-2)
    train(model, optimizer, 1)
    assert positions(model, optimizer) == [None, None]
    assert all("position" not in state for state in optimizer.state.values())


def test_weights_without_a_grid_have_no_position(table):
    model = quantized(table)
    optimizer = ManifoldAdamW(param_groups(model), lr=1e-2, track_position=True)
    assert positions(model, optimizer) == [None, None], "no step has been taken"
    train(model, optimizer, 1)
    assert optimizer.position_of(model[0].bias) is None
    assert len([state for state in optimizer.state.values() if "position" in state]) == 2


def test_a_borrowed_geometry_is_no_grid_to_count_on(table):
    weight = nn.Parameter(torch.ones(2, 2))
    borrowed = {"plugin": "grid", "of_format": table("E4M3")}
    optimizer = ManifoldAdamW([weight], stiffness=borrowed, track_position=True)
    assert stepped(optimizer, weight, 1.0) is None


def test_a_group_may_say_for_itself_and_may_come_later(table):
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = optimizer_of(first, table("E4M3"), lr=1.0, **BY_HAND | {"track_position": False})
    optimizer.add_param_group({"params": [second], "format": table("E4M3"), "track_position": True})
    first.grad = torch.ones(2)
    assert stepped(optimizer, second, -1.0).moved.tolist() == [1.0, 1.0]
    assert optimizer.position_of(first) is None


def test_a_weight_that_has_no_gradient_does_not_move(table):
    weight = nn.Parameter(torch.ones(2))
    optimizer = optimizer_of(weight, table("E4M3"), lr=1.0, **BY_HAND)
    found = stepped(optimizer, weight, -1.0)
    weight.grad = None
    optimizer.step()
    assert torch.equal(optimizer.position_of(weight).moved, found.moved)


def test_a_weight_that_is_quantized_no_more_has_no_position(table):
    model = quantized(table)
    optimizer = ManifoldAdamW(param_groups(model), lr=1e-2, track_position=True)
    train(model, optimizer, 1)
    dequantize_model(model)
    for group in optimizer.param_groups:
        group["format"] = None
    assert positions(model, optimizer) == [None, None]


# --- what is saved --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_position_resumes_to_the_bit_in_every_dtype_of_weights(table, dtype):
    def made():
        weight = nn.Parameter(torch.linspace(0.3, 0.9, 64).to(dtype))
        return weight, optimizer_of(weight, table("E5M2"), lr=0.3, **BY_HAND)

    whole, whole_optimizer = made()
    expected = stepped(whole_optimizer, whole, 1.0, -1.0, 1.0, 1.0)
    part, optimizer = made()
    stepped(optimizer, part, 1.0, -1.0)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed, again = made()
    resumed.data.copy_(part.data)
    again.load_state_dict(torch.load(file, weights_only=True))
    found = stepped(again, resumed, 1.0, 1.0)
    assert found.moved.dtype == torch.float32
    assert torch.equal(found.moved, expected.moved)


def test_loading_leaves_the_saved_state_its_own(table):
    weight = nn.Parameter(torch.ones(2))
    optimizer = optimizer_of(weight, table("E4M3"), lr=1.0, **BY_HAND)
    stepped(optimizer, weight, -1.0)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    stepped(optimizer, weight, -1.0)
    assert saved["state"][0]["position"].tolist() == [1.0, 1.0]


def test_a_deep_copy_counts_on_by_itself(table):
    model = quantized(table)
    optimizer = ManifoldAdamW(param_groups(model), lr=1e-2, track_position=True)
    train(model, optimizer, 2)
    twin, its_optimizer = copy.deepcopy((model, optimizer))
    before = [one.clone() for one in moved(model, optimizer)]
    train(twin, its_optimizer, 2, start=2)
    assert same(moved(model, optimizer), before)
    train(model, optimizer, 2, start=2)
    assert same(moved(model, optimizer), moved(twin, its_optimizer))


def test_with_positions_it_keeps_the_contract():
    check_optimizer(lambda groups: ManifoldAdamW(groups, lr=0.05, other_lr=0.05, track_position=True))


def test_what_is_no_yes_or_no_is_refused():
    with pytest.raises(ValueError, match="Invalid track_position value: 'yes'; use True or False"):
        ManifoldAdamW([nn.Parameter(torch.ones(2))], track_position="yes")
