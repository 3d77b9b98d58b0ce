"""What `altgrad-run` does once the file is right; the first module on the way that imports torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from altgrad_core.assemble import device_for
from altgrad_core.cells import Request, RunResult, run_grid, run_one
from altgrad_core.experiment_file import SINGLE, Cell, ExperimentFile
from altgrad_core.hookspecs import CellResult
from altgrad_core.record import RESOLVED, read_json
from altgrad_core.registry import PluginError, UsageError
from altgrad_core.run_state import EXIT_CODES, PluginFailure
from altgrad_core.terminal import Terminal


def run_file(
    file: ExperimentFile,
    *,
    overrides: Sequence[str],
    without: Sequence[str],
    out: Path,
    device: str,
    resume: Path | None,
    jobs: int,
    quiet: bool,
) -> int:
    """Run the file's cells and return the command's exit code."""
    device = device_for(file.cells_on["cpu"][0].experiment, device)
    cells = file.cells_on[device]
    if resume is not None:
        out, cells = _resumed(file, resume, device)
    if len(cells) == 1:
        try:
            result = run_one(file, cells[0], out, device, Terminal(quiet=quiet))
        except (PluginError, PluginFailure) as error:
            print(f"failed: {error}", file=sys.stderr)
            return EXIT_CODES["failed"]
        return EXIT_CODES.get(result.outcome, 0)
    request = Request(
        path=file.path,
        overrides=tuple(overrides),
        without=tuple(without),
        out=out,
        device=device,
        quiet=quiet,
    )
    results = run_grid(request, file, [cell.name for cell in cells], jobs)
    return _closing(results, len(cells))


def _resumed(file: ExperimentFile, folder: Path, device: str) -> tuple[Path, tuple[Cell, ...]]:
    """Return the out folder and the one cell that a run folder belongs to. Raises UsageError."""
    begun = read_json(folder / RESOLVED)
    if begun is None:
        raise UsageError(f"--resume {folder}: is no run folder, it has no {RESOLVED}")
    found = tuple(cell for cell in file.cells_on[device] if cell.name == begun["cell"])
    if not found or begun["options"]["name"] != file.name:
        raise UsageError(
            f"--resume {folder}: holds {begun['options']['name']}/{begun['cell']}, not a cell of {file.path}"
        )
    return folder.resolve().parent.parent, found


def _closing(results: Sequence[CellResult], cells: int) -> int:
    """Print how the cells ended; 1 if any failed or stopped, 130 if interrupted."""
    print()
    for result in results:
        print(f"{result.outcome:>12}  {result.cell}")
    for result in results:
        if result.outcome in ("failed", "stopped") and result.message:
            print(f"\n{result.cell}: {result.message}", file=sys.stderr)
    codes = [EXIT_CODES.get(result.outcome, 0) for result in results]
    if len(results) < cells:
        print(f"{cells - len(results)} cells were not begun; run the same command to go on")
    return max(codes, default=0)


def run(
    file: ExperimentFile, out: str | Path = "runs", *, device: str = "auto", quiet: bool = False
) -> RunResult:
    """Run an experiment of one cell, as `altgrad-run` does, and return its folder, outcome and summary.

    A finished run is not run again; an unfinished one is resumed. Raises UsageError for a file with a grid.
    """
    device = device_for(file.cells_on["cpu"][0].experiment, device)
    cells = file.cells_on[device]
    if len(cells) != 1:
        raise UsageError(
            f"{file.path} is a grid of {len(cells)} runs; use run_all, or the command altgrad-run"
        )
    return run_one(file, cells[0], Path(out), device, Terminal(quiet=quiet))


def run_all(
    file: ExperimentFile, out: str | Path = "runs", *, device: str = "auto", quiet: bool = False
) -> list[RunResult]:
    """Run every cell of an experiment, one after another, and return their results."""
    device = device_for(file.cells_on["cpu"][0].experiment, device)
    return [run_one(file, cell, Path(out), device, Terminal(quiet=quiet)) for cell in file.cells_on[device]]


__all__ = ["SINGLE", "run", "run_all", "run_file"]
