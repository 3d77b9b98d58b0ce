"""The run that an experiment file names as its `baseline`: what the summary of a run compares with it.

No option of the run: it may be named, or exchanged, once the run is over.
"""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from altgrad_core.record import RESOLVED, SUMMARY, read_json
from altgrad_core.registry import UsageError

COMPARED = {"validation/loss": "nats per token", "validation/bits_per_byte": "bits per byte"}
"""Final metrics that are compared, and their units."""


@attrs.frozen
class Baseline:
    """A run that has ended, and its final metrics."""

    folder: Path
    final: Mapping[str, float]


def read(folder: str) -> Baseline | None:
    """Return the run of a folder; None for an empty name. Raises UsageError where no run has ended there."""
    if not folder:
        return None
    path = Path(folder).expanduser()
    summary = read_json(path / SUMMARY)
    if summary is None:
        problem = "has not ended" if (path / RESOLVED).exists() else "is no run folder"
        raise UsageError(
            f"baseline: {path} {problem}, it has no {SUMMARY}; name the folder of a run that has, such as "
            "'runs/my_experiment/run'"
        )
    return Baseline(path, summary.get("final") or {})


def compared(final: Mapping[str, float], baseline: Baseline) -> dict[str, Any]:
    """Return what a summary keeps of a comparison: the folder, and how much more each metric is here."""
    more = {name: final[name] - baseline.final[name] for name in COMPARED if _both(name, final, baseline)}
    return {"folder": str(baseline.folder), "more": more}


def rows(final: Mapping[str, float], baseline: Baseline) -> Iterator[tuple[str, str]]:
    """Yield the lines of the summary that compare a run with its baseline."""
    found = [
        f"{baseline.final[name]:.4f} {unit}, {_difference(more)} here"
        for name, unit in COMPARED.items()
        if (more := compared(final, baseline)["more"].get(name)) is not None
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
