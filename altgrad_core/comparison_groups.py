"""From the axes of a grid and its `[compare]` to groups of runs, with what is wrong with them. No torch.

An arm with `step_of = k` takes the step size that arm k was tuned to, and so do its runs on float32 weights,
where arm k then has runs too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs

from altgrad_core.arms import HERE, STEP_OF, Arm, arm_axis, arm_of, arm_problems
from altgrad_core.axes import cell_name, short
from altgrad_core.compare import (
    CompareOptions,
    Comparison,
    Group,
    Role,
    is_on_float32,
    matter_on_float32,
    on_float32,
    step_option,
    step_size,
    stepped,
    stiffness_option,
    with_geometry,
)
from altgrad_core.contradictions import contradictions
from altgrad_core.experiment import Cell, Experiment
from altgrad_core.options import Path, default_of, plain, written
from altgrad_core.overrides import Origin, Override, from_table, spelled
from altgrad_core.partial import is_whole, known
from altgrad_core.quantize_options import QuantizeOptions
from altgrad_core.registry import Registry
from altgrad_core.rules import covers
from altgrad_core.structuring import Problem
from altgrad_core.validation_metrics import METRICS
from altgrad_core.wording import listed, suggestion

_FLOAT32 = Override(("quantize", "format"), "FP32", Origin(HERE))

Build = Callable[[Sequence[Override], Sequence[Override]], Cell | None]
"""Values of the axes, and changes on top of all others, to a cell; None where something is wrong with it."""


def expanded(
    options: CompareOptions, axes: Sequence[Sequence[Override]], build: Build, registry: Registry
) -> tuple[Comparison | None, tuple[Cell, ...], list[Problem]]:
    """Return the groups of runs that a comparison takes, each with a cell of the file's own seed and step.

    Where its table has mistakes, that is none; `build` is told all the same of what the runs would be.
    """
    position, problems = arm_axis(options, axes)
    arms = [] if position is None else [arm_of(value) for value in axes[position]]
    problems += known(arm_problems(options, arms))
    if position is None or problems or not is_whole(options):
        made = [build([arm_of(one).own for one in values], ()) for values in itertools.product(*axes)]
        built = [cell for cell in made if cell is not None]
        return None, (), [*problems, *known(_metric_problems(options, built))]
    making = _Making(options, arms, position, axes, build, registry)
    making.make()
    groups = tuple(group for group, _ in making.found.values())
    cells = tuple(cell for _, cell in making.found.values())
    names = tuple(short(arm.given.value) for arm in arms)
    comparison = Comparison(options=options, arms=names, groups=groups, notes=tuple(making.notes))
    return comparison, cells, [*making.problems, *known(_metric_problems(options, cells))]


@attrs.define
class _Making:
    """Groups as they are found, each once."""

    options: CompareOptions
    arms: Sequence[Arm]
    position: int
    axes: Sequence[Sequence[Override]]
    build: Build
    registry: Registry
    found: dict[str, tuple[Group, Cell]] = attrs.field(factory=dict)
    problems: list[Problem] = attrs.field(factory=list)
    notes: dict[str, None] = attrs.field(factory=dict)
    """What a reader of the comparison should know, each once."""
    built: dict[tuple[Path, ...], Cell | None] = attrs.field(factory=dict)

    def make(self) -> None:
        """Find the groups of the arms, of the references, and of the arms on float32 weights."""
        others = [axis for index, axis in enumerate(self.axes) if index != self.position]
        combinations = [list(values) for values in itertools.product(*others)]
        for values, index in itertools.product(combinations, range(len(self.arms))):
            self._arm(index, values)
        for name, values in itertools.product(self.options.references, combinations):
            self._reference(name, values)
        for values, index in itertools.product(combinations, range(len(self.arms))):
            if self.problems:
                return
            self._intrinsic(index, values)

    def _arm(self, index: int, others: Sequence[Override]) -> str:
        """Add an arm's group in a combination of the other axes; returns its name."""
        arm, cell = self.arms[index], self._cell(index, others)
        if cell is None or not self._has_step(arm, cell.experiment):
            return ""
        of = "" if arm.step_of is None else self._arm(arm.step_of, others)
        source = self.found[of][1].experiment if of else cell.experiment
        if of and not self._fits(arm, cell.experiment, source):
            return ""
        if not self._takes_steps(arm, cell.experiment, source):
            return ""
        quantize = cell.experiment.quantize
        format = None if quantize is None else quantize.format.plain()
        role = Role(kind="arm", arm=index, at=_shown(others), format=format)
        return self._add(role, cell, self._with(arm.given, others), of)

    def _reference(self, name: str, others: Sequence[Override]) -> None:
        place = (*HERE, "references", name)
        try:
            changes = list(from_table(self.options.references[name], place))
        except ValueError as error:
            self.problems.append(Problem(place, str(error)))
            return
        values = self._with(self.arms[self.options.baseline].own, others)
        arm, cell = self.arms[self.options.baseline], self.build(values, changes)
        if cell is None or not self._has_step(arm, cell.experiment):
            return
        if not self._takes_steps(arm, cell.experiment, cell.experiment):
            return
        cell = attrs.evolve(cell, experiment=self._freed(name, cell.experiment, changes))
        left = self._open(others, changes, cell.experiment.quantize)
        role = Role(kind="reference", arm=self.options.baseline, at=_shown(left), reference=name)
        self._add(role, cell, _substituted(values, changes))

    def _freed(self, name: str, experiment: Experiment, changes: Sequence[Override]) -> Experiment:
        """Return a reference; what it puts on float32 is all of the weights that [quantize] covers.

        Those of the file's rules with formats of their own are, too, unless it lists rules itself.
        """
        quantize, paths = experiment.quantize, [change.path for change in changes]
        if quantize is None or not quantize.format.unquantized or is_on_float32(quantize, self.registry):
            return experiment
        if _FLOAT32.path not in paths or ("quantize", "rule") in paths:
            return experiment
        where = listed(
            f"{rule.layers!r} ({short(rule.format.plain())})"
            for rule in quantize.rule
            if rule.format is not None and covers(rule, self.registry)
        )
        self._note(f"{name} has the weights of the rules for {where} on float32 too")
        freed = on_float32(experiment, quantize, self.registry)
        self._refuse(self.arms[self.options.baseline], freed)
        return freed

    def _intrinsic(self, index: int, others: Sequence[Override]) -> None:
        """Add an arm's group on float32 weights, and that of the arm whose step size it takes."""
        arm, cell = self.arms[index], self._cell(index, others)
        if cell is None or stiffness_option(cell.experiment.optimizer) is None:
            return
        quantize = cell.experiment.quantize
        if quantize is None or quantize.format.unquantized:
            return
        of = "" if arm.step_of is None else self._on_float32(arm.step_of, others)
        if of or arm.step_of is None:
            self._on_float32(index, others, of)

    def _on_float32(self, index: int, others: Sequence[Override], step_of: str = "") -> str:
        arm, cell = self.arms[index], self._cell(index, others)
        if cell is None or cell.experiment.quantize is None:
            return ""
        format = cell.experiment.quantize.format
        try:
            choice, place = with_geometry(cell.experiment.optimizer, format)
        except ValueError as error:
            self._note(f"{short(arm.given.value)} has no run on float32 weights: {error}")
            return ""
        experiment = on_float32(
            cell.experiment, cell.experiment.quantize, self.registry, own_geometry=bool(place)
        )
        experiment = attrs.evolve(experiment, optimizer=choice)
        self._refuse(arm, experiment)
        changes = [_FLOAT32, *([Override(place, format.plain(), Origin(HERE))] if place else [])]
        shown = (f"{spelled(one.path)} = {written(one.value)} ([compare])" for one in changes)
        made = attrs.evolve(cell, experiment=experiment, in_force=(*cell.in_force, *shown))
        at = _shown(_mattering(others, experiment.quantize))
        role = Role(kind="intrinsic", arm=index, at=at, format=format.plain())
        return self._add(role, made, [*self._with(arm.given, others), *changes[1:]], step_of)

    def _open(
        self, values: Sequence[Override], changes: Sequence[Override], quantize: QuantizeOptions | None
    ) -> list[Override]:
        """Return the values that a reference leaves as they are."""
        left = [
            value
            for value in values
            if not any(value.path[: len(change.path)] == change.path for change in changes)
        ]
        on_float32 = quantize is not None and is_on_float32(quantize, self.registry)
        return _mattering(left, quantize) if on_float32 else left

    def _note(self, text: str) -> None:
        self.notes[text] = None

    def _add(self, role: Role, cell: Cell, values: Sequence[Override], step_of: str = "") -> str:
        experiment, quantize = cell.experiment, cell.experiment.quantize
        if quantize is not None and is_on_float32(quantize, self.registry):
            experiment = on_float32(experiment, quantize, self.registry)
            values = _float32_values(values, experiment)
        name = cell_name(values)
        group, cell = self.found.get(
            name,
            (
                Group(name=name, roles=(), step_of=step_of),
                attrs.evolve(cell, name=name, experiment=experiment),
            ),
        )
        if role not in group.roles:
            group = attrs.evolve(group, roles=(*group.roles, role))
        if cell.experiment != experiment:
            message = f"its runs called {name} would be two different ones; vary less, or compare them apart"
            self.problems.append(Problem(HERE, message))
        self.found[name] = group, cell
        return name

    def _cell(self, index: int, others: Sequence[Override]) -> Cell | None:
        """Return the cell of an arm in a combination of the other axes."""
        values = self._with(self.arms[index].own, others)
        key = tuple(value.origin.path for value in values)
        if key not in self.built:
            self.built[key] = self.build(values, ())
        return self.built[key]

    def _with(self, arm: Override, others: Sequence[Override]) -> list[Override]:
        return [*others[: self.position], arm, *others[self.position :]]

    def _has_step(self, arm: Arm, experiment: Experiment) -> bool:
        """Whether an arm's optimizer has a step size; a problem where it has not."""
        choice = experiment.optimizer
        if step_option(choice) is not None:
            return True
        message = f"{choice.plugin} has no step size for [compare] to tune: neither step_size nor lr"
        self.problems.append(Problem(arm.given.origin.path, message))
        return False

    def _takes_steps(self, arm: Arm, own: Experiment, source: Experiment) -> bool:
        """Whether an arm's optimizer takes each factor on the step size of `source`; a problem where not."""
        for factor in self.options.tune:
            size = step_size(source, factor)
            try:
                stepped(own, size)
            except ValueError as error:
                product = f"{step_size(source, 1.0)!r} x {factor!r}"
                message = f"[compare] tunes {step_option(own.optimizer)}: {error} ({product})"
                self.problems.append(Problem(arm.given.origin.path, message))
                return False
        return True

    def _fits(self, arm: Arm, own: Experiment, other: Experiment) -> bool:
        """Whether one arm can take the other's step size; a problem where it cannot."""
        names = step_option(own.optimizer), step_option(other.optimizer)
        place = (*arm.given.origin.path, STEP_OF)
        if names[0] != names[1]:
            message = (
                f"arm {arm.step_of} has a step size called {names[1]}, {own.optimizer.plugin} {names[0]}"
            )
        elif isinstance(arm.own.value, dict) and names[0] in arm.own.value:
            message = f"takes the {names[0]} of arm {arm.step_of}; leave {names[0]} out"
        else:
            return True
        self.problems.append(Problem(place, message))
        return False

    def _refuse(self, arm: Arm, experiment: Experiment) -> None:
        """Note what contradicts float32 weights in an experiment."""
        for problem in contradictions(attrs.asdict(experiment, recurse=False), self.registry):
            message = f"on float32 weights, as [compare] runs it: {spelled(problem.path)}: {problem.message}"
            self.problems.append(Problem(arm.given.origin.path, message))


def _shown(values: Sequence[Override]) -> dict[str, Any]:
    return {spelled(value.path): value.value for value in values}


def _mattering(values: Sequence[Override], quantize: QuantizeOptions | None) -> list[Override]:
    """Return the values that tell runs on float32 weights apart."""
    matter = () if quantize is None else matter_on_float32(quantize)
    return [one for one in values if one.path[0] != "quantize" or set(one.path[1:2]) & set(matter)]


def _substituted(values: Sequence[Override], changes: Sequence[Override]) -> list[Override]:
    """Return values with changes in their places; a change of a table takes those inside of it away."""
    rest = {change.path: change for change in changes}
    kept = [
        rest.pop(value.path, value)
        for value in values
        if value.path in rest or not any(value.path[: len(path)] == path for path in rest)
    ]
    return [*kept, *rest.values()]


def _float32_values(values: Sequence[Override], experiment: Experiment) -> list[Override]:
    """Return values that name every run on float32 weights in the same way.

    Of what a value of [quantize] may have changed, they have what still matters and is no default.
    """
    named, quantize = [_FLOAT32], experiment.quantize
    for name in matter_on_float32(quantize) if quantize is not None else ():
        value, field = getattr(quantize, name), getattr(attrs.fields(QuantizeOptions), name)
        varied = any(one.path[:2] in (("quantize",), ("quantize", name)) for one in values)
        if varied and value != default_of(field, quantize):
            named.append(Override(("quantize", name), plain(value), Origin(HERE)))
    return [*named, *(one for one in values if one.path[0] != "quantize")]


def _metric_problems(options: CompareOptions, cells: Sequence[Cell]) -> Iterator[Problem]:
    """Refuse a metric that some run will not have, as far as its name tells."""
    place = (*HERE, "metric")
    source, _, quantity = options.metric.partition("/")
    for task in dict.fromkeys(cell.experiment.task for cell in cells):
        if source == "validation" and options.metric not in METRICS[task]:
            known = f"{listed(METRICS[task])} (task = {written(task)})"
            yield Problem(place, f"no evaluation gives {options.metric!r}; there are: {known}")
    if source in ("validation", "train", "epoch"):
        return
    for cell in cells:
        names = [choice.bare_name for choice in cell.experiment.monitor]
        if not quantity or source not in names:
            hint = suggestion(source, names) or "; add it, or compare validation/loss"
            yield Problem(place, f"no monitor {source!r} reports {options.metric!r}{hint}")
            return
