"""What `altgrad-run` does once the file is right; the first module on the way that imports torch."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from altgrad_core.assemble import device_for
from altgrad_core.cells import FAILED, RunResult, folder_of, placed, run_one
from altgrad_core.comparing import Comparing, run_named
from altgrad_core.experiment import Cell
from altgrad_core.experiment_file import ExperimentFile
from altgrad_core.grids import Request, is_local, requested, run_grid
from altgrad_core.hookspecs import CellResult
from altgrad_core.interrupts import ASKED
from altgrad_core.record import EXPERIMENT, RESOLVED, SUMMARY, begun, read_json
from altgrad_core.registry import UsageError
from altgrad_core.run_state import EXIT_CODES
from altgrad_core.terminal import Terminal
from altgrad_core.validation_metrics import HEADINGS


def run_file(
    file: ExperimentFile,
    *,
    without: Sequence[str],
    out: Path,
    device: str,
    resume: Path | None,
    jobs: int,
    quiet: bool,
) -> int:
    """Run the file's cells and return the command's exit code."""
    try:
        if resume is not None:
            return _run_one(file, *_resumed(file, resume, device), quiet)
        cells = placed(file, device) if is_local(file) else []
        if len(cells) == 1 and file.comparison is None:
            ((cell, on),) = cells
            return _run_one(file, cell, on, folder_of(file, cell, out), quiet)
        request = requested(file, without=without, out=out, device=device, quiet=quiet)
        if file.comparison is not None:
            comparing = Comparing(request, file, jobs)
            comparing.run()
            results = list(comparing.results.values())
            return _closing(results, request, comparing.unbegun, comparing.diverged)
        results = run_grid(request, file, jobs)
        return _closing(results, request, len(request.cells) - len(results))
    except FAILED as error:
        print(f"failed: {error}", file=sys.stderr)
        return EXIT_CODES["failed"]


def _run_one(file: ExperimentFile, cell: Cell, device: str, folder: Path, quiet: bool) -> int:
    result = run_one(file, cell, folder, device, Terminal(quiet=quiet))
    return EXIT_CODES.get(result.outcome, 0)


def _resumed(file: ExperimentFile, folder: Path, device: str) -> tuple[Cell, str, Path]:
    """Return the one cell that a run folder holds, its device and the folder. Raises UsageError."""
    asked = begun(folder)
    if asked is None:
        raise UsageError(
            f"--resume {folder}: is no run folder, it has no {RESOLVED}; name a cell's own, OUT/NAME/CELL"
        )
    if (compared := run_named(file, asked["cell"])) is not None:
        on = device_for(compared["cpu"].experiment, device)
        found = [(compared[on], on)]
    else:
        found = [pair for pair in placed(file, device) if pair[0].name == asked["cell"]]
    if not found or asked["options"]["name"] != file.name:
        raise UsageError(
            f"--resume {folder}: holds {asked['options']['name']}/{asked['cell']}, not a cell of {file.path};"
            f" give the file that began it: a copy is {folder / EXPERIMENT}"
        )
    return *found[0], folder


def _closing(
    results: Sequence[CellResult], request: Request, unbegun: int, diverged: Collection[str] = ()
) -> int:
    """Print how the cells ended, with what and where; 1 if any failed or stopped, 130 if interrupted.

    diverged: cells that may have been stopped.
    """
    folders = {result.cell: request.folder(result.cell) for result in results}
    finals = {cell: (read_json(path / SUMMARY) or {}).get("final") or {} for cell, path in folders.items()}
    columns = [name for name in HEADINGS if any(name in final for final in finals.values())]
    print("\n" + _row("outcome", [HEADINGS[name] for name in columns], "folder"))
    for result in results:
        final = finals[result.cell]
        numbers = [f"{final[name]:.4f}" if name in final else "" for name in columns]
        print(_row(result.outcome, numbers, folders[result.cell]))
    for result in results:
        if result.outcome in ("failed", "stopped") and result.message:
            print(f"\n{result.cell}: {result.message}", file=sys.stderr)
    codes = [EXIT_CODES.get(result.outcome, 0) for result in results if result.cell not in diverged]
    if unbegun:
        print(f"not begun: {unbegun}")
        codes = [EXIT_CODES["interrupted"], *codes]
    if unbegun or any(result.outcome in (*ASKED, "busy") for result in results):
        print("run the same command to go on")
    return max(codes, default=0)


def _row(outcome: str, numbers: Sequence[str], folder: object) -> str:
    return "  ".join([f"{outcome:>12}", *(f"{number:>10}" for number in numbers), str(folder)])


def run(
    file: ExperimentFile, out: str | Path = "runs", *, device: str = "auto", quiet: bool = False
) -> RunResult:
    """Run an experiment of one cell, as `altgrad-run` does, and return its folder, outcome and summary.

    A finished run is not run again; an unfinished one is resumed. Raises UsageError for a file with a grid.
    """
    _refuse_comparison(file)
    cells = placed(file, device)
    if len(cells) != 1:
        raise UsageError(
            f"{file.path} is a grid of {len(cells)} runs; use run_all, or the command altgrad-run"
        )
    ((cell, on),) = cells
    return run_one(file, cell, folder_of(file, cell, Path(out)), on, Terminal(quiet=quiet))


def run_all(
    file: ExperimentFile, out: str | Path = "runs", *, device: str = "auto", quiet: bool = False
) -> list[RunResult]:
    """Run every cell of an experiment, one after another, and return their results.

    SIGINT or SIGTERM ends the cell that it finds, and no other is begun. Raises UsageError for a file with a
    [compare].
    """
    _refuse_comparison(file)
    results: list[RunResult] = []
    for cell, on in placed(file, device):
        results.append(run_one(file, cell, folder_of(file, cell, Path(out)), on, Terminal(quiet=quiet)))
        if results[-1].asked:
            break
    return results


def _refuse_comparison(file: ExperimentFile) -> None:
    if file.comparison is not None:
        raise UsageError(f"{file.path} has a [compare], whose runs follow from others: use altgrad-run")
