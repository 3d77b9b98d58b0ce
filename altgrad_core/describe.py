"""An assembled experiment in words and numbers, without torch: for `--check` and the header of a run."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import attrs

from altgrad_core import rules, shapes
from altgrad_core.experiment import CLASSIFICATION, Cell, Experiment
from altgrad_core.format_uses import is_scaled, without_effect
from altgrad_core.options import Choice, FormatChoice
from altgrad_core.quantize_options import (
    FLOWS,
    ActivationOptions,
    GradientOptions,
    QuantizeOptions,
    ScaleOptions,
)
from altgrad_core.registry import Registry


def rows(experiment: Experiment, registry: Registry) -> list[tuple[str, str]]:
    """Return what a run is, as pairs of name and text."""
    return Words(registry).rows(experiment)


@attrs.define
class Words:
    """Runs in words; what several of them have in common is worked out once."""

    registry: Registry
    found: dict[tuple[object, ...], tuple[Experiment, Any]] = attrs.field(factory=dict)

    def rows(self, experiment: Experiment) -> list[tuple[str, str]]:
        return [
            *self._once(_quantized, experiment, *_SHAPES),
            *self._once(_read, experiment, "optimizer", *_SHAPES),
            *_beginnings(experiment),
            ("on the grid", f"{self.share(experiment):.1%} of the non-embedding parameters"),
            ("training", _training(experiment)),
            *self._once(_watched, experiment, "monitor", "fallback"),
        ]

    def share(self, experiment: Experiment) -> float:
        return float(self._once(share_on_grid, experiment, *_SHAPES))

    def cell(self, cell: Cell) -> tuple[str, ...]:
        """Return what tells a cell apart, in columns."""
        parameters = self._once(_parameters, cell.experiment, *_SHAPES)
        return (
            cell.name,
            f"{count(cell.experiment.tokens)} tokens",
            f"{count(parameters)} parameters",
            f"{self.share(cell.experiment):.1%} on the grid",
        )

    def _once(self, make: Callable[[Experiment, Registry], Any], of: Experiment, *sections: str) -> Any:
        """Return what is made of some sections of an experiment, which the cells of a grid share."""
        key = (make, *(id(getattr(of, name)) for name in sections))
        if key not in self.found:
            self.found[key] = of, make(of, self.registry)  # kept, so that its sections keep their identities
        return self.found[key][1]


_SHAPES = ("task", "data", "model", "quantize")
"""The sections that layers, and what becomes of them, follow from."""


def _quantized(experiment: Experiment, registry: Registry) -> list[tuple[str, str]]:
    plan = _plan(experiment, registry)
    return [
        ("format", _format(experiment.quantize, plan)),
        *_flows(experiment.quantize, plan),
        *_without_effect(experiment.quantize, plan),
    ]


def _read(experiment: Experiment, _: Registry) -> list[tuple[str, str]]:
    return [
        ("optimizer", shown(experiment.optimizer)),
        ("task", _task(experiment)),
        ("data", f"{shown(experiment.data.source)}, tokenizer {experiment.data.tokenizer}"),
        ("model", _model(experiment)),
    ]


def _watched(experiment: Experiment, _: Registry) -> list[tuple[str, str]]:
    return [
        ("monitors", ", ".join(map(shown, experiment.monitor)) or "none"),
        ("policies", ", ".join(map(shown, experiment.fallback)) or "none"),
    ]


def _parameters(experiment: Experiment, _: Registry) -> int:
    return shapes.parameter_count(experiment.architecture, embeddings=True)


def shown(choice: Choice) -> str:
    """Return a plugin's name and its options: `GridOptim (normalize adam, step_scale 0.15, ...)`."""
    options = ", ".join(f"{key} {_value(value)}" for key, value in choice.plain_options().items())
    return f"{choice.plugin} ({options})" if options else choice.plugin


def _value(value: Any) -> str:
    if isinstance(value, dict):
        between = " " if "plugin" in value else "="
        inner = " ".join(f"{key}{between}{_value(one)}" for key, one in value.items() if key != "plugin")
        return f"{value.get('plugin', '')} {inner}".strip()
    return " ".join(map(_value, value)) if isinstance(value, list) else str(value)


_Plan: TypeAlias = Mapping[str, rules.LayerPlan]


def _plan(experiment: Experiment, registry: Registry) -> _Plan:
    if experiment.quantize is None:
        return {}
    architecture = experiment.architecture
    linears, tied = shapes.linear_shapes(architecture), rules.tied_layers(architecture)
    return rules.plan(experiment.quantize, linears, tied, registry)


def _format(quantize: QuantizeOptions | None, plan: _Plan) -> str:
    kinds = collections.Counter(
        (shown(layer.format), layer.storage) for layer in plan.values() if not layer.format.unquantized
    )
    if not kinds or quantize is None:
        text = "FP32: no weight is quantized" if plan else "FP32: nothing is quantized"
        return text + _bound(quantize)
    text = ", ".join(
        f"{name} stored as {storage} ({_layers(number)})" for (name, storage), number in kinds.items()
    )
    text += _scales(quantize, [layer.format for layer in plan.values()])
    if any(storage == "grid" for _, storage in kinds):
        text += f", rounded {quantize.storage_rounding}{_residuals(quantize)}"
    return text + _bound(quantize)


def _bound(quantize: QuantizeOptions | None) -> str:
    return f", bound {quantize.bound:g}" if quantize is not None and quantize.bound else ""


def _residuals(quantize: QuantizeOptions) -> str:
    chosen = quantize.residual_format
    return "" if isinstance(chosen, str) else f" in {shown(chosen)}"


def _without_effect(quantize: QuantizeOptions | None, plan: _Plan) -> Iterator[tuple[str, str]]:
    """Yield what is set and changes nothing, so that nobody takes it for a part of the experiment."""
    if quantize is not None:
        for setting, reason in without_effect(quantize, plan.values()):
            yield "no effect", f"quantize.{setting}: {reason}"


def _flows(quantize: QuantizeOptions | None, plan: _Plan) -> Iterator[tuple[str, str]]:
    """Yield what activations and gradients become, where they are quantized."""
    if quantize is None:
        return
    for name in FLOWS:
        choices = [getattr(layer, name) for layer in plan.values()]
        kinds = collections.Counter(shown(choice) for choice in choices if not choice.unquantized)
        options: ActivationOptions | GradientOptions = getattr(quantize, name)
        if kinds:
            formats = ", ".join(f"{format} ({_layers(number)})" for format, number in kinds.items())
            history = f" over {options.amax_history} steps" if options.scale_mode == "delayed" else ""
            rounding = "" if options.rounding == "nearest_even" else f", rounded {options.rounding}"
            yield name, f"{formats}{_scales(options, choices)}, scale {options.scale_mode}{history}{rounding}"


def _layers(number: int) -> str:
    return f"{number} layer{'s' if number > 1 else ''}"


def _scales(options: ScaleOptions, choices: Sequence[FormatChoice]) -> str:
    """Return how scales are made, where that is not the default: `, one scale per block of 32 (ocp)`."""
    if not any(is_scaled(options, choice) for choice in choices):
        return ", scale 1" if options.granularity == "none" else ""
    block_scale = options.block_scale
    shared = {"none": "scale 1", "block": f"one scale per block of {options.block}"}
    text = shared.get(options.granularity, f"one scale per {options.granularity}")
    rule = options.scale_rule if block_scale.unquantized else f"in {shown(block_scale)}"
    if (options.granularity, rule) == ("tensor", "fit"):
        return ""
    return f", {text}" if rule == "fit" else f", {text} ({rule})"


def _beginnings(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Yield what a run starts from, where that is no random float32 weights."""
    if experiment.init_from:
        yield "starts from", experiment.init_from
    if not experiment.train.init_format.unquantized:
        yield "rounded first", f"initial Linear weights to {shown(experiment.train.init_format)}"


def _task(experiment: Experiment) -> str:
    """Return what is learnt: `classification (10 labels, up to 2 windows of 256 tokens a document)`."""
    task, windows = experiment.task.replace("_", " "), experiment.data.windows
    if experiment.task != CLASSIFICATION:
        return task
    read = "window" if windows == 1 else f"{windows} windows"
    return (
        f"{task} ({experiment.data.label_count} labels; of a document the first {read} of "
        f"{experiment.model.block_size} tokens)"
    )


def _model(experiment: Experiment) -> str:
    model = experiment.model
    total = shapes.parameter_count(experiment.architecture, embeddings=True)
    inner = shapes.parameter_count(experiment.architecture, embeddings=False)
    return (
        f"{model.n_layer} layers, {model.n_head} heads, width {model.n_embd}, context {model.block_size}: "
        f"{count(total)} parameters, {count(inner)} without embeddings"
    )


def _training(experiment: Experiment) -> str:
    train = experiment.train
    accumulated = f" x {train.gradient_accumulation}" if train.gradient_accumulation > 1 else ""
    windows = f" x {experiment.data.windows}" if experiment.data.windows > 1 else ""
    batch = f"{train.batch_size}{accumulated}{windows} x {experiment.model.block_size}"
    tokens = f"{count(experiment.tokens)} tokens, seed {experiment.seed}"
    return f"{experiment.steps:,} steps of {batch} tokens: {tokens}"


def share_on_grid(experiment: Experiment, registry: Registry) -> float:
    """Return the share of the non-embedding parameters that the plan puts on a grid."""
    plan = _plan(experiment, registry)
    linears = shapes.linear_shapes(experiment.architecture)
    sizes = {layer: shape[0] * shape[1] for layer, shape in linears.items()}
    total = shapes.parameter_count(experiment.architecture, embeddings=False)
    return sum(sizes[layer] for layer, found in plan.items() if found.storage == "grid") / total


def duration(seconds: float) -> str:
    """Return a time for a person: `75 s`, `12 min`, `3.1 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def count(number: float) -> str:
    """Return a large number for a person: `795,392`, `1.15 M`."""
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:.2f} M"
