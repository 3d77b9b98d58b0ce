"""Activations and gradients: what a quantized Linear computes, and the histories of their scales."""

import contextlib
import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from altgrad_core.flow_quantizer import FlowQuantizer
from altgrad_core.quantizer import quantizer_of
from altgrad_core.random_bits import mix_, stream_key_tensor, stream_keys
from altgrad_core.recipe import Recipe
from altgrad_core.rules import Rule
from altgrad_core.surgery import (
    dequantize_model,
    held_weights,
    quantize_model,
    quantized_flows,
    quantized_layers,
)

INPUTS, OUTPUTS = "0.activations", "0.gradients"


@pytest.fixture
def e4m3(table):
    return table("E4M3")


@pytest.fixture
def e2m1(table):
    """0, 0.5, 1, 1.5, 2, 3, 4, 6."""
    return table("E2M1")


def linear(*rows, bias=False):
    """A model of one Linear of this weight."""
    layer = nn.Linear(len(rows[0]), len(rows), bias=bias)
    layer.weight.data = torch.tensor(rows)
    return nn.Sequential(layer)


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build()


def history(model, name=INPUTS):
    """The amaxes that have entered, the newest first."""
    return [amax for amax in quantized_flows(model)[name].history.tolist() if amax]


def step(model, *amaxes):
    """One forward and backward pass for each amax of the input, which is also that of the gradient."""
    for amax in amaxes:
        model(torch.full((2, 6), float(amax))).backward(torch.full((2, 3), float(amax)))


# --- what is computed -----------------------------------------------------------------------------------


def test_both_products_of_the_backward_pass_see_the_quantized_output_gradient(e2m1):
    unscaled = {"format": e2m1, "granularity": "none"}
    model = linear([1.2, -0.6], [2.6, 0.1])  # in E2M1: [1, -0.5], [3, 0]
    quantize_model(model, e2m1, granularity="none", activations=unscaled, gradients=unscaled)
    x = torch.tensor([[0.7, -5.2]], requires_grad=True)  # 0.5, -6
    y = model(x)
    assert y.tolist() == [[0.5 * 1 + 6 * 0.5, 0.5 * 3]]
    y.backward(torch.tensor([[0.8, -2.4]]))  # 1, -2 (0.8 is nearer to 1)
    assert x.grad.tolist() == [[1 * 1 - 2 * 3, 1 * -0.5]]
    assert model[0].weight.grad.tolist() == [[0.5, -6.0], [-1.0, 12.0]]


def test_a_linear_may_have_activations_and_gradients_without_a_quantized_weight(e2m1):
    unscaled = {"format": e2m1, "granularity": "none"}
    model = quantize_model(linear([1.2, -0.6]), "FP32", activations=unscaled, gradients=unscaled)
    assert quantized_layers(model) == {}
    assert quantizer_of(model[0].weight) is None
    y = model(torch.tensor([[0.7, 0.0]]))
    assert y.item() == torch.tensor(1.2).mul(0.5).item()
    y.backward(torch.tensor([[0.8]]))
    assert model[0].weight.grad.tolist() == [[0.5, 0.0]]


def test_a_bias_is_added_unquantized(e2m1):
    model = linear([1.0], bias=True)
    model[0].bias.data.fill_(0.123)
    quantize_model(model, "FP32", activations={"format": e2m1, "granularity": "none"})
    assert model(torch.tensor([[0.7]])).item() == torch.tensor(0.123).add(0.5).item()


def test_saturated_activations_get_no_gradient_where_it_is_clipped(e2m1):
    recipe = Recipe(format=e2m1, granularity="none", clip_gradient=True)
    model = quantize_model(linear([1.0, 1.0]), "FP32", activations=recipe)
    x = torch.tensor([[3.0, 7.0]], requires_grad=True)
    model(x).backward()
    assert x.grad.tolist() == [[1.0, 0.0]]


def test_saturated_weights_get_no_gradient_where_it_is_clipped(e2m1):
    model = quantize_model(linear([3.0, 7.0]), e2m1, granularity="none", clip_gradient=True)
    model(torch.ones(1, 2)).backward()
    assert model[0].weight.grad.tolist() == [[1.0, 0.0]]
    with held_weights(model):
        model.zero_grad()
        model(torch.ones(1, 2)).backward()
    assert model[0].weight.grad.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_an_activation_function_may_work_in_place(table, e4m3, x, granularity):
    flow = {"format": e4m3, "granularity": granularity}
    models = [seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))) for _ in range(2)]
    models[0][1].inplace = True
    for model in models:
        quantize_model(model, e4m3, activations=flow, gradients={**flow, "format": table("E5M2")})
        model(x).square().sum().backward()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_gradients_of_samples_add_up_to_that_of_the_batch(mlp, table, e4m3, x):
    flow = {"format": e4m3, "granularity": "channel"}
    quantize_model(mlp, e4m3, activations=flow, gradients={**flow, "format": table("E5M2")})
    parameters = dict(mlp.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(mlp, parameters, (x,)).square().sum()

    loss(parameters, x).backward()
    whole = torch.func.grad(loss)(parameters, x)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for name, parameter in parameters.items():
        assert torch.equal(whole[name], parameter.grad)
        torch.testing.assert_close(each[name].sum(dim=0), parameter.grad)


def test_with_every_format_fp32_the_outputs_and_gradients_are_the_untouched_models(mlp, x):
    plain = copy.deepcopy(mlp)
    quantize_model(mlp, "FP32", activations="FP32", gradients="none")
    for model in (mlp, plain):
        model(x).square().sum().backward()
    assert all(
        torch.equal(one.grad, two.grad) for one, two in zip(mlp.parameters(), plain.parameters(), strict=True)
    )
    assert [type(module) for module in mlp] == [nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_under_bfloat16_autocast_the_products_are_those_of_grid_values(mlp, x, e4m3, granularity):
    recipe = Recipe(format=e4m3, granularity=granularity)
    quantize_model(mlp, e4m3, granularity=granularity, activations=recipe, gradients=recipe)
    weight = recipe.quantize(mlp[0].weight, recipe.scale_of(mlp[0].weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mlp[0](x)
        expected = F.linear(recipe.quantize(x, recipe.scale_of(x)), weight, mlp[0].bias)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, expected)
        mlp(x).float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in mlp.parameters())


# --- histories ------------------------------------------------------------------------------------------


@pytest.fixture
def delayed(mlp, table):
    flow = {"format": table("E4M3"), "amax_history": 3}
    return quantize_model(mlp, table("E4M3"), activations=flow, gradients=flow)


def test_the_scale_follows_the_largest_amax_of_the_last_steps(table):
    flow = FlowQuantizer(
        Recipe(format=table("E0M7"), scale_mode="delayed", amax_history=2), torch.device("cpu")
    )
    seen = [flow.quantized(torch.tensor([amax, 0.1]), True)[0].item() for amax in (0.9, 3.0, 0.9, 0.9, 0.9)]
    end = 127 / 128
    assert seen[0] == pytest.approx(0.9, abs=1 / 256)  # an empty history: the tensor's own
    assert seen[1] == end, "the history knows 0.9 alone: 3.0 saturates"
    assert seen[2] == seen[3] == pytest.approx(0.9, abs=4 / 256)
    assert seen[4] == pytest.approx(0.9, abs=1 / 256), "3.0 has left the history"
    assert seen[4] == seen[0] != seen[2]


def test_histories_of_inputs_and_gradients_take_one_entry_a_pass(delayed):
    step(delayed, 1.0, 2.0, 3.0, 4.0)
    assert history(delayed) == [4.0, 3.0, 2.0]
    assert history(delayed, "2.gradients") == [4.0, 3.0, 2.0]


def test_while_weights_are_held_one_entry_of_all_micro_batches_is_made_at_the_end(delayed):
    step(delayed, 8.0)
    with held_weights(delayed):
        step(delayed, 1.0, 3.0, 2.0)
        assert history(delayed) == [8.0], "in use, and fixed"
    assert history(delayed) == [3.0, 8.0]
    assert history(delayed, "2.gradients") == [3.0, 8.0]
    with held_weights(delayed):
        step(delayed, 0.5)
    assert history(delayed) == [0.5, 3.0, 8.0], "the maximum starts anew"


def replayed(model, reentrant):
    def forward(x):
        return checkpoint(model, x.clone().requires_grad_(), use_reentrant=reentrant)

    return forward


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("held", [contextlib.nullcontext, held_weights])
def test_activation_checkpointing_changes_neither_gradients_nor_histories(delayed, x, reentrant, held):
    twin = copy.deepcopy(delayed)
    for model, forward in ((twin, twin), (delayed, replayed(delayed, reentrant))):
        for factor in (0.1, 1.0, 0.3):  # at 1.0 the scale of the forward pass is not that of what it has seen
            with held(model):
                forward(factor * x).square().sum().backward()
    assert history(delayed) == history(twin)
    assert len(history(twin)) == 3
    assert history(delayed, "2.gradients") == history(twin, "2.gradients")
    for one, other in zip(delayed.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_an_inner_context_leaves_the_entry_to_the_outer_one(delayed):
    with held_weights(delayed):
        with held_weights(delayed):
            step(delayed, 1.0)
        assert history(delayed) == []
        step(delayed, 2.0)
    assert history(delayed) == [2.0]


def test_a_step_that_raises_enters_no_history(delayed):
    def failing():
        with held_weights(delayed):
            step(delayed, 1.0)
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        failing()
    assert history(delayed) == []
    with held_weights(delayed):
        step(delayed, 0.5)
    assert history(delayed) == [0.5]


@pytest.mark.parametrize("bad", [0.0, torch.inf, torch.nan])
def test_an_amax_of_zero_or_not_finite_enters_no_history(delayed, bad):
    step(delayed, 1.0, bad)
    assert history(delayed) == [1.0]
    with held_weights(delayed):
        step(delayed, bad)
    assert history(delayed) == [1.0]
    with held_weights(delayed):
        step(delayed, bad, 0.5, bad)
    assert history(delayed) == [0.5, 1.0]


def test_evaluation_leaves_histories_and_random_numbers_alone(mlp, table, x):
    gradients = {"format": table("E5M2"), "rounding": "stochastic"}
    model = quantize_model(mlp, table("E4M3"), activations=table("E4M3"), gradients=gradients)
    step(model, 1.0)
    before = copy.deepcopy([flow.state_dict() for flow in quantized_flows(model).values()])
    with torch.no_grad():
        model(x)
    model.eval()
    model(x).sum().backward()
    with held_weights(model):
        model(x)
    after = [flow.state_dict() for flow in quantized_flows(model).values()]
    assert all(torch.equal(one[key], two[key]) for one, two in zip(before, after, strict=True) for key in one)


def test_in_evaluation_the_scale_is_that_of_training(delayed, x):
    step(delayed, 100.0)
    coarse = delayed.eval()(x)
    recipe = Recipe(format=quantizer_of(delayed[0].weight).format)
    assert not torch.equal(coarse, quantize_model(dequantize_model(delayed), recipe.format)(x))


def test_a_static_scale_has_no_history(mlp, e4m3, x):
    recipe = Recipe(format=e4m3, scale_mode="static", amax=2.0)
    quantize_model(mlp, "FP32", activations=recipe)
    found = mlp[0](x)
    scale = 2.0**7  # 448 / 2 = 1.75 * 2^7
    expected = F.linear(e4m3.quantize(x * scale) / scale, mlp[0].weight, mlp[0].bias)
    assert torch.equal(found, expected)
    assert history(mlp) == []


def test_a_format_that_needs_no_scale_keeps_no_history(mlp, table):
    quantize_model(mlp, "FP32", activations=table("BF16"))
    step(mlp, 3.0)
    assert history(mlp) == []


# --- stochastic gradients -------------------------------------------------------------------------------


def stochastic(table, seed=0):
    """A Linear that changes nothing, with gradients rounded stochastically to E2M1."""
    gradients = {"format": table("E2M1"), "granularity": "none", "rounding": "stochastic"}
    model = linear(*torch.eye(64).tolist())
    return quantize_model(model, "FP32", gradients=gradients, generator=torch.Generator().manual_seed(seed))


def rounded_gradient(model):
    """What becomes of a gradient of 0.1, which lies between the values 0 and 0.5."""
    x = torch.zeros(64, 64, requires_grad=True)
    model(x).backward(torch.full((64, 64), 0.1))
    return x.grad


def test_gradients_rounded_stochastically_keep_their_mean_and_differ_from_pass_to_pass(table):
    model = stochastic(table)
    first, second = rounded_gradient(model), rounded_gradient(model)
    assert set(first.unique().tolist()) == {0.0, 0.5}
    assert not torch.equal(first, second)
    both = torch.stack((first, second)).mean().item()
    assert both == pytest.approx(0.1, abs=4 * 0.2 / (2 * 64 * 64) ** 0.5)  # sd of one: 0.5*sqrt(0.2*0.8)


def test_the_draws_follow_from_the_generator_and_the_pass_alone(table):
    draws = []
    for seed in (0, 0, 1):
        model = stochastic(table, seed)
        draws.append(torch.stack([rounded_gradient(model) for _ in range(2)]))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_the_third_quantization_draws_under_words_four_and_five_of_its_stream(table):
    recipe = Recipe(format=table("E2M1"), granularity="none", rounding="stochastic")
    flow, x = FlowQuantizer(recipe, torch.device("cpu"), (7, 0, 3)), torch.full((100,), 4.5)
    found = [flow.quantized(x, True) for _ in range(3)]
    keys = mix_(torch.tensor([4, 5], dtype=torch.int32), *stream_keys((7, 0, 3)))
    assert torch.equal(found[2], recipe.quantize(x, torch.ones(()), keys))


def test_no_global_random_state_is_touched(table):
    model = stochastic(table)
    before = torch.get_rng_state()
    rounded_gradient(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_one_thread_and_two_give_the_same_bits(table):
    recipe = Recipe(format=table("E2M1"), rounding="stochastic")
    x, found = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)), []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append(FlowQuantizer(recipe, torch.device("cpu"), (7, 0, 3)).quantized(x, True))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_two_layers_draw_different_numbers(table):
    model = seeded(lambda: nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))
    quantize_model(model, "FP32", gradients={"format": table("E2M1"), "rounding": "stochastic"})
    keys = [flow.state_dict()["keys"] for flow in quantized_flows(model).values()]
    assert keys[0].tolist() == stream_key_tensor((0, 0, 1)).tolist()
    assert not torch.equal(*keys)


# --- surgery's promises ---------------------------------------------------------------------------------


def test_state_is_taken_up_to_the_bit(mlp, table, x):
    flows = {"activations": table("E4M3"), "gradients": {"format": table("E2M1"), "rounding": "stochastic"}}
    twin = copy.deepcopy(mlp)
    generator = torch.Generator().manual_seed(5)
    quantize_model(mlp, table("E4M3"), **flows, generator=generator)
    step(mlp, 1.0, 4.0)
    quantize_model(twin, table("E4M3"), **flows)
    for name, flow in quantized_flows(mlp).items():
        quantized_flows(twin)[name].load_state_dict(flow.state_dict())
    for model in (mlp, twin):
        model.zero_grad()
        model(x).square().sum().backward()
    assert torch.equal(mlp[0].weight.grad, twin[0].weight.grad)


def test_a_history_of_another_length_is_refused(table):
    def flow(length):
        recipe = Recipe(format=table("E4M3"), scale_mode="delayed", amax_history=length)
        return FlowQuantizer(recipe, torch.device("cpu"))

    with pytest.raises(ValueError, match="the saved history is 4 long, amax_history is 3"):
        flow(3).load_state_dict(flow(4).state_dict())


def test_flows_are_in_no_state_dict_and_checkpoints_load_strictly_both_ways(delayed):
    plain = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)))
    assert list(delayed.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(delayed.state_dict(), strict=True)
    delayed.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_histories_of_their_own(delayed, copied):
    step(delayed, 2.0)
    twin = copied(delayed)
    step(delayed, 3.0)
    assert (history(twin), history(delayed)) == ([2.0], [3.0, 2.0])
    step(twin, 5.0)
    assert (history(twin), history(delayed)) == ([5.0, 2.0], [3.0, 2.0])


def test_dequantizing_takes_the_flows_away(delayed):
    model = dequantize_model(delayed)
    assert quantized_flows(model) == {}
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert not hasattr(model[0], "input_quantizer")


def test_double_surgery_is_refused_for_flows_too(mlp, e4m3):
    quantize_model(mlp, "FP32", activations=e4m3)
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model(mlp, "FP32", activations=e4m3)


def test_state_follows_the_model_to_another_device(delayed):
    delayed.to("meta")
    flow = quantized_flows(delayed)[INPUTS]
    assert {one.device.type for one in flow.state_dict().values()} == {"meta"}


def test_a_layer_prints_its_formats(delayed):
    assert "format=E4M3, activations=E4M3, gradients=E4M3" in repr(delayed)


@pytest.mark.slow  # compiling takes 20 s
def test_a_compiled_model_keeps_the_same_histories_and_is_not_compiled_again_for_them(mlp, table, x):
    flows = {"activations": table("E4M3"), "gradients": {"format": table("E2M1"), "rounding": "stochastic"}}
    twin = quantize_model(copy.deepcopy(mlp), table("E4M3"), **flows)
    quantize_model(mlp, table("E4M3"), **flows)
    compiled, graphs = torch.compile(mlp), []
    for factor in (1, 5, 2, 3):
        for model, forward in ((mlp, compiled), (twin, twin)):
            with held_weights(model):
                forward(factor * x).square().sum().backward()
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0
    for one, two in zip(quantized_flows(mlp).values(), quantized_flows(twin).values(), strict=True):
        torch.testing.assert_close(one.history, two.history)
        assert one.counter == two.counter


# --- rules ----------------------------------------------------------------------------------------------


def flow_formats(model):
    return {name: flow.recipe.format.name for name, flow in quantized_flows(model).items()}


def test_a_rule_takes_the_calls_flows_unless_it_says_otherwise(mlp, table, e4m3):
    default = {"format": e4m3, "granularity": "channel"}
    rules = [Rule("0", e4m3, activations=table("E5M2"), gradients="none"), Rule("2", "FP32")]
    quantize_model(mlp, rules=rules, activations=default, gradients=table("E5M2"))
    assert flow_formats(mlp) == {"0.activations": "E5M2", "2.activations": "E4M3", "2.gradients": "E5M2"}
    assert quantized_flows(mlp)[INPUTS].recipe.granularity == "channel"
    assert list(quantized_layers(mlp)) == ["0"]


def test_a_rule_that_leaves_everything_alone_leaves_the_module_alone(mlp, e4m3):
    rules = [Rule("0", "FP32", activations="FP32"), Rule(".*", e4m3)]
    quantize_model(mlp, rules=rules, activations=e4m3)
    assert type(mlp[0]) is nn.Linear
    assert flow_formats(mlp) == {"2.activations": "E4M3"}


def test_a_tied_head_has_flows_only_where_a_rule_names_it(e4m3):
    def model():
        parts = nn.ModuleDict({"wte": nn.Embedding(5, 4), "inner": nn.Linear(4, 4), "head": nn.Linear(4, 5)})
        parts["wte"].weight = parts["head"].weight
        return parts

    unnamed, named = model(), model()
    quantize_model(unnamed, e4m3, activations=e4m3)
    assert list(flow_formats(unnamed)) == ["inner.activations"]
    quantize_model(named, rules=[Rule("head", "FP32")], activations=e4m3)
    assert list(flow_formats(named)) == ["head.activations"]


def test_linears_that_share_a_parameter_may_have_different_flows(e4m3):
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    quantize_model(model, rules=[Rule("0", e4m3), Rule("1", e4m3, activations=e4m3)])
    assert first.quantizer is second.quantizer
    assert list(flow_formats(model)) == ["1.activations"]


# --- refusals -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flows", "reason"),
    [
        ({"activations": {"rounding": "stochastic"}}, "is for gradients: a forward pass must be repeatable"),
        ({"activations": {"scale_mode": "initial"}}, "scale_mode='initial' is for weights"),
        ({"gradients": {"clip_gradient": True}}, "clip_gradient clips the gradient of what is quantized"),
        ({"gradients": {"granularity": "channel", "scale_mode": "delayed"}}, 'needs granularity = "tensor"'),
    ],
)
def test_what_flows_cannot_be_is_refused_and_nothing_changes(mlp, e4m3, flows, reason):
    ((kind, options),) = flows.items()
    with pytest.raises(ValueError, match=reason):
        quantize_model(mlp, e4m3, **{kind: {"format": e4m3, **options}})
    assert [type(module) for module in mlp] == [nn.Linear, nn.ReLU, nn.Linear]
    assert quantizer_of(mlp[0].weight) is None
