"""Surgery: any model's Linears quantize their weights, inputs and gradients, without the model's source.

Each chosen `nn.Linear` changes its class to `QuantizedLinear` and gets a `WeightQuantizer`, and a
`FlowQuantizer` for its inputs and one for its output gradients where asked for; its Parameter stays the same
object. So parameter names, weight tying, strict loading of ordinary checkpoints both ways, optimizers made
before the surgery, deepcopy and torch.compile keep working. The quantizers' state lives outside of
`state_dict`.

Chosen are modules whose class is exactly `nn.Linear`, or Hugging Face's `Conv1D` (a Linear with its weight
transposed). Subclasses are left alone: some, such as the output projection of `nn.MultiheadAttention`, are
used by others who read `weight` past their `forward`. `nn.TransformerEncoderLayer` does so in evaluation, to
its `nn.Linear`s: a hook before each quantized one, and `use_nested_tensor = False` in an
`nn.TransformerEncoder`, keep it from that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from altgrad_core.flow_quantizer import FlowQuantizer
from altgrad_core.layer_recipes import (
    LayerRecipes,
    chosen_by_format,
    chosen_by_rules,
    is_linear,
    shared_with_others,
    weight_recipe,
)
from altgrad_core.quantized_linear import Quantized, forward_only, is_conv1d, quantized_class
from altgrad_core.quantizer import WeightQuantizer, quantizer_of, refit
from altgrad_core.random_bits import Key, draw_seed
from altgrad_core.recipe import Recipe, flow_recipe
from altgrad_core.rules import Rule


def quantize_model(
    model: nn.Module,
    format: Any = None,
    *,
    rules: Sequence[Rule] | None = None,
    activations: Any = None,
    gradients: Any = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> nn.Module:
    """Quantize a model's Linears in place, and return the model.

    Give exactly one of `format` (name, table or Format, for every Linear's weight) and `rules` (first match
    wins; a Linear that none matches is left alone). A Linear whose Parameter an embedding shares is left
    alone unless a rule names it. "FP32" leaves alone.

    activations, gradients: how the inputs and the output gradients of these Linears are quantized: a format
        (under a delayed scale), a table {"format": ..., "granularity": ...} of a Recipe's fields, a Recipe,
        or None. A rule may say otherwise for its layers.
    generator: one seed is drawn from it for stochastic rounding of gradients; None means seed 0.
    options: fields of the weights' Recipe, such as `rounding`, `granularity`, `scale_mode`.

    Raises ValueError: both or neither of `format` and `rules`, a rule that matches no layer or has no format,
    two formats for one Parameter, a Parameter that another model has quantized, a model quantized already, a
    model without Linears, an unknown format or option, options that contradict one another.
    """
    if (format is None) == (rules is None):
        raise ValueError("give quantize_model either a format or rules=, not both and not neither")
    if any(isinstance(module, Quantized) for module in model.modules()):
        raise ValueError("the model is quantized already; dequantize_model(model) first")
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    if not linears:
        raise ValueError("the model has no nn.Linear to quantize")
    shared = shared_with_others(model, linears)
    flows = LayerRecipes(activations=flow_recipe(activations), gradients=flow_recipe(gradients))
    if rules is not None:
        chosen = chosen_by_rules(linears, rules, shared, options, flows)
    else:
        chosen = chosen_by_format(
            linears, attrs.evolve(flows, weights=weight_recipe(format, options)), shared
        )
    quantize_layers(model, chosen, draw_seed(generator))
    return model


def quantize_layers(model: nn.Module, chosen: Mapping[str, LayerRecipes], seed: int = 0) -> None:
    """Quantize the Linears named by module path, in place; `seed` is that of stochastic rounding."""
    _refuse_two_formats(model, chosen)
    _refuse_anothers_weights(model, chosen)
    made = [
        (name, *_quantizers(model.get_submodule(name), layer, (seed, 0, 2 * index)))
        for index, (name, layer) in enumerate(chosen.items())
    ]  # before anything changes: they refuse what cannot be
    for name, weights, inputs, gradients in made:
        module: Any = model.get_submodule(name)
        quantizer = quantizer_of(module.weight) or weights  # one for all Linears that share the Parameter
        if quantizer is not None and quantizer is weights:
            quantizer.fit(module.weight)
            quantizer.attach(module.weight)
        module.__class__ = quantized_class(module)
        module.quantizer = quantizer
        module.input_quantizer, module.gradient_quantizer = inputs, gradients
        module.register_forward_pre_hook(forward_only)
    for encoder in _encoders(model):
        if encoder.use_nested_tensor and any(isinstance(one, Quantized) for one in encoder.modules()):
            encoder.use_nested_tensor, encoder.nested_before_surgery = False, True


def requantize(modules: Sequence[Any], layer: LayerRecipes) -> None:
    """Give the weight that these quantized Linears share another recipe, or none, under a scale fitted to it.

    A weight on a grid leaves it, until what keeps weights there takes it up again (`GridStorage.regridding`).
    Inputs and gradients stay quantized as they are.
    """
    first, *_ = modules
    quantizer: WeightQuantizer | None = first.quantizer
    if quantizer is not None and layer.weights is None:
        quantizer.detach(first.weight)
        quantizer = None
    elif quantizer is not None and layer.weights is not None:
        quantizer.switch(layer.weights, storage=layer.storage, covered=layer.covered, weight=first.weight)
    elif layer.weights is not None:
        quantizer = WeightQuantizer(
            layer.weights,
            storage=layer.storage,
            covered=layer.covered,
            transposed=not isinstance(first, nn.Linear),  # a Conv1D
        )
        quantizer.fit(first.weight)
        quantizer.attach(first.weight)
    for module in modules:
        module.quantizer = quantizer


def _encoders(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]


def _quantizers(
    module: Any, layer: LayerRecipes, stream: Key
) -> tuple[WeightQuantizer | None, FlowQuantizer | None, FlowQuantizer | None]:
    """Return what quantizes a Linear's weight, inputs and output gradients; `stream` names their draws."""
    weights = inputs = gradients = None
    if layer.weights is not None:
        weights = WeightQuantizer(
            layer.weights, storage=layer.storage, covered=layer.covered, transposed=is_conv1d(module)
        )
    device = module.weight.device
    if layer.activations is not None:
        _refuse_random_inputs(layer.activations)
        inputs = FlowQuantizer(layer.activations, device, stream)
    if layer.gradients is not None:
        _refuse_clipping(layer.gradients)
        gradients = FlowQuantizer(layer.gradients, device, (*stream[:2], stream[2] + 1))
    return weights, inputs, gradients


def _refuse_random_inputs(recipe: Recipe) -> None:
    if recipe.rounding == "stochastic":
        raise ValueError(
            "rounding='stochastic' is for gradients: a forward pass must be repeatable; use 'nearest_even'"
        )


def _refuse_clipping(recipe: Recipe) -> None:
    if recipe.clip_gradient:
        raise ValueError(
            "clip_gradient clips the gradient of what is quantized, and a gradient has none; leave it out"
        )


def _refuse_two_formats(model: nn.Module, chosen: Mapping[str, LayerRecipes]) -> None:
    """Raise ValueError where Linears that share one Parameter are to become different things."""
    first: dict[int, str] = {}
    for name, layer in chosen.items():
        other = first.setdefault(id(model.get_submodule(name).weight), name)
        if chosen[other].of_weight != layer.of_weight:
            both = " and ".join(
                one.weights.format.name if one.weights else "FP32" for one in (chosen[other], layer)
            )
            raise ValueError(
                f"{other!r} and {name!r} share one weight, which cannot be {both}, or stored in two places; "
                "give both the same rule"
            )


def _refuse_anothers_weights(model: nn.Module, chosen: Mapping[str, LayerRecipes]) -> None:
    """Raise ValueError where a Linear's Parameter is quantized already, as that of another model."""
    for name in chosen:
        module: Any = model.get_submodule(name)
        quantizer = quantizer_of(module.weight)
        if quantizer is not None:
            raise ValueError(
                f"the weight of {name!r} is shared with another model, quantized already to "
                f"{quantizer.format.name}; dequantize_model that one first, quantize both as one "
                "(nn.ModuleList([a, b])), or give this one a copy of the weight"
            )


def dequantize_model(model: nn.Module) -> nn.Module:
    """Undo `quantize_model` in place: the original classes; the weights as they are. Returns the model.

    Raises ValueError, and changes nothing, where somebody has changed the class of a quantized Linear.
    """
    layers = {name: one for name, one in model.named_modules() if isinstance(one, Quantized)}
    for name, layer in layers.items():
        _refuse_another_class(name, layer)
    for module in layers.values():
        if module.quantizer is not None:
            module.quantizer.detach(module.weight)
        del module.quantizer, module.input_quantizer, module.gradient_quantizer
        module.__class__ = type(module).__mro__[2]  # after the quantized class, and Quantized
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is forward_only]:
            del module._forward_pre_hooks[key]
    for encoder in _encoders(model):
        if vars(encoder).pop("nested_before_surgery", False):
            encoder.use_nested_tensor = True
    return model


def _refuse_another_class(name: str, layer: Quantized) -> None:
    if type(layer).__mro__[1] is not Quantized:
        raise ValueError(
            f"{name!r} is a {type(layer).__name__} now, not what quantize_model made it; undo that, then "
            "dequantize_model (a parametrization: torch.nn.utils.parametrize.remove_parametrizations)"
        )


def quantized_layers(model: nn.Module) -> dict[str, WeightQuantizer]:
    """Return the weights' quantizers by module path; Linears that share a Parameter share one."""
    return {
        name: module.quantizer
        for name, module in model.named_modules()
        if isinstance(module, Quantized) and module.quantizer is not None
    }


def quantized_flows(model: nn.Module) -> dict[str, FlowQuantizer]:
    """Return the quantizers of activations and gradients by module path and `.activations`, `.gradients`."""
    return {
        f"{name}.{kind}": flow
        for name, module in model.named_modules()
        if isinstance(module, Quantized)
        for kind, flow in (("activations", module.input_quantizer), ("gradients", module.gradient_quantizer))
        if flow is not None
    }


@contextlib.contextmanager
def held_weights(model: nn.Module) -> Iterator[None]:
    """Compute each Q(w) once and use it for every forward pass inside the context.

    For the micro-batches of one step: the weights must not change inside. Outside, every forward pass
    quantizes afresh, because no counter tells reliably when a weight has changed. The amax histories of
    activations and gradients stay as they are inside, and advance by one entry at the end.
    """
    with contextlib.ExitStack() as stack:  # an outer context's stay held when this one ends
        pairs = _to_hold(model)
        refit(pairs)
        counts = model.training and torch.is_grad_enabled()
        for quantizer, weight in pairs:
            quantizer.hold(weight, counts)
            stack.callback(setattr, quantizer, "held", None)
        flows = [flow for flow in quantized_flows(model).values() if flow.hold(counts)]
        stack.push(lambda error, *_: _release(flows, enter=error is None))
        yield


def _to_hold(model: nn.Module) -> list[tuple[WeightQuantizer, Tensor]]:
    """Return the quantizers whose Q(w) nobody holds yet, each once, with their weights."""
    found = {
        id(module.quantizer): (module.quantizer, module.weight)
        for module in model.modules()
        if isinstance(module, Quantized) and module.quantizer is not None
    }
    return [(one, weight) for one, weight in found.values() if not one.on_grid and one.held is None]


def _release(flows: Sequence[FlowQuantizer], enter: bool) -> None:
    for flow in flows:
        flow.release(enter)
