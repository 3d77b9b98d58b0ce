"""One cell: a run in its folder, from the start, from its newest checkpoint, or not at all if it is over."""

from __future__ import annotations

import contextlib
import platform
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from altgrad_core import baseline, checkpoint, memory, pages, run_checkpoint, run_page
from altgrad_core.assemble import assemble, device_for
from altgrad_core.durable import WriteError
from altgrad_core.experiment import Cell, Experiment
from altgrad_core.experiment_file import ExperimentFile
from altgrad_core.loop import train
from altgrad_core.memory import OutOfMemoryError
from altgrad_core.price import price_per_hour
from altgrad_core.provenance import components_in_use, resolved
from altgrad_core.record import CLOCKS, METRICS, RunFolder, read_lines
from altgrad_core.registry import CORE_DISTRIBUTION, PluginError, Registry, UsageError
from altgrad_core.run_state import Run
from altgrad_core.step_folders import of_steps
from altgrad_core.terminal import Terminal
from altgrad_core.watched import PluginFailure

FAILED = (PluginError, PluginFailure, WriteError, OutOfMemoryError)
"""Errors that end a run, and say all there is to say."""

EXPECTED = (UsageError, *FAILED)
"""Errors that print as they are; others are bugs, and print with a traceback."""


@attrs.frozen(kw_only=True)
class RunResult:
    """A cell that has been run: where it is and what came out."""

    folder: Path
    outcome: str
    summary: dict[str, Any]
    asked: str = ""
    """The outcome that a signal asked for; where it came too late for this run, it is for what follows."""


def placed(file: ExperimentFile, asked: str = "auto") -> list[tuple[Cell, str]]:
    """Return the file's cells with the device each of them runs on; the cells of a grid may differ."""
    devices = [device_for(cell.experiment, asked) for cell in file.cells_on["cpu"]]
    return [(file.cells_on[device][index], device) for index, device in enumerate(devices)]


def folder_of(file: ExperimentFile, cell: Cell, out: Path) -> Path:
    """Return where a cell is run: OUT/NAME/CELL."""
    return out / file.name / cell.name


def run_one(file: ExperimentFile, cell: Cell, path: Path, device: str, terminal: Terminal) -> RunResult:
    """Run one cell in its folder: from the start, from its newest checkpoint, or not at all if over."""
    folder = RunFolder(path)
    try:
        folder.begin(file, cell, resolved(file, cell, device))
        if (ended := _ended(folder, terminal)) is not None:
            return ended
        if device == "cpu":
            pages.keep()
        terminal.log = folder.log
        compared_with = baseline.read(file.baseline, cell.experiment.task)  # before the training, not after
        run = _assembled(cell, file.registry, folder, terminal, device)
        _resume(run)
        run_page.header(run, file, cell, device)
        terminal.begin(run.step, cell.experiment.steps)
        try:
            with memory.told(cell.experiment), _exits_as_errors():
                outcome = train(run)
        except Exception as error:
            _record_failure(run, error, device)
            raise
        finally:
            terminal.end()
        run.summary = _summary(run, outcome, device)
        if compared_with is not None:
            run.summary["baseline"] = baseline.compared(run.summary["final"], compared_with)
        folder.finish(run.summary)
        run_page.report(run, file, compared_with)
        return RunResult(folder=path, outcome=outcome, summary=run.summary, asked=run.asked)
    finally:
        terminal.log = lambda line: None
        folder.close()


def _assembled(cell: Cell, registry: Registry, folder: RunFolder, terminal: Terminal, device: str) -> Run:
    """Return the run of a cell; where that fails, leave a summary, in which what was known before stays."""
    try:
        with memory.told(cell.experiment), _exits_as_errors():
            return assemble(cell, registry, folder, terminal, device)
    except UsageError:
        raise
    except Exception as error:
        _blame(error, cell.experiment, registry)
        known = folder.summary or {"step": 0, "final": {}, "best": {}}
        ended = {"outcome": "failed", "message": _message(error)}
        with contextlib.suppress(WriteError):
            folder.finish({**_what(cell.name, cell.experiment, device), **known, **ended})
        raise


@contextlib.contextmanager
def _exits_as_errors() -> Iterator[None]:
    """Have `sys.exit` in a plugin's code end the run as its errors do, and not the command in silence."""
    try:
        yield
    except SystemExit as error:
        told = RuntimeError(f"SystemExit: {error}").with_traceback(error.__traceback__)
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        raise told from None


def _ended(folder: RunFolder, terminal: Terminal) -> RunResult | None:
    """Return the result of a run that has ended for good, None for one that is to run."""
    summary = folder.summary or {}
    if summary.get("outcome") == "finished":
        terminal.say(f"{folder.path}: finished already, nothing to do")
        return RunResult(folder=folder.path, outcome="skipped", summary=summary)
    if summary.get("outcome") == "stopped":
        reason = f"was stopped at step {summary.get('step')} by {summary.get('message')}"
        terminal.warning(f"{folder.path}: {reason}; nothing to do, start anew with --out")
        return RunResult(folder=folder.path, outcome="stopped", summary=summary)
    return None


def _record_failure(run: Run, error: Exception, device: str) -> None:
    """Leave an event and a summary, as far as the disk takes them; the error itself goes on its way."""
    _blame(error, run.experiment, run.registry)
    run.message = _message(error)
    with contextlib.suppress(WriteError):
        run.folder.event(run.step, "failed", run.message)
        run.folder.finish(_summary(run, "failed", device))


def _message(error: Exception) -> str:
    return "; ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


def _blame(error: Exception, experiment: Experiment, registry: Registry) -> None:
    """Add to a bug in which plugin's code it was raised, if it was: the innermost frame counts."""
    if isinstance(error, EXPECTED):
        return
    owners = {
        entry.component.target.partition(":")[0].partition(".")[0]: entry.owner
        for entry in registry.registered
        if entry.distribution != CORE_DISTRIBUTION
    }
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = next((one for one in reversed(modules) if one.partition(".")[0] in owners), None)
    if module is None:
        return
    owner = owners[module.partition(".")[0]]
    used = [entry for entry in components_in_use(experiment, registry) if entry.owner == owner]
    here = dict.fromkeys(f"{entry.kind} {entry.name!r}" for entry in used)
    error.add_note(
        f"raised in {module} of {owner}, here for {', '.join(here)}"
        if here
        else f"raised in {module} of {owner}"
    )


def _resume(run: Run) -> None:
    checkpoint.recover(run.folder.checkpoints)
    if not of_steps(run.folder.checkpoints):
        if any(line["step"] for line in read_lines(run.folder.path / METRICS)):
            run.terminal.say(f"{run.folder.path} has no checkpoint of a step: beginning anew at step 0")
        run.folder.rewind(-1)
        return
    saved, passed_over = checkpoint.newest(run.folder.checkpoints)
    for reason in passed_over:
        run.warn(reason)
    if saved is None:
        raise UsageError(f"{run.folder.path}: no whole checkpoint is left; start anew with --out")
    run_checkpoint.load(run, saved)
    checkpoint.set_aside(run.folder.checkpoints, run.step)
    run.folder.rewind(run.step)
    run.terminal.say(f"resuming {run.folder.path} at step {run.step}")


def _summary(run: Run, outcome: str, device: str) -> dict[str, Any]:
    price = price_per_hour()
    tokens = run.step * run.experiment.tokens_per_step
    return {
        **_what(run.cell, run.experiment, device),
        "outcome": outcome,
        "message": run.message,
        "step": run.step,
        "tokens": tokens,
        "passes": run.passes,
        "final": {key: value for key, value in run.last.items() if not key.startswith(CLOCKS)},
        "best": run.best,
        "loss_floor": run.tokens.loss_floor,
        "share_on_grid": run.share_on_grid,
        "actions": run.action_counts,
        "formats": run.formats if run.switches else None,
        "seconds": run.seconds,
        "tokens_per_second": tokens / run.seconds if run.seconds else None,
        "price_per_hour": price or None,
        "cost": price * run.seconds / 3600 if price else None,
    }


def _what(cell: str, experiment: Experiment, device: str) -> dict[str, Any]:
    """Return what was run, and where."""
    return {
        "name": experiment.name,
        "cell": cell,
        "task": experiment.task,
        "steps": experiment.steps,
        "model": experiment.plain()["model"],
        "device": device,
        "machine": platform.node(),
    }
