"""The run that an experiment file names as its `baseline`: what the summary of a run compares with it.

No option of the run: it may be named, or exchanged, once the run is over.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from altgrad_core.record import RESOLVED, SUMMARY, read_json
from altgrad_core.registry import UsageError
from altgrad_core.validation_metrics import HEADINGS, METRICS


@attrs.frozen
class Baseline:
    """A run that has ended, and its final metrics."""

    folder: Path
    task: str
    final: Mapping[str, float]


def read(folder: str, task: str) -> Baseline | None:
    """Return the run of a folder; None for an empty name.

    Raises UsageError where no run has ended there, or one that learnt something else than `task`.
    """
    if not folder:
        return None
    path = Path(os.path.expanduser(folder))
    summary = read_json(path / SUMMARY)
    if summary is None:
        problem = "has not ended" if (path / RESOLVED).exists() else "is no run folder"
        raise UsageError(
            f"baseline: {path} {problem}, it has no {SUMMARY}; name the folder of a run that has, such as "
            "'runs/my_experiment/run'"
        )
    if (theirs := summary.get("task", task)) != task:
        raise UsageError(
            f"baseline: {path} is a run of task = {theirs!r}, this one of {task!r}, whose losses do "
            "not compare; name a run of the same task, or none"
        )
    return Baseline(path, task, summary.get("final") or {})


def compared(final: Mapping[str, float], baseline: Baseline) -> dict[str, Any]:
    """Return what a summary keeps of a comparison: the folder, and how much more each metric is here."""
    names = [name for name in METRICS[baseline.task] if name in HEADINGS and _both(name, final, baseline)]
    more = {name: final[name] - baseline.final[name] for name in names}
    return {"folder": str(baseline.folder), "more": more}


def rows(final: Mapping[str, float], baseline: Baseline) -> Iterator[tuple[str, str]]:
    """Yield the lines of the summary that compare a run with its baseline."""
    found = [
        f"{METRICS[baseline.task][name].words.format(baseline.final[name])}, {_difference(more)} here"
        for name, more in compared(final, baseline)["more"].items()
    ]
    yield "baseline", f"{baseline.folder}: {'; '.join(found) or 'has no validation loss to compare with'}"


def command(folder: Path, baseline: Baseline) -> str:
    """Return what to type to see both: a report, or their first difference where no report is installed."""
    runs = f"{shlex.quote(str(folder))} {shlex.quote(str(baseline.folder))}"
    if importlib.metadata.entry_points(group="console_scripts", name="altgrad-report"):
        return f"altgrad-report {runs} -o comparison.html"
    return f"altgrad diff {runs}"


def _both(name: str, final: Mapping[str, float], baseline: Baseline) -> bool:
    return final.get(name) is not None and baseline.final.get(name) is not None


def _difference(more: float) -> str:
    if more == 0:
        return "the same"
    return f"{abs(more):.4f} {'more' if more > 0 else 'less'}" if more == more else "NaN"
