"""The three figures of `theory.py`: a line is predicted, a mark is measured."""

from __future__ import annotations

from pathlib import Path

from dead_zones import Arm, Run, Setting
from floors import Floor
from line_chart import Series, chart
from quadratic import Bowl, Grid, gaussian_bowl
from rung_walks import STEPS, curve

from altgrad_formats.exmy import ExMy

POWERS = tuple(i / 6 for i in range(9))  # of S, with one half and two thirds among them
FIGURE_WEIGHTS = 2048
LR = 0.02


def written(folder: Path, sweep: list[Floor]) -> list[Path]:
    """Write the figures into the folder, which is made, and return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"floors": floor_figure(sweep), "dead-zones": dead_zone_figure(), "rung-walk": walk_figure()}
    for name, text in figures.items():
        (folder / f"{name}.svg").write_text(text, encoding="utf-8")
    return [folder / f"{name}.svg" for name in figures]


def floor_figure(sweep: list[Floor]) -> str:
    series = []
    for name in dict.fromkeys(row.format for row in sweep):
        rows = [row for row in sweep if row.format == name]
        ratios = [row.excess.over(row.chain) for row in rows]
        line = [(row.lr, 1.0) for row in rows]
        marks = [(row.lr, ratio.value, ratio.error) for row, ratio in zip(rows, ratios, strict=True)]
        series.append(Series(name, line, marks))
    title = "Stochastic rounding: the floor, until steps outgrow gaps"
    return chart(title, "learning rate", "excess loss / prediction", series, logarithmic=True)


def dead_zone_figure() -> str:
    bowl = gaussian_bowl(FIGURE_WEIGHTS, noise=0.0)
    grid = Grid.fitted(ExMy(3, 12), float(bowl.target.abs().max()))
    base = left(grid, bowl, Arm("q = 0", 0))
    series = []
    for norm in ("rms", "mean"):
        runs = [left(grid, bowl, Arm("", q, norm)) for q in POWERS]
        line = [
            (q, float(run.predicted.sum() / base.predicted.sum()))
            for q, run in zip(POWERS, runs, strict=True)
        ]
        rows = [run.relative_to(base, "E3M12").measured for run in runs]
        marks = [(q, row.value, row.error) for q, row in zip(POWERS, rows, strict=True)]
        series.append(Series(f"matched by {norm}", line, marks))
    title = "Nearest rounding, 12 mantissa bits: loss left by S^q"
    return chart(title, "q", "loss / loss at q = 0", series)


def left(grid: Grid, bowl: Bowl, arm: Arm) -> Run:
    return Run.of(Setting(grid=grid, bowl=bowl, lr=LR, arm=arm), "outside")


def walk_figure() -> str:
    slopes = {
        "rung: variance": (False, 2, 1.0),
        "rung: mean": (False, 1, 0.0),
        "value: mean": (True, 1, -0.5),
    }
    walks = {by_value: curve(by_value) for by_value in (False, True)}
    series = []
    for name, (by_value, column, slope) in slopes.items():
        points = walks[by_value]
        line = [(0.0, 0.0), *((p[0], slope * p[0]) for p in points)]
        series.append(Series(name, line, [(p[0], p[column], 0.0) for p in points]))
    title = f"E7M0 on flat ground, {STEPS} steps: log2(w/w0)"
    return chart(title, "p = sum of E|r|", "octaves, or octaves squared", series)
