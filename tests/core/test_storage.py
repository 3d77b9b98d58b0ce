import copy
import math
import pickle

import pytest
import torch
from torch import nn

from altgrad_core.format import Format
from altgrad_core.grid_scales import GridScales
from altgrad_core.groups import param_groups
from altgrad_core.master_bound import MasterBound
from altgrad_core.quantizer import quantizer_of
from altgrad_core.rules import Rule
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import dequantize_model, quantize_model

CODEBOOK = Format(name="CODEBOOK", bits=4, values=[-3.0, -1.25, -0.5, 0.0, 0.25, 0.75, 1.5, 3.0])

OPTIMIZERS = {
    "SGD with momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "AdamW, foreach": lambda groups: torch.optim.AdamW(groups, lr=0.01, foreach=True),
    "RAdam": lambda groups: torch.optim.RAdam(groups, lr=0.01),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda groups: torch.optim.Muon(
        [group for group in groups if all(one.dim() == 2 for one in group["params"])], lr=0.02
    )

rounded_both_ways = pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def perceptron(format=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    return model if format is None else quantize_model(model, format, **options)


def weights_of(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def single(values, format, **options):
    """A model of one weight of these values, which SGD moves by exactly what `push` says."""
    model = nn.Sequential(nn.Linear(len(values), 1, bias=False))
    model[0].weight.data = torch.tensor([values])
    quantize_model(model, format)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return model[0].weight, optimizer, store_on_grid(optimizer, **options)


# --- on the grid ----------------------------------------------------------------------------------------


@rounded_both_ways
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_after_every_step_of_any_optimizer_the_weights_are_on_their_grids(
    table, make, rounding, train, is_on_grid
):
    for format in (table("E4M3"), table("E7M0"), CODEBOOK):
        model = perceptron(format)
        optimizer = make(param_groups(model))
        storage = store_on_grid(optimizer, rounding, generator())
        assert [tuple(one.shape) for one in storage.weights] == [(16, 6), (4, 16)]
        for step in range(5):
            assert all(map(is_on_grid, storage.weights))
            train(model, optimizer, 1, step)
        assert all(map(is_on_grid, storage.weights))


@rounded_both_ways
def test_on_the_grid_a_model_learns(table, rounding, train):
    model = perceptron(table("E4M3"))
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.02)
    store_on_grid(optimizer, rounding, generator())
    losses = train(model, optimizer, 60)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_the_forward_pass_uses_grid_weights_as_they_are(uniform, train):
    model = perceptron(uniform)
    optimizer = torch.optim.AdamW(param_groups(model))
    store_on_grid(optimizer)
    train(model, optimizer, 3)
    outputs = model(torch.ones(1, 6))
    assert torch.equal(outputs, dequantize_model(model)(torch.ones(1, 6)))


def test_the_first_snap_is_to_nearest_even_also_under_stochastic_rounding(uniform):
    values = 8 * [0.5, 0.25 + 0.4 / 128, 0.25 + 0.6 / 128, 0.5 / 128, 1.5 / 128]
    for rounding in ("nearest_even", "stochastic"):
        weight, _, _ = single(values, uniform, rounding=rounding, generator=generator())
        assert (weight * 128).tolist() == [8 * [64, 32, 33, 0, 2]]


def test_an_update_below_half_a_spacing_is_lost_under_nearest_even(uniform, push):
    weight, optimizer, _ = single([0.5, 0.25], uniform)
    push(weight, optimizer, 0.49 / 128, -0.51 / 128)
    assert (weight * 128).tolist() == [[64, 31]]


def test_stochastic_rounding_is_unbiased(uniform, push):
    count, moves = 400, []
    for seed in range(count):
        weight, optimizer, _ = single([0.5] * 16, uniform, rounding="stochastic", generator=generator(seed))
        push(weight, optimizer, 0.3 / 128)
        moves.append(weight.detach() * 128 - 64)
    moved = torch.cat(moves)
    assert set(moved.unique().tolist()) == {0.0, 1.0}
    error = (0.3 * 0.7 / moved.numel()) ** 0.5
    assert abs(moved.mean().item() - 0.3) < 4 * error
    assert (moved.mean(0) - 0.3).abs().max() < 5 * (0.3 * 0.7 / count) ** 0.5, "each element by itself"


def test_weights_steps_and_tensors_draw_different_numbers(uniform):
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    for layer in model:
        layer.weight.data.fill_(0.5)
    quantize_model(model, uniform)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    store_on_grid(optimizer, "stochastic", generator())
    seen = []
    for _ in range(2):
        for layer in model:
            layer.weight.data.fill_(0.5)
            layer.weight.grad = torch.full((64, 64), 0.5 / 128)
        optimizer.step()
        seen += [layer.weight.detach() < 0.5 for layer in model]
    for index, one in enumerate(seen):
        assert 0.45 < one.float().mean() < 0.55
        for other in seen[:index]:
            assert 0.45 < (one ^ other).float().mean() < 0.55


# --- scales ---------------------------------------------------------------------------------------------


def test_a_scale_shrinks_at_once_and_grows_by_one_binade_a_step(uniform, push):
    weight, optimizer, storage = single([0.5, 0.25], uniform)
    scale = quantizer_of(weight).scale
    assert scale.item() == 1
    push(weight, optimizer, 3.0, 0.0)
    assert (scale.item(), weight.tolist()) == (0.25, [[3.5, 0.25]])
    push(weight, optimizer, -3.4, -0.25)  # 0.1 would fit a scale of 8
    assert (scale.item(), weight.tolist()) == (0.5, [[0.09375, 0.0]])
    push(weight, optimizer, 0.0, 0.0)
    assert scale.item() == 1
    assert storage.scales.rescales.tolist() == [3]


def test_the_scale_tensor_is_the_quantizers_own_and_stays_the_same_object(uniform, push):
    weight, optimizer, storage = single([0.5], uniform)
    scale = quantizer_of(weight).scale
    push(weight, optimizer, 3.0)
    assert quantizer_of(weight).scale is scale is storage.scales.scales[0]


def test_an_initial_scale_stays_and_weights_saturate(uniform, push):
    weight, optimizer, storage = single([0.5], uniform, scale_mode="initial")
    push(weight, optimizer, 3.0)
    assert weight.item() == 127 / 128
    assert storage.scales.rescales.tolist() == [0]


def test_a_static_scale_follows_from_the_given_amax_and_stays(uniform, train, is_on_grid):
    model = perceptron(uniform, scale_mode="static", amax=3.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    storage = store_on_grid(optimizer)
    assert [one.scale.item() for one in map(quantizer_of, storage.weights)] == [0.25, 0.25]  # 127/128/3
    train(model, optimizer, 3)
    assert [one.scale.item() for one in map(quantizer_of, storage.weights)] == [0.25, 0.25]
    assert all(map(is_on_grid, storage.weights))


def test_under_stochastic_rounding_no_weight_saturates(uniform, push):
    weight, optimizer, _ = single([0.5], uniform, rounding="stochastic", generator=generator())
    push(weight, optimizer, 0.5 - 0.9 / 128)  # 127.1/128
    assert quantizer_of(weight).scale.item() == 0.5
    weight, optimizer, _ = single([0.5], uniform)
    push(weight, optimizer, 0.5 - 0.9 / 128)
    assert (quantizer_of(weight).scale.item(), weight.item()) == (1, 127 / 128)


def test_each_weight_has_its_own_scale(uniform):
    model = perceptron(uniform)
    model[0].weight.data.mul_(2.0**-6)
    optimizer = torch.optim.SGD(param_groups(model), lr=0.0)
    store_on_grid(optimizer)
    scales = [quantizer_of(layer.weight).scale.item() for layer in (model[0], model[3])]
    assert scales[0] > 16 * scales[1]


def test_a_weight_of_zeros_takes_the_scale_of_its_first_values(uniform, push):
    weight, optimizer, _ = single([0.0, 0.0], uniform)
    assert quantizer_of(weight).scale.item() == 0.5
    push(weight, optimizer, 0.0, 0.0)
    assert quantizer_of(weight).scale.item() == 0.5
    push(weight, optimizer, 2.0**-20, 0.0)
    assert quantizer_of(weight).scale.item() == 2.0**19
    assert weight.tolist() == [[2.0**-20, 0]]
    push(weight, optimizer, -(2.0**-20), 2.0**-25)
    assert quantizer_of(weight).scale.item() == 2.0**20, "one binade a step from then on"


def test_formats_that_need_no_scale_keep_one(table, push, is_on_grid):
    weight, optimizer, storage = single([2.0**-20], table("BF16"))
    push(weight, optimizer, 1e9)
    assert quantizer_of(weight).scale.item() == 1
    assert storage.scales.rescales.tolist() == [0]
    assert is_on_grid(weight)


def test_a_margin_leaves_room(uniform):
    model = perceptron(uniform, margin=4.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    store_on_grid(optimizer)
    for layer in (model[0], model[3]):
        assert (layer.weight * quantizer_of(layer.weight).scale).abs().max() <= 0.25


def test_a_nan_is_seen_and_moves_no_scale(uniform, push):
    weight, optimizer, _ = single([0.5, 0.25], uniform)
    push(weight, optimizer, math.nan, 9.0)
    assert weight.isnan().tolist() == [[True, False]]
    assert quantizer_of(weight).scale.item() == 1


# --- bound ----------------------------------------------------------------------------------------------


def test_the_bound_is_the_largest_grid_value_not_above_it(uniform, push):
    weight, optimizer, _ = single([0.5, -0.5], uniform, bound=1.51, scale_mode="initial")
    push(weight, optimizer, 0.4, -0.4)
    assert (weight * 128).tolist() == [[96, -96]]  # 0.755*128 is 96.6


def test_the_order_is_scale_round_bound(uniform, push):
    weight, optimizer, _ = single([0.5, 0.5], uniform, bound=2.92)  # 1.46
    push(weight, optimizer, 2.0, 0.9)
    assert quantizer_of(weight).scale.item() == 0.25, "the scale serves 2.5, not the bound"
    assert (weight * 32).tolist() == [[46, 45]], "1.46*32 is 46.7, and would be rounded to 47"


def test_without_a_bound_weights_grow(uniform, push):
    weight, optimizer, _ = single([0.5], uniform)
    push(weight, optimizer, 100.0)
    assert weight.item() > 99


def test_the_bound_is_none_where_the_weight_starts_at_zero(uniform, push):
    weight, optimizer, _ = single([0.0], uniform, bound=2.0)
    push(weight, optimizer, 100.0)
    assert weight.item() == 100


def test_the_bound_refers_to_the_weights_before_their_first_snap(table, push):
    weight, optimizer, _ = single([0.75, -0.75], table("E7M0"), bound=2.0)  # snaps to 0.5 and 1: a tie
    push(weight, optimizer, 9.0, 0.0)
    assert weight.abs().max().item() == 1, "the largest power of two up to 1.5"


def test_the_bound_of_a_lopsided_grid_is_on_it_on_both_sides(push, is_on_grid):
    weight, optimizer, storage = single([1.0, -1.0], CODEBOOK, bound=1.0, scale_mode="initial")
    assert quantizer_of(weight).scale.item() == 2
    push(weight, optimizer, 5.0, -5.0)
    assert weight.tolist() == [[0.75, -0.625]]
    assert all(map(is_on_grid, storage.weights))


def test_masters_are_bound_by_the_multiple_itself(push):
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[0.3, -0.3]])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    MasterBound(optimizer, [model.weight], 1.5)
    push(model.weight, optimizer, 1.0, -0.1)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[0.45, -0.4]]))
    push(model.weight, optimizer, math.nan, 0.0)
    assert model.weight.isnan().tolist() == [[True, False]]


def test_a_master_that_starts_at_zero_has_no_bound(push):
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.zero_()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    MasterBound(optimizer, [model.weight], 1.5)
    push(model.weight, optimizer, 7.0, 0.0)
    assert model.weight.tolist() == [[7, 0]]


def test_the_bound_of_masters_is_saved(push):
    def bound_at(value):
        weight = nn.Parameter(torch.full((1, 2), value))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        return weight, optimizer, MasterBound(optimizer, [weight], 2.0)

    _, _, first = bound_at(0.5)
    weight, optimizer, second = bound_at(100.0)
    second.load_state_dict(first.state_dict())
    push(weight, optimizer, 0.0)
    assert weight.tolist() == [[1, 1]]


# --- a format fine enough makes no difference -----------------------------------------------------------


def _final_losses(train, format, rounding, lr):
    """The loss after training, for each of four seeds: of a float32 model where there is no format."""
    found = []
    for seed in range(4):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(6, 16, bias=False), nn.GELU(), nn.Linear(16, 4, bias=False))
        if format is not None:
            quantize_model(model, format)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
        if format is not None:
            store_on_grid(optimizer, rounding, generator(seed))
        found.append(sum(train(model, optimizer, 200, start=1000 * seed)[-20:]) / 20)
    return torch.tensor(found)


@pytest.mark.slow
def test_bf16_with_stochastic_rounding_trains_as_float32_does_within_the_spread_of_seeds(table, train):
    exact, stochastic, nearest = (
        _final_losses(train, format, rounding, lr=3e-4)
        for format, rounding in ((None, ""), (table("BF16"), "stochastic"), (table("BF16"), "nearest_even"))
    )
    spread = exact.std()
    assert (stochastic - exact).abs().max() < 0.2 * spread
    assert (nearest - exact).abs().max() > 0.2 * spread, "updates of 3e-4 are below half a spacing"


# --- what is left alone ---------------------------------------------------------------------------------


@rounded_both_ways
def test_other_parameters_are_untouched_to_the_bit(uniform, rounding):
    runs = []
    for stored in (False, True):
        model = perceptron(uniform)
        optimizer = torch.optim.AdamW(param_groups(model), lr=0.01)
        if stored:
            store_on_grid(optimizer, rounding, generator())
        for step in range(5):
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = torch.randn(parameter.shape, generator=generator(100 * step + index))
            optimizer.step()
        runs.append([one.detach() for one in model.parameters() if quantizer_of(one) is None])
    assert len(runs[0]) == 4
    assert same(*runs)


def test_weights_whose_rule_says_master_are_left_alone(uniform, train, is_on_grid):
    rules = [Rule("0", uniform), Rule("3", uniform, storage="master")]
    model = quantize_model(perceptron(), rules=rules)
    optimizer = torch.optim.SGD(param_groups(model), lr=0.01)
    storage = store_on_grid(optimizer)
    train(model, optimizer, 2)
    assert storage.weights == [model[0].weight]
    assert not is_on_grid(model[3].weight)
    assert not quantizer_of(model[3].weight).on_grid


def test_a_tied_head_is_left_alone(uniform):
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, nn.Linear(4, 4), head)
    quantize_model(model, rules=[Rule(".*", uniform)])
    storage = store_on_grid(torch.optim.SGD(param_groups(model), lr=0.1))
    assert storage.weights == [model[1].weight]


@rounded_both_ways
def test_no_global_random_state_is_touched(uniform, rounding):
    model = perceptron(uniform)
    optimizer = torch.optim.SGD(param_groups(model), lr=0.01)
    state = torch.get_rng_state()
    store_on_grid(optimizer, rounding, generator())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)


def test_one_number_is_drawn_from_the_generator_and_none_means_seed_zero(uniform):
    seeds = [
        store_on_grid(torch.optim.SGD(perceptron(uniform).parameters(), lr=0.1), "stochastic", given).seed
        for given in (generator(1), generator(1), generator(2), None)
    ]
    assert seeds[0] == seeds[1] != seeds[2]
    assert seeds[3] == 0


def test_with_fp32_training_is_that_of_the_unquantized_model(train):
    runs = []
    for format in (None, "FP32"):
        model = perceptron(format)
        optimizer = torch.optim.AdamW(param_groups(model), lr=0.01, fused=True)
        runs.append((train(model, optimizer, 10), weights_of(model)))
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


# --- two uniform formats are one ------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic", None])
def test_e0m7_and_e1m6_train_alike_to_the_bit(table, rounding, train):
    runs = []
    for name in ("E0M7", "E1M6"):
        model = perceptron(table(name))
        optimizer = torch.optim.AdamW(param_groups(model), lr=0.03)
        if rounding:
            storage = store_on_grid(optimizer, rounding, generator(), bound=8.0)
        runs.append((train(model, optimizer, 40), weights_of(model)))
        assert not rounding or storage.scales.rescales.sum() > 0, "the scales have moved"
    assert runs[0][0] == runs[1][0]
    assert same(runs[0][1], runs[1][1])


# --- resuming, copying, threads -------------------------------------------------------------------------


@rounded_both_ways
def test_a_fresh_run_resumes_to_the_bit(uniform, rounding, train, saved, is_on_grid):
    def fresh(seed):
        model = perceptron(uniform)
        model[0].weight.data.mul_(seed)
        optimizer = torch.optim.AdamW([{"params": group["params"]} for group in param_groups(model)], lr=0.03)
        return model, optimizer, store_on_grid(optimizer, rounding, generator(seed), bound=4.0)

    model, optimizer, storage = fresh(seed=5)
    train(model, optimizer, 10)
    states = saved(*(one.state_dict() for one in (model, optimizer, storage)))
    losses = train(model, optimizer, 10, start=10)
    other = fresh(seed=1)
    for part, state in zip(other, states, strict=True):
        part.load_state_dict(state)
    assert all(map(is_on_grid, other[2].weights)), "by the loaded scales, at once"
    assert train(*other[:2], 10, start=10) == losses
    assert same(weights_of(model), weights_of(other[0]))
    for layer in (0, 3):
        mine, its = (quantizer_of(one[layer].weight).scale for one in (model, other[0]))
        assert mine.item() == its.item()
    assert torch.equal(storage.scales.rescales, other[2].scales.rescales)


def test_a_state_of_other_weights_is_refused(uniform):
    storage = store_on_grid(torch.optim.SGD(perceptron(uniform).parameters(), lr=0.1))
    state = storage.state_dict()
    state["scales"] = {key: value[:1] for key, value in state["scales"].items()}
    with pytest.raises(ValueError, match="of 1 weights, these are 2"):
        storage.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_model_optimizer_and_storage_are_copied_together(uniform, copied, train, is_on_grid):
    model = perceptron(uniform)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    storage = store_on_grid(optimizer, "stochastic", generator())
    train(model, optimizer, 3)
    before = weights_of(model)
    twins = copied((model, optimizer, storage))
    losses = train(*twins[:2], 5, start=3)
    assert same(weights_of(model), before), "training the copy leaves the original alone"
    assert train(model, optimizer, 5, start=3) == losses
    assert same(weights_of(model), weights_of(twins[0]))
    assert all(map(is_on_grid, twins[2].weights))


copied_both_ways = pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))], ids=["deepcopy", "pickle"]
)


@copied_both_ways
def test_a_copy_of_the_model_alone_quantizes_in_its_forward_pass(uniform, copied, train, is_on_grid):
    model = perceptron(uniform)
    storage = store_on_grid(torch.optim.SGD(model.parameters(), lr=0.05))
    twin, x = copied(model), torch.randn(8, 6, generator=generator())
    assert torch.equal(twin(x), model(x))
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.0013), 1)
    weight = twin[0].weight
    assert not is_on_grid(weight), "a float32 master"
    quantizer = quantizer_of(weight)
    used = quantizer.quantized(weight).detach() * quantizer.scale
    assert torch.isin(used, uniform.values).all()
    assert quantizer_of(storage.weights[0]).on_grid, "the original is as it was"


@copied_both_ways
def test_the_parts_are_copied_in_any_order(uniform, copied, train, is_on_grid):
    model = perceptron(uniform)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    storage, optimizer, model = copied((store_on_grid(optimizer), optimizer, model))
    assert quantizer_of(model[0].weight).on_grid
    train(model, optimizer, 1)
    assert all(map(is_on_grid, storage.weights))


@copied_both_ways
def test_a_copy_of_the_model_alone_can_be_stored_on_the_grid_again(uniform, copied, train, is_on_grid):
    model = perceptron(uniform)
    store_on_grid(torch.optim.SGD(model.parameters(), lr=0.05))
    twin = copied(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05)
    storage = store_on_grid(optimizer)
    train(twin, optimizer, 1)
    assert all(map(is_on_grid, storage.weights))


@pytest.mark.parametrize("rounding", ["stochastic", "error_feedback", "eco"])
def test_snapped_a_loaded_model_is_as_one_that_was_stored_with_these_weights(
    uniform, rounding, train, is_on_grid
):
    def make(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        return model, optimizer, store_on_grid(optimizer, rounding, generator(), bound=2.0)

    loaded = {name: 3.7 * value for name, value in perceptron().state_dict().items()}
    first, other = perceptron(uniform), perceptron(uniform)
    first.load_state_dict(loaded)
    first, first_optimizer, _ = make(first)
    other, other_optimizer, storage = make(other)
    other.load_state_dict(loaded)
    assert not any(map(is_on_grid, storage.weights))
    storage.snap()
    assert all(map(is_on_grid, storage.weights))
    assert same(weights_of(first), weights_of(other))
    assert train(first, first_optimizer, 3) == train(other, other_optimizer, 3)


@rounded_both_ways
def test_one_thread_and_two_give_the_same_bits(table, rounding):
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            model = nn.Sequential(nn.Linear(300, 300))
            model[0].weight.data = torch.randn(300, 300, generator=generator(1))
            quantize_model(model, table("E4M3"))
            optimizer = torch.optim.SGD([model[0].weight], lr=0.1)
            store_on_grid(optimizer, rounding, generator())
            for step in range(3):
                model[0].weight.grad = torch.randn(300, 300, generator=generator(step))
                optimizer.step()
            runs.append(model[0].weight.detach())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*runs)


# --- what monitors are shown ----------------------------------------------------------------------------


def test_the_update_before_rounding_is_kept_where_it_is_watched(uniform, push):
    weight, optimizer, storage = single([0.5, 0.25], uniform)
    push(weight, optimizer, 0.1 / 128)
    assert storage.intended == {}
    storage.watched = {weight: weight.detach().clone()}
    push(weight, optimizer, 0.125 / 128)
    assert (storage.intended[weight] * 128).tolist() == [[0.125, 0.125]]
    assert (weight * 128).tolist() == [[64, 32]]
    storage.watched = {}
    push(weight, optimizer, 0.1 / 128)
    assert storage.intended == {}


# --- refusals -------------------------------------------------------------------------------------------


def test_an_optimizer_without_quantized_weights_is_refused():
    with pytest.raises(ValueError, match=r"no quantized weight.*quantize_model"):
        store_on_grid(torch.optim.SGD(perceptron().parameters(), lr=0.1))


def test_storing_twice_is_an_error(uniform):
    optimizer = torch.optim.SGD(perceptron(uniform).parameters(), lr=0.1)
    store_on_grid(optimizer)
    with pytest.raises(ValueError, match="on the grid already"):
        store_on_grid(optimizer)


@pytest.mark.parametrize("as_keyword", [True, False])
def test_a_step_with_a_closure_is_refused_before_anything_moves(uniform, as_keyword):
    weight, optimizer, _ = single([0.5], uniform)
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="without a closure"):
        optimizer.step(closure=lambda: 0.0) if as_keyword else optimizer.step(lambda: 0.0)
    assert weight.item() == 0.5


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"granularity": "channel"}, 'has one scale, not one per channel: .*granularity="tensor"'),
        ({"granularity": "block"}, "not one per block"),
        ({"scale_rule": "ocp"}, "not one by the rule 'ocp': .*scale_rule=\"fit\""),
        ({"scale_rule": "exact"}, "not one by the rule 'exact'"),
    ],
)
def test_a_scale_that_a_grid_cannot_have_is_refused_and_nothing_is_snapped(uniform, options, reason):
    model = perceptron(uniform, **options)
    before = weights_of(model)
    with pytest.raises(ValueError, match=reason):
        store_on_grid(torch.optim.SGD(model.parameters(), lr=1.0))
    assert same(weights_of(model), before)


def test_scales_per_channel_are_refused_for_optimizers_that_land_on_the_grid_too(uniform):
    model = perceptron(uniform, granularity="channel")
    weight = model[0].weight
    with pytest.raises(ValueError, match="one per channel or block"):
        GridScales([weight], [uniform], [quantizer_of(weight).scale], fitted=[True], adaptive=[True])


def test_an_optimizer_that_lands_on_the_grid_itself_is_refused(uniform):
    class OnTheGrid(torch.optim.SGD):
        stores_on_grid = True

    with pytest.raises(ValueError, match="OnTheGrid keeps its weights on the grid by itself"):
        store_on_grid(OnTheGrid(perceptron(uniform).parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        ({"rounding": "up"}, "one of nearest_even, stochastic, error_feedback, eco, not 'up'"),
        ({"scale_mode": "current"}, "one of adaptive, initial, not 'current'"),
        ({"bound": -1.0}, "0 or more, not -1.0"),
        ({"bound": math.inf}, "not inf"),
    ],
)
def test_an_unknown_option_is_refused_and_nothing_is_snapped(uniform, option, reason):
    model = perceptron(uniform)
    before = weights_of(model)
    with pytest.raises(ValueError, match=reason):
        store_on_grid(torch.optim.SGD(model.parameters(), lr=0.1), **option)
    assert same(before, weights_of(model))


def test_a_bound_of_zero_means_none_and_is_refused_for_masters():
    weight = nn.Parameter(torch.ones(1, 1))
    with pytest.raises(ValueError, match="more than 0"):
        MasterBound(torch.optim.SGD([weight], lr=0.1), [weight], 0.0)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic", "error_feedback"])
def test_weights_of_a_group_added_later_live_on_their_grids_too(table, rounding):
    first, second = (quantize_model(nn.Linear(8, 8, bias=False), table("E4M3")) for _ in range(2))
    optimizer = torch.optim.SGD(first.parameters(), lr=0.01)
    storage = store_on_grid(optimizer, rounding)
    optimizer.add_param_group({"params": list(second.parameters())})
    for _ in range(3):
        for weight in (first.weight, second.weight):
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert len(storage.weights) == 2
    for weight, scale in zip(storage.weights, storage.scales.scales, strict=True):
        scaled = weight.detach() * scale
        assert torch.equal(table("E4M3").quantize(scaled), scaled)


def test_a_bound_limits_nothing_once_the_last_weight_has_left_its_grid():
    scales = GridScales([], [], [], fitted=[], adaptive=[], bound=8.0)
    assert scales.limits() is None
    assert scales.on_host() == []
