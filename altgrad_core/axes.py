"""The axes of a grid of runs, and the names of its cells.

Each key of `[grid]` is a path, each value the list that the path runs through; the cells are the cartesian
product. A cell's name says what varies and depends on the cell's own values alone, so that a grid may grow
and find its finished cells again.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from altgrad_core.options import Path
from altgrad_core.overrides import Origin, Override, from_table
from altgrad_core.structuring import Problem
from altgrad_core.wording import shown

SINGLE = "run"
"""The name of the only cell of a file without a grid."""

MOST_CELLS = 10_000
"""Checking that many takes some seconds; running them takes years."""

_LONGEST_NAME = 120
"""Characters; file systems take 255 bytes."""


def axes(grid: Mapping[str, Any]) -> tuple[list[list[Override]], list[Problem]]:
    """Return the values of each axis of a `[grid]` table, and what is wrong with the others.

    Raises ValueError for a key that is no dotted key.
    """
    found, problems = [], []
    for axis in from_table(grid, ("grid",)):
        if isinstance(axis.value, list) and axis.value:
            found.append(
                [
                    Override(axis.path, value, Origin((*axis.origin.path, index)))
                    for index, value in enumerate(axis.value)
                ]
            )
        else:
            hint = (
                "" if isinstance(axis.value, list) else "; to set a single value, write it outside of [grid]"
            )
            message = f"expected a list with at least one value, got {shown(axis.value)}{hint}"
            problems.append(Problem(axis.origin.path, message))
    cells = math.prod(map(len, found))
    if cells > MOST_CELLS:
        problems.append(Problem(("grid",), f"is {cells:,} runs; {MOST_CELLS:,} is the most"))
        return [], problems
    return found, problems


def cell_name(overrides: Sequence[Override]) -> str:
    """Return a folder name that tells cells with different values apart."""
    if not overrides:
        return SINGLE
    labels = [_label(override.path) for override in overrides]
    if len(set(labels)) < len(labels):
        labels = [_safe(".".join(map(str, override.path))) for override in overrides]
    values = (short(override.value) for override in overrides)
    name = ",".join(f"{label}={value}" for label, value in zip(labels, values, strict=True))
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 11]}-{_digest(name, 10)}"


def _label(path: Path) -> str:
    """Return what a path is called in a name: its last step, or what a `plugin` or position is of."""
    steps = [step for step in path if isinstance(step, str) and step != "plugin"]
    return _safe(steps[-1] if steps else str(path[-1]))


def short(value: Any) -> str:
    """Return a value as the name of a cell has it."""
    if isinstance(value, dict):
        rest = [f"{_safe(key)}={short(inner)}" for key, inner in value.items() if key != "plugin"]
        name = short(value["plugin"]) if "plugin" in value else ""
        return f"{name}({','.join(rest)})" if rest else name
    if isinstance(value, list):
        return "+".join(map(short, value)) or "()"
    if isinstance(value, bool):
        return str(value).lower()
    return _safe(value if isinstance(value, str) else shown(value))


def _safe(text: str) -> str:
    """Return text that a folder's name may hold; what had to be replaced is told apart by a digest."""
    safe = re.sub(r"[^A-Za-z0-9_.-]+", "_", text)
    return text if safe == text and text else f"{safe[:40]}-{_digest(text, 6)}"


def _digest(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:digits]
