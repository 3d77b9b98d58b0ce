"""Extra passes: what they compute, and that they leave no trace in a training that quantizes everything."""

import contextlib
import copy
import types

import attrs
import numpy as np
import pytest
import torch
from torch import nn

import altgrad_core as altgrad
from altgrad_core import data
from altgrad_core.experiment import Experiment, TrainOptions
from altgrad_core.extra_pass import extra_passes, gradients, micro_batches, unquantized, watched
from altgrad_core.forward import autocast
from altgrad_core.model import GPT
from altgrad_core.model_options import ModelOptions
from altgrad_core.quantized_linear import Quantized
from altgrad_core.run_state import Run
from altgrad_core.surgery import held_weights, quantized_flows, quantized_layers
from altgrad_core.tasks import LanguageModelling

SMALL = ModelOptions(n_layer=2, n_head=2, n_embd=16, block_size=8, tie_weights=False)
TRAINING = TrainOptions(batch_size=3, gradient_accumulation=2)
TOKENS = np.random.default_rng(0).integers(0, 24, 500).astype(np.uint8)


@pytest.fixture
def run_of():
    """Return a function that makes a run around a model, with what extra passes use of it."""

    def make(model, train=TRAINING, options=SMALL, autocast=False):
        parts = {field.name: None for field in attrs.fields(Run) if field.default is attrs.NOTHING}
        experiment = Experiment(name="small", seed=3, model=options, train=train)
        tokens = types.SimpleNamespace(train=TOKENS, validation=TOKENS)
        return Run(**parts | {
            "experiment": experiment,
            "model": model,
            "compiled": model,
            "device": torch.device("cpu"),
            "tokens": tokens,
            "task": LanguageModelling(experiment, tokens),
            "autocast": autocast,
        })  # fmt: skip

    return make


def gpt(options=SMALL):
    return GPT(options, 24, torch.Generator().manual_seed(1))


@pytest.fixture
def quantized(table):
    """Return a function that makes a GPT whose weights, inputs and gradients are quantized."""

    def make(options=SMALL, **more):
        inputs = {"format": table("E4M3"), "amax_history": 3}
        outputs = {"format": table("E5M2"), "amax_history": 3, "rounding": "stochastic"}
        return altgrad.quantize_model(
            gpt(options), table("E4M3"), activations=inputs, gradients=outputs, **more
        )

    return make


def train_once(run, step, optimizer):
    """Take one step as the loop does, and return its gradients."""
    with held_weights(run.model):
        for tokens, targets in micro_batches(run, step):
            with autocast(run):
                loss = run.model(tokens, targets)[1]
            (loss / run.experiment.train.gradient_accumulation).backward()
    found = [parameter.grad.clone() for parameter in run.model.parameters()]
    optimizer.step()
    return found


def observed(run, step, **options):
    """Return the gradients of the coming step, by extra passes."""
    with extra_passes(run, **options) as loss_of:
        return gradients(loss_of, list(run.model.parameters()), list(micro_batches(run, step)))


def same(some, others):
    return len(some) == len(others) and all(map(torch.equal, some, others))


def tensors_of(thing):
    return {name: value.clone() for name, value in vars(thing).items() if isinstance(value, torch.Tensor)}


def everything(model):
    """Return all that an extra pass could change of a model and its quantizers."""
    quantizers = [*quantized_layers(model).values(), *quantized_flows(model).values()]
    layers = [layer for layer in model.modules() if isinstance(layer, Quantized)]
    return (
        [parameter.detach().clone() for parameter in model.parameters()],
        [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
        [tensors_of(quantizer) for quantizer in quantizers],
        [{key: value for key, value in vars(one).items() if isinstance(value, bool)} for one in quantizers],
        [(id(one.quantizer), id(one.input_quantizer), id(one.gradient_quantizer)) for one in layers],
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        torch.get_rng_state(),
    )  # fmt: skip


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("storage", ["master", "grid"])
def test_the_gradient_is_the_one_that_training_is_about_to_compute_bit_for_bit(
    run_of, quantized, storage, bf16
):
    run = run_of(quantized(), autocast=bf16)
    optimizer = torch.optim.SGD(altgrad.param_groups(run.model), lr=0.5)
    if storage == "grid":
        altgrad.store_on_grid(optimizer)
    for step in range(4):
        found = observed(run, step)
        optimizer.zero_grad()
        assert same(found, train_once(run, step, optimizer))


def test_under_float32_it_is_that_of_the_model_that_was_never_quantized(run_of, quantized):
    run, plain = run_of(quantized()), run_of(gpt())
    assert same(observed(run, 0, float32=True), observed(plain, 0))
    assert not same(observed(run, 0), observed(plain, 0))


def test_under_float32_a_weight_on_the_grid_is_used_as_it_is(run_of, quantized):
    run = run_of(quantized())
    altgrad.store_on_grid(torch.optim.SGD(altgrad.param_groups(run.model), lr=0.5))
    plain = copy.deepcopy(run.model)
    altgrad.dequantize_model(plain)
    assert same(observed(run, 0, float32=True), observed(run_of(plain), 0))


@pytest.mark.parametrize(("float32", "dtype"), [(False, torch.bfloat16), (True, torch.float32)])
def test_only_the_reference_runs_without_the_runs_autocast(run_of, float32, dtype):
    run, seen = run_of(gpt(), autocast=True), []
    with (
        extra_passes(run, float32=float32) as loss_of,
        watched({"fc": run.model.transformer.h[0].mlp.c_fc}, lambda name, x, y: seen.append((name, y.dtype))),
    ):
        loss_of(*next(micro_batches(run, 0)))
    assert seen == [("fc", dtype)]


def test_dropout_is_off(run_of):
    options = attrs.evolve(SMALL, dropout=0.5)
    with_dropout, without = run_of(gpt(options), options=options), run_of(gpt())
    assert same(observed(with_dropout, 0), observed(without, 0))


def test_a_parameter_that_the_loss_does_not_reach_has_zero_gradient(run_of):
    run, idle = run_of(gpt()), nn.Parameter(torch.ones(3))
    with extra_passes(run) as loss_of:
        (found,) = gradients(loss_of, [idle], list(micro_batches(run, 0)))
    assert found.tolist() == [0, 0, 0]


def test_micro_batches_are_those_of_training_and_then_go_on(run_of):
    found = list(micro_batches(run_of(gpt()), 5, 4))
    assert len(list(micro_batches(run_of(gpt()), 5))) == 2
    for index, batch in enumerate(found):
        own = data.training_batch(TOKENS, block_size=8, batch_size=3, seed=3, step=5, micro_batch=index)
        assert same(batch, own)


def test_each_micro_batch_rounds_its_gradients_by_numbers_of_its_own(run_of, quantized):
    run = run_of(quantized(), TrainOptions(batch_size=3))
    batch = next(micro_batches(run, 0))
    with extra_passes(run) as loss_of:
        one, other = (gradients(loss_of, list(run.model.parameters()), [batch]) for _ in range(2))
    assert not same(one, other)


@pytest.mark.parametrize("breaks", [False, True])
@pytest.mark.parametrize("float32", [False, True])
@pytest.mark.parametrize(
    "recipe", [{}, {"granularity": "block"}, {"scale_mode": "initial"}, {"granularity": "channel"}], ids=str
)
def test_nothing_is_left_behind_not_even_after_an_error(run_of, quantized, recipe, float32, breaks):
    run = run_of(quantized(attrs.evolve(SMALL, dropout=0.3), **recipe))
    run.model.transformer.h[1].eval()  # not every module trains
    optimizer = torch.optim.SGD(run.model.parameters(), lr=5.0)
    for step in range(2):
        train_once(run, step, optimizer)
    before = everything(run.model)
    linears = {name: one for name, one in run.model.named_modules() if isinstance(one, nn.Linear)}
    with (
        contextlib.suppress(ZeroDivisionError),
        extra_passes(run, float32=float32) as loss_of,
        watched(linears, lambda *_: None),
    ):
        gradients(loss_of, list(run.model.parameters()), list(micro_batches(run, 2)))
        torch.rand(3)
        if breaks:
            raise ZeroDivisionError
    assert equal(everything(run.model), before)


def test_a_scale_without_a_value_is_still_to_be_fitted_afterwards(run_of, quantized):
    run = run_of(quantized(scale_mode="initial"))
    for quantizer in quantized_layers(run.model).values():
        quantizer.unfitted = True  # as after a move from the meta device
    observed(run, 0)
    assert all(quantizer.unfitted for quantizer in quantized_layers(run.model).values())


def test_extra_passes_work_where_gradients_are_off_and_leave_them_off(run_of):
    run = run_of(gpt())
    with torch.no_grad():
        found = observed(run, 0)
        assert not torch.is_grad_enabled()
    assert any(one.any() for one in found)


def test_a_step_after_extra_passes_is_the_step_without_them(run_of, quantized):
    options = attrs.evolve(SMALL, dropout=0.3)
    arms = [run_of(quantized(options), options=options) for _ in range(2)]
    for looked_at, run in enumerate(arms):
        torch.manual_seed(5)
        optimizer = torch.optim.AdamW(run.model.parameters(), lr=0.01)
        for step in range(3):
            optimizer.zero_grad()
            train_once(run, step, optimizer)
            if looked_at:
                observed(run, step + 1)
                observed(run, step + 1, float32=True)
    assert same(*(list(run.model.parameters()) for run in arms))


def test_watching_ends_with_its_context_after_an_error_too():
    module, seen = nn.Linear(2, 2), []
    with contextlib.suppress(ZeroDivisionError), watched({"one": module}, lambda *call: seen.append(call[0])):
        module(torch.ones(2))
        raise ZeroDivisionError
    module(torch.ones(2))
    assert seen == ["one"]


def test_what_is_watched_hangs_on_no_graph():
    module, seen = nn.Linear(2, 2), []
    with watched({"one": module}, lambda *call: seen.append(call[1:])):
        module(torch.ones(2, requires_grad=True))
    assert not any(one.requires_grad for one in seen[0])


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again(run_of, quantized):
    run = run_of(quantized())
    compiled = torch.compile(run.model, backend="eager")
    tokens, targets = next(micro_batches(run, 0))

    def trained():
        with held_weights(run.model):
            compiled(tokens, targets)[1].backward()

    trained()
    trained()
    with torch._dynamo.config.patch(error_on_recompile=True):
        observed(run, 1)
        observed(run, 1, float32=True)
        trained()


def test_unquantized_gives_every_quantizer_back(quantized):
    model = quantized()
    before = everything(model)
    with contextlib.suppress(ZeroDivisionError), unquantized(model):
        assert not quantized_layers(model)
        assert not quantized_flows(model)
        raise ZeroDivisionError
    assert equal(everything(model), before)
