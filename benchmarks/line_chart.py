"""Lines and marks on two axes, as an SVG file: what the theory predicts, and what was measured.

A prediction is a line, a measurement a mark with its standard error to both sides, as the chart itself says;
each series has one color for both, and its name beside its last point. No dependency draws it, and any
browser shows it.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

import attrs

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 170, 50, 60  # margins; the names stand on the right
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito's, told apart by color-blind readers
NAMES_APART = 16  # pixels
MARGIN = 0.05  # of an axis, free at both ends
KEY = "line: predicted; marks: measured, with standard errors"
FONT = "font-family='sans-serif' font-size='13' fill='#222'"


@attrs.frozen
class Series:
    """A name, the predicted line as (x, y), and the measured marks as (x, y, error)."""

    name: str
    line: Sequence[tuple[float, float]]
    marks: Sequence[tuple[float, float, float]] = ()

    @property
    def points(self) -> list[tuple[float, float]]:
        return [*self.line, *((x, y) for x, y, _ in self.marks)]


@attrs.frozen
class Axis:
    """From numbers to pixels: low and high are at the pixels `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    @classmethod
    def over(cls, numbers: Iterable[float], start: float, end: float, logarithmic: bool = False) -> Axis:
        numbers = list(numbers)
        low, high = min(numbers), max(numbers)
        if logarithmic:
            factor = (high / low) ** MARGIN
            return cls(low / factor, high * factor, start, end, logarithmic)
        margin = MARGIN * (high - low or 1.0)
        return cls(low - margin, high + margin, start, end)

    def __call__(self, number: float) -> float:
        low, high, x = (math.log(n) if self.logarithmic else n for n in (self.low, self.high, number))
        return self.start + (self.end - self.start) * (x - low) / (high - low)

    @property
    def ticks(self) -> list[float]:
        """Numbers of the form 1, 2, 5 times a power of ten; all of them, or a step of such a size."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            return [m * 10.0**e for e in powers for m in (1, 2, 5) if self.low <= m * 10.0**e <= self.high]
        rough = (self.high - self.low) / 6
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= rough)
        return [step * n for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def chart(title: str, x_name: str, y_name: str, series: Sequence[Series], logarithmic: bool = False) -> str:
    """Return the SVG; `logarithmic` is of both axes."""
    points = [point for one in series for point in one.points]
    x = Axis.over((p[0] for p in points), LEFT, WIDTH - RIGHT, logarithmic)
    y = Axis.over((p[1] for p in points), HEIGHT - BOTTOM, TOP, logarithmic)
    parts = [*_frame(title, x_name, y_name, x, y)]
    heights = _apart([y(one.points[-1][1]) for one in series])
    for one, color, height in zip(series, COLORS, heights, strict=False):
        parts += _drawn(one, color, x, y)
        parts.append(_text(WIDTH - RIGHT + 10, height + 4, one.name, f"style='fill:{color}'"))
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' {FONT}>"
    return "\n".join([head, "<rect width='100%' height='100%' fill='white'/>", *parts, "</svg>"]) + "\n"


def _frame(title: str, x_name: str, y_name: str, x: Axis, y: Axis) -> Iterable[str]:
    """Yield the title, the axes' names, and a faint line with its number at each tick."""
    yield _text(LEFT, 24, title, "font-size='15' font-weight='bold'")
    yield _text(LEFT, 42, KEY, "font-size='12'")
    yield _text((x.start + x.end) / 2, HEIGHT - 16, x_name, "text-anchor='middle'")
    middle = (y.start + y.end) / 2
    yield _text(18, middle, y_name, f"text-anchor='middle' transform='rotate(-90 18 {middle})'")
    for tick in x.ticks:
        yield _line(x(tick), y.start, x(tick), y.end, "#ddd")
        yield _text(x(tick), y.start + 18, f"{tick:g}", "text-anchor='middle'")
    for tick in y.ticks:
        yield _line(x.start, y(tick), x.end, y(tick), "#ddd")
        yield _text(x.start - 8, y(tick) + 4, f"{tick:g}", "text-anchor='end'")


def _drawn(one: Series, color: str, x: Axis, y: Axis) -> Iterable[str]:
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in one.line)
    yield f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='2'/>"
    for a, b, error in one.marks:
        yield _line(x(a), y(b - error), x(a), y(b + error), color)
        yield f"<circle cx='{x(a):.1f}' cy='{y(b):.1f}' r='4' fill='{color}'/>"


def _apart(heights: Sequence[float]) -> list[float]:
    """Return the heights pushed down where names would overlap."""
    placed = dict.fromkeys(range(len(heights)), 0.0)
    lowest = -math.inf
    for index in sorted(placed, key=lambda i: heights[i]):
        lowest = placed[index] = max(heights[index], lowest + NAMES_APART)
    return list(placed.values())


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{color}'/>"


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' {more}>{html.escape(text)}</text>"
