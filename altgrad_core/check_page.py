"""What `altgrad-run FILE --check` prints: the runs of a file that is right, without torch."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from altgrad_core import price
from altgrad_core.columns import aligned
from altgrad_core.describe import Words, count, duration
from altgrad_core.experiment import Cell, Experiment
from altgrad_core.experiment_file import DEVICES, ExperimentFile
from altgrad_core.options import plain
from altgrad_core.record import SUMMARY, read_json
from altgrad_core.registry import Registry


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


def _rows_of(cell: Cell, words: Words, *, seeded: bool) -> Iterator[tuple[str, str]]:
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
    words = Words(registry)
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
    return f"{text}, about {duration(total)} at the speed of earlier runs here{price.cost(total)}"


def _seconds(experiment: Experiment, summaries: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the time a cell takes at the mean speed of the runs of its model; None: there is none."""
    model = plain(experiment.model)
    speeds = [
        float(summary["tokens_per_second"])
        for summary in summaries
        if summary.get("model") == model and summary.get("tokens_per_second")
    ]
    return experiment.tokens / (sum(speeds) / len(speeds)) if speeds else None
