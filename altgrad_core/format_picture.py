"""Pictures of a grid for a terminal: where its values are, and how far apart. Text only, no color.

Two of density, where the height of a column says how many values fall into it: one on a linear axis, one on a
logarithmic axis of whole binades. And the spacing over the same logarithmic axis, itself in powers of two: a
staircase for a floating-point format, level ground for a fixed-point one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import attrs
import torch

from altgrad_core.format import Format
from altgrad_core.format_facts import exact, is_symmetric

LINEAR_COLUMNS = 64
"""A power of two, so that a uniform grid has equally many values in each column."""
_MARGIN = 10
"""Characters to the left of a picture, where the staircase has its numbers."""
_TALLEST = 8  # rows of the staircase
_FEWEST_COLUMNS = 16
_ROUNDOFF = 1e-6  # of a binade: 2^(k/8) as a float32 belongs to the column that begins there


@attrs.frozen
class Ink:
    """The characters to draw with: eight heights after the empty one, and an axis."""

    heights: str = " ▁▂▃▄▅▆▇█"
    wall: str = "│"
    floor: str = "─"
    tick: str = "┴"


ASCII = Ink(" .:-=+*%#", "|", "-", "+")
"""For an output that cannot show block characters."""


@attrs.frozen
class LogAxis:
    """Whole binades from 2^lowest, each of `per_binade` columns, or `per_column` of them in each column."""

    lowest: int
    binades: int
    per_binade: int
    per_column: int

    @classmethod
    def over(cls, smallest: float, largest: float, room: int) -> LogAxis:
        """Return the axis of at most `room` columns that holds both."""
        lowest = math.frexp(smallest)[1] - 1
        binades = math.frexp(largest)[1] - lowest
        return cls(lowest, binades, max(1, room // binades), max(1, -(-binades // room)))

    @property
    def columns(self) -> int:
        return -(-self.binades * self.per_binade // self.per_column)

    @property
    def column_width(self) -> float:
        """In binades."""
        return self.per_column / self.per_binade

    def column(self, x: float) -> int:
        """Return the column that a positive x falls into."""
        return math.floor((math.log2(x) - self.lowest + _ROUNDOFF) / self.column_width)

    def at(self, column: float) -> float:
        """Return the x of a place on the axis: a whole number is a column's left edge."""
        return float(2.0 ** (self.lowest + column * self.column_width))

    def __str__(self) -> str:
        if self.per_column > 1:
            return f"{self.per_column} binades a column"
        return f"{self.per_binade} column{'s' if self.per_binade > 1 else ''} a binade"


def pictures(format: Format, width: int, ink: Ink) -> Iterator[str]:
    """Yield the three pictures, in lines of at most `width` characters (64 or more)."""
    yield from _linear(format, width, ink)
    positive = [value for value in format.values.tolist() if value > 0]
    axis = LogAxis.over(positive[0], positive[-1], max(_FEWEST_COLUMNS, width - _MARGIN - 1))
    counts = Counter(map(axis.column, positive))
    yield from ("", f"positive values per column, log2 axis: {axis}")
    yield from _density([counts[column] for column in range(axis.columns)], ink)
    yield from _log_floor(axis, width, ink)
    yield from ("", "spacing, both axes log2")
    yield from _staircase(_log2_spacing(format, axis), ink)
    yield from _log_floor(axis, width, ink)


def _linear(format: Format, width: int, ink: Ink) -> Iterator[str]:
    """Yield the density on a linear axis; from 0 where the negative values only mirror the others."""
    columns = LINEAR_COLUMNS if width >= LINEAR_COLUMNS + _MARGIN else LINEAR_COLUMNS // 2
    values = format.values.double()
    values = values[values >= 0] if is_symmetric(format) else values
    start = float(values[0])
    end = float(values[-1] + (values[-1] - values[-2]))  # room for the last value, as for every other
    places = ((values - start) * (columns / (end - start))).long().clamp_(max=columns - 1)
    yield "values per column, linear axis"
    yield from _density(torch.bincount(places, minlength=columns).tolist(), ink)
    half, last = columns // 2, exact(end)
    before_last = min(columns, width - _MARGIN - len(last))
    yield " " * _MARGIN + (ink.tick + ink.floor * (half - 1)) * 2 + ink.tick
    labels = f"{exact(start):<{half}}{exact((start + end) / 2)}"
    yield f"{'':{_MARGIN}}{labels:<{before_last}}{last}"


def _density(counts: Sequence[int], ink: Ink) -> Iterator[str]:
    """Yield a legend, and the columns: one height up stands for 2, or 4, 8, ... times as many values."""
    step = max(1, math.ceil(math.log2(max(counts)) / (len(ink.heights) - 2)))
    heights = [0 if count == 0 else 1 + math.ceil(math.log2(count) / step) for count in counts]
    most = [f"{ink.heights[height]} {2 ** (step * (height - 1))}" for height in range(1, max(heights) + 1)]
    yield f"  up to: {'  '.join(most)}"
    yield ""
    yield f"{'':{_MARGIN}}{''.join(ink.heights[height] for height in heights)}".rstrip()


def _log_floor(axis: LogAxis, width: int, ink: Ink) -> Iterator[str]:
    """Yield the axis and its labels, as many as there is room for."""
    every = next(step for step in (2**n for n in range(12)) if step / axis.column_width >= 8)
    ticks = {
        round((exponent - axis.lowest) / axis.column_width): f"2^{exponent}"
        for exponent in range(axis.lowest, axis.lowest + axis.binades + 1)
        if exponent % every == 0
    }
    yield " " * _MARGIN + "".join(ink.tick if at in ticks else ink.floor for at in range(axis.columns + 1))
    labels = ""
    for at, label in ticks.items():
        labels = f"{labels:<{min(at, width - _MARGIN - len(label))}}{label}"
    yield " " * _MARGIN + labels


def _log2_spacing(format: Format, axis: LogAxis) -> list[float]:
    """Return log2 of the spacing in the middle of each column that begins within the format's range."""
    begun = [column for column in range(axis.columns) if axis.at(column) <= format.largest]
    middles = torch.tensor([axis.at(column + 0.5) for column in begun], dtype=torch.float64)
    return list(format.spacing(middles).log2().tolist())


def _staircase(levels: Sequence[float], ink: Ink) -> Iterator[str]:
    """Yield bars; a row stands for 1, 2, 4, ... powers of two and is named by its highest."""
    floor = math.floor(min(levels))
    different = math.floor(max(levels)) - floor + 1
    per_row = next(rows for rows in (2**n for n in range(12)) if rows * _TALLEST >= different)
    full = len(ink.heights) - 1
    bars = [max(1, round(full * (level - floor + 1) / per_row)) for level in levels]
    for row in range(-(-different // per_row) - 1, -1, -1):
        label = f"2^{floor + (row + 1) * per_row - 1}"
        inked = "".join(ink.heights[min(full, max(0, bar - full * row))] for bar in bars)
        yield f"{label:>{_MARGIN - 2}} {ink.wall}{inked}".rstrip()
