"""Which Linears of a live model get which recipes: by one format, or by rules.

What `altgrad_core.rules` decides from an experiment file's names alone, decided here for any model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn

from altgrad_core.lookup import format_or_none
from altgrad_core.quantized_linear import is_conv1d
from altgrad_core.recipe import Recipe, flow_recipe, recipe_of
from altgrad_core.registry import UsageError
from altgrad_core.rules import WIDEST_GRID_BITS, Rule, first_match


@attrs.frozen(kw_only=True)
class LayerRecipes:
    """What one Linear becomes; None is left alone. `storage` and `covered` are the weight's."""

    weights: Recipe | None = None
    storage: str | None = None
    covered: bool = True
    activations: Recipe | None = None
    gradients: Recipe | None = None

    @property
    def empty(self) -> bool:
        return self.weights is None and self.activations is None and self.gradients is None

    @property
    def of_weight(self) -> tuple[Any, ...]:
        """What Linears that share a Parameter must agree on."""
        return self.weights, self.storage, self.covered


def is_linear(module: nn.Module) -> bool:
    """Whether surgery may choose a module: an `nn.Linear`, none of its subclasses, or a Conv1D."""
    return type(module) is nn.Linear or is_conv1d(module)


def shared_with_others(model: nn.Module, linears: dict[str, nn.Module]) -> set[int]:
    """Return the ids of Parameters that a module other than a Linear holds."""
    own = {id(module) for module in linears.values()}
    return {
        id(parameter)
        for module in model.modules()
        if id(module) not in own
        for parameter in module.parameters(recurse=False)
    }


def weight_recipe(format: Any, options: Mapping[str, Any]) -> Recipe | None:
    """Return the recipe of weights in a format, whichever way it is named; None for FP32 and none."""
    found = format_or_none(format)
    return None if found is None else recipe_of(found, options)


def chosen_by_format(
    linears: Mapping[str, nn.Module], layer: LayerRecipes, shared: set[int]
) -> dict[str, LayerRecipes]:
    """Give every Linear the same recipes; those whose weight (its id) is `shared` with an embedding none."""
    if layer.empty:
        return {}
    return {name: layer for name, module in linears.items() if id(module.weight) not in shared}


def chosen_by_rules(
    linears: Mapping[str, nn.Module],
    rules: Sequence[Rule],
    shared: set[int],
    options: Mapping[str, Any],
    flows: LayerRecipes,
) -> dict[str, LayerRecipes]:
    """Give each Linear what the first rule that matches its name says; what none matches gets nothing.

    options: of the weights' recipes. flows: the recipes that a rule without its own leaves to all.

    Raises ValueError for a rule that matches no Linear, or has no format.
    """
    for rule in rules:
        if not any(rule.matches(name) for name in linears):
            raise ValueError(f"the rule {rule.layers!r} matches no Linear; there are: {', '.join(linears)}")
        if rule.format is None:
            raise ValueError(f'the rule {rule.layers!r} has no format; "FP32" leaves its weights alone')
    chosen: dict[str, LayerRecipes] = {}
    for name, module in linears.items():
        index = first_match(rules, name)
        if index is not None:
            layer = _ruled(name, rules[index], id(module.weight) in shared, options, flows)
            if not layer.empty:
                chosen[name] = layer
    return chosen


def _ruled(
    name: str, rule: Rule, shared: bool, options: Mapping[str, Any], flows: LayerRecipes
) -> LayerRecipes:
    """Return what a layer becomes under its rule."""
    weights = weight_recipe(rule.format, options)
    if shared and weights is not None and rule.storage == "grid":
        raise ValueError(
            f"{name!r} shares its weight with an embedding and cannot live on the grid: untie it, or leave "
            "the rule's storage out"
        )
    wide = weights is not None and weights.format.bits > WIDEST_GRID_BITS
    covered = not shared and (not wide or rule.storage is not None)
    return LayerRecipes(
        weights=weights,
        storage=rule.storage if covered else "master",
        covered=covered,
        activations=_of_rule(rule.activations, flows.activations),
        gradients=_of_rule(rule.gradients, flows.gradients),
    )


def _of_rule(spec: Any, default: Recipe | None) -> Recipe | None:
    return default if spec is None else flow_recipe(spec, default)


def refuse_inexact(recipe: Recipe | None) -> None:
    """Refuse what bfloat16 does not hold: a grid value times a power of two, to 8 bits, it does."""
    if recipe is None:
        return
    if not recipe.power_of_two:
        cause = "block_scale" if recipe.block_scale else 'scale_rule = "exact"'
        raise UsageError(
            f"{recipe.format.name} under {cause} has scales that are no powers of two: inexact under "
            'bfloat16 autocast; set train.dtype = "float32", or leave it out'
        )
    try:
        recipe.format.quantize(torch.ones(1, dtype=torch.bfloat16))
    except ValueError as error:
        raise UsageError(
            f"{recipe.format.name} does not survive bfloat16 autocast, which cannot hold every value of it; "
            'set train.dtype = "float32", or name another format'
        ) from error
