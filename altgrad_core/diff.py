"""Two runs side by side: options that differ, and the first step and the first tensor that do.

Runs that should be one and the same (a resume, another machine, a refactor) differ somewhere first; this
says where. Compared are all options, every metric but clocks at every step that both have logged, and the
checkpoints of common steps, bit by bit: model, optimizer, storage, scales and amax histories. Versions,
devices and commits are shown where they differ, and are no difference by themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from altgrad_core.options import written
from altgrad_core.record import CHECKPOINTS, CLOCKS, METRICS, RESOLVED, SUMMARY, begun, read_json, read_lines
from altgrad_core.registry import UsageError
from altgrad_core.step_folders import of_steps

MADE_WITH = ("device", "device_name", "machine", "threads", "python", "torch", "plugins", "commit")
"""What resolved.json tells of where a run was made."""

ABSENT = "-"


@attrs.frozen
class Setting:
    """An option that differs, as both files would write it; `-` where one has it not."""

    path: str
    first: str
    second: str


@attrs.frozen
class MetricsDiff:
    """What tells the two metrics.jsonl apart; None and nothing where nothing does."""

    common: int
    """Steps that both have logged."""
    step: int | None
    """The first of them at which a metric differs."""
    values: dict[str, tuple[float, float]]
    """What differs there."""
    alone: tuple[int, int]
    """Steps logged by the first run only, by the second only."""
    names: tuple[tuple[str, ...], tuple[str, ...]]
    """Metrics that at some step of both only the first run has, only the second."""

    @property
    def differs(self) -> bool:
        return self.step is not None or any(self.alone) or any(self.names)


@attrs.frozen
class TensorsDiff:
    """What tells the checkpoints of common steps apart."""

    steps: tuple[int, ...]
    """Steps whose checkpoints were compared: up to the first that differs."""
    step: int | None
    tensor: str
    """The first tensor that differs at that step, or entry of the state."""
    detail: str
    damaged: tuple[str, ...]
    """Checkpoints that could not be read, and why."""

    @property
    def differs(self) -> bool:
        return self.step is not None


@attrs.frozen
class RunsDiff:
    """Two runs side by side."""

    first: str
    second: str
    outcomes: tuple[str, str]
    options: tuple[Setting, ...]
    made_with: tuple[Setting, ...]
    metrics: MetricsDiff
    tensors: TensorsDiff

    @property
    def differs(self) -> bool:
        return bool(self.options) or self.metrics.differs or self.tensors.differs

    def plain(self) -> dict[str, Any]:
        return {"differs": self.differs, **attrs.asdict(self)}


def compare(first: Path, second: Path) -> RunsDiff:
    """Compare two run folders. Raises UsageError where one of them is none."""
    one, other = _resolved(first), _resolved(second)
    return RunsDiff(
        first=str(first),
        second=str(second),
        outcomes=(_outcome(first), _outcome(second)),
        options=settings(one["options"], other["options"]),
        made_with=settings(*({name: run.get(name) for name in MADE_WITH} for run in (one, other))),
        metrics=metrics(*(list(read_lines(folder / METRICS)) for folder in (first, second))),
        tensors=tensors(first, second),
    )


def _resolved(folder: Path) -> dict[str, Any]:
    found = begun(folder)
    if found is None:
        runs = sorted(str(path.parent) for path in folder.glob(f"*/{RESOLVED}"))
        way_out = f"name one of its runs: {', '.join(runs)}" if runs else "name the folder of a run"
        raise UsageError(f"{folder}: is no run folder, it has no {RESOLVED}; {way_out}")
    return found


def _outcome(folder: Path) -> str:
    """Return how a run ended, and at which step."""
    summary = read_json(folder / SUMMARY)
    if summary is not None:
        return f"{summary.get('outcome')} at step {summary.get('step')}"
    steps = [line["step"] for line in read_lines(folder / METRICS)]
    return f"not ended, at step {steps[-1]}" if steps else "not begun"


def settings(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Setting, ...]:
    """Return the options that differ, in the order of the first, then of what only the second has."""
    leaves = [dict(_leaves(options, "")) for options in (one, other)]
    return tuple(
        Setting(path, *(written(each[path]) if path in each else ABSENT for each in leaves))
        for path in {**leaves[0], **leaves[1]}
        if path not in leaves[0] or path not in leaves[1] or leaves[0][path] != leaves[1][path]
    )


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield every option under its path; the plugins of a list by their order, then each by its name."""
    if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        names = [one.get("plugin", str(number)) for number, one in enumerate(value)]
        yield path, names
        value = dict(zip(names, value, strict=True))
    if not isinstance(value, dict):
        if value is not None:
            yield path, value
        return
    for key, inner in value.items():
        yield from _leaves(inner, f"{path}.{key}" if path else str(key))


def metrics(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> MetricsDiff:
    """Compare what was logged, step by step, each number exactly; NaN is NaN."""
    lines = [{line["step"]: _timeless(line) for line in run} for run in (one, other)]
    common = [step for step in lines[0] if step in lines[1]]
    pairs = [(step, lines[0][step], lines[1][step]) for step in common]
    first = ((step, values) for step, *both in pairs if (values := _unequal(*both)))
    step, values = next(first, (None, {}))
    return MetricsDiff(
        common=len(common),
        step=step,
        values=values,
        alone=(len(lines[0].keys() - lines[1].keys()), len(lines[1].keys() - lines[0].keys())),
        names=(
            tuple(dict.fromkeys(name for _, here, there in pairs for name in here if name not in there)),
            tuple(dict.fromkeys(name for _, there, here in pairs for name in here if name not in there)),
        ),
    )


def _timeless(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name != "step" and not name.startswith(CLOCKS)}


def _unequal(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    return {
        name: (value, other[name])
        for name, value in one.items()
        if name in other and repr(value) != repr(other[name])  # NaN has one spelling, and -0.0 its own
    }


def tensors(first: Path, second: Path) -> TensorsDiff:
    """Compare the checkpoints of common steps, the earliest first, until one differs."""
    found = [of_steps(run / CHECKPOINTS) for run in (first, second)]
    steps: list[int] = []
    damaged: list[str] = []
    for step in [step for step in found[0] if step in found[1]]:
        from altgrad_core import checkpoint, checkpoint_diff  # torch, where there is something to compare

        try:
            one, other = (checkpoint.load(each[step]) for each in found)
        except checkpoint.CheckpointError as error:
            damaged.append(str(error))
            continue
        steps.append(step)
        if difference := checkpoint_diff.first_difference(one, other):
            return TensorsDiff(tuple(steps), step, *difference, tuple(damaged))
    return TensorsDiff(tuple(steps), None, "", "", tuple(damaged))
