"""What `altgrad diff` prints: two runs side by side, for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from altgrad_core.columns import aligned
from altgrad_core.diff import MetricsDiff, RunsDiff, Setting, TensorsDiff

SHOWN = 8
"""Metrics that are listed; the others are counted."""

_SIDES = ("first", "second")


def lines(found: RunsDiff) -> Iterator[str]:
    """Yield the page of a comparison; the last line is the verdict."""
    for side, folder, outcome in zip(_SIDES, (found.first, found.second), found.outcomes, strict=True):
        yield f"{side:<6}  {folder}: {outcome}"
    yield from _settings("options that differ", found.options)
    yield from _settings("made with (no difference by itself)", found.made_with)
    yield from _metrics(found.metrics)
    yield from _tensors(found.tensors)
    yield ""
    yield _verdict(found)


def _settings(title: str, rows: Sequence[Setting]) -> Iterator[str]:
    if rows:
        yield from ("", title)
        yield from aligned([("", *_SIDES), *((row.path, row.first, row.second) for row in rows)])


def _metrics(found: MetricsDiff) -> Iterator[str]:
    yield ""
    if found.step is None:
        yield f"metrics: {_counted(found.common, 'step')} in both, no value differs"
    else:
        yield f"metrics: {_counted(found.common, 'step')} in both; the first that differs: step {found.step}"
        rows = [(name, repr(one), repr(other)) for name, (one, other) in found.values.items()]
        yield from aligned([("", *_SIDES), *rows[:SHOWN]])
        if len(rows) > SHOWN:
            yield f"  and {_counted(len(rows) - SHOWN, 'more metric')}"
    for side, count in zip(_SIDES, found.alone, strict=True):
        if count:
            yield f"  logged by the {side} only: {_counted(count, 'step')}"
    for side, names in zip(_SIDES, found.names, strict=True):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            yield f"  of the {side} only: {', '.join(names[:SHOWN])}{more}"


def _tensors(found: TensorsDiff) -> Iterator[str]:
    yield ""
    steps = f"of step{'s' if len(found.steps) > 1 else ''} {', '.join(map(str, found.steps))}"
    if not found.steps:
        yield "checkpoints: none of a step that both have"
    elif found.step is None:
        yield f"checkpoints: those {steps} are equal in every bit"
    else:
        yield f"checkpoints: the first that differs: step {found.step}"
        yield f"  {found.tensor}: {found.detail}"
    for reason in found.damaged:
        yield f"  not compared: {reason}"


def _verdict(found: RunsDiff) -> str:
    if not found.differs:
        return "the runs are equal"
    places = []
    if found.options:
        places.append(_counted(len(found.options), "option"))
    if found.metrics.step is not None:
        places.append(f"metrics from step {found.metrics.step}")
    elif found.metrics.differs:
        places.append("what was logged")
    if found.tensors.differs:
        places.append(f"tensors from step {found.tensors.step}")
    return f"the runs differ: {', '.join(places)}"


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"
