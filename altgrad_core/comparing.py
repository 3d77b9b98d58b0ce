"""Running a comparison: the tuning runs, the best step size of each group, then the runs that are compared.

What was chosen is never taken from an earlier command: it follows from the tuning runs' folders, so that a
command that was interrupted, a second one beside it, or one with more seeds finds the same and runs only what
is not there. `compare.json` tells a report which run is there for what; it is there before the first run, and
is written after each round.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import attrs

from altgrad_core import compare
from altgrad_core.compare import Comparison, Group
from altgrad_core.comparison_record import COMPARE, ComparisonRecord
from altgrad_core.experiment import Cell
from altgrad_core.experiment_file import DEVICES, ExperimentFile
from altgrad_core.grids import Request, over, run_grid
from altgrad_core.hookspecs import CellResult
from altgrad_core.interrupts import ASKED
from altgrad_core.options import plain
from altgrad_core.record import SUMMARY, read_json, refuse_unwritable
from altgrad_core.tuning import Tuning
from altgrad_core.validation_metrics import more_is_better

_Run: TypeAlias = tuple[str, int, float]
"""A run of a comparison: name of its group, seed, factor on the step size."""

_MEASURED = ("finished", "skipped", "stopped")
"""Outcomes after which a run's folder tells what came out."""
_UNDONE = (*ASKED, "busy")
"""Outcomes after which the command has come to its end."""


@attrs.define
class Comparing:
    """A comparison on its way; `results` are those of every run so far."""

    request: Request
    file: ExperimentFile
    jobs: int
    results: dict[str, CellResult] = attrs.field(factory=dict)
    unbegun: int = 0
    """Runs that the command was to do next when it was interrupted."""
    tunings: dict[str, Tuning] = attrs.field(init=False)
    record: ComparisonRecord = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.record = ComparisonRecord(self.request.out / self.request.name / COMPARE)
        given = self.comparison.options.tune
        self.tunings = {group.name: Tuning(given) for group in self.comparison.groups if not group.step_of}

    @property
    def comparison(self) -> Comparison:
        assert self.file.comparison is not None
        return self.file.comparison

    def run(self) -> None:
        """Run all there is to run; a run that fails leaves its own group without a choice, and no other."""
        self._tune(self._recall)
        refuse_unwritable(self.record.path.parent)
        self.record.begin(self._plain())
        self._tell()
        if self._tune(self._run_and_read):
            self._compare()
            self._tell()
        if self.record.kept:
            print(f"warning: {self.record.path} stays as it was: {self.record.kept}", flush=True)

    def _tune(self, losses: Callable[[Sequence[_Run]], bool]) -> bool:
        """Have losses of the tuning runs taken, and the lists extended; returns whether it came to an end.

        losses: takes those of some runs; returns whether to go on.
        """
        seeds = self.comparison.options.tune_seeds
        new = {name: tuning.factors for name, tuning in self.tunings.items()}
        while new and self.comparison.options.tuned:
            if not losses([(name, seed, factor) for name in new for factor in new[name] for seed in seeds]):
                return False
            extended = {
                name: self.tunings[name].extend(functools.partial(self._can_run, name)) for name in new
            }
            new = {name: [factor] for name, factor in extended.items() if factor is not None}
        return True

    def _compare(self) -> None:
        """Run what is compared, each group at its best step size."""
        chosen = {group.name: factor for group in self.comparison.groups if (factor := self.factor(group))}
        for line in self._told(chosen):
            print(line, flush=True)
        seeds = self.comparison.options.seeds
        self._run([(name, seed, factor) for name, factor in chosen.items() for seed in seeds])

    def factor(self, group: Group) -> float | None:
        """Return the factor on a group's step size, None where it cannot be chosen yet."""
        return self.tunings[group.step_of or group.name].best

    @property
    def diverged(self) -> set[str]:
        """The tuning runs that a policy stopped: they have told what they were run for."""
        return {
            group.run(seed, factor)
            for group in self.comparison.groups
            if not group.step_of
            for factor, losses in self.tunings[group.name].losses.items()
            for seed, loss in losses.items()
            if loss == math.inf
        }

    def _can_run(self, name: str, factor: float) -> bool:
        """Whether a group, and those that take its step size, have runs of a factor."""
        takers = [group.name for group in self.comparison.groups if name in (group.name, group.step_of)]
        try:
            for taker in takers:
                cells_of(self.file, taker, self.comparison.options.seeds[0], factor)
        except ValueError:
            return False
        return True

    def _recall(self, runs: Sequence[_Run]) -> bool:
        """Take the losses that commands before this one have left, and run nothing."""
        self._read(runs, {result.cell: result for result in over(self._request(runs))})
        return True

    def _run_and_read(self, runs: Sequence[_Run]) -> bool:
        """Run tuning runs, take their losses and tell of them; returns whether the command may go on."""
        done = self._run(runs)
        self._read(runs, self.results)
        self._tell()
        return done

    def _run(self, runs: Sequence[_Run]) -> bool:
        """Run seeds and factors of groups; returns whether the command may go on."""
        if not runs:
            return True
        request = self._request(runs)
        found = run_grid(request, self.file, self.jobs, until_done=True)
        self.results |= {result.cell: result for result in found}
        self.unbegun = len(request.cells) - len(found)
        return not self.unbegun and not any(result.outcome in _UNDONE for result in found)

    def _request(self, runs: Sequence[_Run]) -> Request:
        cells = {}
        for name, seed, factor in runs:
            made = cells_of(self.file, name, seed, factor)
            cells[made[DEVICES[0]].name] = made
        return attrs.evolve(self.request, cells=cells)

    def _read(self, runs: Sequence[_Run], results: dict[str, CellResult]) -> None:
        """Take the losses of tuning runs out of their folders."""
        groups = {group.name: group for group in self.comparison.groups}
        for name, seed, factor in runs:
            losses = self.tunings[name].losses.setdefault(factor, {})
            losses[seed] = self._loss(groups[name].run(seed, factor), results)

    def _loss(self, run: str, results: dict[str, CellResult]) -> float | None:
        """Return the metric of a run at its end, less is better; inf where it diverged, None: it has none.

        A run whose end does not have the metric has failed, and `results` is told so.
        """
        result = results.get(run)
        if result is None or result.outcome not in _MEASURED:
            return None
        summary = read_json(self.request.folder(run) / SUMMARY) or {}
        if summary.get("outcome") == "stopped":
            return math.inf
        metric, final = self.comparison.options.metric, summary.get("final", {})
        if metric not in final:
            results[run] = attrs.evolve(
                result, outcome="failed", message=f"its end has no {metric!r}; there are: {', '.join(final)}"
            )
            return None
        loss = -float(final[metric]) if more_is_better(metric) else float(final[metric])
        return loss if math.isfinite(loss) else math.inf

    def _told(self, chosen: Mapping[str, float]) -> Iterator[str]:
        """Yield what was chosen, for a person."""
        if self.request.quiet or not self.comparison.options.tuned:
            return
        yield "\nstep sizes"
        for group in self.comparison.groups:
            if group.step_of:
                continue
            edge = "; still the first or last: no verdict" if self.tunings[group.name].on_the_edge else ""
            factor = f"x {chosen[group.name]:g}" if group.name in chosen else "none: a tuning run failed"
            yield f"  {factor:>8}  {group.name}{edge}"
        yield from (f"note: {note}" for note in self.comparison.notes)

    def _tell(self) -> None:
        """Write what has come out, if anything has: runs that are refused tell of nothing."""
        losses = [
            loss for one in self.tunings.values() for seeds in one.losses.values() for loss in seeds.values()
        ]
        measured = [result for result in self.results.values() if result.outcome in _MEASURED]
        if measured or any(loss is not None for loss in losses):
            self.record.update(self._plain())

    def _plain(self) -> dict[str, Any]:
        options = self.comparison.options
        return {
            "hash": options.digest,
            "compare": plain(options),
            "arms": list(self.comparison.arms),
            "groups": [self._group(group) for group in self.comparison.groups],
            "notes": list(self.comparison.notes),
        }

    def _group(self, group: Group) -> dict[str, Any]:
        tuning, factor = self.tunings[group.step_of or group.name], self.factor(group)
        base, source = (
            {device: _base(self.file, name)[device].experiment for device in DEVICES}
            for name in (group.name, group.step_of or group.name)
        )
        sizes = {
            device: None if factor is None else compare.step_size(source[device], factor)
            for device in DEVICES
        }
        return {
            "name": group.name,
            "roles": [attrs.asdict(role) for role in group.roles],
            "step_option": compare.step_option(base[DEVICES[0]].optimizer),
            "step_of": group.step_of or None,
            "factor": factor,
            "step_size": sizes,
            "on_the_edge": tuning.on_the_edge,
            "tuning": {} if group.step_of else _tuning_runs(group, tuning),
            "runs": {}
            if factor is None
            else {str(seed): group.run(seed, factor) for seed in self.comparison.options.seeds},
        }


def _tuning_runs(group: Group, tuning: Tuning) -> dict[str, dict[str, Any]]:
    """Return factor to seed to what came out."""
    return {
        repr(factor): {
            str(seed): {
                "run": group.run(seed, factor),
                "loss": None if loss == math.inf else loss,
                "diverged": loss == math.inf,
            }
            for seed, loss in losses.items()
        }
        for factor, losses in sorted(tuning.losses.items())
    }


def cells_of(file: ExperimentFile, group: str, seed: int, factor: float) -> dict[str, Cell]:
    """Return a run of a group on each device."""
    assert file.comparison is not None
    of = file.comparison.groups[file.comparison.positions[group]]
    base, source = _base(file, group), _base(file, of.step_of or group)
    return {device: compare.at(base[device], of, seed, factor, source[device]) for device in DEVICES}


def _base(file: ExperimentFile, group: str) -> dict[str, Cell]:
    """Return the cell of a group on each device."""
    assert file.comparison is not None
    return {device: file.cells_on[device][file.comparison.positions[group]] for device in DEVICES}


def run_named(file: ExperimentFile, name: str) -> dict[str, Cell] | None:
    """Return the run of a file's comparison with that name on each device; None: there is none."""
    for group in file.comparison.groups if file.comparison else ():
        if (found := group.run_named(name)) is not None:
            return cells_of(file, group.name, *found)
    return None
