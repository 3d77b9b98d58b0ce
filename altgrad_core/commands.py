"""What `altgrad-run` does once the file is right; the first module on the way that imports torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from altgrad_core.cells import Request, RunResult, folder_of, placed, run_grid, run_one
from altgrad_core.experiment_file import SINGLE, Cell, ExperimentFile
from altgrad_core.hookspecs import CellResult
from altgrad_core.record import RESOLVED, WriteError, read_json
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
    cells = placed(file, device)
    folders = [folder_of(file, cell, out) for cell, _ in cells]
    if resume is not None:
        cells, folders = [_resumed(file, resume, cells)], [resume]
    if len(cells) == 1:
        ((cell, on),) = cells
        try:
            result = run_one(file, cell, folders[0], on, Terminal(quiet=quiet))
        except (PluginError, PluginFailure, WriteError) as error:
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
    results = run_grid(request, file, [cell.name for cell, _ in cells], jobs)
    return _closing(results, len(cells))


def _resumed(file: ExperimentFile, folder: Path, cells: Sequence[tuple[Cell, str]]) -> tuple[Cell, str]:
    """Return the one cell that a run folder holds, and its device. Raises UsageError."""
    begun = read_json(folder / RESOLVED)
    if begun is None:
        raise UsageError(f"--resume {folder}: is no run folder, it has no {RESOLVED}")
    found = [pair for pair in cells if pair[0].name == begun["cell"]]
    if not found or begun["options"]["name"] != file.name:
        raise UsageError(
            f"--resume {folder}: holds {begun['options']['name']}/{begun['cell']}, not a cell of {file.path}"
        )
    return found[0]


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
        codes = [EXIT_CODES["interrupted"], *codes]
    return max(codes, default=0)


def run(
    file: ExperimentFile, out: str | Path = "runs", *, device: str = "auto", quiet: bool = False
) -> RunResult:
    """Run an experiment of one cell, as `altgrad-run` does, and return its folder, outcome and summary.

    A finished run is not run again; an unfinished one is resumed. Raises UsageError for a file with a grid.
    """
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
    """Run every cell of an experiment, one after another, and return their results."""
    return [
        run_one(file, cell, folder_of(file, cell, Path(out)), on, Terminal(quiet=quiet))
        for cell, on in placed(file, device)
    ]


__all__ = ["SINGLE", "run", "run_all", "run_file"]
