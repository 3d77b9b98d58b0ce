import warnings

import pytest
import torch

from altgrad_core import kernels
from altgrad_core.random_bits import stream_key_tensor, uniform, uniform_like


@pytest.fixture
def compiled():
    kernels.enable()
    yield
    kernels.disable()


def test_kernels_are_eager_until_they_are_enabled():
    calls = []

    @kernels.kernel
    def double(x):
        calls.append(1)
        return 2 * x

    double(torch.ones(2)), double(torch.ones(2))
    assert len(calls) == 2


def test_a_short_run_is_not_worth_compiling():
    assert not kernels.enable(kernels.WORTH_COMPILING / 2)


def test_the_variable_keeps_kernels_eager(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "eager")
    assert not kernels.enable()


def test_keys_as_a_tensor_give_the_numbers_of_the_stream():
    key = (3, 5, 7)
    assert torch.equal(uniform_like(torch.empty(4, 5), stream_key_tensor(key)), uniform(key, (4, 5)))


def test_without_a_working_compiler_it_is_said_once_and_the_result_is_the_same(monkeypatch, compiled):
    from torch._inductor.exc import InvalidCxxCompiler

    def broken(*_, **__):
        raise InvalidCxxCompiler

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)

    @kernels.kernel
    def double(x):
        return 2 * x

    with pytest.warns(RuntimeWarning, match="kernels stay eager"):
        assert torch.equal(double(torch.ones(2)), torch.full((2,), 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        double(torch.ones(2))


def test_a_mistake_inside_of_a_kernel_is_not_taken_for_a_compiler_error(monkeypatch, compiled):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    @kernels.kernel
    def wrong(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        wrong(torch.ones(1))


@pytest.mark.slow
def test_what_is_compiled_for_tensors_without_memory_does_not_serve_others(compiled):
    @kernels.kernel
    def doubled(x):
        return 2 * x + 1

    doubled(torch.ones(40, device="meta"))
    doubled(torch.ones(50, device="meta"))
    assert torch.equal(doubled(torch.ones(60)), torch.full((60,), 3.0))
