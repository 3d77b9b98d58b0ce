"""Linears that quantize: what `surgery` turns a model's Linears into.

Three quantizers, each of which may be absent: of the weight, of the input activations, of the output's
gradient. The forward pass is Q_a(input) @ Q_w(weight)^T + bias; since the gradient of its output comes back
quantized, both products of the backward pass see it so.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from altgrad_core.flow_quantizer import FlowQuantizer
from altgrad_core.quantizer import WeightQuantizer


class Quantized(nn.Module):
    """What quantized modules share: quantizers, which follow copies and moves of the module."""

    quantizer: WeightQuantizer | None
    input_quantizer: FlowQuantizer | None
    gradient_quantizer: FlowQuantizer | None
    weight: Tensor

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._attach()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow()
        return self

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        before = self.weight
        super()._load_from_state_dict(*arguments, **keywords)
        if self.quantizer is not None:
            self.quantizer.detach(before)
        self._follow()  # with assign=True the weight is another Parameter now, it may be on another device

    def _follow(self) -> None:
        """Let the quantizers follow the weight, which may be another, elsewhere."""
        for one in (self.quantizer, self.input_quantizer, self.gradient_quantizer):
            if one is not None:
                one.to(self.weight.device)
        self._attach()

    def _attach(self) -> None:
        if self.quantizer is not None:
            self.quantizer.attach(self.weight)

    def _weight(self) -> Tensor:
        return self.weight if self.quantizer is None else self.quantizer.quantized(self.weight)

    def _input(self, x: Tensor) -> Tensor:
        if self.input_quantizer is None:
            return x
        return self.input_quantizer.quantized(x, self.training, torch.is_grad_enabled())

    def _output(self, y: Tensor) -> Tensor:
        if self.gradient_quantizer is None:
            return y
        return self.gradient_quantizer.through(y, self.training and torch.is_grad_enabled())


class QuantizedLinear(Quantized, nn.Linear):
    """An `nn.Linear` that uses the quantized weight and input, and quantizes its output's gradient."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {described(self)}"

    def forward(self, input: Tensor) -> Tensor:
        return self._output(functional.linear(self._input(input), self._weight(), self.bias))


def forward_only(module: nn.Module, inputs: Any) -> None:
    """Do nothing, as a hook before a quantized Linear's forward pass.

    Where there is a hook, `nn.TransformerEncoderLayer` calls its Linears; without one it evaluates by a fused
    kernel, which reads their weights as they are.
    """


def described(module: Quantized) -> str:
    """Return the formats of a module, for its repr."""
    given = {
        "format": module.quantizer and module.quantizer.format.name,
        "activations": module.input_quantizer and module.input_quantizer.recipe.format.name,
        "gradients": module.gradient_quantizer and module.gradient_quantizer.recipe.format.name,
    }
    return ", ".join(f"{key}={name}" for key, name in given.items() if name)


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is Hugging Face's Conv1D, a Linear with its weight transposed."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def quantized_class(module: nn.Module) -> type:
    """Return the quantized subclass of a Linear's class."""
    conv1d: Any = type(module)
    return quantized_conv1d(conv1d) if is_conv1d(module) else QuantizedLinear


@functools.lru_cache(maxsize=4)
def quantized_conv1d(conv1d: type) -> type:
    """Return the quantized subclass of Hugging Face's Conv1D: y = x @ weight + bias, weight (in, out)."""

    def forward(self: Any, x: Tensor) -> Tensor:
        rows = self._input(x).reshape(-1, x.shape[-1])
        y: Tensor = self._output(torch.addmm(self.bias, rows, self._weight()))
        return y.view(*x.shape[:-1], self.nf)

    def reduced(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _blank_quantized_conv1d, (conv1d,), self.__dict__

    return type("QuantizedConv1D", (Quantized, conv1d), {"forward": forward, "__reduce_ex__": reduced})


def _blank_quantized_conv1d(conv1d: type) -> Any:
    """Return a QuantizedConv1D without its state, for pickle and deepcopy: its class is made at run time."""
    cls: Any = quantized_conv1d(conv1d)
    return cls.__new__(cls)
