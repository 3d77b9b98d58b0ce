"""Actions that change how a run quantizes: an adjusted scale, another format.

They are carried out between backward pass and optimizer step, on the uncompiled model's own objects: a
compiled model notices by itself, and is compiled again where a format has changed.

`SwitchFormat` gives a layer what a rule with that format would have given it in the experiment file: formats
of up to 8 bits stay stored where the layer's weight was, wider ones and "none" are trained by plain AdamW on
a float32 master. Scales are fitted anew and unadjusted, weights stored on a grid are rounded to the new one
(nearest even), the bound stays the multiple of the initial rms that it was. Moments, the options of the
layer's parameter group, and the quantization of inputs and gradients stay as they are. A tied head that no
rule quantizes is no candidate; one that a rule does quantize changes in its forward pass alone.

`AdjustScale` multiplies what the scaling rule finds by a power of two. Factors multiply up, and end with the
format of a weight.

What a resume needs is the list of switches, which is carried out again on the newly assembled run before its
state is loaded, and the adjustments.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from torch import Tensor, nn

from altgrad_core import rules
from altgrad_core.format import Format
from altgrad_core.hookspecs import Action, AdjustScale, ClipGradients, ScaleLearningRate, SwitchFormat
from altgrad_core.layer_recipes import LayerRecipes, refuse_inexact
from altgrad_core.lookup import format_or_none
from altgrad_core.options import FormatChoice
from altgrad_core.quantize_options import FLOWS, QuantizeOptions, RuleOptions
from altgrad_core.quantized_linear import Quantized
from altgrad_core.quantizer import WeightQuantizer, quantizer_of
from altgrad_core.recipe import recipe_from
from altgrad_core.registry import Registry
from altgrad_core.structuring import structure
from altgrad_core.surgery import quantized_flows, quantized_layers, requantize

if TYPE_CHECKING:
    from altgrad_core.run_state import Run

HIGH_PRECISION = "FP32"
"""What stands for the format of a weight that is not quantized any more."""

_AS_BEFORE = object()
"""Stands for the format of weights that nobody has switched."""


def formats_of(model: nn.Module) -> dict[str, str]:
    """Return the format of each quantized weight by the module path of its Linear."""
    return {layer: quantizer.format.name for layer, quantizer in quantized_layers(model).items()}


def carry_out(run: Run, action: Action) -> dict[str, Any]:
    """Change how the run quantizes, where the action asks for that, and return what an event tells of it.

    Raises ValueError for what cannot be, with the way out, and has then changed nothing.
    """
    if isinstance(action, SwitchFormat):
        before = switch_format(run, action.layers, action.to)
        run.switches.append((action.layers, action.to))
        return {"layers": list(before), "formats_before": before}
    if isinstance(action, AdjustScale):
        adjustments = adjust_scales(run, action.layers, action.factor, action.of)
        return {"layers": list(adjustments), "adjustments": adjustments}
    if isinstance(action, ScaleLearningRate):
        _refuse_unless_positive("factor", action.factor)
    if isinstance(action, ClipGradients):
        _refuse_unless_positive("norm", action.norm)
    return {}


def _refuse_unless_positive(field: str, value: Any) -> None:
    """Raise ValueError for what would make nothing, NaN or the opposite of rates and gradients."""
    if not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ValueError(f"{field}={value!r} is no finite number above 0")


def switch_format(run: Run, pattern: str, to: str) -> dict[str, str]:
    """Quantize the weights of the layers that match in another format; returns their formats before.

    Layers in that format already are left alone.
    """
    choice, problems = structure(to, FormatChoice, run.registry)
    if problems:
        raise ValueError("; ".join(one.message for one in problems))
    format = format_or_none(choice, run.registry)
    alike, matched = _sharing(run.model), {*_matched(pattern, run.formats, "a quantized weight")}
    weights: dict[str, Any] = {layer: run.model.get_submodule(layer).weight for layer in run.formats}
    moving = [layer for layer in weights if alike[layer] & matched and _format(weights[layer]) != format]
    planned = {layer: _planned(run, layer, choice) for layer in moving if layer == min(alike[layer])}
    with _regridding(run, [weights[layer] for layer in planned]):
        for layer, recipes in planned.items():
            requantize([run.model.get_submodule(one) for one in sorted(alike[layer])], recipes)
        regroup(run.optimizer, [weights[layer] for layer in planned])
    before = {layer: run.formats[layer] for layer in moving}
    run.formats |= dict.fromkeys(moving, HIGH_PRECISION if format is None else format.name)
    return before


def _format(weight: Tensor) -> Format | None:
    quantizer = quantizer_of(weight)
    return None if quantizer is None else quantizer.format


def _sharing(model: nn.Module) -> dict[str, set[str]]:
    """Return for each quantized Linear those that share its weight, itself among them."""
    holders: dict[int, set[str]] = {}
    layers = {name: one for name, one in model.named_modules() if isinstance(one, Quantized)}
    for name, layer in layers.items():
        holders.setdefault(id(layer.weight), set()).add(name)
    return {name: holders[id(layer.weight)] for name, layer in layers.items()}


def _planned(run: Run, layer: str, choice: FormatChoice) -> LayerRecipes:
    """Return what the layer's own rule, or [quantize], would make of its weight in that format."""
    quantize = run.experiment.quantize
    assert quantize is not None  # there are quantized layers
    plan = rules.plan(
        _with_format(quantize, layer, choice, run.registry),
        [layer],
        set(rules.tied_layers(run.experiment.architecture)) & {layer},
        run.registry,
    ).get(layer)
    if plan is None:
        return LayerRecipes()
    recipe = recipe_from(quantize, plan.format, run.registry)
    if recipe is None:
        return LayerRecipes()
    if run.autocast:
        refuse_inexact(recipe)
    weight: Any = run.model.get_submodule(layer).weight
    if plan.storage == "grid" and weight.requires_grad and not _can_store(run):
        raise ValueError(
            f"{layer!r} would be stored on a grid, and no weight was when the run began; name a format of "
            'more than 8 bits, or "none"'
        )
    return LayerRecipes(weights=recipe, storage=plan.storage, covered=plan.covered)


def _with_format(
    quantize: QuantizeOptions, layer: str, choice: FormatChoice, registry: Registry
) -> QuantizeOptions:
    """Return options whose only rule is the layer's own with another format; a wide one needs no storage."""
    index = rules.first_match(quantize.rule, layer)
    own = RuleOptions(layers=re.escape(layer)) if index is None else quantize.rule[index]
    wide = rules.bits(choice, registry) > rules.WIDEST_GRID_BITS
    rule = attrs.evolve(own, format=choice, storage=None if wide else own.storage)
    return attrs.evolve(quantize, rule=(rule,))


def _can_store(run: Run) -> bool:
    return run.storage is not None or bool(getattr(run.optimizer, "stores_on_grid", False))


@contextlib.contextmanager
def _regridding(run: Run, weights: Collection[Tensor]) -> Iterator[None]:
    """Have formats and scales of weights changed inside; whatever keeps weights on grids then takes it up."""
    changed = {id(weight) for weight in weights}
    run.regridded |= {name for name, weight in run.trained.items() if id(weight) in changed}
    stored = run.storage.regridding(weights) if run.storage is not None else contextlib.nullcontext()
    with stored:
        yield
    regrid = getattr(run.optimizer, "regrid", None)
    if regrid is not None:
        regrid(weights)
    if run.master_bound is not None:
        run.master_bound.follow_formats()


def regroup(optimizer: Any, weights: Collection[Tensor]) -> None:
    """Have the groups' `format` and `scale` tell of these weights what their quantizers do.

    A group of one format stays one; where only some of its weights have another now, they become a group of
    their own with the same options.
    """
    changed = {id(weight) for weight in weights}
    for group in [one for one in optimizer.param_groups if "format" in one]:
        parts: dict[Any, list[Tensor]] = {}
        for weight in group["params"]:
            quantizer = quantizer_of(weight)
            seen = quantizer.format if quantizer is not None and quantizer.covered else None
            parts.setdefault(seen if id(weight) in changed else _AS_BEFORE, []).append(weight)
        stays, *leave = sorted(parts, key=lambda format: format is not _AS_BEFORE)
        others = [_part({**group}, format, parts[format]) for format in leave]
        _part(group, stays, parts[stays])
        optimizer.param_groups.extend(others)


def _part(group: dict[str, Any], format: Any, weights: list[Tensor]) -> dict[str, Any]:
    """Make of a group that of some of its weights, in a format: one, None, or _AS_BEFORE."""
    scales = group.get("scale")
    if isinstance(scales, list | tuple):
        own = {id(weight): scale for weight, scale in zip(group["params"], scales, strict=True)}
        scales = [own[id(weight)] for weight in weights]
    if format is not _AS_BEFORE:
        scales = None if format is None else [_scale(weight) for weight in weights]
        group["format"] = format
    group["params"], group["scale"] = weights, scales
    return group


def _scale(weight: Tensor) -> Tensor:
    quantizer = quantizer_of(weight)
    assert quantizer is not None
    return quantizer.scale


def adjust_scales(run: Run, pattern: str, factor: float, of: str) -> dict[str, float]:
    """Multiply the scales of the layers that match; returns their adjustments, all factors together."""
    refuse_factor(factor)
    if of == "weights":
        found = quantized_layers(run.model)
        matched = _matched(pattern, found, "a quantized weight")
        adjust_weights(run, {found[layer]: factor for layer in matched})
        return {layer: found[layer].adjustment for layer in matched}
    if of not in FLOWS:
        raise ValueError(f"of={of!r} is not one of weights, {', '.join(FLOWS)}")
    flows = {
        name.rpartition(".")[0]: flow
        for name, flow in quantized_flows(run.model).items()
        if name.endswith(f".{of}")
    }
    matched = _matched(pattern, flows, f"quantized {of}")
    for layer in matched:
        flows[layer].adjust(factor)
    return {layer: float(flows[layer].adjustment) for layer in matched}


def adjust_weights(run: Run, factors: Mapping[WeightQuantizer, float]) -> None:
    """Multiply the scales of weights; those on a grid are snapped to it anew."""
    places = [(weight, quantizer_of(weight)) for weight in run.model.parameters()]
    concerned = [weight for weight, quantizer in places if quantizer is not None and quantizer in factors]
    with _regridding(run, concerned):
        for quantizer, factor in factors.items():
            quantizer.adjust(factor)


def refuse_factor(factor: float) -> None:
    """Raise ValueError unless it is a power of two."""
    if not (isinstance(factor, int | float) and 0 < factor < math.inf and math.frexp(factor)[0] == 0.5):
        raise ValueError(f"factor={factor!r} is no power of two, such as 0.5 or 2.0")


def _matched(pattern: str, layers: Collection[str], what: str) -> Sequence[str]:
    """Return the layers that match. Raises ValueError where none does."""
    try:
        found = [layer for layer in layers if re.fullmatch(pattern, layer)]
    except re.error as error:
        raise ValueError(f"layers={pattern!r} is no regular expression: {error}") from error
    if not layers:
        raise ValueError(f"no layer has {what}")
    if not found:
        raise ValueError(f"layers={rules.no_match(pattern, layers, f'layer with {what}')}")
    return found


def repeat(run: Run, switches: Sequence[Sequence[str]], adjustments: Mapping[str, float]) -> None:
    """Carry out a saved run's switches and adjustments, before its weights and scales are loaded."""
    for pattern, to in switches:
        switch_format(run, pattern, to)
    run.switches = [(pattern, to) for pattern, to in switches]
    quantizers = {name: quantizer_of(weight) for name, weight in run.model.named_parameters()}
    factors = {
        quantizer: adjustments[name]
        for name, quantizer in quantizers.items()
        if quantizer is not None and adjustments[name] != 1
    }
    if factors:
        adjust_weights(run, factors)
