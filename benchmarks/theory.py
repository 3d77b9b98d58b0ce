"""What theory predicts of training on a grid, beside what simulation measures, for the 8-bit formats.

    python benchmarks/theory.py [--only spacing T1 T2 T3] [--json] [--out FOLDER]

T1 is the floor of stochastic rounding (`floors.py`), T2 the dead zone of nearest rounding (`dead_zones.py`,
`freezing.py`), T3 the walk in rungs (`rung_walks.py`); each module has its derivation, and docs/science.md
all of them. Errors are standard errors. With --out three figures are written, as plain SVG for a browser.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import dead_zones
import floors
import freezing
import peers
import rung_walks
import spacings
import theory_figures
import torch
from rich import box
from rich.console import Console
from rich.table import Table

MARK = " *"

# Every part: what is measured, by name.
PARTS: dict[str, dict[str, Callable[[], list[Any]]]] = {
    "spacing": {"spacing": spacings.spacing_rows},
    "T1": {"floors": floors.floors, "floors by learning rate": floors.sweep},
    "T2": {
        "dead zones, many mantissa bits": dead_zones.wide,
        "dead zones, 8 bits": dead_zones.eight_bits,
        "frozen": freezing.shares,
    },
    "T3": {
        "flat ground": rung_walks.flat_ground,
        "bowl": rung_walks.biases,
        "sign lock": rung_walks.sign_locks,
    },
}


# --- the tables -----------------------------------------------------------------------------------------


def spacing_table(rows: Sequence[spacings.Spacing]) -> Table:
    table = Table(
        "",
        *("mean u/rms, sigma 1", "measured", "sigma 0.02", "least to most", "CV^2 of u", "E[u^2]E[u^-2]"),
        title=f"The spacing over Gaussian weights, amax {spacings.AMAX} sigma, by its place in the binade",
    )
    for row in rows:
        low, high = row.squared_variation
        table.add_row(
            row.format,
            f"{row.mean_at_1:.4f}",
            row.measured_at_1.to(4),
            f"{row.mean_at_002:.4f}",
            f"{row.lowest:.3f} to {row.highest:.3f}",
            f"{abs(low):.3f} to {abs(high):.3f}",
            f"{row.scramble_cost:.3g}",
        )
    return table


def floor_table(title: str, rows: Sequence[floors.Floor]) -> Table:
    table = Table(
        "",
        *(
            "arm",
            "lr",
            "excess a weight",
            "1/4 mean u E|g|",
            "without simulating",
            "measured over it",
            "long steps",
        ),
        title=f"T1, {title}: excess loss under stochastic rounding; long steps exceed the spacing",
    )
    for row in rows:
        table.add_row(
            *(row.format, row.arm, f"{row.lr:g}", row.excess.to(5)),
            *(f"{row.formula:.5f}", f"{row.chain:.5f}", str(row.excess.over(row.chain))),
            f"{100 * row.long_steps:.1f} %",
        )
    return table


def dead_zone_table(title: str, rows: Sequence[dead_zones.DeadZone]) -> Table:
    table = Table(
        "",
        *("arm", "formula", "predicted", "measured", "crossing", "left of start", "moving"),
        title=f"T2, {title}: loss left by nearest rounding over that of q = 0; * out of regime or under way",
    )
    for row in rows:
        table.add_row(
            *(row.format, row.arm, f"{row.formula:.4g}", f"{row.predicted:.4g}" + MARK * (not row.in_regime)),
            *(str(row.measured), f"{row.crossing:.2f}", f"{row.of_start:.3f}", f"{100 * row.moving:.1f} %"),
        )
    return table


def frozen_table(rows: Sequence[freezing.Frozen]) -> Table:
    ratios = [f"{ratio} rms(u)" for ratio in freezing.RATIOS]
    table = Table("", "arm", *ratios, title="T2: share frozen, predicted / measured, by the rms of the step")
    for name in dict.fromkeys(row.format for row in rows):
        for arm in freezing.POWERS:
            found = [row for row in rows if (row.format, row.arm) == (name, arm)]
            table.add_row(name, arm, *(f"{row.predicted:.3f} / {row.measured:.3f}" for row in found))
    return table


def fact_table(title: str, rows: Sequence[rung_walks.Fact]) -> Table:
    table = Table("", "", "predicted", "measured", title=f"T3, {title}")
    for row in rows:
        table.add_row(row.format, row.what, f"{row.predicted:z.4f}", row.measured.to(4))
    return table


def tables(results: dict[str, list[Any]]) -> list[Table]:
    return [_table(name, rows) for name, rows in results.items()]


def _table(name: str, rows: Sequence[Any]) -> Table:
    if name == "spacing":
        return spacing_table(rows)
    if name == "frozen":
        return frozen_table(rows)
    kinds = {floors.Floor: floor_table, dead_zones.DeadZone: dead_zone_table, rung_walks.Fact: fact_table}
    return kinds[type(rows[0])](name, rows)


# --- the command ----------------------------------------------------------------------------------------


def as_plain(row: Any) -> dict[str, Any]:
    """Return a row for JSON, which has no NaN: null."""
    return attrs.asdict(
        row,
        value_serializer=lambda _row, _field, x: None if isinstance(x, float) and math.isnan(x) else x,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="default: everything")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write three figures there, as SVG")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small tensors: a second thread costs more than it gives
    began = time.perf_counter()
    results = {name: measure() for part in arguments.only for name, measure in PARTS[part].items()}
    if arguments.out:
        sweep = results.get("floors by learning rate") or floors.sweep()
        figures = [str(path) for path in theory_figures.written(arguments.out, sweep)]
    else:
        figures = []
    machine = peers.machine() | {"seconds": f"{time.perf_counter() - began:.0f}"}
    if arguments.json:
        rows = {name: [as_plain(row) for row in found] for name, found in results.items()}
        print(json.dumps({"machine": machine, "figures": figures, **rows}, allow_nan=False))
        return
    console = Console(width=2000 if arguments.markdown else 140, markup=False, highlight=False)
    for table in tables(results):
        table.box, table.title_justify = (box.MARKDOWN if arguments.markdown else box.SIMPLE), "left"
        console.print(table)
    console.print("  ".join(f"{name} {value}" for name, value in machine.items()), *figures, sep="\n")


if __name__ == "__main__":
    main()
