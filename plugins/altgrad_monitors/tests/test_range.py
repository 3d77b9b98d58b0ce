"""Overflow and underflow in a small run, against counts made by hand; no other plugin is needed."""

import copy
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import altgrad_core as altgrad
from altgrad_core.format import Format
from altgrad_core.grid_scales import GridScales
from altgrad_core.hookspecs import Step, Weight
from altgrad_core.layer_recipes import LayerRecipes
from altgrad_core.quantizer import quantizer_of, ranges_of
from altgrad_core.range_counts import RangeCounts, RangeTable
from altgrad_core.surgery import held_weights, quantized_flows, quantized_layers, requantize
from altgrad_core.watched import Watched
from altgrad_monitors import RangeOptions
from altgrad_monitors import rung_counts as rung_counts_of
from altgrad_monitors.range import Range
from altgrad_monitors.rung_counts import RungCounts

HEAD, MLP = "lm_head", "transformer.h.0.mlp.c_fc"


@pytest.fixture
def range_in(run_of):
    """Return a function that starts the monitor in a small run; options are its own."""

    def start(run=None, saved=None, policies=(), **options):
        run = run or run_of("E4M3", "E4M3", "E5M2")
        monitor = Range(RangeOptions(**{"every": 1} | options))
        run.monitors = [Watched("range", "here", monitor)]
        run.policies = list(policies)
        if saved is not None:
            monitor.load_state_dict(saved)
        monitor.start(run)
        return run, monitor

    return start


@pytest.fixture
def after(step_of):
    """Return a function that takes a step of the model, without an update, and returns what is observed."""

    def take(run, monitor, batches=1, update=None):
        with held_weights(run.model):
            for index in range(batches):
                tokens = torch.arange(24).view(3, 8).roll(index) % 24
                run.model(tokens, tokens)[1].backward()
        if update is not None:
            update()
        run.step += 1
        seen = monitor.observe(step_of(run, run.step))
        return {name: float(value) for name, value in seen.items()}

    return take


def layer(run, name):
    return run.model.get_submodule(name)


def test_a_healthy_step_overflows_nowhere(range_in, after):
    seen = after(*range_in())
    assert seen["range/forward_overflow_count/total"] == 0
    assert seen["range/saturated_gradients/total"] == 0
    assert seen["range/forward_nonfinite_count/total"] == 0
    assert not any(name.startswith("range/optimizer") for name in seen)


def test_everything_that_is_reported_is_provided(range_in, after):
    run, monitor = range_in()
    assert {name.split("/")[1] for name in after(run, monitor)} <= set(monitor.provides)


def test_weights_beyond_a_static_scale_are_counted_with_their_layer(range_in, after, run_of):
    run, monitor = range_in(run_of("E4M3", scale_mode="static", amax=0.02, granularity="tensor"))
    weights = {name: layer(run, name).weight.detach() for name in quantized_layers(run.model)}
    scale = quantizer_of(layer(run, MLP).weight).scale
    past = {name: int((weight * scale).abs().gt(464).sum()) for name, weight in weights.items()}
    lost = int(((weights[MLP] * scale).abs() <= 2.0**-10).sum())
    seen = after(run, monitor)
    assert past[MLP] > 0
    assert seen[f"range/forward_overflow_count/{MLP}"] == past[MLP]
    assert seen[f"range/saturated_weights/{MLP}"] == pytest.approx(past[MLP] / weights[MLP].numel())
    assert seen[f"range/forward_underflow_count/{MLP}"] == lost
    assert seen["range/forward_overflow_count/total"] == sum(past.values())
    elements = sum(weight.numel() for weight in weights.values())
    assert seen["range/forward_overflow_fraction/total"] == pytest.approx(sum(past.values()) / elements)


def test_forward_pools_weights_and_activations_and_saturated_tells_them_apart(range_in, after, run_of):
    static = {"format": "E4M3", "scale_mode": "static", "amax": 1e-3}
    run = run_of("E4M3")
    altgrad.dequantize_model(run.model)
    format = Format(name="UNIT", bits=3, values=[-1.0, -0.5, 0.0, 0.5, 1.0])
    altgrad.quantize_model(run.model, format, activations=static | {"format": format})
    run, monitor = range_in(run)
    seen = after(run, monitor)
    assert seen[f"range/saturated_weights/{MLP}"] == 0
    assert seen[f"range/saturated_activations/{MLP}"] > 0.9
    inputs, weight = 3 * 8 * 16, 4 * 16 * 16
    count = seen[f"range/saturated_activations/{MLP}"] * inputs
    assert seen[f"range/forward_overflow_fraction/{MLP}"] == pytest.approx(count / (inputs + weight))


def test_micro_batches_add_up(range_in, after, run_of):
    one, both = (after(*range_in(run_of("E4M3", "E4M3", "UNIFORM")), batches=n) for n in (1, 2))
    assert one["range/backward_underflow_count/total"] > 0
    assert both["range/backward_underflow_count/total"] > one["range/backward_underflow_count/total"]
    ratio = [seen["range/backward_underflow_fraction/total"] for seen in (one, both)]
    assert ratio[1] == pytest.approx(ratio[0], rel=0.5)


def test_amax_and_octaves_are_those_of_the_tensors(range_in, after):
    run, monitor = range_in()
    weight = layer(run, MLP).weight.detach()
    rounded = quantizer_of(layer(run, MLP).weight).quantize(weight).abs()
    exponents = rounded[rounded > 0].log2().floor()
    seen = after(run, monitor)
    assert seen[f"range/amax_weights/{MLP}"] == float(weight.abs().max())
    assert seen[f"range/octaves_weights/{MLP}"] == float(exponents.max() - exponents.min() + 1)
    assert seen["range/amax_weights/total"] == max(
        float(layer(run, name).weight.detach().abs().max()) for name in quantized_layers(run.model)
    )


def test_the_average_of_amax_begins_with_the_first_and_follows_by_alpha(range_in, after):
    run, monitor = range_in(alpha=0.25)
    first = after(run, monitor)[f"range/amax_weights/{MLP}"]
    with torch.no_grad():
        layer(run, MLP).weight.mul_(3)
    seen = after(run, monitor)
    assert seen[f"range/amax_ema_weights/{MLP}"] == pytest.approx(first * 1.5)


def test_a_nan_is_counted_and_poisons_no_average(range_in, after):
    run, monitor = range_in()
    before = after(run, monitor)
    with torch.no_grad():
        layer(run, MLP).weight[0, 0] = torch.nan
    seen = after(run, monitor)
    assert seen[f"range/forward_nonfinite_count/{MLP}"] == 1
    assert seen[f"range/amax_weights/{MLP}"] <= before[f"range/amax_weights/{MLP}"]
    assert seen[f"range/backward_nonfinite_count/{MLP}"] > 0
    assert seen[f"range/amax_ema_gradients/{MLP}"] == before[f"range/amax_ema_gradients/{MLP}"]


def test_changes_of_scale_are_counted_from_one_observation_to_the_next(range_in, after):
    run, monitor = range_in()
    after(run, monitor)
    with torch.no_grad():
        layer(run, MLP).weight.mul_(4)
    seen = after(run, monitor)
    assert seen[f"range/rescale/{MLP}"] == 1
    assert seen["range/rescale/total"] == 1
    assert after(run, monitor)["range/rescale/total"] == 0


def test_layers_that_are_not_chosen_are_not_counted(range_in, after):
    run, monitor = range_in(layers=".*mlp.*")
    seen = after(run, monitor)
    layers = {name.split("/")[2] for name in seen} - {"total"}
    assert layers == {
        f"transformer.h.{block}.mlp.{which}" for block in (0, 1) for which in ("c_fc", "c_proj")
    }
    assert quantized_flows(run.model)[f"{HEAD}.activations"].ranges is None


def test_layers_are_pooled_by_type(range_in, after):
    seen = after(*range_in(per="type"))
    assert {name.split("/")[2] for name in seen} == {
        "attention", "attention_output", "mlp", "classifier", "total",
    }  # fmt: skip


def test_only_steps_that_are_due_are_counted(range_in, after):
    run, monitor = range_in(every=2)
    assert after(run, monitor) == {}
    assert int(monitor._table.totals.sum()) == 0
    assert after(run, monitor)["range/forward_overflow_fraction/total"] == 0


def test_a_policy_that_reads_a_metric_has_every_step_counted(range_in, after):
    plugin = types.SimpleNamespace(needs=("range/saturated_gradients/total",))
    run, monitor = range_in(every=100, policies=[Watched("reader", "here", plugin)])
    assert "range/saturated_gradients/total" in after(run, monitor)


def test_a_step_that_was_skipped_leaves_no_counts_to_the_next(range_in, after):
    run, monitor = range_in()
    after(run, monitor)
    elements = monitor._table.totals[:, 0].clone()
    with held_weights(run.model):
        run.model(torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long))[1].backward()
    run.step += 1
    after(run, monitor)
    assert torch.equal(monitor._table.totals[:, 0], elements)


def test_passes_of_others_between_the_step_and_the_look_at_it_change_nothing(range_in, step_of, after):
    run, monitor = range_in()
    after(run, monitor)
    expected = int(monitor._table.totals.sum())
    run.step -= 1
    monitor._table.index = 0
    with held_weights(run.model):
        tokens = torch.arange(24).view(3, 8)
        run.model(tokens, tokens)[1].backward()
    run.step += 1
    run.model.eval()
    with torch.enable_grad(), held_weights(run.model):
        run.model(tokens, tokens)[1].backward()
    assert monitor.observe(step_of(run, run.step))
    assert int(monitor._table.totals.sum()) == expected


def test_counts_of_another_step_are_not_reported(range_in, after, step_of):
    run, monitor = range_in()
    assert after(run, monitor)
    run.step += 1
    assert monitor.observe(step_of(run, run.step)) == {}


class Waits(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{function} makes the host wait")
        return function(*arguments, **keywords or {})


def test_neither_counting_nor_reporting_waits_for_a_device(range_in, after, stored, step_of):
    run, monitor = range_in(stored)
    after(run, monitor, update=run.optimizer.step)
    unrounded = [weight.detach() * 3 for weight in run.storage.weights]
    with Waits():
        assert monitor._table.begin()
        run.storage.ranges.add(unrounded, run.storage.weights, run.storage.scales)
        run.step += 1
        seen = monitor.observe(step_of(run, run.step))
    assert float(seen["range/optimizer_overflow_count/total"]) > 0


def test_averages_go_on_after_a_resume(range_in, after, run_of):
    run, monitor = range_in()
    after(run, monitor)
    again, resumed = range_in(run_of("E4M3", "E4M3", "E5M2"), saved=copy.deepcopy(monitor.state_dict()))
    for name, flow in quantized_flows(again.model).items():
        flow.load_state_dict(quantized_flows(run.model)[name].state_dict())
    for each in (run, again):
        with torch.no_grad():
            layer(each, MLP).weight.mul_(4)
    again.step = run.step
    assert after(again, resumed) == after(run, monitor)


def test_averages_of_other_layers_are_refused(range_in):
    _, monitor = range_in(layers=".*mlp.*")
    with pytest.raises(ValueError, match="of 16 other places than these 36"):
        range_in(saved=monitor.state_dict())


def test_at_the_end_the_quantizers_count_no_more(range_in, after):
    run, monitor = range_in()
    after(run, monitor)
    monitor.end(run, "finished")
    assert all(flow.ranges is None for flow in quantized_flows(run.model).values())
    assert all(ranges_of(weight) is None for weight in run.model.parameters())


def test_a_weight_that_gets_another_quantizer_is_counted_from_its_first_forward_pass_on(range_in, after):
    run, monitor = range_in()
    recipe = quantizer_of(layer(run, MLP).weight).recipe
    requantize([layer(run, MLP)], LayerRecipes())
    assert f"range/amax_weights/{MLP}" not in after(run, monitor)
    requantize([layer(run, MLP)], LayerRecipes(weights=recipe))
    assert f"range/amax_weights/{MLP}" in after(run, monitor)


def test_a_model_that_is_not_quantized_reports_nothing(range_in, after, run_of):
    assert after(*range_in(run_of())) == {}


@pytest.fixture
def stored(run_of):
    """A run whose weights are on the grid behind SGD, bounded to twice their rms."""
    run = run_of("E4M3")
    run.optimizer = torch.optim.SGD(altgrad.param_groups(run.model), lr=0.0)
    run.storage = altgrad.store_on_grid(run.optimizer, bound=2.0, scale_mode="initial")
    return run


def test_weights_on_the_grid_are_counted_when_they_land(range_in, after, stored):
    run, monitor = range_in(stored)
    weight = layer(run, MLP).weight
    limit = 2 * float(weight.detach().square().mean().sqrt())
    with torch.no_grad():
        weight[0, :5] = 10 * limit
    seen = after(run, monitor, update=run.optimizer.step)
    assert seen[f"range/optimizer_overflow_count/{MLP}"] == 5
    assert seen["range/optimizer_overflow_count/total"] == 5
    assert seen[f"range/saturated_weights/{MLP}"] == pytest.approx(5 / weight.numel())
    assert seen[f"range/amax_weights/{MLP}"] == pytest.approx(10 * limit)
    assert "range/forward_overflow_count/total" not in seen


def test_of_a_step_without_an_update_the_optimizer_is_not_reported(range_in, after, stored, step_of):
    run, monitor = range_in(stored)
    quantizer_of(layer(run, HEAD).weight).on_grid = False
    assert "range/optimizer_overflow_count/total" in after(run, monitor, update=run.optimizer.step)
    seen = after(run, monitor)
    assert "range/forward_overflow_count/total" in seen
    assert not any(name.startswith("range/optimizer") for name in seen)
    assert monitor.skipped(step_of(run, run.step)).keys() == seen.keys()


def test_gradients_that_overflowed_to_infinity_are_seen_in_a_step_that_was_skipped(range_in, step_of, run_of):
    pytest.importorskip("altgrad_formats", reason="the tables here have no infinities")
    static = {"format": "E5M2", "scale_mode": "static", "amax": 1e-9, "overflow": "ieee"}
    run = run_of("E4M3")
    altgrad.dequantize_model(run.model)
    altgrad.quantize_model(run.model, "E4M3", gradients=static)
    run, monitor = range_in(run)
    with held_weights(run.model):
        tokens = torch.arange(24).view(3, 8)
        run.model(tokens, tokens)[1].backward()
    assert not layer(run, HEAD).weight.grad.isfinite().all()
    run.step += 1
    assert float(monitor.skipped(step_of(run, 1))[f"range/saturated_gradients/{HEAD}"]) > 0.5


def test_a_weight_that_leaves_the_grid_is_counted_in_the_forward_pass(range_in, after, stored):
    run, monitor = range_in(stored)
    after(run, monitor, update=run.optimizer.step)
    quantizer_of(layer(run, MLP).weight).on_grid = False
    seen = after(run, monitor)
    assert f"range/forward_overflow_count/{MLP}" in seen
    assert f"range/optimizer_overflow_count/{MLP}" not in seen


EIGHTHS = Format(name="EIGHTHS", bits=4, values=[rung / 8 for rung in range(-7, 8)])


class Rungs(torch.optim.SGD):
    """An optimizer that lands by itself: it has scales, and intends rungs."""

    intended_in_rungs = True


def rung_counts(before, intended, after, bound=0.0, rescale=1.0):
    """Return overflow, underflow and non-finite of one weight's step, under a scale of 1 before it."""
    linear = torch.nn.Linear(len(before), 1, bias=False)
    linear.weight.data = torch.tensor([before])
    altgrad.quantize_model(torch.nn.ModuleList([linear]), EIGHTHS)
    quantizer = quantizer_of(linear.weight)
    quantizer.scale.fill_(1.0)
    optimizer = Rungs([linear.weight], lr=0.0)
    optimizer.scales = GridScales(
        [linear.weight.detach()], [EIGHTHS], [quantizer.scale], fitted=[False], adaptive=[False], bound=bound
    )
    run = types.SimpleNamespace(optimizer=optimizer, trained={"weight": linear.weight})
    table = RangeTable(1, torch.device("cpu"), lambda: 1, lambda index: True)
    counts = RungCounts(run, table, {linear.weight: RangeCounts(table, 0)})
    optimizer.step()
    quantizer.scale.mul_(rescale)
    weight = Weight(
        value=torch.tensor([after]), layer="0", format=EIGHTHS, scale=quantizer.scale, storage="grid"
    )
    step = Step(
        index=1, loss=torch.tensor(0.0), weights={"weight": weight}, gradients={},
        before={"weight": torch.tensor([before])}, intended={"weight": torch.tensor([intended])},
        intended_in_rungs=True, counts={"weight": (torch.tensor(0), torch.tensor(0))},
    )  # fmt: skip
    counts.add(step)
    assert table.totals[0, 0] == len(before)
    return table.totals[0, 1:].tolist()


def test_rungs_past_the_last_overflow_and_what_lands_on_zero_underflows():
    before = [0.875, 0.875, -0.75, 0.125, 0.125, 0.0, 0.0]
    intended = [0.0, 0.5, -1.5, -0.75, -1.0, 0.25, 0.0]
    after = [0.875, 0.875, -0.875, 0.0, 0.0, 0.0, 0.0]
    assert rung_counts(before, intended, after) == [2, 2, 0]


def test_rungs_past_the_bound_overflow():
    assert rung_counts([0.25, -0.25], [1.5, -0.5], [0.25, -0.25], bound=1.0) == [2, 0, 0]
    assert rung_counts([0.25, -0.25], [1.5, -0.5], [0.375, -0.25], bound=2.0) == [0, 0, 0]


def test_a_bound_is_in_the_rungs_of_before_where_the_scale_moves():
    assert rung_counts([0.25, -0.25], [1.5, 0.0], [0.375, -0.25], bound=2.0, rescale=0.5) == [0, 0, 0]
    assert rung_counts([0.25, -0.25], [2.5, 0.0], [0.375, -0.25], bound=2.0, rescale=0.5) == [1, 0, 0]


def test_the_loop_in_c_counts_rungs_as_torch_does():
    made = torch.Generator().manual_seed(3)
    before = EIGHTHS.from_rung(torch.randint(-7, 8, (40_000,), generator=made)) / 4
    intended = torch.randn(40_000, generator=made) * 3
    after = EIGHTHS.quantize(before * 4 + intended / 8) / 4
    before[5], intended[6], intended[7], after[8] = torch.nan, torch.inf, torch.nan, torch.nan
    given = before, intended, after, torch.tensor(4.0), torch.tensor([-6, 7], dtype=torch.int32), EIGHTHS
    expected = rung_counts_of._rungs_lost(*given)
    found = rung_counts_of._lost_in_c(*given)
    assert expected[0].min() > 0
    assert found is None or all(map(torch.equal, found, expected))


def test_steps_that_are_not_finite_are_neither():
    before, nan, inf = [0.5, 0.5, torch.nan], torch.nan, torch.inf
    assert rung_counts(before, [nan, inf, 1.0], [nan, 0.875, nan]) == [0, 0, 3]
