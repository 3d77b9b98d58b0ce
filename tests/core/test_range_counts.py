"""What rounding does at the ends of a format: counted by hand, by brute force, and inside the quantizers."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from altgrad_core import native, range_counts
from altgrad_core.landing_counts import LandingCounts
from altgrad_core.quantizer import count_ranges, ranges_of
from altgrad_core.range_counts import RangeCounts, RangeTable, last_kept
from altgrad_core.recipe import Recipe
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import held_weights, quantize_model, quantized_flows

NAN, INF = math.nan, math.inf
CPU = torch.device("cpu")


def made(places=1, step=lambda: 1, due=lambda index: True):
    """Return a table and its rows."""
    table = RangeTable(places, CPU, step, due)
    return table, [RangeCounts(table, row) for row in range(places)]


def seen(recipe, x, scale=None, keys=None):
    """Return overflow, underflow and non-finite, and the extremes, of one rounding."""
    table, (row,) = made()
    scale = recipe.scale_of(x) if scale is None else scale
    row.begin(recipe.format, recipe.rounding)
    row.add(x, recipe.quantize(x, scale, keys), scale)
    assert table.totals[0, 0] == x.numel()
    return table.totals[0, 1:].tolist(), table.ends[0].tolist()


# format: [stays, overflows] at the end, smallest that is not lost, what is lost
ENDS = {
    "E4M3": (464.0, 464.1, 2.0**-9, 2.0**-10),  # 448 has an even code: the tie comes back
    "E5M2": (61439.0, 61440.0, 2.0**-16, 2.0**-17),  # 57344 has an odd one
    "E3M4": (125.9, 126.0, 2.0**-4, 2.0**-5),
    "E7M0": (1.24 * 2.0**64, 1.25 * 2.0**64, 2.0**-62, 2.0**-63),  # a table goes on by its last gap, 2^63
    "E0M7": (0.996, 0.99609375, 2.0**-7, 2.0**-8),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_rounds_past_an_end_overflows_and_what_rounds_to_zero_underflows(table, name):
    stays, overflows, smallest, lost = ENDS[name]
    recipe = Recipe(format=table(name), granularity="none")
    x = torch.tensor([stays, -stays, overflows, -overflows, -overflows, smallest, lost, -lost, 0.0, -0.0])
    counts, (amax, largest, least) = seen(recipe, x)
    assert counts == [3, 2, 0]
    assert (amax, largest, least) == (float(x[2]), recipe.format.largest, smallest)


def test_infinities_overflow_and_are_not_finite_and_nan_is_only_that(table):
    recipe = Recipe(format=table("E4M3"), granularity="none")
    counts, ends = seen(recipe, torch.tensor([INF, -INF, NAN, 1.0]))
    assert counts == [2, 0, 3]
    assert ends == [1.0, 448.0, 1.0]


def test_under_ieee_the_same_overflows(table):
    recipe = Recipe(format=table("E4M3"), granularity="none", overflow="ieee")
    counts, ends = seen(recipe, torch.tensor([500.0, -464.0, 2.0]))
    assert counts == [1, 0, 0]
    assert ends == [500.0, 448.0, 2.0]


def test_zeros_alone_have_no_smallest_value(table):
    counts, ends = seen(Recipe(format=table("E4M3")), torch.zeros(5))
    assert counts == [0, 0, 0]
    assert ends == [0.0, 0.0, INF]


def test_the_scale_is_part_of_it(table):
    recipe, x = Recipe(format=table("E4M3")), torch.tensor([1.0, 2.0, 3.0, 2.0**-9])
    assert seen(recipe, x, torch.tensor(256.0))[0] == [2, 0, 0]
    assert seen(recipe, x, torch.tensor(0.25))[0] == [0, 1, 0]


def test_each_channel_has_its_own_end(table):
    recipe = Recipe(format=table("E4M3"), granularity="channel")
    x = torch.tensor([[1.0, 2.0], [100.0, 1e-9]])
    assert seen(recipe, x, torch.tensor([[448.0], [1.0]]))[0] == [1, 1, 0]


def test_each_block_has_its_own_end(table):
    recipe = Recipe(format=table("E2M1"), granularity="block", block=16, scale_rule="ocp")
    x = torch.cat((torch.full((16,), 7.5), torch.full((8,), 0.99), torch.full((8,), 1e-3)))
    x[16] = 0.51  # scales of 1 and 8: 7.5 and 7.92 are past the last midpoint, 7
    assert seen(recipe, x.view(1, 32))[0] == [16 + 7, 8, 0]


def test_what_is_past_the_end_itself_overflows_under_stochastic_rounding(table):
    recipe = Recipe(format=table("E4M3"), granularity="none", rounding="stochastic")
    keys = torch.zeros(2, dtype=torch.int32)
    assert seen(recipe, torch.tensor([448.0, 449.0, -479.0]), keys=keys)[0] == [2, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero", "up", "down"])
def test_the_last_number_kept_is_where_clipped_gradients_begin(table, named, rounding, dtype):
    for name in named:
        format = table(name)
        recipe = Recipe(format=format, rounding=rounding, granularity="none", clip_gradient=True)
        ends = format.values[[0, -1]]
        kept = last_kept(format, ends, rounding, dtype)
        further = kept.nextafter(torch.tensor([-INF, INF], dtype=dtype))
        one = torch.ones(())
        assert recipe.passes(kept, one).all(), name
        assert not recipe.passes(further, one).any() or not further.isfinite().all(), name


def test_a_bound_inside_the_format_is_an_end_too(table):
    kept = last_kept(table("E4M3"), torch.tensor([[-1.0, 1.125]]), "nearest_even", torch.float32)
    assert kept.tolist() == [[-1.0625, float(torch.tensor(1.1875).nextafter(torch.tensor(0.0)))]]


def brute_force(values, x, scale):
    """Count by numpy: the nearest of the format's values and one more beyond each end, ties to even rungs."""
    values = np.array(values, dtype=np.float64)
    gap = values[-1] - values[-2]
    grid = np.concatenate(([-values[-1] - gap], values, [values[-1] + gap]))
    rungs = np.arange(len(grid)) - len(values) // 2 - 1
    v = np.float32(x) * np.float32(scale)
    distance = np.abs(v[:, None].astype(np.float64) - grid)
    nearest = distance == distance.min(axis=1, keepdims=True)
    pick = (nearest * (2 - rungs % 2)).argmax(axis=1)  # of two as near, the even one
    outside = (pick == 0) | (pick == len(grid) - 1) | (np.abs(v) > grid[-1])
    return [int(outside.sum()), int(((grid[pick] == 0) & (x != 0)).sum()), 0]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["E4M3", "E5M2", "E3M4", "E7M0", "E0M7", "E2M1"]),
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40),
    st.integers(-12, 12),
)
def test_counts_are_those_of_brute_force(table, name, numbers, shift):
    format, scale = table(name), 2.0**shift
    x = torch.tensor(numbers) * format.largest / 4
    found, _ = seen(Recipe(format=format), x, torch.tensor(scale))
    assert found == brute_force(format.values.tolist(), x.numpy(), scale)


def with_both_loops(recipe, x, scale):
    q = recipe.quantize(x, scale)
    (one, (row,)), (other, (same,)) = made(), made()
    row.begin(recipe.format, recipe.rounding)
    same.begin(recipe.format, recipe.rounding)
    row.add(x, q, scale)
    kept = last_kept(recipe.format, recipe.format.values[[0, -1]], recipe.rounding, torch.float32)
    same.add_found(x.numel(), *range_counts._seen(x.float(), q.float(), scale, kept))
    return one, other


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loop_in_c_counts_what_torch_counts(table, granularity, dtype):
    recipe = Recipe(format=table("E4M3"), granularity=granularity)
    x = torch.randn(37, 96, generator=torch.Generator().manual_seed(1)) ** 5
    x[3, 5], x[4, 6], x[5, :7], x[6, 7] = NAN, INF, 0.0, 1e-38
    x = x.to(dtype)
    scale = recipe.scale_of(x.nan_to_num(0, 0, 0)) * 4
    one, other = with_both_loops(recipe, x, scale)
    assert one.totals.tolist() == other.totals.tolist()
    assert one.totals[0, 1:].min() > 0
    assert one.ends.tolist() == other.ends.tolist()


def test_a_transposed_tensor_is_counted_alike(table):
    recipe = Recipe(format=table("E4M3"), granularity="channel")
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(1)).t()
    one, other = with_both_loops(recipe, x, recipe.scale_of(x) * 4)
    assert one.totals.tolist() == other.totals.tolist()
    assert one.totals[0, 1] > 0


@pytest.mark.skipif(native.library(range_counts._SOURCE) is None, reason="there is no C compiler")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_count(table, threads):
    recipe = Recipe(format=table("E4M3"))
    x = torch.randn(3, 50_001, generator=torch.Generator().manual_seed(1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        one, other = with_both_loops(recipe, x, recipe.scale_of(x) * 8)
    finally:
        torch.set_num_threads(before)
    assert one.totals.tolist() == other.totals.tolist()
    assert one.ends.tolist() == other.ends.tolist()


def count_in(rows, model):
    """Have a model of one Linear count its weight, inputs and gradients in these rows."""
    count_ranges(model[0].weight, rows[0])
    for flow, row in zip(quantized_flows(model).values(), rows[1:], strict=True):
        flow.ranges = row


class Clock:
    """The step that is being taken."""

    now = 1


@pytest.fixture
def counting(table):
    """Return a function from a model of one Linear, quantized, to the clock and the table of its counters."""

    def count(model, due=lambda index: True):
        clock = Clock()
        counted, rows = made(1 + len(quantized_flows(model)), lambda: clock.now, due)
        count_in(rows, model)
        return clock, counted

    return count


@pytest.fixture
def model(table):
    linear = nn.Linear(2, 1, bias=False)
    linear.weight.data = torch.tensor([[448.0, 2.0**-12]])
    flow = {"format": table("E4M3"), "amax_history": 1}
    return quantize_model(nn.Sequential(linear), table("E4M3"), activations=flow, gradients=flow)


def stepped(model, *inputs):
    with held_weights(model):
        for x in inputs:
            model(torch.tensor(x)).backward(torch.ones(len(x), 1))


WEIGHTS, INPUTS, GRADIENTS = range(3)


def test_a_weight_that_is_held_is_counted_once_and_flows_add_up_over_micro_batches(model, counting):
    _, found = counting(model)
    stepped(model, [[1.0, 1.0]], [[1.0, 1e-9], [0.0, NAN]])
    assert found.totals[WEIGHTS].tolist() == [2, 0, 1, 0]
    assert found.totals[INPUTS].tolist() == [6, 0, 1, 1]
    assert found.totals[GRADIENTS].tolist() == [3, 0, 0, 0]


def test_a_delayed_scale_lets_the_next_step_overflow(model, counting):
    clock, found = counting(model)
    stepped(model, [[1.0, 0.5]])
    clock.now = 2
    stepped(model, [[1.8, -3.0]])
    assert found.index == 2
    assert found.totals[INPUTS].tolist() == [2, 1, 0, 0]  # the scale is 256: up to 464/256 stays
    assert found.ends[INPUTS].tolist() == [3.0, 1.75, 1.75]


def test_each_step_begins_anew_and_a_step_that_is_not_due_counts_nothing(model, counting):
    clock, found = counting(model, due=lambda index: index % 2 == 0)
    stepped(model, [[1.0, 1.0]])
    assert not found.on
    assert found.totals.sum() == 0
    clock.now = 2
    stepped(model, [[1.0, 1.0]])
    clock.now = 4
    stepped(model, [[1.0, 1.0]])
    assert found.totals[INPUTS, 0] == 2


def test_evaluation_counts_nothing(model, counting):
    _, found = counting(model)
    stepped(model, [[1.0, 1.0]])
    before = found.totals.clone()
    model.eval()
    stepped(model, [[1.0, 1.0]])
    model.train()
    with torch.no_grad(), held_weights(model):
        model(torch.ones(1, 2))
    assert torch.equal(found.totals, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_replay_of_activation_checkpointing_is_not_counted_again(model, counting, reentrant):
    _, found = counting(model)
    x = torch.ones(1, 2, requires_grad=True)
    with held_weights(model):
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert found.totals[:, 0].tolist() == [2, 2, 1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_counts_nothing(model, counting, copied):
    counting(model)
    copy = copied(model)
    assert ranges_of(copy[0].weight) is None
    assert all(flow.ranges is None for flow in quantized_flows(copy).values())


def test_a_copy_of_an_optimizer_with_its_storage_counts_nothing(table):
    weight, optimizer, _ = landing(table, [1.0, 2.0])
    storage = next(iter(optimizer._optimizer_step_post_hooks.values())).__self__
    assert storage.ranges is not None
    assert copy.deepcopy((weight, optimizer, storage))[2].ranges is None


def test_counting_changes_nothing(table):
    def trained(counts):
        with torch.random.fork_rng():
            torch.manual_seed(5)
            net = nn.Sequential(nn.Linear(40, 40))
        stochastic = {"format": table("E5M2"), "rounding": "stochastic"}
        quantize_model(net, table("E4M3"), activations=table("E4M3"), gradients=stochastic)
        if counts:
            count_in(made(3)[1], net)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        for step in range(4):
            with held_weights(net):
                x = torch.randn(50, 40, generator=torch.Generator().manual_seed(step))
                net(x).square().mean().backward()
            optimizer.step()
        return [*net.parameters(), *(flow.history for flow in quantized_flows(net).values())]

    assert all(map(torch.equal, trained(True), trained(False)))


def test_under_vmap_nothing_is_counted(table, counting):
    flow = {"format": table("E4M3"), "scale_mode": "current"}
    net = quantize_model(nn.Sequential(nn.Linear(2, 1)), table("E4M3"), activations=flow)
    _, found = counting(net)
    with held_weights(net):
        torch.func.vmap(net)(torch.ones(3, 1, 2))
    assert found.on
    assert found.totals[INPUTS, 0] == 0


@pytest.mark.slow
def test_a_compiled_model_counts_what_an_eager_one_does(table, counting):
    def counted(compiled):
        linear = nn.Linear(64, 64, bias=False)
        linear.weight.data = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) ** 3
        flow = {"format": table("E4M3"), "amax_history": 1}
        net = quantize_model(nn.Sequential(linear), table("E4M3"), activations=flow, gradients=flow)
        clock, found = counting(net, due=lambda index: index != 2)
        called = torch.compile(net) if compiled else net
        totals = []
        for clock.now in (1, 2, 3):
            with held_weights(net):
                x = torch.randn(32, 64, generator=torch.Generator().manual_seed(clock.now)) * clock.now
                called(x).square().sum().backward()
            totals.append((found.totals.tolist(), found.on))
        return totals

    assert counted(True) == counted(False)


def landing(table, values, bound=0.0, scale_mode="initial", rounding="nearest_even"):
    """Return a weight on E4M3's grid, the optimizer that lets it be moved by hand, and its counters."""
    linear = nn.Linear(len(values), 1, bias=False)
    linear.weight.data = torch.tensor([values])
    net = quantize_model(nn.Sequential(linear), table("E4M3"))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    storage = store_on_grid(optimizer, rounding, torch.Generator(), bound=bound, scale_mode=scale_mode)
    found, (row,) = made()
    storage.ranges = LandingCounts({linear.weight: row}, storage.rounding)
    return linear.weight, optimizer, found


def moved(weight, optimizer, by):
    weight.grad = -torch.tensor([by])
    optimizer.step()


def test_what_leaves_the_format_and_what_becomes_zero_is_counted_when_weights_land(table):
    weight, optimizer, found = landing(table, [448.0, 1.0, 2.0**-9, 1.0])
    moved(weight, optimizer, [64.0, -512.0, -(2.0**-10), NAN])  # to 512, -511, 2^-10 and NaN
    assert found.totals.tolist() == [[4, 2, 1, 1]]
    assert found.ends.tolist() == [[512.0, 448.0, 448.0]]


def test_what_is_beyond_the_bound_is_cut_off_and_counted(table):
    weight, optimizer, found = landing(table, [1.0, -1.0, 1.0, -1.0], bound=1.5)
    moved(weight, optimizer, [0.5, -0.625, 0.6, -0.5])  # -1.625 and 1.6 are cut to 1.5
    assert weight.tolist() == [[1.5, -1.5, 1.5, -1.5]]
    assert found.totals.tolist() == [[4, 2, 0, 0]]


def test_what_rounds_to_the_bound_is_not_cut_off(table):
    weight, optimizer, found = landing(table, [1.0, -1.0, 1.0, -1.0], bound=1.5)
    moved(weight, optimizer, [0.5625, -0.55, 0.0, 0.0])  # 1.5625 lies half way to the next value, 1.625
    assert found.totals.tolist() == [[4, 0, 0, 0]]


def test_a_scale_that_follows_its_weight_lets_nothing_overflow(table):
    weight, optimizer, found = landing(table, [448.0, 1.0], scale_mode="adaptive")
    moved(weight, optimizer, [448.0, 0.0])
    assert found.totals.tolist() == [[2, 0, 0, 0]]


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic", "error_feedback"])
def test_counting_does_not_change_what_lands(table, rounding):
    def landed(counts):
        values = torch.randn(2000, generator=torch.Generator().manual_seed(2)).tolist()
        weight, optimizer, found = landing(table, values, bound=1.5, rounding=rounding)
        if not counts:
            found._due = lambda index: False
        for step in range(3):
            moves = torch.randn(2000, generator=torch.Generator().manual_seed(step))
            moved(weight, optimizer, (moves / 4).tolist())
        assert bool(found.totals[0, 1]) == counts
        return weight.detach().clone()

    assert torch.equal(landed(True), landed(False))
