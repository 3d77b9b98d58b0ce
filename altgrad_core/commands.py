"""What `altgrad-run` does once the file is right; the first module on the way that imports torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from altgrad_core.cells import Request, RunResult, folder_of, placed, run_grid, run_one
from altgrad_core.experiment_file import SINGLE, Cell, ExperimentFile
from altgrad_core.hookspecs import CellResult
from altgrad_core.record import RESOLVED, SUMMARY, WriteError, read_json
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
    return _closing(results, dict(zip((cell.name for cell, _ in cells), folders, strict=True)))


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


def _closing(results: Sequence[CellResult], folders: Mapping[str, Path]) -> int:
    """Print how the cells ended, with what and where; 1 if any failed or stopped, 130 if interrupted."""
    print(f"\n{'outcome':>12}  {'validation':>10}  {'bits/byte':>9}  folder")
    for result in results:
        final = (read_json(folders[result.cell] / SUMMARY) or {}).get("final") or {}
        numbers = (final.get("validation/loss"), final.get("validation/bits_per_byte"))
        loss, per_byte = ("" if number is None else f"{number:.4f}" for number in numbers)
        print(f"{result.outcome:>12}  {loss:>10}  {per_byte:>9}  {folders[result.cell]}")
    for result in results:
        if result.outcome in ("failed", "stopped") and result.message:
            print(f"\n{result.cell}: {result.message}", file=sys.stderr)
    codes = [EXIT_CODES.get(result.outcome, 0) for result in results]
    if unbegun := len(folders) - len(results):
        print(f"not begun: {unbegun}")
        codes = [EXIT_CODES["interrupted"], *codes]
    if unbegun or any(result.outcome in ("interrupted", "terminated", "busy") for result in results):
        print("run the same command to go on")
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
