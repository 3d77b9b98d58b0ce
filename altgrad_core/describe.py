"""An assembled experiment in words and numbers, without torch: for `--check` and the header of a run."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from altgrad_core import rules, shapes
from altgrad_core.experiment import Experiment
from altgrad_core.experiment_file import DEVICES, Cell, ExperimentFile
from altgrad_core.options import Choice, FormatChoice
from altgrad_core.record import SUMMARY, read_json
from altgrad_core.registry import Registry
from altgrad_core.terminal import count, duration

PRICE_VARIABLE = "ALTGRAD_PRICE_PER_HOUR"
"""Environment variable: what an hour of this machine costs, in any currency; unset: no cost is stated."""


def rows(experiment: Experiment, registry: Registry) -> list[tuple[str, str]]:
    """Return what a run is, as pairs of name and text."""
    return [
        ("format", _format(experiment, registry)),
        ("optimizer", shown(experiment.optimizer)),
        ("data", f"{shown(experiment.data.source)}, tokenizer {experiment.data.tokenizer}"),
        ("model", _model(experiment)),
        ("on the grid", f"{share_on_grid(experiment, registry):.1%} of the non-embedding parameters"),
        ("training", _training(experiment)),
        ("monitors", ", ".join(map(shown, experiment.monitor)) or "none"),
        ("policies", ", ".join(map(shown, experiment.fallback)) or "none"),
    ]


def shown(choice: Choice) -> str:
    """Return a plugin's name and its options: `GridOptim (normalize adam, step_scale 0.15, ...)`."""
    options = ", ".join(f"{key} {_value(value)}" for key, value in choice.plain_options().items())
    return f"{choice.plugin} ({options})" if options else choice.plugin


def _value(value: Any) -> str:
    if isinstance(value, dict):
        inner = " ".join(f"{key} {_value(one)}" for key, one in value.items() if key != "plugin")
        return f"{value.get('plugin', '')} {inner}".strip()
    return " ".join(map(_value, value)) if isinstance(value, list) else str(value)


def _plan(experiment: Experiment, registry: Registry) -> dict[str, rules.LayerPlan]:
    if experiment.quantize is None:
        return {}
    linears = shapes.linear_shapes(experiment.model, experiment.data.vocab_size)
    return rules.plan(experiment.quantize, linears, rules.tied_layers(experiment.model), registry)


def _format(experiment: Experiment, registry: Registry) -> str:
    plan = _plan(experiment, registry)
    if not plan:
        return "FP32: nothing is quantised"
    quantize = experiment.quantize
    kinds = {(_name(layer.format), layer.storage): 0 for layer in plan.values()}
    for layer in plan.values():
        kinds[_name(layer.format), layer.storage] += 1
    text = ", ".join(
        f"{name} stored as {storage} ({number} layers)" for (name, storage), number in kinds.items()
    )
    if quantize and any(storage == "grid" for _, storage in kinds):
        text += f", rounded {quantize.storage_rounding}"
    return f"{text}, bound {quantize.bound:g}" if quantize and quantize.bound else text


def _name(choice: FormatChoice) -> str:
    return shown(choice)


def _model(experiment: Experiment) -> str:
    model, vocabulary = experiment.model, experiment.data.vocab_size
    total = shapes.parameter_count(model, vocabulary, embeddings=True)
    inner = shapes.parameter_count(model, vocabulary, embeddings=False)
    return (
        f"{model.n_layer} layers, {model.n_head} heads, width {model.n_embd}, context {model.block_size}: "
        f"{count(total)} parameters, {count(inner)} without embeddings"
    )


def _training(experiment: Experiment) -> str:
    train = experiment.train
    accumulated = f" x {train.gradient_accumulation}" if train.gradient_accumulation > 1 else ""
    return (
        f"{experiment.steps:,} steps of {train.batch_size}{accumulated} x {experiment.model.block_size} tokens: "
        f"{count(experiment.tokens)} tokens, seed {experiment.seed}"
    )


def share_on_grid(experiment: Experiment, registry: Registry) -> float:
    """Return the share of the non-embedding parameters that the plan puts on a grid."""
    plan = _plan(experiment, registry)
    linears = shapes.linear_shapes(experiment.model, experiment.data.vocab_size)
    sizes = {layer: shape[0] * shape[1] for layer, shape in linears.items()}
    total = shapes.parameter_count(experiment.model, experiment.data.vocab_size, embeddings=False)
    return sum(sizes[layer] for layer, found in plan.items() if found.storage == "grid") / total


# --- --check -----------------------------------------------------------------------------------------


def check(file: ExperimentFile, out: Path, device: str = "auto") -> Iterable[str]:
    """Yield the lines of `altgrad-run FILE --check`, for each device overlay that differs."""
    yield f"{file.path} is right"
    devices = [device] if device in DEVICES else list(DEVICES)
    if len(devices) > 1 and [one.experiment for one in file.cells_on["cpu"]] == [
        one.experiment for one in file.cells_on["cuda"]
    ]:
        devices = ["cpu"]
    for one in devices:
        cells = file.cells_on[one]
        label = f"on {one}" if len(devices) > 1 or device in DEVICES else "on any device"
        yield f"\n{label}: {len(cells)} run{'s' if len(cells) > 1 else ''}{_forecast(cells, file, out, one)}"
        for overlay in cells[0].in_force if len(cells) == 1 else ():
            yield f"  with {overlay}"
        if len(cells) == 1:
            width = max(len(name) for name, _ in rows(cells[0].experiment, file.registry))
            yield from (
                f"  {name:<{width}}  {text}" for name, text in rows(cells[0].experiment, file.registry)
            )
        else:
            for cell in cells:
                share = share_on_grid(cell.experiment, file.registry)
                yield f"  {cell.name}: {count(cell.experiment.tokens)} tokens, {share:.1%} on the grid"


def _forecast(cells: tuple[Cell, ...], file: ExperimentFile, out: Path, device: str) -> str:
    """Return how long the runs take, from earlier runs of the same name on this machine; empty: unknown."""
    tokens = sum(cell.experiment.tokens for cell in cells)
    text = f", {count(tokens)} tokens"
    speeds = [
        summary["tokens_per_second"]
        for path in (out / file.name).glob(f"*/{SUMMARY}")
        if (summary := read_json(path))
        and summary.get("machine") == platform.node()
        and summary.get("device") == device
        and summary.get("model") == cells[0].experiment.plain()["model"]
        and summary.get("tokens_per_second")
    ]
    if not speeds:
        return text
    seconds = tokens / (sum(speeds) / len(speeds))
    return f"{text}, about {duration(seconds)} at the speed of earlier runs here{cost(seconds)}"


def cost(seconds: float) -> str:
    """Return `, cost 0.12` at the price of $ALTGRAD_PRICE_PER_HOUR; empty where none is set."""
    price = price_per_hour()
    return f", cost {price * seconds / 3600:.2f}" if price else ""


def price_per_hour() -> float:
    try:
        return float(os.environ.get(PRICE_VARIABLE, "0"))
    except ValueError:
        return 0.0
