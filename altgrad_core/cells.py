"""One cell: a run in its folder, from the start, from its newest checkpoint, or not at all if it is over."""

from __future__ import annotations

import collections
import contextlib
import platform
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from altgrad_core import baseline, checkpoint, describe, memory, pages, run_checkpoint
from altgrad_core.axes import SINGLE
from altgrad_core.durable import WriteError
from altgrad_core.experiment import Cell, Experiment
from altgrad_core.experiment_file import ExperimentFile
from altgrad_core.memory import OutOfMemoryError
from altgrad_core.price import cost, price_per_hour
from altgrad_core.record import EVENTS, RunFolder, components_in_use, resolved
from altgrad_core.registry import CORE_DISTRIBUTION, PluginError, Registry, UsageError
from altgrad_core.step_folders import of_steps
from altgrad_core.terminal import Terminal
from altgrad_core.validation_metrics import METRICS
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
    from altgrad_core.assemble import device_for

    devices = [device_for(cell.experiment, asked) for cell in file.cells_on["cpu"]]
    return [(file.cells_on[device][index], device) for index, device in enumerate(devices)]


def folder_of(file: ExperimentFile, cell: Cell, out: Path) -> Path:
    return out / file.name / cell.name


def run_one(file: ExperimentFile, cell: Cell, path: Path, device: str, terminal: Terminal) -> RunResult:
    """Run one cell in its folder: from the start, from its newest checkpoint, or not at all if over."""
    from altgrad_core.loop import train

    folder = RunFolder(path)
    try:
        folder.begin(file, cell, resolved(file, cell, device))
        if (ended := _ended(folder, terminal)) is not None:
            return ended
        pages.keep()
        terminal.log = folder.log
        compared_with = baseline.read(file.baseline, cell.experiment.task)  # before the training, not after
        run = _assembled(cell, file.registry, folder, terminal, device)
        _resume(run)
        _header(run, file, cell, device)
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
        _report(run, file, compared_with)
        return RunResult(folder=path, outcome=outcome, summary=run.summary, asked=run.asked)
    finally:
        terminal.log = lambda line: None
        folder.close()


def _assembled(cell: Cell, registry: Registry, folder: RunFolder, terminal: Terminal, device: str) -> Any:
    """Return the run of a cell; where that fails, leave a summary, in which what was known before stays."""
    from altgrad_core.assemble import assemble

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


def _record_failure(run: Any, error: Exception, device: str) -> None:
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


def _resume(run: Any) -> None:
    checkpoint.recover(run.folder.checkpoints)
    if not of_steps(run.folder.checkpoints):
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


def _header(run: Any, file: ExperimentFile, cell: Cell, device: str) -> None:
    terminal = run.terminal
    title = file.name if cell.name == SINGLE else f"{file.name} / {cell.name}"
    terminal.say(f"{title} on {device}", style="bold")
    terminal.table(
        [
            *describe.rows(cell.experiment, file.registry),
            ("text", _text(run)),
            ("folder", str(run.folder.path)),
            *([("frozen", f"{run.frozen:,} numbers do not train")] if run.frozen else []),
            *([("overrides", "; ".join(cell.in_force))] if cell.in_force else []),
            *([("price", f"{price:g} an hour")] if (price := price_per_hour()) else []),
        ]
    )


def _text(run: Any) -> str:
    """Return how much there is to learn from, and how often the run is to read it."""
    task, tokens = run.task, len(run.tokens.train)
    passes = run.experiment.steps * task.per_step / task.epoch
    documents = "" if task.read == "tokens" else f"{task.epoch:,} documents of "
    return f"{documents}{tokens:,} training tokens, {passes:.2f} passes over them"


def _summary(run: Any, outcome: str, device: str) -> dict[str, Any]:
    price = price_per_hour()
    tokens = run.step * run.experiment.tokens_per_step
    return {
        **_what(run.cell, run.experiment, device),
        "outcome": outcome,
        "message": run.message,
        "step": run.step,
        "tokens": tokens,
        "passes": run.passes,
        "final": {
            key: value for key, value in run.last.items() if not key.startswith(("time/", "cost/", "memory/"))
        },
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


def _report(run: Any, file: ExperimentFile, compared_with: baseline.Baseline | None) -> None:
    """Print the summary, and the next command to type."""
    summary, terminal = run.summary, run.terminal
    final, best = summary["final"], summary["best"]
    terminal.say(
        f"{summary['outcome']} at step {summary['step']} after {describe.duration(run.seconds)}", style="bold"
    )
    rows = [("reason", summary["message"])] if summary["message"] else []
    shown = METRICS[summary["task"]]
    if evaluated := [one.words.format(final[name]) for name, one in shown.items() if name in final]:
        rows.append(("validation", ", ".join(evaluated)))
    if compared_with is not None:
        rows += baseline.rows(final, compared_with)
    if best:
        rows.append(("best", f"{best['validation/loss']:.4f} at step {best['step']:.0f}"))
    if summary["loss_floor"] is not None:
        rows.append(("floor", f"{summary['loss_floor']:.4f} nats per token, the source's entropy"))
    rows += _what_policies_did(summary)
    rows.append(("on the grid", f"{summary['share_on_grid']:.1%} of the non-embedding parameters"))
    rows.append(("text", f"{summary['passes']:.2f} passes over the training {run.task.read}"))
    if summary["tokens_per_second"]:
        rows.append(("speed", f"{summary['tokens_per_second']:,.0f} tokens/s{cost(run.seconds)}"))
    rows.append(("folder", str(run.folder.path)))
    if run.cell == SINGLE or summary["outcome"] != "finished":  # a grid goes on by itself
        rows.append(("next", _next(run, file)))
    if compared_with is not None and summary["outcome"] == "finished":
        rows.append(("compare", baseline.command(run.folder.path, compared_with)))
    terminal.table(rows)


def _what_policies_did(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return how often which policy acted, and, where formats were switched, what they are now."""
    rows = []
    for policy, kinds in summary["actions"].items():
        rows.append((policy, ", ".join(f"{count} x {kind}" for kind, count in kinds.items())))
    if summary["formats"]:
        now = collections.Counter(summary["formats"].values())
        rows.append(("formats now", ", ".join(f"{name} in {count} layers" for name, count in now.items())))
    return rows


def _next(run: Any, file: ExperimentFile) -> str:
    """Return what to type next."""
    folder, seed = run.folder.path, (run.experiment.seed + 1) % 2**63  # TOML's integers have 64 bits
    if run.summary["outcome"] == "finished":
        command = f"altgrad-run {file.path} --set seed={seed} --out {folder.parent.parent}-seed{seed}"
        return f"another seed: {command}"
    if run.summary["outcome"] == "stopped":
        return f"{folder / EVENTS} tells how it came to this; the file's next try needs another --out"
    return f"to go on: altgrad-run {file.path} --resume {folder}, with the same --set if there was any"
