"""A live table of the cells that are being run, read from their folders: whoever runs them, and wherever.

On a terminal only; what else is printed meanwhile appears above it.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import rich.console
import rich.live
import rich.table

from altgrad_core.record import LOCK, METRICS, SUMMARY, read_json
from altgrad_core.validation_metrics import LOSS

_REFRESHES = 1.0
"""Looks at the folders a second."""
_TAIL = 8192
"""Bytes at the end of a file of metrics that hold its last lines."""
_MOST_ROWS = 20
"""Rows; the rest is counted."""


class LiveTable:
    """What each cell has come to; rich asks for it again at every refresh."""

    def __init__(self, folders: Mapping[str, Path], steps: Mapping[str, int]) -> None:
        self.folders = dict(folders)
        self.steps = steps
        self.begun = time.time()
        self.ended: dict[str, str] = {}

    def __rich__(self) -> rich.console.Group:
        rows = dict(self._running())
        counts = collections.Counter(self.ended.values())
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        table = rich.table.Table(box=None, pad_edge=False)
        for heading in ("cell", "step", "loss", "tokens/s", "validation"):
            table.add_column(heading, justify="left" if heading == "cell" else "right", no_wrap=True)
        for name, line in list(rows.items())[:_MOST_ROWS]:
            table.add_row(name, f"{line.get('step', 0)}/{self.steps[name]}", *_numbers(line))
        if len(rows) > _MOST_ROWS:
            table.add_row(f"and {len(rows) - _MOST_ROWS} more", "", "", "", "")
        return rich.console.Group(
            f"{len(self.ended)} of {len(self.folders)} runs ended{f' ({told})' if told else ''}", table
        )

    def _running(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield the cells that a process runs now, with their last line of metrics."""
        for name, folder in self.folders.items():
            if name in self.ended:
                continue
            began = _changed(folder / LOCK)
            if began is None or began < self.begun - 1:
                continue  # nobody has taken it up since
            if (ended := _changed(folder / SUMMARY)) is not None and ended >= began:
                self.ended[name] = str((read_json(folder / SUMMARY) or {}).get("outcome"))
            elif _alive(folder):
                yield name, last_line(folder / METRICS)


def _numbers(line: Mapping[str, Any]) -> tuple[str, ...]:
    forms = {"train/loss": ".4f", "time/tokens_per_second": ",.0f", LOSS: ".4f"}
    return tuple(f"{line[name]:{form}}" if name in line else "" for name, form in forms.items())


def last_line(path: Path) -> dict[str, Any]:
    """Return the last whole record of a growing file of metrics; values of lines before fill its gaps."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL))
            lines = file.read().decode(errors="replace").split("\n")[:-1]
    except OSError:
        return {}
    found: dict[str, Any] = {}
    for line in lines:
        with contextlib.suppress(ValueError):
            found |= json.loads(line)
    return found


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _alive(folder: Path) -> bool:
    """Whether the process that took a folder up is still there, as far as this machine can tell."""
    try:
        _, number, _, machine = (folder / LOCK).read_text().split()
    except (OSError, ValueError):
        return True
    return machine != platform.node() or os.path.exists(f"/proc/{number}") or not os.path.exists("/proc")


@contextlib.contextmanager
def shown(
    folders: Mapping[str, Path], steps: Mapping[str, int], console: rich.console.Console | None = None
) -> Iterator[None]:
    """Show the table until the block ends, where the console is a terminal."""
    console = console or rich.console.Console(highlight=False)
    if not console.is_terminal:
        yield
        return
    table = LiveTable(folders, steps)
    with rich.live.Live(table, console=console, refresh_per_second=_REFRESHES, transient=True):
        yield
