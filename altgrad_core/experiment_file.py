"""Experiment files: TOML in, resolved experiments out, every mistake of the file in one go.

A file describes one run, or a grid of runs. It is checked under every device overlay, cell by cell, before
torch is imported; each problem is reported as `file:line: path: what is wrong`.
"""

from __future__ import annotations

import hashlib
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import tomli

from altgrad_core import locator, rules, shapes
from altgrad_core.experiment import Experiment, data_options
from altgrad_core.options import FieldError, Path, Problem, shown, structure, suggestion
from altgrad_core.overrides import Origin, Override, Tree, from_flag, from_table, spelled, split
from altgrad_core.registry import Registry, UsageError, discover

DEVICES = ("cpu", "cuda")
DRIVER_KEYS = ("on", "grid")
"""Top-level tables that shape the runs and are no option of a run."""

SINGLE = "run"
"""The name of the only cell of a file without a grid."""

_LONGEST_CELL_NAME = 120


class ExperimentError(UsageError):
    """Everything that is wrong with an experiment file, one line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)


@attrs.frozen(kw_only=True)
class Cell:
    """One run of a file: its folder's name and its options."""

    name: str
    experiment: Experiment
    in_force: tuple[str, ...]
    """The overrides behind the options, for the header: `steps = 1500 ([on.cpu])`."""


@attrs.frozen(kw_only=True)
class ExperimentFile:
    """A file that was read and found right under every device overlay."""

    path: pathlib.Path
    text: str
    name: str
    registry: Registry
    cells_on: Mapping[str, tuple[Cell, ...]]
    """The cells, by device: `cpu`, `cuda`."""


def load_experiment(
    path: str | pathlib.Path, overrides: Sequence[str] = (), registry: Registry | None = None
) -> ExperimentFile:
    """Read an experiment file with `key=value` overrides. Raises ExperimentError with every problem."""
    path = pathlib.Path(path)
    flags = [from_flag(text) for text in overrides]
    text, raw = _read(path)
    registry = registry or discover()
    checked = _Checked(path=path, text=text, raw=raw, flags=flags, registry=registry)
    cells_on = {device: checked.cells(device) for device in DEVICES}
    if checked.lines:
        raise ExperimentError(list(checked.lines))
    name = cells_on[DEVICES[0]][0].experiment.name
    return ExperimentFile(path=path, text=text, name=name, registry=registry, cells_on=cells_on)


def _read(path: pathlib.Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ExperimentError(
            [f"{path}: cannot be read: {error.strerror}; give the path of a TOML file"]
        ) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ExperimentError(
            [f"{path}:{line}: is not UTF-8 text: {error.reason}; save it as UTF-8"]
        ) from error
    try:
        return text, tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", str(error))
        line = int(place[1]) if place and place[1] else text.count("\n") + 1
        reason = str(error)[: place.start()] if place else str(error)
        raise ExperimentError([f"{path}:{line}: is no TOML: {reason}"]) from error
    except RecursionError as error:
        raise ExperimentError([f"{path}:1: is nested too deeply"]) from error


@attrs.define
class _Checked:
    """One file on its way to cells, collecting problems as lines, each once."""

    path: pathlib.Path
    text: str
    raw: dict[str, Any]
    flags: list[Override]
    registry: Registry
    lines: dict[str, None] = attrs.field(factory=dict)
    positions: dict[Path, int] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.positions = locator.lines(self.text)

    def cells(self, device: str) -> tuple[Cell, ...]:
        """Return the cells of the file on this device; problems go to `lines`."""
        base = Tree({key: value for key, value in self.raw.items() if key not in DRIVER_KEYS})
        overlay = self._overlay(device)
        base.apply(overlay)
        cells = []
        for name, values in self._combinations():
            tree = base.copy()
            tree.apply(values)
            tree.apply(self.flags)
            experiment = self._experiment(tree)
            if experiment is not None:
                in_force = tuple(_in_force(one, device) for one in (*overlay, *values, *self.flags))
                cells.append(Cell(name=name, experiment=experiment, in_force=in_force))
        return tuple(cells)

    def _overlay(self, device: str) -> list[Override]:
        overlays = self.raw.get("on", {})
        if not isinstance(overlays, dict):
            self._report(Tree({}), [Problem(("on",), "expected tables [on.cpu] or [on.cuda]")])
            return []
        for key, table in overlays.items():
            if key not in DEVICES:
                self._report(
                    Tree({}),
                    [
                        Problem(
                            ("on", key),
                            f"unknown device {key!r}{suggestion(key, DEVICES)}; there are: cpu, cuda",
                        )
                    ],
                )
            elif not isinstance(table, dict):
                self._report(Tree({}), [Problem(("on", key), f"expected a table, got {shown(table)}")])
        table = overlays.get(device, {})
        return self._keys(from_table, table, ("on", device)) if isinstance(table, dict) else []

    def _keys(self, reader: Any, table: dict[str, Any], at: Path) -> list[Override]:
        try:
            return list(reader(table, at))
        except ValueError as error:
            self._report(Tree({}), [Problem(at, str(error))])
            return []

    def _combinations(self) -> Iterable[tuple[str, list[Override]]]:
        grid = self.raw.get("grid", {})
        if not isinstance(grid, dict):
            self._report(Tree({}), [Problem(("grid",), "expected a table of lists")])
            return [(SINGLE, [])]
        axes = []
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                hint = "" if isinstance(values, list) else ", or put the value outside of [grid]"
                self._report(
                    Tree({}),
                    [
                        Problem(
                            ("grid", key),
                            f"expected a list with at least one value, got {shown(values)}{hint}",
                        )
                    ],
                )
                continue
            axis = self._keys(
                lambda values, at: [
                    Override(split(at[1]), value, Origin((*at, index))) for index, value in enumerate(values)
                ],
                values,
                ("grid", key),
            )
            if axis:
                axes.append(axis)
        cells = [(cell_name(combination), list(combination)) for combination in itertools.product(*axes)]
        self._refuse_twins(cells)
        return cells

    def _refuse_twins(self, cells: list[tuple[str, list[Override]]]) -> None:
        seen: set[str] = set()
        for name, _ in cells:
            if name in seen:
                self._report(Tree({}), [Problem(("grid",), f"two cells are the same: {name}; remove one")])
            seen.add(name)

    def _experiment(self, tree: Tree) -> Experiment | None:
        sections, problems = _sections(tree.data, self.registry)
        problems = [*tree.problems, *problems, *contradictions(sections, self.registry)]
        self._report(tree, problems)
        return None if problems else Experiment(**sections)

    def _report(self, tree: Tree, problems: Iterable[Problem]) -> None:
        for problem in problems:
            origin = tree.origin(problem.path) if problem.path else Origin()
            if origin.flag:
                place = origin.flag
            else:
                place = f"{self.path}:{locator.locate(self.positions, origin.path)}"
            path = spelled(problem.path)
            self.lines[f"{place}: {path}: {problem.message}" if path else f"{place}: {problem.message}"] = (
                None
            )


def _in_force(override: Override, device: str) -> str:
    source = (
        "--set"
        if override.origin.flag
        else {"on": f"[on.{device}]", "grid": "[grid]"}[str(override.origin.path[0])]
    )
    return f"{spelled(override.path)} = {_short(override.value)} ({source})"


def _sections(data: Mapping[str, Any], registry: Registry) -> tuple[dict[str, Any], list[Problem]]:
    """Structure each top-level key by itself, so that one mistake hides no other.

    Returns the sections that are right, defaults included, and the problems of the others.
    """
    fields = attrs.fields_dict(attrs.resolve_types(Experiment))
    data = {"data": {"plugin": "licenses"}, "optimizer": {"plugin": "AdamW"}, **data}
    if isinstance(data["data"], dict):
        data["data"] = data_options({"plugin": "licenses", **data["data"]})
    sections = {key: field.default for key, field in fields.items() if key not in data and key != "name"}
    problems: list[Problem] = []
    for key, value in data.items():
        if key not in fields:
            known = [*fields, *DRIVER_KEYS]
            found = suggestion(key, known) or f"; the keys are: {', '.join(known)}"
            problems.append(Problem((key,), f"unknown key {key!r}{found}"))
            continue
        section, wrong = structure(value, fields[key].type, registry, (key,))
        if not wrong and fields[key].validator is not None:
            wrong = _validated(fields[key], section)
        problems += [_without_source(problem) for problem in wrong]
        if not wrong:
            sections[key] = section
    if "name" not in data:
        problems.append(Problem((), 'name: is required and missing; add name = "..." at the top'))
    return sections, problems


def _validated(field: Any, value: Any) -> list[Problem]:
    try:
        field.validator(None, field, value)
    except ValueError as error:
        return [Problem((field.name,), str(error))]
    return []


def _without_source(problem: Problem) -> Problem:
    """Drop the inner step of DataOptions, which a file does not write."""
    if problem.path[:2] == ("data", "source"):
        return Problem(("data", *problem.path[2:]), problem.message)
    return problem


# --- what no single field can know -------------------------------------------------------------------


def contradictions(sections: Mapping[str, Any], registry: Registry) -> list[Problem]:
    """Return the problems between sections, as far as the sections given are right by themselves."""
    problems = []
    for kind in ("monitor", "fallback"):
        names = [choice.plugin for choice in sections.get(kind, ())]
        problems += [
            Problem((kind, index), f"{name!r} is listed twice; keep one")
            for index, name in enumerate(names)
            if name in names[:index]
        ]
    if "model" in sections and "data" in sections:
        problems += _rule_problems(sections, registry)
        problems += _freeze_problems(sections)
    return problems


def _rule_problems(sections: Mapping[str, Any], registry: Registry) -> list[Problem]:
    quantize, model = sections.get("quantize"), sections["model"]
    if quantize is None:
        return []
    layers = shapes.linear_shapes(model, sections["data"].vocab_size)
    try:
        rules.plan(quantize, layers, rules.tied_layers(model), registry)
    except FieldError as error:
        return [Problem(("quantize", *error.path), str(error))]
    return []


def _freeze_problems(sections: Mapping[str, Any]) -> list[Problem]:
    names = shapes.parameter_shapes(sections["model"], sections["data"].vocab_size)
    patterns = sections["train"].freeze if "train" in sections else ()
    return [
        Problem(
            ("train", "freeze", index), f"{pattern!r} matches no parameter; there are: {', '.join(names)}"
        )
        for index, pattern in enumerate(patterns)
        if not any(re.fullmatch(pattern, name) for name in names)
    ]


# --- names of cells ----------------------------------------------------------------------------------


def cell_name(overrides: Sequence[Override]) -> str:
    """Return a folder name that says what varies; it depends on this cell's values alone."""
    if not overrides:
        return SINGLE
    name = ",".join(f"{_axis(override.path)}={_short(override.value)}" for override in overrides)
    name = re.sub(r"[^\w.,=+()-]+", "_", name)
    if len(name) <= _LONGEST_CELL_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:10]
    return f"{name[: _LONGEST_CELL_NAME - 11]}-{digest}"


def _axis(path: Path) -> str:
    return str(path[-1]) if len(path) > 1 else str(path[0])


def _short(value: Any) -> str:
    if isinstance(value, dict):
        rest = [f"{key}={_short(inner)}" for key, inner in value.items() if key != "plugin"]
        name = str(value.get("plugin", ""))
        return f"{name}({','.join(rest)})" if rest else name
    if isinstance(value, list):
        return "+".join(map(_short, value))
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
