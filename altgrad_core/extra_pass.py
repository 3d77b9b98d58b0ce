"""Extra passes: a run's model once more, forward and backward, without a trace in the training.

What a monitor measures beside the training (a float32 reference gradient, the Fisher information, the inputs
of the Linears) takes passes of its own:

    with extra_passes(run) as loss_of:
        found = gradients(loss_of, parameters, list(micro_batches(run, step.index)))

The model runs uncompiled and in evaluation mode: no dropout is drawn, no amax history advances. Q(w) is
computed once and held. Scales that follow the weights, counters of stochastic rounding, training flags,
quantizers and random states are given back at the end, after an error too; gradients come from
`torch.autograd.grad`, so that nothing reaches `.grad`.

A monitor observes a step when its update is done: the weights are those that the coming step will see. With
the coming step's micro-batches the gradient of an extra pass is therefore, dropout apart, the one that
training is about to compute, before clipping, bit for bit (compiled models: up to the compiler's rounding).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from altgrad_core.forward import autocast
from altgrad_core.forward import micro_batches as micro_batches
from altgrad_core.quantized_linear import Quantized
from altgrad_core.run_state import Run
from altgrad_core.surgery import held_weights, quantized_flows, quantized_layers
from altgrad_core.tasks import Batch

Loss = Callable[[Tensor, Tensor], Tensor]
"""From inputs and targets to the mean loss, 0-d."""

Seen = Callable[[str, Tensor, Tensor], None]
"""Called with a module's name, its first input and its output."""


@contextlib.contextmanager
def extra_passes(run: Run, *, float32: bool = False) -> Iterator[Loss]:
    """Let the model run inside, and give everything back as it was; what comes is the loss of a batch.

    Gradients are enabled; enter `torch.no_grad()` inside where none is wanted.

    float32: the reference: the same weights, quantized nowhere, and no autocast. Weights that are stored on
        a grid are used as they are, masters as masters.
    """
    devices = [run.device] if run.device.type == "cuda" else []
    calls = itertools.count()

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        if next(calls):
            _draw_anew(run.model)
        with contextlib.nullcontext() if float32 else autocast(run):
            loss: Tensor = run.model(inputs, targets)[1]
        return loss

    with (
        torch.random.fork_rng(devices),
        _kept(run.model),
        _evaluating(run.model),
        unquantized(run.model) if float32 else held_weights(run.model),
        torch.enable_grad(),
    ):
        yield loss_of


def gradients(loss_of: Loss, parameters: Sequence[Tensor], batches: Sequence[Batch]) -> list[Tensor]:
    """Return the gradients of the mean loss over the batches, summed up in the order that training has.

    A parameter that the loss does not reach gets zeros.
    """
    total: list[Tensor] = []
    for inputs, targets in batches:
        loss = loss_of(inputs, targets) / len(batches)
        found = torch.autograd.grad(loss, list(parameters), materialize_grads=True)
        if total:
            torch._foreach_add_(total, found)
        else:
            total = [one.detach() for one in found]
    return total


@contextlib.contextmanager
def watched(modules: Mapping[str, nn.Module], seen: Seen) -> Iterator[None]:
    """Have `seen` called in each forward pass of these modules inside the context, and never after it."""
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(_calling(seen, name)).remove)
        yield


def _calling(seen: Seen, name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen(name, inputs[0].detach(), output.detach())

    return hook


@contextlib.contextmanager
def unquantized(model: nn.Module) -> Iterator[None]:
    """Let the quantized Linears use weights, inputs and output gradients as they are, inside the context."""
    layers = [module for module in model.modules() if isinstance(module, Quantized)]
    kept = [(one.quantizer, one.input_quantizer, one.gradient_quantizer) for one in layers]
    try:
        for layer in layers:
            layer.quantizer = layer.input_quantizer = layer.gradient_quantizer = None
        yield
    finally:
        for layer, own in zip(layers, kept, strict=True):
            layer.quantizer, layer.input_quantizer, layer.gradient_quantizer = own


@contextlib.contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    """Give the scales and counters of the quantizers back, in place; their histories do not move here."""
    quantizers = {id(one): one for one in quantized_layers(model).values() if one.follows}.values()
    scales = [(one, one.scale.clone(), one.unfitted) for one in quantizers]
    counters = [(flow.counter, flow.counter.clone()) for flow in quantized_flows(model).values()]
    try:
        yield
    finally:
        for quantizer, scale, unfitted in scales:
            quantizer.scale.copy_(scale)
            quantizer.unfitted = unfitted
        for counter, before in counters:
            counter.copy_(before)


def _draw_anew(model: nn.Module) -> None:
    """Let stochastic rounding take the numbers of the next micro-batch: evaluation does not by itself."""
    for flow in quantized_flows(model).values():
        if flow.recipe.rounding == "stochastic":
            flow.counter.add_(1)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode, and each back into its own."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
