"""The cells of a grid: what a process needs to run one, the executor of this machine, and running them all.

Finished cells are passed over, unfinished ones resumed, one that fails stops no other. Two commands on one
grid share the work: a cell whose folder another process has locked is left to it, and tried again once that
process has let go.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs
import torch

from altgrad_core import live_table, locks, workers
from altgrad_core.assemble import device_for
from altgrad_core.cells import EXPECTED, run_one
from altgrad_core.experiment import Cell
from altgrad_core.experiment_file import DEVICES, ExperimentFile
from altgrad_core.hookspecs import CellResult, Executor, NoOptions
from altgrad_core.interrupts import ASKED
from altgrad_core.record import LOCK, RESOLVED, SUMMARY, BusyError, differences, read_json, refuse_unwritable
from altgrad_core.registry import PluginError, Registered, UsageError, discover
from altgrad_core.terminal import Terminal
from altgrad_core.wording import shown

_POLL = 1.0
"""Seconds between looks at what another process holds."""


@attrs.frozen(kw_only=True)
class Request:
    """Some cells, and what the command asks of each; picklable, and all that another machine needs."""

    path: Path
    text: str
    """What the file said when the command began; it may be edited meanwhile."""
    name: str
    cells: Mapping[str, Mapping[str, Cell]]
    """Name of a cell's folder to the cell on each device."""
    without: tuple[str, ...] = ()
    out: Path = Path("runs")
    device: str = "auto"
    baseline: str = ""
    flags: tuple[str, ...] = ()
    quiet: bool = False
    threads: int | None = None

    def folder(self, cell: str) -> Path:
        return self.out / self.name / cell


def requested(
    file: ExperimentFile, *, out: Path, device: str = "auto", without: Sequence[str] = (), quiet: bool = False
) -> Request:
    """Return a request for the cells of a file."""
    by_device = (file.cells_on[device] for device in DEVICES)
    return Request(
        path=file.path,
        text=file.text,
        name=file.name,
        cells={pair[0].name: dict(zip(DEVICES, pair, strict=True)) for pair in zip(*by_device, strict=True)},
        baseline=file.baseline,
        flags=file.flags,
        out=out,
        device=device,
        without=tuple(without),
        quiet=quiet,
    )


def run_cell(request: Request, name: str) -> CellResult:
    """Run one cell in this process; never raises for what goes wrong inside of the cell."""
    if request.threads:
        torch.set_num_threads(request.threads)
    try:
        cells = request.cells[name]
        device = device_for(cells[DEVICES[0]].experiment, request.device)
        file = _file(request)
        terminal = Terminal(quiet=request.quiet)
        result = run_one(file, cells[device], request.folder(name), device, terminal)
    except BusyError as error:
        return CellResult(cell=name, outcome="busy", message=str(error))
    except EXPECTED as error:
        return CellResult(cell=name, outcome="failed", message=str(error))
    except Exception:  # noqa: BLE001 - a bug prints with its traceback; the other cells go on
        return CellResult(cell=name, outcome="failed", message=traceback.format_exc())
    outcome = result.asked or result.outcome  # a signal that came as the cell was ending ends the grid
    return CellResult(cell=name, outcome=outcome, message=result.summary.get("message", ""))


def _file(request: Request) -> ExperimentFile:
    registry = discover(request.without)
    return ExperimentFile(
        path=request.path,
        text=request.text,
        name=request.name,
        registry=registry,
        cells_on={},
        baseline=request.baseline,
        flags=request.flags,
    )


class LocalExecutor:
    """Cells one after another in this process, or in `jobs` processes of this machine."""

    def run(self, cells: Sequence[str], run_cell: Callable[[str], CellResult], jobs: int) -> list[CellResult]:
        """Run every cell once; one that fails never stops the others."""
        if jobs <= 1:
            results = []
            for cell in cells:
                results.append(run_cell(cell))
                if results[-1].outcome in ASKED:
                    break
            return results
        count = itertools.count(1)

        def ended(result: CellResult) -> None:
            print(f"{result.cell}: {result.outcome}  ({next(count)} of {len(cells)})", flush=True)

        return workers.run_in_processes(cells, run_cell, jobs, ended)


def local_executor(options: NoOptions) -> Executor:
    """Return the executor `local`."""
    return LocalExecutor()


def is_local(file: ExperimentFile) -> bool:
    """Whether the file's executor is the core's own, which may run cells in this process."""
    return _executor(file).component.target == f"{__name__}:{local_executor.__name__}"


def _executor(file: ExperimentFile) -> Registered:
    return file.registry.find("executor", file.executor.plugin)


def run_grid(
    request: Request, file: ExperimentFile, jobs: int, *, until_done: bool = False
) -> list[CellResult]:
    """Run the cells of a request through the file's executor; returns results in the cells' order.

    until_done: wait for cells that other processes run, and take them over where one of those dies.
    """
    results = {result.cell: result for result in over(request)}
    if results and not request.quiet:
        print(f"over already: {len(results)} of {len(request.cells)} runs", flush=True)
    request = _placed(request, file, jobs)
    left = [name for name in request.cells if name not in results]
    if left and is_local(file):
        refuse_unwritable(request.out / request.name)
    while left:
        new = {result.cell: result for result in _executed(request, file, left, jobs)}
        results |= new
        busy = [name for name, result in new.items() if result.outcome == "busy"]
        if len(new) < len(left) or any(one.outcome in ASKED for one in new.values()):
            break
        left = _released(request, busy, wait=until_done)
    return [results[name] for name in request.cells if name in results]


def _placed(request: Request, file: ExperimentFile, jobs: int) -> Request:
    """Return the request as its executor needs it: threads divided, folders that other machines find."""
    if not is_local(file):
        return attrs.evolve(
            request,
            quiet=True,
            path=request.path.absolute(),
            out=request.out.absolute(),
            baseline=request.baseline and os.path.abspath(os.path.expanduser(request.baseline)),
        )
    if jobs > 1:
        threads = request.threads or max(1, (os.cpu_count() or 1) // jobs)
        return attrs.evolve(request, quiet=True, threads=threads)
    return request


def _executed(request: Request, file: ExperimentFile, names: Sequence[str], jobs: int) -> list[CellResult]:
    executor: Executor = file.executor.build(file.registry)
    needed = attrs.evolve(request, cells={name: request.cells[name] for name in names})
    with _shown(needed, shown=jobs > 1 or not is_local(file)):
        try:
            return _checked(executor.run(names, functools.partial(run_cell, needed), jobs), names)
        except UsageError:
            raise
        except Exception as error:
            if is_local(file):
                raise
            raise PluginError(
                f"{_executor(file).title}: run raised {type(error).__name__}: {error}"
            ) from error


def _checked(results: Iterable[CellResult], names: Sequence[str]) -> list[CellResult]:
    """Return the results of an executor. Raises TypeError where one of them is none of these cells'."""
    found, known = list(results), set(names)
    for one in found:
        if not isinstance(one, CellResult) or one.cell not in known:
            raise TypeError(f"it must return a CellResult of each cell that it has run, not {shown(one)}")
    return found


@contextlib.contextmanager
def _shown(request: Request, *, shown: bool) -> Iterator[None]:
    """Show a live table of the cells, where there is a terminal."""
    if not shown:
        yield
        return
    steps = {name: cells[DEVICES[0]].experiment.steps for name, cells in request.cells.items()}
    with live_table.shown({name: request.folder(name) for name in request.cells}, steps):
        yield


def over(request: Request) -> Iterator[CellResult]:
    """Yield the results of cells that are finished, or were stopped, with these very options."""
    for name, cells in request.cells.items():
        folder = request.folder(name)
        summary = read_json(folder / SUMMARY) or {}
        outcome = {"finished": "skipped", "stopped": "stopped"}.get(summary.get("outcome", ""))
        if outcome is None:
            continue
        begun = read_json(folder / RESOLVED) or {}
        cell = cells.get(begun.get("device", ""))
        if cell is not None and not differences(begun.get("options"), cell.experiment.plain()):
            yield CellResult(cell=name, outcome=outcome, message=summary.get("message", ""))


def _released(request: Request, busy: Sequence[str], *, wait: bool) -> list[str]:
    """Return those of the busy cells that nobody runs now; wait until there is one, if asked to."""
    said = False
    while True:
        free = [name for name in busy if not _held(request.folder(name))]
        if free or not busy or not wait:
            return free
        if not said:
            runs = "a run" if len(busy) == 1 else f"{len(busy)} runs"
            print(f"waiting for {runs} of another process", flush=True)
        said = True
        time.sleep(_POLL)


def _held(folder: Path) -> bool:
    """Whether another process has locked a run folder."""
    try:
        with (folder / LOCK).open("a") as lock:
            return not locks.take(lock)
    except OSError:  # whoever runs the cell is told why its folder cannot be locked
        return False
