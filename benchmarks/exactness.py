"""The share of values that a quantizer rounds wrongly, by class of value, for AltGrad and every peer.

    python benchmarks/exactness.py [--peers qtorch gfloat] [--formats E4M3 E5M2] [--markdown | --json]

Right is: the nearest value of the format, a tie to the even code, saturation beyond the largest value, NaN
for NaN, the sign of a zero kept (`reference.py`, which knows none of AltGrad's arithmetic).

A peer is compared in those formats that it expresses with its own options, never in a neighbor of them. inf
or NaN for what is out of range is another convention than saturation, not an error: such cells say so.
"""

from __future__ import annotations

import argparse
import collections
import io
import json

import attrs
import numpy as np
import peers
import torch
from reference import CLASSES, exact, inputs, magnitudes
from rich import box
from rich.console import Console
from rich.table import Table

from altgrad_formats.layout import NAMED, Layout

OUT_OF_RANGE = ("overflow", "infinity")
LARGE = 2**16  # elements
FORMATS = {
    **{name: layout for name, layout in NAMED.items() if layout.bits <= 8},
    **{  # what peers have besides: without special codes, and with the biases of IEEE P3109
        layout.name: layout
        for layout in (Layout(4, 3, 7), Layout(5, 2, 15), Layout(3, 4, 4), Layout(4, 3, 8), Layout(5, 2, 16))
    },
}


# --- the comparison -----------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Score:
    """How one class came out: how many are wrong, and how many of those became inf or NaN."""

    tried: int
    wrong: int = 0
    became_inf: int = 0
    became_nan: int = 0
    error: str | None = None

    def cell(self, name: str) -> str:
        if self.tried == 0:
            return "–"
        if self.error is not None:
            return "raises"
        special = " or ".join(["inf"] * (self.became_inf > 0) + ["NaN"] * (self.became_nan > 0))
        if name not in OUT_OF_RANGE or not special:
            return share(self.wrong / self.tried)
        rest = self.wrong - self.became_inf - self.became_nan
        return special if rest == 0 else f"{share(rest / self.tried)}, else {special}"


def share(fraction: float) -> str:
    """Return a percentage; only nothing at all is 0, and only all is 100."""
    percent = 100 * fraction
    if percent in (0, 100):
        return "0" if percent == 0 else "100 %"
    if not 0.1 <= percent <= 99:
        return "< 0.1 %" if percent < 0.1 else "> 99 %"
    return f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"


def scored(call: peers.adapters.Call, name: str, x: np.ndarray, grid: np.ndarray) -> Score:
    """Compare one class; a zero's sign counts in the class of signed zeros, which holds them all.

    A quantizer may treat large tensors in another way than small ones: it is called with the values once and
    with many copies of them, and a value is wrong where any of its results is.
    """
    if not len(x):
        return Score(tried=0)
    expected = exact(x, grid)
    try:
        with np.errstate(invalid="ignore"):
            once, repeated = (_called(call, np.tile(x, n)) for n in (1, -(-LARGE // len(x))))
    except Exception as error:  # noqa: BLE001 - a peer that raises is a result: its row says so
        return Score(tried=len(x), wrong=len(x), error=f"{type(error).__name__}: {error}")
    seen = np.concatenate([once, repeated]).reshape(-1, len(x))
    same = (seen == expected) | (np.isnan(seen) & np.isnan(expected))
    if name == "signed zero":
        same &= np.signbit(seen) == np.signbit(expected)
    return Score(
        tried=len(x),
        wrong=_somewhere(~same),
        became_inf=_somewhere(~same & np.isinf(seen)),
        became_nan=_somewhere(~same & np.isnan(seen)),
    )


def _called(call: peers.adapters.Call, x: np.ndarray) -> np.ndarray:
    result: np.ndarray = call(torch.from_numpy(x)).float().numpy()
    return result


def _somewhere(mask: np.ndarray) -> int:
    """Return the number of columns in which the mask is True somewhere."""
    return int(mask.any(axis=0).sum())


@attrs.frozen(kw_only=True)
class Row:
    """One peer in one format; `missing` alone where the peer cannot be used."""

    peer: str
    version: str | None
    settings: str
    missing: str | None = None
    format: str | None = None
    classes: dict[str, Score] = attrs.field(factory=dict)

    def cells(self) -> tuple[str, ...]:
        return tuple(self.classes[name].cell(name) for name in CLASSES)


def rows(found: list[peers.Found], formats: dict[str, Layout], count: int) -> list[Row]:
    result = []
    for one in found:
        facts = {"peer": one.name, "version": one.version, "settings": one.peer.settings}
        if one.missing:
            result.append(Row(**facts, missing=one.missing))
        for name, layout in formats.items():
            call = one.call(layout, "nearest_even")
            if call is not None:
                grid, tried = magnitudes(layout), inputs(layout, count)
                scores = {group: scored(call, group, tried[group], grid) for group in CLASSES}
                result.append(Row(**facts, format=name, classes=scores))
    return result


# --- the tables ---------------------------------------------------------------------------------------


def shares(result: list[Row], style: box.Box) -> Table:
    """Return the table of shares: one row per peer for all formats that come out alike."""
    alike: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    for row in result:
        if row.format is not None:
            alike[(row.peer, *row.cells())].append(row.format)
    table = Table("", "formats", *CLASSES, box=style)
    for (peer, *cells), names in alike.items():
        table.add_row(peer, ", ".join(names), *cells)
    return table


def who(result: list[Row], style: box.Box) -> Table:
    """Return the table of versions and settings, with the reason where a peer is missing."""
    table = Table("", "version", "how it is called", box=style)
    for row in {row.peer: row for row in result}.values():
        missing = f"; missing: {row.missing}" if row.missing else ""
        table.add_row(row.peer, row.version or "none here", row.settings + missing)
    return table


def show(result: list[Row], markdown: bool) -> None:
    style, text = (box.MARKDOWN if markdown else box.SIMPLE), io.StringIO()
    console = Console(file=text, width=2000 if markdown else 160, markup=False, highlight=False)
    console.print(shares(result, style), who(result, style))
    console.print("  ".join(f"{name} {value}" for name, value in peers.machine().items()))
    print("\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="*", help="by name, AltGrad always; default: all")
    parser.add_argument("--formats", nargs="*", choices=[*NAMED, *FORMATS], metavar="FORMAT")
    parser.add_argument("--values", type=int, default=8000, help="about so many in each large class")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    everything = {**NAMED, **FORMATS}
    formats = {name: everything[name] for name in arguments.formats or FORMATS}
    result = rows(peers.find_all(arguments.peers), formats, arguments.values)
    if arguments.json:
        print(json.dumps({"machine": peers.machine(), "rows": [attrs.asdict(row) for row in result]}))
    else:
        show(result, arguments.markdown)


if __name__ == "__main__":
    main()
