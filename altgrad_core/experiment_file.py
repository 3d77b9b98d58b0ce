"""Experiment files: TOML in, resolved experiments out, every mistake of the file in one go.

A file describes one run, or a grid of runs. It is checked under every device overlay, cell by cell, before
torch is imported; each problem is reported as `file:line: path: what is wrong`.
"""

from __future__ import annotations

import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from altgrad_core import locator, toml_file
from altgrad_core.axes import axes, cell_name
from altgrad_core.compare import Comparison
from altgrad_core.comparison_groups import expanded
from altgrad_core.driver_tables import DRIVER_KEYS, DRIVER_TABLES, driver_tables
from altgrad_core.experiment import DEFAULT_PLUGINS, Cell, Experiment
from altgrad_core.mistakes import ExperimentError, Mistakes, one_line
from altgrad_core.options import ExecutorChoice, Path, written
from altgrad_core.overrides import Override, Tree, from_flag, from_table, spelled
from altgrad_core.registry import Registry, UsageError, discover
from altgrad_core.sections import Sections
from altgrad_core.structuring import Problem
from altgrad_core.wording import listed, shown, suggestion

DEVICES = ("cpu", "cuda")


@attrs.frozen(kw_only=True)
class ExperimentFile:
    """A file that was read and found right under every device overlay."""

    path: pathlib.Path
    text: str
    name: str
    registry: Registry
    cells_on: Mapping[str, tuple[Cell, ...]]
    """The cells, by device: `cpu`, `cuda`. Of a comparison one for each group, of no seed and factor yet."""
    executor: ExecutorChoice = ExecutorChoice("local")
    """How the cells of a grid are run."""
    comparison: Comparison | None = None
    """What a file with [compare] compares."""
    baseline: str = ""
    """The folder of the run that summaries compare with; empty: none."""
    flags: tuple[str, ...] = ()
    """The `key=value` overrides that it was read with."""


def load_experiment(
    path: str | pathlib.Path, overrides: Sequence[str] = (), registry: Registry | None = None
) -> ExperimentFile:
    """Read an experiment file with `key=value` overrides. Raises ExperimentError with every problem."""
    path = pathlib.Path(path)
    flags, bad_flags = _flags(overrides)
    text, raw = toml_file.read(path)
    registry = discover() if registry is None else registry
    checked = _Checked(
        raw=raw,
        flags=flags,
        registry=registry,
        mistakes=Mistakes(path, locator.lines(text)),
        sections=Sections(registry),
    )
    cells_on = {device: checked.cells(device) for device in DEVICES}
    if lines := [*checked.mistakes.lines(), *bad_flags]:
        raise ExperimentError(lines)
    return ExperimentFile(
        path=path,
        text=text,
        name=cells_on[DEVICES[0]][0].experiment.name,
        registry=registry,
        cells_on=cells_on,
        executor=checked.driver["executor"] or ExecutorChoice("local"),
        comparison=checked.comparison,
        baseline=checked.driver["baseline"] or "",
        flags=tuple(overrides),
    )


def _flags(texts: Sequence[str]) -> tuple[list[Override], list[str]]:
    flags, wrong = [], []
    for text in texts:
        try:
            flags.append(from_flag(text))
        except UsageError as error:
            wrong.append(one_line(str(error)))
    return flags, wrong


@attrs.define
class _Checked:
    """One file on its way to cells."""

    raw: dict[str, Any]
    flags: list[Override]
    registry: Registry
    mistakes: Mistakes
    sections: Sections
    comparison: Comparison | None = None
    driver_tree: Tree | None = None

    @functools.cached_property
    def driver(self) -> dict[str, Any]:
        """What the file says of how the runs are run; None: nothing."""
        found, problems, self.driver_tree = driver_tables(self.raw, self.flags, self.registry)
        self.mistakes.add(problems, self.driver_tree)
        return found

    def cells(self, device: str) -> tuple[Cell, ...]:
        """Return the cells of the file on this device, as far as they are right."""
        overlay = self._overlay(device)
        varied = [axis for axis in self._axes() if not self._flagged(axis[0].path)]
        self._refuse(overlay, varied)
        base = Tree(_with_default_plugins(self.raw))
        base.apply(overlay)
        build = functools.partial(self._cell, base, [_in_force(one, device) for one in overlay])
        if self.driver["compare"] is not None:
            return self._compared(varied, build)
        found = [build(values) for values in itertools.product(*varied)]
        cells = [cell for cell in found if cell is not None]
        if not self.mistakes.found:
            self.mistakes.add(_twins(cells))
        return tuple(cells)

    def _cell(
        self,
        base: Tree,
        in_force: Sequence[str],
        values: Sequence[Override],
        changes: Sequence[Override] = (),
    ) -> Cell | None:
        """Return the cell of a combination of values, with changes on top of all; None: it is wrong."""
        flags = [flag for flag in self.flags if flag.path[0] not in DRIVER_TABLES]
        tree = base.copy()
        for overrides in (values, flags, changes):
            tree.apply(overrides)
        experiment = self._experiment(tree)
        if experiment is None:
            return None
        more = (_in_force(one) for one in (*values, *flags, *changes))
        return Cell(name=cell_name(values), experiment=experiment, in_force=(*in_force, *more))

    def _compared(
        self, varied: Sequence[Sequence[Override]], build: Callable[..., Cell | None]
    ) -> tuple[Cell, ...]:
        """Return a cell for each group of a comparison, which must be the same on every device."""
        for flag in self.flags:
            if flag.path == ("seed",):
                message = "[compare] gives the seeds; --set compare.seeds=[...]"
                self.mistakes.add([Problem(flag.path, message)], Tree({}, {flag.path: flag.origin}))
        comparison, cells, problems = expanded(self.driver["compare"], varied, build, self.registry)
        self.mistakes.add(problems, self.driver_tree)
        if self.mistakes.found or comparison is None:
            return ()
        self.mistakes.add(_twins(cells, [group.step_of for group in comparison.groups]))
        if self.comparison not in (None, comparison):
            message = "what is compared is not the same under [on.cpu] and [on.cuda]; make it the same"
            self.mistakes.add([Problem(("compare",), message)])
        self.comparison = comparison
        return cells

    def _overlay(self, device: str) -> list[Override]:
        """Return the overrides of `[on.*]` for this device."""
        overlays = self.raw.get("on", {})
        if not isinstance(overlays, dict):
            self.mistakes.add([Problem(("on",), "expected tables [on.cpu] or [on.cuda]")])
            return []
        for key, table in overlays.items():
            if key not in DEVICES:
                hint = suggestion(key, DEVICES) or f"; there are: {listed(DEVICES)}"
                self.mistakes.add([Problem(("on", key), f"unknown device {key!r}{hint}")])
            elif not isinstance(table, dict):
                self.mistakes.add([Problem(("on", key), f"expected a table, got {shown(table)}")])
        table = overlays.get(device, {})
        try:
            return list(from_table(table, ("on", device))) if isinstance(table, dict) else []
        except ValueError as error:
            self.mistakes.add([Problem(("on", device), str(error))])
            return []

    def _axes(self) -> list[list[Override]]:
        grid = self.raw.get("grid", {})
        if not isinstance(grid, dict):
            self.mistakes.add([Problem(("grid",), "expected a table of lists")])
            return []
        try:
            found, problems = axes(grid)
        except ValueError as error:
            self.mistakes.add([Problem(("grid",), str(error))])
            return []
        self.mistakes.add(problems)
        return found

    def _refuse(self, overlay: Sequence[Override], varied: Sequence[Sequence[Override]]) -> None:
        """Refuse overrides that would put two runs into one folder."""
        for override in (*overlay, *itertools.chain(*varied)):
            if override.path[0] == "name":
                message = "names the folder of every run; set it at the top of the file"
                self.mistakes.add([Problem(override.origin.path, message)])

    def _flagged(self, axis: Path) -> bool:
        """Whether a `--set` gives every cell one value along the axis, which is then no axis."""
        return any(axis[: len(flag.path)] == flag.path for flag in self.flags)

    def _experiment(self, tree: Tree) -> Experiment | None:
        sections, problems = self.sections.structured(tree.data)
        problems = [*tree.problems, *problems]
        self.mistakes.add(problems, tree)
        return None if problems else Experiment(**sections)


def _with_default_plugins(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tables of a run, with the plugins that [data] and [optimizer] need not name.

    A name alone becomes the table that `--set optimizer.lr=...` goes into.
    """
    data = {key: value for key, value in raw.items() if key not in DRIVER_KEYS}
    for key, plugin in DEFAULT_PLUGINS.items():
        table = data.get(key, {})
        if isinstance(table, str):
            data[key] = {"plugin": table}
        elif isinstance(table, dict):
            data[key] = {"plugin": plugin, **table}
    return data


def _twins(cells: Sequence[Cell], told_apart: Sequence[str] = ()) -> list[Problem]:
    """Refuse cells that are the same run, or would share a folder; `told_apart` may tell equal ones apart."""
    seen: dict[str | tuple[str, ...], str] = {}
    texts: dict[int, str] = {}
    twins = []
    for cell, mark in zip(cells, told_apart or [""] * len(cells), strict=True):
        keys = (cell.name, (*_texts(cell.experiment, texts), mark))
        if twin := next((seen[key] for key in keys if key in seen), None):
            twins.append((twin, cell.name))
        seen |= dict.fromkeys(keys, cell.name)
    if not twins:
        return []
    more = f"; so are {len(twins) - 1} more pairs" if len(twins) > 1 else ""
    message = f"the cells {twins[0][0]} and {twins[0][1]} are the same run{more}; remove one value"
    return [Problem(("grid",), message)]


def _texts(experiment: Experiment, known: dict[int, str]) -> Iterator[str]:
    """Yield the options of a run as text, section by section; `known`: those of sections seen before."""
    for field in attrs.fields(Experiment):
        section = getattr(experiment, field.name)
        if id(section) not in known:
            known[id(section)] = written(section)
        yield known[id(section)]


def _in_force(override: Override, device: str = "") -> str:
    source = {"on": f"[on.{device}]", "grid": "[grid]", "compare": "[compare]"}
    written_in = "--set" if override.origin.flag else source[str(override.origin.path[0])]
    return f"{spelled(override.path)} = {written(override.value)} ({written_in})"
