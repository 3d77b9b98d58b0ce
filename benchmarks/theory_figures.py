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
        line = [(row.lr, row.chain) for row in rows]
        series.append(Series(name, line, [(row.lr, row.excess.value, row.excess.error) for row in rows]))
    title = "Stochastic rounding, plain descent: one floor, until steps outgrow gaps"
    return chart(title, "learning rate", "excess loss per weight", series, logarithmic=True)


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
    title = "Nearest rounding, E3M12: loss left by steps times S^q"
    return chart(title, "q", "loss left / loss left at q = 0", series)


def left(grid: Grid, bowl: Bowl, arm: Arm) -> Run:
    return Run.of(Setting(grid=grid, bowl=bowl, lr=LR, arm=arm), "outside")


def walk_figure() -> str:
    slopes = {
        "rung rounding: variance": (False, 2, 1.0),
        "rung rounding: mean": (False, 1, 0.0),
        "value rounding: mean": (True, 1, -0.5),
    }
    walks = {by_value: curve(by_value) for by_value in (False, True)}
    series = []
    for name, (by_value, column, slope) in slopes.items():
        points = walks[by_value]
        line = [(0.0, 0.0), *((p[0], slope * p[0]) for p in points)]
        marks = [(p[0], p[column].value, p[column].error) for p in points]
        series.append(Series(name, line, marks))
    title = f"E7M0 on flat ground, {STEPS} steps: log2(w/w0)"
    return chart(title, "p = sum of E|r|, in rungs", "mean, octaves; variance, octaves squared", series)
