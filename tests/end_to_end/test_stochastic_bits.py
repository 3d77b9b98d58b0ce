"""Stochastic rounding in training depends on (seed, step, tensor, element) alone.

The gradients are given, so that nothing but the rounding can differ.
"""

import functools

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core import kernels, native, native_table
from altgrad_formats import native_exmy
from altgrad_optim import GridOptim

FORMATS = ["E4M3", "E7M0", "E3M4"]


def trained(make, format, steps=4, resume_after=None):
    """Return the weights after steps with given gradients, through a state dict after `resume_after`."""
    model, optimizer, storage = make(format)
    for step in range(steps):
        if step == resume_after:
            saved = model.state_dict(), optimizer.state_dict(), storage.state_dict() if storage else None
            model, optimizer, storage = make(format)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            if storage:
                storage.load_state_dict(saved[2])
        draws = torch.Generator().manual_seed(100 + step)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draws)
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def model_of(format):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(200, 150, bias=False), torch.nn.Linear(150, 120, bias=False))
    return altgrad.quantize_model(model, format)


def stored(format, seed=3):
    model = model_of(format)
    optimizer = torch.optim.SGD(altgrad.param_groups(model), lr=1e-3, momentum=0.9)
    generator = torch.Generator().manual_seed(seed)
    return model, optimizer, altgrad.store_on_grid(optimizer, "stochastic", generator, bound=4.0)


def rungs(format, seed=3):
    model = model_of(format)
    generator = torch.Generator().manual_seed(seed)
    groups = altgrad.param_groups(model)
    return model, GridOptim(groups, step_scale=0.5, normalize="adam", generator=generator), None


both = pytest.mark.parametrize("make", [stored, rungs])
formats = pytest.mark.parametrize("format", FORMATS)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@both
@formats
def test_one_and_two_threads_give_the_same_weights(make, format):
    threads, found = torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(trained(make, format))
    torch.set_num_threads(threads)
    assert same(*found)


@both
@formats
def test_loops_in_c_and_eager_torch_give_the_same_weights(make, format, monkeypatch):
    by_loops = trained(make, format)
    for module in (native_exmy, native_table):
        monkeypatch.setattr(module, "_loops", lambda: None)
    assert same(by_loops, trained(make, format))


@pytest.mark.slow
@both
@formats
def test_compiled_and_eager_kernels_give_the_same_weights(make, format):
    eager = trained(make, format)
    kernels.enable()
    try:
        compiled = trained(make, format)
    finally:
        kernels.disable()
    assert same(compiled, eager)


@both
@formats
@pytest.mark.parametrize("after", [1, 3])
def test_a_resume_draws_what_the_run_would_have_drawn(make, format, after):
    assert same(trained(make, format), trained(make, format, resume_after=after))


@both
def test_another_seed_gives_other_weights(make):
    assert not same(trained(make, "E4M3"), trained(functools.partial(make, seed=4), "E4M3"))


def test_these_tensors_are_large_enough_for_the_loops():
    assert all(weight.numel() >= native.FEWEST_ELEMENTS for weight in model_of("E4M3").parameters())
