"""Surgery: any model's Linears quantise their weights, without the model's source.

Each chosen `nn.Linear` changes its class to `QuantizedLinear` and gets a `WeightQuantizer`; its Parameter
stays the same object. So parameter names, weight tying, strict loading of ordinary checkpoints both ways,
optimizers made before the surgery, deepcopy and torch.compile keep working. The quantiser's state lives
outside of `state_dict`.

Chosen are modules whose class is exactly `nn.Linear`, or Hugging Face's `Conv1D` (a Linear with its weight
transposed). Subclasses are left alone: some, such as the output projection of `nn.MultiheadAttention`, are
used by others who read `weight` past their `forward`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

from altgrad_core.format import Format
from altgrad_core.lookup import format_or_none
from altgrad_core.quantizer import WeightQuantizer as WeightQuantizer
from altgrad_core.quantizer import quantizer_of as quantizer_of
from altgrad_core.rules import WIDEST_GRID_BITS, Rule, first_match


class _Quantized(nn.Module):
    """What quantised modules share: the quantiser follows copies and moves of the module."""

    quantizer: WeightQuantizer
    weight: Tensor

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.quantizer.attach(self.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.quantizer.to(self.weight.device)
        self.quantizer.attach(self.weight)
        return self

    def _load_from_state_dict(self, *arguments: Any, **keywords: Any) -> None:
        super()._load_from_state_dict(*arguments, **keywords)
        self.quantizer.attach(self.weight)  # with assign=True it is another Parameter now


class QuantizedLinear(_Quantized, nn.Linear):
    """An `nn.Linear` whose forward pass uses the quantised weight."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.quantizer.format.name}"

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.quantizer.quantized(self.weight), self.bias)


@functools.lru_cache(maxsize=4)
def _quantized_conv1d(conv1d: type) -> type:
    """Return the quantised subclass of Hugging Face's Conv1D: y = x @ weight + bias, weight (in, out)."""

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.quantizer.quantized(self.weight)
        return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], self.nf)

    def reduced(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _blank_quantized_conv1d, (conv1d,), self.__dict__

    return type("QuantizedConv1D", (_Quantized, conv1d), {"forward": forward, "__reduce_ex__": reduced})


def _blank_quantized_conv1d(conv1d: type) -> Any:
    """Return a QuantizedConv1D without its state, for pickle and deepcopy: its class is made at run time."""
    cls: Any = _quantized_conv1d(conv1d)
    return cls.__new__(cls)


def quantize_model(
    model: nn.Module,
    format: Any = None,
    *,
    rules: Sequence[Rule] | None = None,
    **options: Any,
) -> nn.Module:
    """Quantise the weights of a model's Linears in place, and return the model.

    Give exactly one of `format` (name, table or Format, for every Linear) and `rules` (first match wins; a
    Linear that none matches is left alone). A Linear whose Parameter an embedding shares is left alone
    unless a rule names it. "FP32" leaves alone.

    options: `rounding`, `overflow`, `granularity`, `margin`, `scale_mode` of WeightQuantizer.
    Raises ValueError: both or neither given, a rule that matches no layer or has no format, two formats for
    one Parameter, a model quantised already, a model without Linears, an unknown format or option.
    """
    if (format is None) == (rules is None):
        raise ValueError("give quantize_model either a format or rules=, not both and not neither")
    if any(isinstance(module, _Quantized) for module in model.modules()):
        raise ValueError("the model is quantised already; dequantize_model(model) first")
    linears = {name: module for name, module in model.named_modules() if _is_linear(module)}
    if not linears:
        raise ValueError("the model has no nn.Linear to quantise")
    shared = _shared_with_others(model, linears)
    if rules is not None:
        chosen = _chosen_by_rules(linears, rules, shared)
    else:
        chosen = _chosen(linears, format, shared)
    quantize_layers(model, chosen, **options)
    return model


@attrs.frozen
class LayerFormat:
    """What one Linear becomes: `format`, and `storage` and `geometry` of its WeightQuantizer."""

    format: Format
    storage: str | None = None
    geometry: bool = True


def quantize_layers(model: nn.Module, chosen: Mapping[str, LayerFormat], **options: Any) -> None:
    """Quantise the Linears named by module path, in place; see `quantize_model` for the options."""
    _refuse_two_formats(model, chosen)
    for name, layer in chosen.items():
        module: Any = model.get_submodule(name)
        quantizer = quantizer_of(module.weight)
        if quantizer is None:
            quantizer = WeightQuantizer(
                layer.format, storage=layer.storage, geometry=layer.geometry, **options
            )
            quantizer.fit(module.weight)
            quantizer.attach(module.weight)
        module.__class__ = _quantized_conv1d(module.__class__) if _is_conv1d(module) else QuantizedLinear
        module.quantizer = quantizer


def _refuse_two_formats(model: nn.Module, chosen: Mapping[str, LayerFormat]) -> None:
    """Raise ValueError where Linears that share one Parameter are to become different things."""
    first: dict[int, str] = {}
    for name, layer in chosen.items():
        other = first.setdefault(id(model.get_submodule(name).weight), name)
        if chosen[other] != layer:
            raise ValueError(
                f"{other!r} and {name!r} share one weight, which cannot be {chosen[other].format.name} and "
                f"{layer.format.name}, or stored in two places; give both the same rule"
            )


def dequantize_model(model: nn.Module) -> nn.Module:
    """Undo `quantize_model` in place: the original classes; the weights as they are. Returns the model."""
    for module in model.modules():
        if isinstance(module, _Quantized):
            module.quantizer.detach(module.weight)
            del module.quantizer
            module.__class__ = type(module).__mro__[2]
    return model


def quantized_layers(model: nn.Module) -> dict[str, WeightQuantizer]:
    """Return the quantisers of a model by module path; Linears that share a Parameter share one."""
    return {
        name: module.quantizer for name, module in model.named_modules() if isinstance(module, _Quantized)
    }


@contextlib.contextmanager
def held_weights(model: nn.Module) -> Iterator[None]:
    """Compute each Q(w) once and use it for every forward pass inside the context.

    For the micro-batches of one step: the weights must not change inside. Outside, every forward pass
    quantises afresh, because no counter tells reliably when a weight has changed.
    """
    pairs = [
        (module.quantizer, module.weight)
        for module in model.modules()
        if isinstance(module, _Quantized) and not module.quantizer.on_grid
    ]
    mine = []  # an outer context's stay held when this one ends
    try:
        for quantizer, weight in pairs:
            if quantizer.held is None:
                quantizer.held = quantizer.quantize(weight)
                mine.append(quantizer)
        yield
    finally:
        for quantizer in mine:
            quantizer.held = None


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def _shared_with_others(model: nn.Module, linears: dict[str, nn.Module]) -> set[int]:
    """Return the ids of Parameters that a module other than a Linear holds."""
    own = {id(module) for module in linears.values()}
    return {
        id(parameter)
        for module in model.modules()
        if id(module) not in own
        for parameter in module.parameters(recurse=False)
    }


def _chosen(linears: dict[str, nn.Module], format: Any, shared: set[int]) -> dict[str, LayerFormat]:
    found = format_or_none(format)
    if found is None:
        return {}
    return {name: LayerFormat(found) for name, module in linears.items() if id(module.weight) not in shared}


def _chosen_by_rules(
    linears: dict[str, nn.Module], rules: Sequence[Rule], shared: set[int]
) -> dict[str, LayerFormat]:
    for rule in rules:
        if not any(rule.matches(name) for name in linears):
            raise ValueError(f"the rule {rule.layers!r} matches no Linear; there are: {', '.join(linears)}")
        if rule.format is None:
            raise ValueError(f'the rule {rule.layers!r} has no format; "FP32" leaves its layers alone')
    chosen: dict[str, LayerFormat] = {}
    for name, module in linears.items():
        index = first_match(rules, name)
        found = None if index is None else format_or_none(rules[index].format)
        if index is not None and found is not None:
            chosen[name] = _ruled(name, found, rules[index], id(module.weight) in shared)
    return chosen


def _ruled(name: str, format: Format, rule: Rule, shared: bool) -> LayerFormat:
    """Return format, storage and geometry of a layer under its rule."""
    if shared and rule.storage == "grid":
        raise ValueError(
            f"{name!r} shares its weight with an embedding and cannot live on the grid: untie it, or leave "
            "the rule's storage out"
        )
    geometry = not shared and (format.bits <= WIDEST_GRID_BITS or rule.storage is not None)
    return LayerFormat(format, rule.storage if geometry else "master", geometry)
