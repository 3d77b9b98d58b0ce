"""Running a comparison: the tuning runs, the best step size of each group, then the runs that are compared.

What was chosen is never taken from an earlier command: it follows from the tuning runs' folders, so that a
command that was interrupted, a second one beside it, or one with more seeds finds the same and runs only what
is not there. `compare.json` tells a report which run is there for what; it is written first, and after each
round.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from altgrad_core import compare
from altgrad_core.compare import Comparison, Group
from altgrad_core.durable import write_whole
from altgrad_core.experiment_file import DEVICES, Cell, ExperimentFile
from altgrad_core.grids import Request, run_grid
from altgrad_core.hookspecs import CellResult
from altgrad_core.options import plain
from altgrad_core.record import SUMMARY, WriteError, read_json
from altgrad_core.tuning import Tuning, rounded
from altgrad_core.validation_metrics import more_is_better

COMPARE = "compare.json"

_MEASURED = ("finished", "skipped", "stopped")
"""Outcomes after which a run's folder tells what came out."""
_UNDONE = ("interrupted", "terminated", "busy")
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

    def __attrs_post_init__(self) -> None:
        given = self.comparison.options.tune
        self.tunings = {group.name: Tuning(given) for group in self.comparison.groups if not group.step_of}

    @property
    def comparison(self) -> Comparison:
        assert self.file.comparison is not None
        return self.file.comparison

    def run(self) -> None:
        """Run all there is to run; a run that fails leaves its own group without a choice, and no other."""
        self._write()
        new = {name: tuning.factors for name, tuning in self.tunings.items()}
        while new and self.comparison.options.tuned:
            seeds = self.comparison.options.tune_seeds
            done = self._run((name, seed, factor) for name in new for factor in new[name] for seed in seeds)
            self._read(new)
            self._write()
            if not done:
                return
            extended = {name: self.tunings[name].extend() for name in new}
            new = {name: [factor] for name, factor in extended.items() if factor is not None}
        chosen = {group.name: factor for group in self.comparison.groups if (factor := self.factor(group))}
        for line in self._told(chosen):
            print(line, flush=True)
        seeds = self.comparison.options.seeds
        self._run((name, seed, factor) for name, factor in chosen.items() for seed in seeds)
        self._write()

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

    def _run(self, runs: Iterator[tuple[str, int, float]]) -> bool:
        """Run seeds and factors of groups; returns whether the command may go on."""
        cells = {}
        for name, seed, factor in runs:
            made = cells_of(self.file, name, seed, factor)
            cells[made[DEVICES[0]].name] = made
        if not cells:
            return True
        found = run_grid(attrs.evolve(self.request, cells=cells), self.file, self.jobs, until_done=True)
        self.results |= {result.cell: result for result in found}
        self.unbegun = len(cells) - len(found)
        return len(found) == len(cells) and not any(result.outcome in _UNDONE for result in found)

    def _read(self, factors: Mapping[str, Sequence[float]]) -> None:
        """Take the tuning runs' losses out of their folders."""
        groups = {group.name: group for group in self.comparison.groups}
        for name, tried in factors.items():
            for factor in tried:
                self.tunings[name].losses[factor] = {
                    seed: self._loss(groups[name].run(seed, factor))
                    for seed in self.comparison.options.tune_seeds
                }

    def _loss(self, run: str) -> float | None:
        """Return the metric of a run at its end, less is better; inf where it diverged, None: it has none."""
        result = self.results.get(run)
        if result is None or result.outcome not in _MEASURED:
            return None
        summary = read_json(self.request.folder(run) / SUMMARY) or {}
        if summary.get("outcome") == "stopped":
            return math.inf
        metric, final = self.comparison.options.metric, summary.get("final", {})
        if metric not in final:
            self.results[run] = attrs.evolve(
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

    # --- compare.json --------------------------------------------------------------------------------

    def _write(self) -> None:
        path = self.request.out / self.request.name / COMPARE
        earlier = read_json(path) or {}
        digest = self.comparison.options.digest
        hashes = [one for one in earlier.get("earlier_hashes", []) if one != digest]
        if earlier and earlier.get("hash") != digest:
            hashes.append(earlier.get("hash"))
        text = json.dumps({**self._plain(), "earlier_hashes": hashes}, indent=1, default=str) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text, writer=f".{os.getpid()}")
        except OSError as error:
            raise WriteError(f"{path}: cannot be written: {error.strerror}") from error

    def _plain(self) -> dict[str, Any]:
        options = self.comparison.options
        return {
            "hash": options.digest,
            "compare": plain(options),
            "arms": list(self.comparison.arms),
            "groups": [self._group(group) for group in self.comparison.groups],
        }

    def _group(self, group: Group) -> dict[str, Any]:
        tuning, factor = self.tunings[group.step_of or group.name], self.factor(group)
        base, source = (
            {device: _base(self.file, name)[device].experiment for device in DEVICES}
            for name in (group.name, group.step_of or group.name)
        )
        sizes = {
            device: None if factor is None else rounded(compare.step_size(source[device]) * factor)
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
