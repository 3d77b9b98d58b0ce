"""`[compare]`: what a report may claim, written before the runs. No torch.

The runs of a comparison come in groups, which differ inside in seed and step size alone:

- an arm has a group in each combination of the other axes of [grid];
- a reference has one in each combination of the axes that it leaves open, with the baseline's optimizer;
- an arm with a stiffness has one per format on float32 weights, with `of_format`. What the arm does there it
  does as an optimizer, not by geometry: a report takes it away. The weights that [quantize] covers, and their
  bound, stay what they are, so that only how they are stored differs.

A group's name says its values alone, so that the same run is never two groups: a reference `fp32` of the file
is the baseline's group at "FP32" of a grid that has this value, and where nothing is quantised no other
options of [quantize] tell groups apart than which weights it covers and their bound.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import attrs

from altgrad_core.experiment import Cell, Experiment
from altgrad_core.options import Choice, FieldError, StiffnessChoice, at_least, option, plain
from altgrad_core.quantize_options import UNQUANTISED, QuantizeOptions, RuleOptions
from altgrad_core.registry import Registry, listed, shown
from altgrad_core.rules import covers
from altgrad_core.tuning import MOST_EXTENSIONS, rounded
from altgrad_core.validation_metrics import more_is_better


def _some(_: Any, field: Any, value: Sequence[Any]) -> None:
    if not value:
        raise ValueError("expected a list with at least one value, got []")
    if twice := [one for one in value if list(value).count(one) > 1]:
        raise ValueError(f"{shown(twice[0])} is listed twice; keep one")


def _factors(_: Any, field: Any, value: Sequence[float]) -> None:
    _some(_, field, value)
    if bad := [one for one in value if one <= 0]:
        raise ValueError(f"expected factors above 0, got {shown(bad[0])}")


def _seeds(_: Any, field: Any, value: Sequence[int]) -> None:
    _some(_, field, value)
    if bad := [one for one in value if one < 0]:
        raise ValueError(f"expected seeds of 0 or more, got {shown(bad[0])}")


@attrs.frozen(kw_only=True)
class CompareOptions:
    """The table `[compare]`."""

    arm: str = option("the axis of [grid] whose values are compared")
    baseline: int = option(
        "index of the arm that the others are compared with", default=0, validator=at_least(0)
    )
    tune: tuple[float, ...] = option(
        "factors on each arm's own step size; a single one is taken as it is",
        default=(0.25, 0.5, 1.0, 2.0, 4.0),
        validator=_factors,
    )
    tune_seeds: tuple[int, ...] = option(
        "seeds that each arm's best factor is chosen on", default=(1, 2), validator=_seeds
    )
    seeds: tuple[int, ...] = option(
        "seeds that the arms are compared on", default=(3, 4, 5, 6, 7), validator=_seeds
    )
    metric: str = option(
        "what is compared, at the end of a run; less is better, but of an F1", default="validation/loss"
    )
    smallest_effect: float = option(
        "smaller differences count as none", unit="nats", default=0.005, validator=at_least(0)
    )
    references: dict[str, dict[str, Any]] = option(
        "runs beside the arms, on every seed: name to what is different", default=attrs.Factory(dict)
    )

    def __attrs_post_init__(self) -> None:
        if both := sorted(set(self.tune_seeds) & set(self.seeds)):
            raise FieldError(
                "seeds",
                f"{both[0]} is one of tune_seeds too: what was chosen on a seed is not compared on it; "
                "take other seeds",
            )
        if empty := next((name for name, table in self.references.items() if not table), None):
            raise FieldError(("references", empty), "changes nothing, so it is no reference; remove it")

    @property
    def tuned(self) -> bool:
        """Whether there is a choice of factors."""
        return len(self.tune) > 1

    @property
    def digest(self) -> str:
        """Identify the table, defaults included."""
        return hashlib.sha256(json.dumps(plain(self), sort_keys=True, default=str).encode()).hexdigest()


@attrs.frozen(kw_only=True)
class Role:
    """What a group of runs is there for; the same runs may serve several ends."""

    kind: Literal["arm", "reference", "intrinsic"]
    """`intrinsic`: an arm on float32 weights."""
    arm: int
    at: Mapping[str, Any] = attrs.field(factory=dict)
    """The combination of the other axes, as far as the group hangs on it."""
    format: Any = None
    """The format of the weights, of an intrinsic group that of the geometry, as a file writes it in full."""
    reference: str = ""


@attrs.frozen(kw_only=True)
class Group:
    """Runs that differ in seed and step size alone."""

    name: str
    roles: tuple[Role, ...]
    step_of: str = ""
    """Name of the group whose step size these runs take; empty: they have one of their own."""

    def run(self, seed: int, factor: float) -> str:
        """Return the name of a run's folder."""
        return f"{self.name},seed={seed},step={rounded(factor)!r}"

    def run_named(self, name: str) -> tuple[int, float] | None:
        """Return seed and factor of the run with that name, None where it is none of this group."""
        found = re.fullmatch(rf"{re.escape(self.name)},seed=(\d+),step=([\d.e+-]+)", name)
        return (int(found[1]), float(found[2])) if found else None


@attrs.frozen(kw_only=True)
class Comparison:
    """A file's `[compare]` and the groups of runs that it takes, in the order of the file's cells."""

    options: CompareOptions
    arms: tuple[str, ...]
    """The values of the axis, as a person would name them."""
    groups: tuple[Group, ...]

    @functools.cached_property
    def positions(self) -> dict[str, int]:
        """Name of a group to its place, which is that of its cell in the file's cells."""
        return {group.name: index for index, group in enumerate(self.groups)}

    def tuning_runs(self, group: Group) -> int:
        """Return how many runs choose a group's step size, as long as its best is not on the edge."""
        own = self.options.tuned and not group.step_of
        return len(self.options.tune) * len(self.options.tune_seeds) if own else 0

    def runs(self, group: Group) -> int:
        return self.tuning_runs(group) + len(self.options.seeds)

    def plan(self) -> Iterator[tuple[str, str]]:
        """Yield what is going to be run, as pairs of name and text."""
        options, groups = self.options, self.groups
        own = [group for group in groups if self.tuning_runs(group)]
        most = MOST_EXTENSIONS * len(options.tune_seeds) * len(own)
        yield "compared", f"{len(self.arms)} arms of {options.arm}; baseline {self.arms[options.baseline]}"
        better = ", more is better," if more_is_better(options.metric) else ""
        yield "by", f"{options.metric}{better} on seeds {listed(map(str, options.seeds))}"
        yield (
            "tuning",
            f"{sum(map(self.tuning_runs, groups))} runs: {len(own)} x {len(options.tune)} step sizes x "
            f"{len(options.tune_seeds)} seeds; up to {most} more where the best is the first or last"
            if own
            else "none: a single factor leaves nothing to choose",
        )
        for kind, label in (("arm", "comparison"), ("reference", "references"), ("intrinsic", "float32")):
            of_kind = [group for group in groups if group.roles[0].kind == kind]
            seeds = len(options.seeds)
            why = " (of_format on float32 weights)" if kind == "intrinsic" else ""
            yield label, f"{len(of_kind) * seeds} runs: {len(of_kind)} x {seeds} seeds{why}"
        yield "hash", options.digest


def step_option(choice: Choice) -> str | None:
    """Return which option of an optimizer is its step size: what its class calls `step_size`, else lr."""
    declared = getattr(type(choice.options), "step_size", None)
    name = declared if isinstance(declared, str) else "lr"
    return name if hasattr(choice.options, name) else None


def step_size(experiment: Experiment, factor: float) -> float:
    """Return a factor times the step size; nan where there is none."""
    name = step_option(experiment.optimizer)
    return rounded(getattr(experiment.optimizer.options, name) * factor) if name else math.nan


def stepped(experiment: Experiment, size: float) -> Experiment:
    """Return the experiment with another step size. Raises ValueError where its optimizer takes no such."""
    choice, name = experiment.optimizer, step_option(experiment.optimizer)
    assert name is not None
    if not 0 < size < math.inf:
        raise ValueError(f"expected more than 0 and a finite number, got {size!r}")
    options = attrs.evolve(choice.options, **{name: size})
    return attrs.evolve(experiment, optimizer=attrs.evolve(choice, options=options))


def at(base: Cell, group: Group, seed: int, factor: float, step_source: Cell) -> Cell:
    """Return a group's run: `base` on a seed, its step size `factor` times that of `step_source`.

    Its last evaluation reads the whole validation split. Raises ValueError where its optimizer takes no such
    step size.
    """
    experiment, name = base.experiment, step_option(base.experiment.optimizer)
    size = step_size(step_source.experiment, factor)
    changed = attrs.evolve(
        stepped(experiment, size),
        seed=seed,
        train=attrs.evolve(experiment.train, final_eval_batches=0),
    )
    in_force = (*base.in_force, f"seed = {seed} ([compare])", f"optimizer.{name} = {size:g} ([compare])")
    return Cell(name=group.run(seed, factor), experiment=changed, in_force=in_force)


def unquantised(quantize: QuantizeOptions) -> bool:
    """Whether a [quantize] table quantises nothing."""
    formats = [quantize.format, quantize.activations.format, quantize.gradients.format]
    formats += [
        one
        for rule in quantize.rule
        for one in (rule.format, rule.activations, rule.gradients)
        if one is not None
    ]
    return all(one.unquantised for one in formats)


ON_FLOAT32 = ("bound", "rule")
"""Options of [quantize] that matter where nothing is quantised: rules say which weights are covered."""


def on_float32(experiment: Experiment, quantize: QuantizeOptions, registry: Registry) -> Experiment:
    """Return the experiment with nothing quantised; `quantize` covers the weights that it did."""
    rule = tuple(
        RuleOptions(layers=one.layers, format=None if covers(one, registry) else UNQUANTISED)
        for one in quantize.rule
    )
    if all(one.format is None for one in rule):
        rule = ()
    float32 = QuantizeOptions(format=UNQUANTISED, bound=quantize.bound, rule=rule)
    return attrs.evolve(experiment, quantize=float32)


def stiffness_option(choice: Choice) -> str | None:
    """Return which option of an optimizer is a stiffness; None: it has none."""
    return next((name for name, value in _items(choice.options) if isinstance(value, StiffnessChoice)), None)


def _items(options: Any) -> Iterator[tuple[str, Any]]:
    for field in attrs.fields(type(options)):
        yield field.name, getattr(options, field.name)
