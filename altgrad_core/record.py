"""The run folder: what was asked, what was measured, what happened.

`runs/<name>/<cell>/` holds experiment.toml (verbatim), resolved.json (every option, with versions and
device), metrics.jsonl (one line per logged step), events.jsonl, checkpoints/, log.txt and summary.json.
Two runs never share a folder: an advisory lock (`flock`) on `.lock` says who holds it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from altgrad_core import locks
from altgrad_core.durable import WriteError, write_whole
from altgrad_core.experiment import Cell
from altgrad_core.experiment_file import ExperimentFile
from altgrad_core.registry import UsageError

METRICS, EVENTS, SUMMARY, RESOLVED, EXPERIMENT = (
    "metrics.jsonl",
    "events.jsonl",
    "summary.json",
    "resolved.json",
    "experiment.toml",
)
CHECKPOINTS, LOG, LOCK = "checkpoints", "log.txt", ".lock"

CLOCKS = ("time/", "cost/", "memory/")
"""How metrics begin that differ from run to run on any machine."""


class BusyError(UsageError):
    """Another process is running this cell."""


class RunFolder:
    """One cell's folder, locked, with its growing files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / CHECKPOINTS
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = (path / LOCK).open("a+")
            self._take_lock()
            self._try_what_is_there()
        except OSError as error:
            raise _unwritable(error.filename or path, error) from error
        self._files: dict[str, IO[str]] = {}

    def _try_what_is_there(self) -> None:
        """Raise OSError where a file that is to grow, or the folder of checkpoints, cannot be written."""
        for name in (METRICS, EVENTS, LOG, EXPERIMENT, RESOLVED, SUMMARY):
            if os.path.lexists(self.path / name):
                (self.path / name).open("a").close()
        if os.path.lexists(self.checkpoints):
            tempfile.TemporaryFile(dir=self.checkpoints).close()

    def _take_lock(self) -> None:
        try:
            taken = locks.take(self._lock)
        except OSError as error:
            self._lock.close()
            raise UsageError(
                f"{self.path}: cannot be locked: {error.strerror}; choose a folder on another file system "
                "with --out"
            ) from error
        if not taken:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "another process"
            self._lock.close()
            raise BusyError(f"{self.path}: is being run by {holder}; wait for it, or use --out")
        self._lock.truncate(0)
        holder = f"process {os.getpid()} on {platform.node()}"
        os.write(self._lock.fileno(), holder.encode())  # no buffer: a full disk refuses it here and now

    @property
    def summary(self) -> dict[str, Any] | None:
        """The summary of a run that has ended, None before."""
        return read_json(self.path / SUMMARY)

    def begin(self, file: ExperimentFile, cell: Cell, resolved: Mapping[str, Any]) -> None:
        """Write what the run was asked to do; refuse a folder that another experiment began."""
        trained = self.checkpoints.exists() or (self.path / METRICS).exists()
        before = begun(self.path) if trained else None
        if before is not None and (changed := differences(before["options"], resolved["options"])):
            devices = before.get("device"), resolved["device"]
            back = "put the options back"
            if devices[0] != devices[1]:
                back = f"it was begun on {devices[0]}, this is {devices[1]}: go on with --device {devices[0]}"
            raise UsageError(
                f"{self.path}: was begun with other options: {'; '.join(changed)}; use --out for another "
                f"folder, where init_from = {json.dumps(str(self.path))} starts from its weights, or {back}"
            )
        self._replace(EXPERIMENT, file.text)
        if before is None:
            self._replace(RESOLVED, json.dumps(resolved, indent=1) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the metrics and events after `step`, and torn lines, before a resume writes them again."""
        for name in (METRICS, EVENTS):
            path = self.path / name
            kept = "".join(json.dumps(line) + "\n" for line in read_lines(path) if line["step"] <= step)
            if not path.exists() or path.read_text(errors="replace") != kept:
                self._replace(name, kept)
        (self.path / SUMMARY).unlink(missing_ok=True)  # it told of an end that was none

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl and flush it. NaN and inf are written as Python's json does."""
        self._append(METRICS, json.dumps({"step": step, **values}))

    def event(self, step: int, kind: str, message: str, **details: Any) -> None:
        """Append one line to events.jsonl."""
        self._append(EVENTS, json.dumps({"step": step, "event": kind, "message": message, **details}))

    def log(self, line: str) -> None:
        """Append what the terminal showed to log.txt."""
        self._append(LOG, line)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json; a run without one has not ended."""
        self._replace(SUMMARY, json.dumps(summary, indent=1) + "\n")

    def close(self) -> None:
        """Close the files and let go of the lock."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # what a full disk did not take, and has been reported
                file.close()
        self._files.clear()
        self._lock.close()

    def _append(self, name: str, line: str) -> None:
        with self._writing(name):
            if name not in self._files:
                path = self.path / name
                self._files[name] = path.open("a", encoding="utf-8", errors="backslashreplace")
            self._files[name].write(line + "\n")
            self._files[name].flush()

    def _replace(self, name: str, text: str) -> None:
        with self._writing(name):
            if name in self._files:
                self._files.pop(name).close()  # what is appended from here on goes into the new file
            write_whole(self.path / name, text)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WriteError(f"{self.path / name}: cannot be written: {error.strerror}") from error


def refuse_unwritable(folder: Path) -> None:
    """Raise UsageError where the folders of runs cannot be made in this one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unwritable(folder, error) from error


def _unwritable(place: str | Path, error: OSError) -> UsageError:
    return UsageError(f"{place}: cannot be written: {error.strerror}; choose another folder with --out")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of metrics or events; a line that is torn, or has no whole step, is skipped."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # nested deeper than Python reads
                continue
            if isinstance(record, dict) and type(record.get("step")) is int and line.endswith("\n"):
                yield record


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, None where there is no whole one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def begun(folder: Path) -> dict[str, Any] | None:
    """Return what a run folder was begun with, its cell and options at least, None where nothing was.

    Raises UsageError for a file that is damaged, or another program's.
    """
    path = folder / RESOLVED
    if not os.path.exists(path):
        return None
    found = read_json(path) or {}
    options = found.get("options")
    name = options.get("name") if isinstance(options, dict) else None
    needed = {"cell": found.get("cell"), "options.name": name}
    if missing := [key for key, value in needed.items() if not isinstance(value, str)]:
        raise UsageError(
            f"{path}: does not tell which run this is: it has no {' and no '.join(missing)}; put back "
            "the file that the run wrote, or remove it and run again: the checkpoints hold the options too"
        )
    return found


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Return which options differ, as `path: before -> now`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            line
            for key in keys
            for line in differences(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        ]
    return [] if before == now else [f"{path}: {before!r} -> {now!r}"]
