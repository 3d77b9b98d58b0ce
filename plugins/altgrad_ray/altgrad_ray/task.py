"""What happens on the node that a cell was sent to; imports no Ray."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

import attrs

from altgrad_core.hookspecs import CellResult

POLL = 1.0
"""Seconds between tries of a folder whose lock is held."""


@attrs.frozen(kw_only=True)
class Surroundings:
    """What a cell finds on this machine and shall find on every other."""

    folder: str
    """The current folder: relative paths begin there."""
    variables: Mapping[str, str]
    """Environment variables that change what a run does."""

    @classmethod
    def here(cls) -> Surroundings:
        own = {name: value for name, value in os.environ.items() if name.startswith("ALTGRAD_")}
        return cls(folder=os.getcwd(), variables=own)

    def enter(self) -> None:
        """Make this process's surroundings these. Raises OSError where the folder is not there."""
        os.environ.update(self.variables)
        os.chdir(self.folder)


def attempt(
    run_cell: Callable[[str], CellResult], cell: str, surroundings: Surroundings, patience: float
) -> CellResult:
    """Run one cell in this process.

    patience: seconds to wait for the folder's lock. A cell that was lost is tried again before its node, cut
    off but alive, has stopped; until then its lock keeps the two apart.
    """
    try:
        surroundings.enter()
    except OSError as error:
        message = (
            f"node {os.uname().nodename}: {error}; start the command in a folder that all nodes share, "
            "and let --out be one"
        )
        return CellResult(cell=cell, outcome="failed", message=message)
    deadline = time.monotonic() + patience
    while (result := run_cell(cell)).outcome == "busy" and time.monotonic() < deadline:
        time.sleep(POLL)
    return result
