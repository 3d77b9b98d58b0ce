"""The cells of a grid: running one, and the executor that runs them on this machine."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import os
import platform
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs

from altgrad_core import checkpoint, describe, workers
from altgrad_core.experiment_file import SINGLE, Cell, ExperimentFile, load_experiment
from altgrad_core.hookspecs import CellResult, Executor, NoOptions
from altgrad_core.record import EVENTS, BusyError, RunFolder, WriteError, resolved
from altgrad_core.registry import PluginError, UsageError, discover
from altgrad_core.run_state import PluginFailure
from altgrad_core.terminal import Terminal

EXPECTED = (UsageError, PluginError, PluginFailure, WriteError)
"""Errors that say all there is to say; others are bugs, and print with a traceback."""


@attrs.frozen(kw_only=True)
class Request:
    """What the command asks of every cell; picklable, so that another process can take a cell."""

    path: Path
    overrides: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    out: Path = Path("runs")
    device: str = "auto"
    quiet: bool = False
    threads: int | None = None

    def file(self) -> ExperimentFile:
        return load_experiment(self.path, self.overrides, discover(self.without))


@attrs.frozen(kw_only=True)
class RunResult:
    """A cell that has been run: where it is and what came out."""

    folder: Path
    outcome: str
    summary: dict[str, Any]


def run_cell(request: Request, name: str) -> CellResult:
    """Run one cell in this process; never raises for what goes wrong inside of the cell."""
    import torch

    if request.threads:
        torch.set_num_threads(request.threads)
    try:
        file = request.file()
        (cell, device), *_ = (pair for pair in placed(file, request.device) if pair[0].name == name)
        path = folder_of(file, cell, request.out)
        result = run_one(file, cell, path, device, Terminal(quiet=request.quiet))
    except BusyError as error:
        return CellResult(cell=name, outcome="busy", message=str(error))
    except EXPECTED as error:
        return CellResult(cell=name, outcome="failed", message=str(error))
    except Exception:  # noqa: BLE001 - a bug prints with its traceback; the other cells go on
        return CellResult(cell=name, outcome="failed", message=traceback.format_exc())
    return CellResult(cell=name, outcome=result.outcome, message=result.summary.get("message", ""))


def placed(file: ExperimentFile, asked: str = "auto") -> list[tuple[Cell, str]]:
    """Return the file's cells with the device each of them runs on; the cells of a grid may differ."""
    from altgrad_core.assemble import device_for

    devices = [device_for(cell.experiment, asked) for cell in file.cells_on["cpu"]]
    return [(file.cells_on[device][index], device) for index, device in enumerate(devices)]


def folder_of(file: ExperimentFile, cell: Cell, out: Path) -> Path:
    return out / file.name / cell.name


def run_one(file: ExperimentFile, cell: Cell, path: Path, device: str, terminal: Terminal) -> RunResult:
    """Run one cell in its folder: from the start, from its newest checkpoint, or not at all if over."""
    from altgrad_core.assemble import assemble
    from altgrad_core.loop import train

    folder = RunFolder(path)
    try:
        folder.begin(file, cell, resolved(file, cell, device))
        if (ended := _ended(folder, terminal)) is not None:
            return ended
        terminal.log = folder.log
        run = assemble(cell, file.registry, folder, terminal, device)
        _resume(run)
        _header(run, file, cell, device)
        terminal.begin(run.step, cell.experiment.steps)
        try:
            outcome = train(run)
        except Exception as error:
            _record_failure(run, error, device)
            raise
        finally:
            terminal.end()
        run.summary = _summary(run, outcome, device)
        folder.finish(run.summary)
        _report(run, file)
        return RunResult(folder=path, outcome=outcome, summary=run.summary)
    finally:
        terminal.log = lambda line: None
        folder.close()


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
    run.message = f"{type(error).__name__}: {error}"
    with contextlib.suppress(WriteError):
        run.folder.event(run.step, "failed", run.message)
        run.folder.finish(_summary(run, "failed", device))


def _resume(run: Any) -> None:
    checkpoint.recover(run.folder.checkpoints)
    saved, passed_over = checkpoint.newest(run.folder.checkpoints)
    for reason in passed_over:
        run.warn(reason)
    if saved is None:
        if passed_over:
            raise UsageError(f"{run.folder.path}: no whole checkpoint is left; start anew with --out")
        run.folder.rewind(-1)
        return
    run.load(saved)
    checkpoint.set_aside(run.folder.checkpoints, run.step)
    run.folder.rewind(run.step)
    run.terminal.say(f"resuming {run.folder.path} at step {run.step}")


def _header(run: Any, file: ExperimentFile, cell: Cell, device: str) -> None:
    terminal = run.terminal
    title = file.name if cell.name == SINGLE else f"{file.name} / {cell.name}"
    terminal.say(f"{title} on {device}", style="bold")
    passes = cell.experiment.tokens / len(run.tokens.train)
    terminal.table(
        [
            *describe.rows(cell.experiment, file.registry),
            ("text", f"{len(run.tokens.train):,} training tokens, {passes:.2f} passes over them"),
            ("folder", str(run.folder.path)),
            *([("frozen", f"{run.frozen:,} numbers do not train")] if run.frozen else []),
            *([("overrides", "; ".join(cell.in_force))] if cell.in_force else []),
        ]
    )


def _summary(run: Any, outcome: str, device: str) -> dict[str, Any]:
    experiment = run.experiment
    price = describe.price_per_hour()
    tokens = run.step * experiment.tokens_per_step
    return {
        "name": experiment.name,
        "cell": run.cell,
        "outcome": outcome,
        "message": run.message,
        "step": run.step,
        "steps": experiment.steps,
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
        "model": experiment.plain()["model"],
        "device": device,
        "machine": platform.node(),
        "seconds": run.seconds,
        "tokens_per_second": tokens / run.seconds if run.seconds else None,
        "price_per_hour": price or None,
        "cost": price * run.seconds / 3600 if price else None,
    }


def _report(run: Any, file: ExperimentFile) -> None:
    """Print the summary, and the next command to type."""
    summary, terminal = run.summary, run.terminal
    final, best = summary["final"], summary["best"]
    terminal.say(
        f"{summary['outcome']} at step {summary['step']} after {describe.duration(run.seconds)}", style="bold"
    )
    rows = [("reason", summary["message"])] if summary["message"] else []
    if "validation/loss" in final:
        per_byte = final.get("validation/bits_per_byte")
        text = (
            f"{final['validation/loss']:.4f} nats per token, perplexity {final['validation/perplexity']:.2f}"
        )
        rows.append(
            ("validation", text + (f", {per_byte:.4f} bits per byte" if per_byte is not None else ""))
        )
    if best:
        rows.append(("best", f"{best['validation/loss']:.4f} at step {best['step']:.0f}"))
    if summary["loss_floor"] is not None:
        rows.append(("floor", f"{summary['loss_floor']:.4f} nats per token, the source's entropy"))
    rows += _what_policies_did(summary)
    rows.append(("on the grid", f"{summary['share_on_grid']:.1%} of the non-embedding parameters"))
    rows.append(("text", f"{summary['passes']:.2f} passes over the training tokens"))
    if summary["tokens_per_second"]:
        rows.append(("speed", f"{summary['tokens_per_second']:,.0f} tokens/s{describe.cost(run.seconds)}"))
    rows.append(("folder", str(run.folder.path)))
    rows.append(("next", _next(run, file)))
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
    folder, seed = run.folder.path, run.experiment.seed + 1
    if run.summary["outcome"] == "finished":
        command = f"altgrad-run {file.path} --set seed={seed} --out {folder.parent.parent}-seed{seed}"
        return f"another seed: {command}"
    if run.summary["outcome"] == "stopped":
        return f"{folder / EVENTS} tells how it came to this; the file's next try needs another --out"
    return f"to go on: altgrad-run {file.path} --resume {folder}, with the same --set if there was any"


# --- many cells --------------------------------------------------------------------------------------


class LocalExecutor:
    """Cells one after another in this process, or in `jobs` processes of this machine."""

    def run(self, cells: Sequence[str], run_cell: Callable[[str], CellResult], jobs: int) -> list[CellResult]:
        """Run every cell once; one that fails never stops the others."""
        if jobs <= 1 or len(cells) <= 1:
            results = []
            for cell in cells:
                results.append(run_cell(cell))
                if results[-1].outcome in ("interrupted", "terminated"):
                    break
            return results
        count = itertools.count(1)

        def ended(result: CellResult) -> None:
            print(f"{result.cell}: {result.outcome}  ({next(count)} of {len(cells)})", flush=True)

        return workers.run_in_processes(cells, run_cell, jobs, ended)


def local_executor(options: NoOptions) -> Executor:
    return LocalExecutor()


def run_grid(request: Request, file: ExperimentFile, cells: Sequence[str], jobs: int) -> list[CellResult]:
    """Run the cells of a grid through the local executor."""
    executor: Executor = file.registry.find("executor", "local").build(NoOptions())
    if jobs > 1:
        threads = request.threads or max(1, (os.cpu_count() or 1) // jobs)
        request = attrs.evolve(request, threads=threads, quiet=True)
    return executor.run(cells, functools.partial(run_cell, request), jobs)
