"""An assembled experiment in words and numbers, without torch: for `--check` and the header of a run."""

from __future__ import annotations

import collections
import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs

from altgrad_core import rules, shapes
from altgrad_core.columns import aligned
from altgrad_core.experiment import CLASSIFICATION, Cell, Experiment
from altgrad_core.experiment_file import DEVICES, ExperimentFile
from altgrad_core.format_uses import is_scaled, without_effect
from altgrad_core.options import Choice, FormatChoice, plain
from altgrad_core.quantize_options import ActivationOptions, GradientOptions, QuantizeOptions, ScaleOptions
from altgrad_core.record import SUMMARY, read_json
from altgrad_core.registry import Registry, UsageError

PRICE_VARIABLE = "ALTGRAD_PRICE_PER_HOUR"
"""Environment variable: what an hour of this machine costs, in any currency; unset: no cost is stated."""


def rows(experiment: Experiment, registry: Registry) -> list[tuple[str, str]]:
    """Return what a run is, as pairs of name and text."""
    return _Words(registry).rows(experiment)


@attrs.define
class _Words:
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
        inner = " ".join(f"{key} {_value(one)}" for key, one in value.items() if key != "plugin")
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
        (shown(layer.format), layer.storage) for layer in plan.values() if not layer.format.unquantised
    )
    if not kinds or quantize is None:
        text = "FP32: no weight is quantised" if plan else "FP32: nothing is quantised"
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
    """Yield what activations and gradients become, where they are quantised."""
    if quantize is None:
        return
    for name in ("activations", "gradients"):
        choices = [getattr(layer, name) for layer in plan.values()]
        kinds = collections.Counter(shown(choice) for choice in choices if not choice.unquantised)
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
    rule = options.scale_rule if block_scale.unquantised else f"in {shown(block_scale)}"
    if (options.granularity, rule) == ("tensor", "fit"):
        return ""
    return f", {text}" if rule == "fit" else f", {text} ({rule})"


def _beginnings(experiment: Experiment) -> Iterator[tuple[str, str]]:
    """Yield what a run starts from, where that is no random float32 weights."""
    if experiment.init_from:
        yield "starts from", experiment.init_from
    if not experiment.train.init_format.unquantised:
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


# --- --check -----------------------------------------------------------------------------------------


def check(file: ExperimentFile, out: Path, device: str = "auto") -> Iterator[str]:
    """Yield the lines of `altgrad-run FILE --check`, for each device overlay that differs."""
    yield f"{file.path} is right"
    cpu, cuda = ([cell.experiment for cell in file.cells_on[one]] for one in DEVICES)
    if device in DEVICES:
        devices = {device: f"on {device}"}
    else:
        devices = {"cpu": "on any device"} if cpu == cuda else {one: f"on {one}" for one in DEVICES}
    for one, label in devices.items():
        cells = file.cells_on[one]
        planned = _planned(file, cells)
        runs = "1 run" if len(planned) == 1 else f"{len(planned)} runs"
        yield ""
        yield f"{label}: {runs}{_forecast(planned, file, out, one)}"
        if file.comparison is not None:
            yield from aligned(list(file.comparison.plan()))
        yield from _checked(cells, file.registry, seeded=file.comparison is None)


def _rows_of(cell: Cell, words: _Words, *, seeded: bool) -> Iterator[tuple[str, str]]:
    """Yield the rows of a cell; a comparison gives its cells their seeds."""
    seed = f", seed {cell.experiment.seed}"
    for name, text in words.rows(cell.experiment):
        yield name, text if seeded or name != "training" else text.removesuffix(seed)


def _planned(file: ExperimentFile, cells: Sequence[Cell]) -> list[Cell]:
    """Return a cell for each run; those of a comparison stand for all of their seeds and step sizes."""
    if file.comparison is None:
        return list(cells)
    pairs = zip(file.comparison.groups, cells, strict=True)
    return [cell for group, cell in pairs for _ in range(file.comparison.runs(group))]


def _checked(cells: Sequence[Cell], registry: Registry, *, seeded: bool) -> Iterator[str]:
    """Yield what the cells have in common, then what tells them apart."""
    for overlay in cells[0].in_force:
        if all(overlay in cell.in_force for cell in cells):
            yield f"  with {overlay}"
    words = _Words(registry)
    described = [list(_rows_of(cell, words, seeded=seeded)) for cell in cells]
    shared = [row for row in described[0] if all(row in one for one in described)]
    yield from aligned(shared)
    if len(cells) > 1:
        yield from aligned([words.cell(cell) for cell in cells])


def _forecast(cells: Sequence[Cell], file: ExperimentFile, out: Path, device: str) -> str:
    """Return the tokens, and how long they take at the speed of earlier runs of this name here, if known."""
    tokens = sum(cell.experiment.tokens for cell in cells)
    text = f", {count(tokens)} tokens"
    summaries = [read_json(path) for path in sorted((out / file.name).glob(f"*/{SUMMARY}"))]
    here = [
        summary
        for summary in summaries
        if summary and (summary.get("machine"), summary.get("device")) == (platform.node(), device)
    ]
    seconds = [_seconds(cell.experiment, here) for cell in cells]
    if None in seconds:
        return text
    total = sum(one for one in seconds if one is not None)
    return f"{text}, about {duration(total)} at the speed of earlier runs here{cost(total)}"


def _seconds(experiment: Experiment, summaries: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the time a cell takes at the mean speed of the runs of its model; None: there is none."""
    model = plain(experiment.model)
    speeds = [
        float(summary["tokens_per_second"])
        for summary in summaries
        if summary.get("model") == model and summary.get("tokens_per_second")
    ]
    return experiment.tokens / (sum(speeds) / len(speeds)) if speeds else None


def cost(seconds: float) -> str:
    """Return `, cost 0.12` at the price of $ALTGRAD_PRICE_PER_HOUR; empty where none is set."""
    price = price_per_hour()
    return f", cost {price * seconds / 3600:.2f}" if price else ""


def price_per_hour() -> float:
    """Return the price of $ALTGRAD_PRICE_PER_HOUR, 0 where none is set. Raises UsageError for no number."""
    given = os.environ.get(PRICE_VARIABLE) or "0"
    try:
        price = float(given)
    except ValueError:
        price = math.nan
    if not 0 <= price < math.inf:
        raise UsageError(f"${PRICE_VARIABLE} is {given!r}; set it to a number, 0 or more, or unset it")
    return price


def duration(seconds: float) -> str:
    """Return a time for a person: `75 s`, `12 min`, `3.1 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def count(number: float) -> str:
    """Return a large number for a person: `795,392`, `1.15 M`."""
    return f"{number:,.0f}" if number < 1e6 else f"{number / 1e6:.2f} M"
