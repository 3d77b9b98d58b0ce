"""What no single option can know: options that contradict one another, or the model they are for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from altgrad_core import patterns, rules, shapes
from altgrad_core.experiment import CLASSIFICATION
from altgrad_core.format_uses import inexact_in_bfloat16
from altgrad_core.options import OptimizerChoice, Path, written
from altgrad_core.partial import known
from altgrad_core.quantize_options import ON_GRID
from altgrad_core.registry import Registry
from altgrad_core.shapes import Architecture
from altgrad_core.structuring import Problem

COMPARED = ("task", "data", "model", "train", "quantize", "optimizer", "monitor", "fallback")
"""The sections that may contradict one another."""


def contradictions(sections: Mapping[str, Any], registry: Registry) -> Iterator[Problem]:
    """Yield the problems between the sections of an experiment, as far as these are known."""
    return known(
        _listed_twice(sections),
        _quantize(sections),
        _scales_of_the_grid(sections),
        _optimizer_options(sections),
        _of_the_model(sections, registry),
    )


def _of_the_model(sections: Mapping[str, Any], registry: Registry) -> Iterator[Problem]:
    """Yield what contradicts the model, whose head follows from what is learnt."""
    unfit = list(known(_labels(sections)))
    if unfit:
        yield from unfit
        return
    data = sections["data"]
    architecture = Architecture(sections["model"], data.vocab_size, data.labels(sections["task"]))
    if unusable := list(_unusable_patterns(sections, architecture)):
        yield from unusable
        return
    yield from known(
        _rules(sections, architecture),
        _storage_rounding(sections, architecture, registry),
        _freeze(sections, architecture),
        _monitored(sections, architecture),
        _inexact(sections, architecture),
    )


def _listed_twice(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """Two of one name, from whichever distribution: metrics and checkpoints go by the bare name."""
    for kind in ("monitor", "fallback"):
        names = [choice.bare_name for choice in sections[kind]]
        for index, name in enumerate(names):
            if name in names[:index]:
                yield Problem((kind, index), f"{name!r} is listed twice; keep one")


def _quantize(sections: Mapping[str, Any]) -> Iterator[Problem]:
    quantize = sections["quantize"]
    for problem in quantize.conflicts() if quantize is not None else ():
        yield Problem(("quantize", *problem.path), str(problem))


def _scales_of_the_grid(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """What lands on the grid by itself needs the scales of grid storage, whatever the storage."""
    quantize, optimizer = sections["quantize"], sections["optimizer"]
    if quantize is None or quantize.format.unquantized or quantize.storage == "grid":
        return
    for name in ("granularity", "scale_rule") if _stores_on_grid(optimizer) else ():
        allowed, reason, way_out = ON_GRID[name]
        if (value := getattr(quantize, name)) not in allowed:
            yield Problem(
                ("quantize", name),
                f"{written(value)} does not go with {optimizer.plugin}, which lands on the grid by itself "
                f"and {reason}; use {way_out}, or another optimizer",
            )


def _stores_on_grid(optimizer: OptimizerChoice) -> bool:
    """Whether an optimizer lands on the grid by itself, whatever [quantize] storage says."""
    return bool(getattr(optimizer.options, "stores_on_grid", False))


def _optimizer_options(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """A monitor whose options name `optimizer_options` reads what an optimizer keeps only under those."""
    optimizer = sections["optimizer"]
    for index, choice in enumerate(sections["monitor"]):
        for name, value in getattr(choice.options, "optimizer_options", {}).items():
            known = hasattr(optimizer.options, name)
            if not known or getattr(optimizer.options, name) != value:
                way_out = "has as an option: set it" if known else "does not know: use one that does"
                yield Problem(
                    ("monitor", index),
                    f"{choice.plugin!r} needs {name} = {written(value)} of the optimizer, which "
                    f"{optimizer.plugin} {way_out}, or leave the monitor out",
                )


def _labels(sections: Mapping[str, Any]) -> Iterator[Problem]:
    """Classification needs to know how many labels there are; nothing else reads documents in windows."""
    data, source = sections["data"], sections["data"].source
    if sections["task"] != CLASSIFICATION:
        if data.windows != 1:
            message = f'says how a document is classified; leave it out, or set task = "{CLASSIFICATION}"'
            yield Problem(("data", "windows"), message)
    elif data.label_count is None:
        yield Problem(
            ("task",),
            f"the data set {source.plugin!r} has no labels to classify by; name another as data.plugin "
            '(`altgrad plugins --kind dataset` tells which have labels), or set task = "language_modelling"',
        )
    elif data.label_count == 0:
        yield Problem(("data",), "classification needs to know how many labels there are; set label_count")


def _unusable_patterns(sections: Mapping[str, Any], architecture: Architecture) -> Iterator[Problem]:
    """Yield the patterns that are none, or take too long on the names of the model that all are tried on."""
    parameters = shapes.parameter_shapes(architecture)
    names = [*parameters, *(name.rpartition(".")[0] for name in parameters), architecture.head]
    for path, pattern in known(*(found(sections) for found in (_observed, _frozen, _ruled))):
        if not isinstance(pattern, str):
            continue
        if problem := patterns.problem(pattern) or patterns.endless(pattern, names):
            yield Problem(path, f"{pattern!r} {problem}")


def _observed(sections: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    for index, choice in enumerate(sections["monitor"]):
        yield ("monitor", index, "layers"), getattr(choice.options, "layers", None)


def _frozen(sections: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    for index, pattern in enumerate(sections["train"].freeze):
        yield ("train", "freeze", index), pattern


def _ruled(sections: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    for index, rule in enumerate(sections["quantize"].rule if sections["quantize"] is not None else ()):
        yield ("quantize", "rule", index, "layers"), rule.layers


def _rules(sections: Mapping[str, Any], architecture: Architecture) -> Iterator[Problem]:
    quantize = sections["quantize"]
    if quantize is None:
        return
    layers = shapes.linear_shapes(architecture)
    for problem in rules.problems(quantize, layers, rules.tied_layers(architecture)):
        yield Problem(("quantize", *problem.path), str(problem))


def _storage_rounding(
    sections: Mapping[str, Any], architecture: Architecture, registry: Registry
) -> Iterator[Problem]:
    """An optimizer whose options name `storage_roundings` goes with those alone, if anything is rounded."""
    quantize, optimizer = sections["quantize"], sections["optimizer"]
    taken = getattr(optimizer.options, "storage_roundings", None)
    if quantize is None or taken is None or quantize.storage_rounding in taken:
        return
    layers = shapes.linear_shapes(architecture)
    by_itself = _stores_on_grid(optimizer)
    if by_itself or rules.on_the_grid(quantize, layers, rules.tied_layers(architecture), registry):
        reason = ", which lands on the grid by itself" if by_itself else " and its options"
        yield Problem(
            ("quantize", "storage_rounding"),
            f'"{quantize.storage_rounding}" does not go with {optimizer.plugin}{reason}; use '
            f"{' or '.join(map(written, taken))}, or another optimizer",
        )


def _inexact(sections: Mapping[str, Any], architecture: Architecture) -> Iterator[Problem]:
    """What an assembled run would refuse under bfloat16 autocast, as far as names and numbers tell.

    Where the file asks for bfloat16 by name: "auto" is that on CUDA only, and the file is right elsewhere.
    """
    quantize, train = sections["quantize"], sections["train"]
    if quantize is None or train.dtype != "bf16":
        return
    layers = shapes.linear_shapes(architecture)
    for problem in inexact_in_bfloat16(quantize, layers, rules.tied_layers(architecture)):
        yield Problem(("quantize", *problem.path), str(problem))


def _freeze(sections: Mapping[str, Any], architecture: Architecture) -> Iterator[Problem]:
    names = shapes.parameter_shapes(architecture)
    frozen = set()
    for path, pattern in _frozen(sections):
        matched = {name for name in names if re.fullmatch(pattern, name)}
        if not matched:
            yield Problem(path, rules.no_match(pattern, names, "parameter"))
        frozen |= matched
    if frozen == set(names):
        yield Problem(("train", "freeze"), "leaves nothing to train; narrow its patterns")


def _monitored(sections: Mapping[str, Any], architecture: Architecture) -> Iterator[Problem]:
    """A monitor's `layers` must match a module path, as a rule's must."""
    names = shapes.parameter_shapes(architecture)
    layers = [name.rpartition(".")[0] for name in names] + [architecture.head]
    for path, pattern in _observed(sections):
        if isinstance(pattern, str) and not any(re.fullmatch(pattern, layer) for layer in layers):
            yield Problem(path, rules.no_match(pattern, layers, "layer"))
