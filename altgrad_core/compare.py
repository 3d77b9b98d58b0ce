"""`[compare]`: what a report may claim, written before the runs. No torch.

The runs of a comparison come in groups, which differ inside in seed and step size alone:

- an arm has a group in each combination of the other axes of [grid];
- a reference has one in each combination of the axes that it leaves open, with the baseline's optimizer;
- an arm with a stiffness has one per format on float32 weights, with `of_format`. What the arm does there it
  does as an optimizer, not by geometry: a report takes it away. The weights that [quantize] covers, and their
  bound, stay what they are, so that only how they are stored differs: where a rule has a format of its own,
  its weights take that one's geometry. An optimizer that takes no `of_format` has none: `notes` say so.

A group's name says its values alone, so that the same run is never two groups: a reference `fp32` of the file
is the baseline's group at "FP32" of a grid that has this value, and on float32 weights no options of
[quantize] tell groups apart that are about how the weights it covers are stored.
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
from altgrad_core.options import (
    Choice,
    FieldError,
    FormatChoice,
    OptimizerChoice,
    Path,
    StiffnessChoice,
    at_least,
    option,
    plain,
)
from altgrad_core.quantize_options import UNQUANTIZED, QuantizeOptions, RuleOptions
from altgrad_core.registry import Registry
from altgrad_core.rules import covers
from altgrad_core.tuning import MOST_EXTENSIONS, rounded
from altgrad_core.validation_metrics import LOSS, more_is_better
from altgrad_core.wording import listed, shown


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
    metric: str = option("what is compared, at the end of a run; less is better, but of an F1", default=LOSS)
    smallest_effect: float = option(
        "smaller differences count as none, in the metric's own unit: nats for a loss",
        default=0.005,
        validator=at_least(0),
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
    notes: tuple[str, ...] = ()
    """What a reader should know of the groups: what they lack, what tells them apart beside their names."""

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
        for note in self.notes:
            yield "note", note
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


def is_on_float32(quantize: QuantizeOptions, registry: Registry) -> bool:
    """Whether the weights that a [quantize] table covers are all unquantized."""
    own = [rule for rule in quantize.rule if rule.format is not None and covers(rule, registry)]
    return quantize.format.unquantized and not own


_OF_OTHER_WEIGHTS = (
    *("granularity", "block", "block_scale", "scale_rule", "scale_mode", "amax", "margin"),
    *("rounding", "overflow", "clip_gradient"),
)


def matter_on_float32(quantize: QuantizeOptions) -> tuple[str, ...]:
    """Return the options of [quantize] that matter where the weights that it covers are on float32.

    Rules say which these are. What is no matter of theirs stays: flows, and weights that a rule puts into a
    wide format, such as a head in BF16.
    """
    others = any(rule.format is not None and not rule.format.unquantized for rule in quantize.rule)
    return ("bound", "rule", "activations", "gradients", *(_OF_OTHER_WEIGHTS if others else ()))


def on_float32(
    experiment: Experiment, quantize: QuantizeOptions, registry: Registry, *, own_geometry: bool = False
) -> Experiment:
    """Return the experiment with the weights that `quantize` covers on float32, and else as it is.

    own_geometry: whether weights with another format by a rule take the geometry of that format, instead of
        the one that the optimizer's stiffness names.
    """
    rule = tuple(_rule_on_float32(one, quantize, registry, own_geometry) for one in quantize.rule)
    if all(one == RuleOptions(layers=one.layers) for one in rule):
        rule = ()
    table = attrs.evolve(quantize, rule=rule, scale_mode=quantize.mode_in("master"))
    kept = {name: getattr(table, name) for name in matter_on_float32(table)}
    return attrs.evolve(experiment, quantize=QuantizeOptions(format=UNQUANTIZED, **kept))


def _rule_on_float32(
    rule: RuleOptions, quantize: QuantizeOptions, registry: Registry, own_geometry: bool
) -> RuleOptions:
    if not covers(rule, registry):
        return rule
    other = rule.format if own_geometry and rule.format != quantize.format else None
    return attrs.evolve(rule, format=None, storage=None, of_format=rule.of_format or other)


def with_geometry(choice: OptimizerChoice, format: FormatChoice) -> tuple[OptimizerChoice, Path]:
    """Return the optimizer with this `of_format`, and where that stands; as it is where that is so already.

    Raises ValueError where the optimizer takes no other geometry than that of its weights' own format.
    """
    name = stiffness_option(choice)
    if name is None:
        return choice, ()
    stiffness = getattr(choice.options, name)
    if stiffness.geometry.of_format is not None:
        return choice, ()
    geometry = attrs.evolve(stiffness.geometry, of_format=format)
    options = attrs.evolve(choice.options, **{name: attrs.evolve(stiffness, geometry=geometry)})
    return attrs.evolve(choice, options=options), ("optimizer", name, "of_format")


def stiffness_option(choice: Choice) -> str | None:
    """Return which option of an optimizer is a stiffness; None: it has none."""
    return next((name for name, value in _items(choice.options) if isinstance(value, StiffnessChoice)), None)


def _items(options: Any) -> Iterator[tuple[str, Any]]:
    for field in attrs.fields(type(options)):
        yield field.name, getattr(options, field.name)
