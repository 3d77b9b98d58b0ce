"""compare.json: which run of a comparison is there for what, as a report reads it.

Several commands may write it: one that was interrupted and is run again, two that share the runs, one whose
file has been edited. What one of them has found out, another that knows less does not take back.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from altgrad_core.durable import WriteError, write_whole
from altgrad_core.record import read_json

COMPARE, LOCK = "compare.json", ".compare.lock"


@attrs.define
class ComparisonRecord:
    """A comparison's compare.json, as one command writes it."""

    path: Path
    hashes: frozenset[str] = frozenset()
    """Of the tables whose record this command may replace: its own, and the one that it found."""
    kept: str = ""
    """Why the file was left as it was; empty: it was not."""

    def begin(self, told: Mapping[str, Any]) -> None:
        """Write what is compared, before the first run, where no command has."""
        with self._locked() as found:
            self.hashes = frozenset((told["hash"], found.get("hash", "")))
            if not found:
                self._write(told, found)

    def update(self, told: Mapping[str, Any]) -> None:
        """Write what has come out so far, unless the file has what this command has not."""
        with self._locked() as found:
            self.kept = self._to_keep(found, told)
            if not self.kept:
                self._write(told, found)

    def _to_keep(self, found: Mapping[str, Any], told: Mapping[str, Any]) -> str:
        """Return why what was found stays; empty: it does not."""
        if found and found["hash"] not in self.hashes:
            return "another command has begun with another [compare] since: run this one again after it"
        lost = _chosen(found) & {group["name"] for group in told["groups"]} - _chosen(told)
        if lost and found["hash"] == told["hash"]:
            return f"it has the step size of {min(lost)}, which this command has not come to"
        return ""

    def _write(self, told: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        hashes = [one for one in found.get("earlier_hashes", []) if one != told["hash"]]
        if found and found["hash"] != told["hash"]:
            hashes.append(found["hash"])
        text = json.dumps({**told, "earlier_hashes": hashes}, indent=1, default=str) + "\n"
        write_whole(self.path, text, writer=f".{os.getpid()}")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        """Yield what the file holds while no other command writes it; nothing where it is none of ours."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with (self.path.parent / LOCK).open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                found = read_json(self.path) or {}
                yield found if _is_record(found) else {}
        except OSError as error:
            raise WriteError(f"{self.path}: cannot be written: {error.strerror}") from error


def _is_record(found: Mapping[str, Any]) -> bool:
    groups = found.get("groups")
    return (
        isinstance(found.get("hash"), str)
        and isinstance(found.get("earlier_hashes", []), list)
        and isinstance(groups, list)
        and all(isinstance(group, dict) and "name" in group for group in groups)
    )


def _chosen(record: Mapping[str, Any]) -> set[str]:
    """Return the groups of which a step size is known."""
    return {group["name"] for group in record.get("groups", ()) if group.get("factor") is not None}
