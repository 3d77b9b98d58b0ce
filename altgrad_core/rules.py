"""Which Linear gets which format and lives where, decided from names alone, without torch.

Rules match full module paths, first match wins (`attn.c_proj` and `mlp.c_proj` are different layers).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import attrs

from altgrad_core import patterns
from altgrad_core.options import FieldError, FormatChoice
from altgrad_core.quantize_options import UNQUANTIZED
from altgrad_core.registry import Registry
from altgrad_core.wording import listed

if TYPE_CHECKING:
    from altgrad_core.quantize_options import QuantizeOptions, RuleOptions
    from altgrad_core.shapes import Architecture

WIDEST_GRID_BITS = 8
"""Formats wider than this, named in a rule, are stored as master unless the rule says otherwise."""


def _is_pattern(_: Any, field: Any, value: str) -> None:
    if problem := patterns.problem(value):
        raise ValueError(f"the rule {value!r} {problem}")


def _is_storage(_: Any, field: Any, value: str | None) -> None:
    if value not in ("grid", "master", None):
        raise ValueError(f"a rule's storage is 'grid', 'master' or None, not {value!r}")


@attrs.frozen
class Rule:
    """What to do with the layers whose full module path matches the regular expression `layers`.

    format: the weights': a name, a table of options, a `Format`, or "FP32" (leave alone).
    storage: "grid" or "master"; None: as the optimizer's storage decides. A format wider than 8 bits
        without a storage is trained as plain AdamW trains it, on a float32 master.
    activations, gradients: the inputs' and the output gradients' format or recipe, as `quantize_model` takes
        them; None: as the call says for all layers; "FP32" or "none": leave alone.

    Raises ValueError for a `layers` that is no regular expression, or an unknown storage.
    """

    layers: str = attrs.field(validator=_is_pattern)
    format: Any = None
    storage: str | None = attrs.field(default=None, validator=_is_storage)
    activations: Any = None
    gradients: Any = None

    def matches(self, layer: str) -> bool:
        return re.fullmatch(self.layers, layer) is not None


def first_match(rules: Iterable[Any], layer: str) -> int | None:
    """Return the index of the first rule that matches the module path, or None."""
    return next((index for index, rule in enumerate(rules) if re.fullmatch(rule.layers, layer)), None)


def tied_layers(architecture: Architecture) -> tuple[str, ...]:
    """Return the Linears whose Parameter an embedding shares."""
    return (architecture.head,) if architecture.ties_head else ()


@attrs.frozen
class LayerPlan:
    """One Linear: its formats, where its weight lives, and whether optimizers see to it (it is covered)."""

    format: FormatChoice
    storage: str
    covered: bool = True
    activations: FormatChoice = UNQUANTIZED
    gradients: FormatChoice = UNQUANTIZED

    @property
    def unquantized(self) -> bool:
        return all(one.unquantized for one in (self.format, self.activations, self.gradients))


def plan(
    quantize: QuantizeOptions, layers: Collection[str], tied: Collection[str], registry: Registry
) -> dict[str, LayerPlan]:
    """Return the plan of every Linear that is quantized, by module path.

    `tied` are the Linears whose Parameter an embedding shares: left alone unless a rule names them, and
    then stored as master. Raises FieldError for a rule that matches nothing or asks for what cannot be.
    """
    for problem in problems(quantize, layers, tied):
        raise problem
    every = _plans(quantize, layers, tied, registry)
    return {layer: found for layer, found in every if not found.unquantized}


def covered(
    quantize: QuantizeOptions, layers: Collection[str], tied: Collection[str], registry: Registry
) -> list[str]:
    """Return the Linears whose weights an optimizer's own rule and `lr` are for, whatever their format.

    They are those that take the format of [quantize], FP32 too, or a narrow one of a rule's. So what changes
    the format alone changes how the same weights are stored, and not which weights train by which rule.
    """
    return [layer for layer, found in _plans(quantize, layers, tied, registry) if found.covered]


def on_the_grid(
    quantize: QuantizeOptions, layers: Collection[str], tied: Collection[str], registry: Registry
) -> list[str]:
    """Return the Linears whose weights live on the grid."""
    return [layer for layer, found in _plans(quantize, layers, tied, registry) if found.storage == "grid"]


def geometries(quantize: QuantizeOptions, layers: Collection[str]) -> dict[str, FormatChoice]:
    """Return the Linears whose rule says which format's geometry they take without being in it."""
    matched = {layer: first_match(quantize.rule, layer) for layer in layers}
    found = {layer: quantize.rule[index].of_format for layer, index in matched.items() if index is not None}
    return {layer: of_format for layer, of_format in found.items() if of_format is not None}


def covers(rule: RuleOptions, registry: Registry) -> bool:
    """Whether a rule leaves its layers covered: FP32, or a wide format without a storage, does not."""
    if rule.format is None:
        return True
    narrow = bits(rule.format, registry) <= WIDEST_GRID_BITS
    return not rule.format.unquantized and (narrow or rule.storage is not None)


def problems(
    quantize: QuantizeOptions, layers: Collection[str], tied: Collection[str]
) -> Iterator[FieldError]:
    """Yield what is wrong with the rules, as far as the names of the layers tell."""
    matched = {layer: first_match(quantize.rule, layer) for layer in layers}
    for index, rule in enumerate(quantize.rule):
        at = ("rule", index, "layers")
        if not any(rule.matches(layer) for layer in layers):
            yield FieldError(at, no_match(rule.layers, layers, "layer"))
        elif index not in matched.values():
            yield FieldError(at, f"is never reached: earlier rules match every layer of {rule.layers!r}")
        for layer in tied:
            if quantize.is_onto_the_grid(rule) and matched.get(layer) == index:
                yield FieldError(
                    ("rule", index, "storage"),
                    f"{layer!r} shares its weight with the embedding and cannot live on the grid; "
                    'set model.tie_weights = false, or storage = "master"',
                )


def no_match(pattern: str, names: Collection[str], what: str) -> str:
    """Say that a pattern matches no whole name, and what would."""
    message = f"{pattern!r} matches no {what}"
    if any(re.search(pattern, name) for name in names):
        around = f".*({pattern}).*" if "|" in pattern else f".*{pattern}.*"
        message += f"; it must match the whole name, as {around!r} does"
    families = dict.fromkeys(re.sub(r"\.\d+(?=\.)", ".N", name) for name in names)
    return f"{message}; there are: {listed(families)}"


def _plans(
    quantize: QuantizeOptions, layers: Collection[str], tied: Collection[str], registry: Registry
) -> Iterator[tuple[str, LayerPlan]]:
    """Yield every Linear with its plan; a tied one that no rule names has none."""
    for layer in layers:
        index = first_match(quantize.rule, layer)
        if index is not None or layer not in tied:
            yield layer, _layer_plan(quantize, index, layer in tied, registry)


def _layer_plan(quantize: QuantizeOptions, index: int | None, tied: bool, registry: Registry) -> LayerPlan:
    rule = None if index is None else quantize.rule[index]
    format = (rule and rule.format) or quantize.format
    flows = (
        (rule and rule.activations) or quantize.activations.format,
        (rule and rule.gradients) or quantize.gradients.format,
    )
    is_covered = rule is None or (not tied and covers(rule, registry))
    inherited = quantize.storage if is_covered else "master"
    storage = "master" if format.unquantized else (rule and rule.storage) or inherited
    return LayerPlan(format, storage, is_covered, *flows)


def bits(format: FormatChoice, registry: Registry) -> int:
    """Return the width of a chosen format's code; 8 where it cannot be known without torch."""
    if format.unquantized:
        return 32
    component = registry.find("format", format.plugin).component
    return component.bits or getattr(format.options, "bits", None) or WIDEST_GRID_BITS
