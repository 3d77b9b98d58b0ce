"""The cells of a grid: running one, and the executor that runs them on this machine."""

from __future__ import annotations

import functools
import multiprocessing
import os
import platform
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import attrs

from altgrad_core import checkpoint, describe
from altgrad_core.experiment_file import SINGLE, Cell, ExperimentFile, load_experiment
from altgrad_core.hookspecs import CellResult, Executor, NoOptions
from altgrad_core.record import BusyError, RunFolder, resolved
from altgrad_core.registry import PluginError, UsageError, discover
from altgrad_core.terminal import Terminal

USAGE, FAILURE = 2, 1


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
    file = request.file()
    from altgrad_core.assemble import device_for

    device = device_for(file.cells_on["cpu"][0].experiment, request.device)
    cell = next(one for one in file.cells_on[device] if one.name == name)
    try:
        result = run_one(file, cell, request.out, device, Terminal(quiet=request.quiet))
    except BusyError as error:
        return CellResult(cell=name, outcome="busy", message=str(error))
    except (UsageError, PluginError) as error:
        return CellResult(cell=name, outcome="failed", message=str(error))
    except Exception:  # noqa: BLE001 - a bug prints with its traceback; the other cells go on
        return CellResult(cell=name, outcome="failed", message=traceback.format_exc())
    return CellResult(cell=name, outcome=result.outcome, message=result.summary.get("message", ""))


def run_one(file: ExperimentFile, cell: Cell, out: Path, device: str, terminal: Terminal) -> RunResult:
    """Run one cell in its folder: from the start, from its newest checkpoint, or not at all if finished."""
    from altgrad_core.assemble import assemble
    from altgrad_core.loop import train

    path = out / file.name / cell.name
    folder = RunFolder(path)
    try:
        folder.begin(file, cell, resolved(file, cell, device))
        if folder.summary is not None and folder.summary.get("outcome") == "finished":
            terminal.say(f"{path}: finished already, nothing to do")
            return RunResult(folder=path, outcome="skipped", summary=folder.summary)
        terminal.log = folder.log
        run = assemble(cell, file.registry, folder, terminal, device)
        _resume(run)
        _header(run, file, cell, device)
        terminal.begin(run.step, cell.experiment.steps)
        try:
            outcome = train(run)
        except Exception as error:
            folder.event(run.step, "failed", f"{type(error).__name__}: {error}")
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


def _resume(run: Any) -> None:
    saved, passed_over = checkpoint.newest(run.folder.checkpoints)
    for reason in passed_over:
        run.warn(reason)
    if saved is None:
        if passed_over:
            raise UsageError(f"{run.folder.path}: no whole checkpoint is left; start anew with --out")
        run.folder.rewind(-1)
        return
    run.load(saved)
    run.folder.rewind(run.step)
    run.terminal.say(f"resuming {run.folder.path} at step {run.step}")


def _header(run: Any, file: ExperimentFile, cell: Cell, device: str) -> None:
    terminal = run.terminal
    title = file.name if cell.name == SINGLE else f"{file.name} / {cell.name}"
    terminal.say(f"{title} on {device}", style="bold")
    terminal.table(describe.rows(cell.experiment, file.registry))
    passes = cell.experiment.tokens / len(run.tokens.train)
    terminal.table(
        [
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
    rows = []
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
    rows.append(("on the grid", f"{summary['share_on_grid']:.1%} of the non-embedding parameters"))
    rows.append(("text", f"{summary['passes']:.2f} passes over the training tokens"))
    if summary["tokens_per_second"]:
        rows.append(("speed", f"{summary['tokens_per_second']:,.0f} tokens/s{describe.cost(run.seconds)}"))
    rows.append(("folder", str(run.folder.path)))
    seed = run.experiment.seed + 1
    again = f"altgrad-run {file.path} --set seed={seed} --out {run.folder.path.parent.parent}-seed{seed}"
    rows.append(
        ("next", f"altgrad-run {file.path}" if summary["outcome"] != "finished" else f"another seed: {again}")
    )
    terminal.table(rows)


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
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(run_cell, cell): cell for cell in cells}
            results = []
            for future in as_completed(futures):
                error = future.exception()
                cell = futures[future]
                failed = CellResult(cell=cell, outcome="failed", message=f"its process died: {error}")
                results.append(future.result() if error is None else failed)
                print(f"{cell}: {results[-1].outcome}  ({len(results)} of {len(cells)})", flush=True)
        return sorted(results, key=lambda result: list(cells).index(result.cell))


def local_executor(options: NoOptions) -> Executor:
    return LocalExecutor()


def run_grid(request: Request, file: ExperimentFile, cells: Sequence[str], jobs: int) -> list[CellResult]:
    """Run the cells of a grid through the local executor."""
    executor: Executor = file.registry.find("executor", "local").build(NoOptions())
    if jobs > 1:
        threads = request.threads or max(1, (os.cpu_count() or 1) // jobs)
        request = attrs.evolve(request, threads=threads, quiet=True)
    return executor.run(cells, functools.partial(run_cell, request), jobs)
