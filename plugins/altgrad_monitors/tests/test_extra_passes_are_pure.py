"""Monitors with passes of their own change nothing of a run in the middle of its training."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from altgrad_core.extra_pass import micro_batches
from altgrad_core.surgery import held_weights, quantized_flows, quantized_layers
from altgrad_monitors import AttentionEntropyOptions, FidelityOptions, FisherOptions, KurtosisOptions
from altgrad_monitors.attention_entropy import AttentionEntropy
from altgrad_monitors.fidelity import Fidelity
from altgrad_monitors.fisher import Fisher
from altgrad_monitors.kurtosis import Kurtosis

aten = torch.ops.aten

MONITORS = {
    "attention_entropy": lambda: AttentionEntropy(AttentionEntropyOptions()),
    "fidelity": lambda: Fidelity(FidelityOptions()),
    "fisher": lambda: Fisher(FisherOptions(batches=2)),
    "kurtosis": lambda: Kurtosis(KurtosisOptions()),
}


def train_once(run):
    """Move histories, gradients and weights; the scales are then those before the move."""
    with held_weights(run.model):
        run.model(*next(micro_batches(run, 0)))[1].backward()
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.sub_(20 * parameter.grad)


def snapshot(run):
    """Return tensors that stand for everything that could have changed."""
    quantizers = [*quantized_layers(run.model).values(), *quantized_flows(run.model).values()]
    return [
        *(parameter.detach().clone() for parameter in run.model.parameters()),
        *(parameter.grad.clone() for parameter in run.model.parameters()),
        *(one.clone() for each in quantizers for one in vars(each).values() if isinstance(one, torch.Tensor)),
        torch.tensor([module.training for module in run.model.modules()]),
        torch.tensor([len(module._forward_hooks) for module in run.model.modules()]),
        torch.tensor([parameter._version for parameter in run.model.parameters()]),
        torch.get_rng_state(),
    ]


@pytest.mark.parametrize("name", MONITORS)
@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_weights_gradients_scales_histories_modes_hooks_and_random_states_are_as_before(
    run_of, observed, name, granularity
):
    run = run_of("E4M3", "E4M3", "E5M2", model={"dropout": 0.5}, granularity=granularity)
    run.model.transformer.h[0].eval()
    train_once(run)
    before = snapshot(run)
    assert observed(MONITORS[name](), run)
    assert all(map(torch.equal, before, snapshot(run)))


class NoNumbers(TorchDispatchMode):
    """Refuses to tell a tensor's number: on a GPU that would wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (aten._local_scalar_dense.default, aten.nonzero.default)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("name", MONITORS)
def test_no_number_leaves_the_device_while_it_observes(run_of, step_of, name):
    run, monitor = run_of("E4M3", "E4M3", "E5M2"), MONITORS[name]()
    monitor.start(run)
    with torch.no_grad(), NoNumbers():
        assert monitor.observe(step_of(run))
