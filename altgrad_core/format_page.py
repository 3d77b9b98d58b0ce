"""The page of one format, as `altgrad formats NAME` shows it: its facts, its values, pictures of its grid.

Everything comes from the `Format` contract, so that a third party's table of values has the same page as an
ExMy format. Positive values stand in rows of binades beside their codes. A row is written in decimals where
these are short, else as whole multiples of one power of two; either way it is exact.
"""

from __future__ import annotations

import math
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import attrs
import rich.console

from altgrad_core.component_page import format_spec
from altgrad_core.format import Format
from altgrad_core.format_facts import (
    Codes,
    FormatFacts,
    codes,
    exact,
    facts,
    hexadecimal,
    is_symmetric,
    odd_times_power,
)
from altgrad_core.format_picture import ASCII, Ink, pictures
from altgrad_core.format_table import LEAVE_ALONE, owner
from altgrad_core.lookup import format_or_none
from altgrad_core.options import written
from altgrad_core.registry import PluginError, Registered, Registry, UsageError
from altgrad_core.wording import listed

_FEWEST_COLUMNS = 64
_MOST_LISTED = 8
"""Bits of a format of which every value is listed; a wider one has a line for a binade."""
_BINADES_AT_AN_END = 4
_SHORT = 6
"""Characters from one value to the next in a row; longer decimals are written as multiples."""
_FRONT, _BEHIND = 15, 9
"""Characters before and after the values of a row: binade and codes, unit."""


class Unquantized:
    """The page of FP32 and none."""

    def lines(self, console: rich.console.Console) -> Iterator[str]:
        """Yield what the names mean."""
        yield from textwrap.wrap(LEAVE_ALONE, max(_FEWEST_COLUMNS, console.width))

    def plain(self) -> dict[str, Any]:
        """Return the same for JSON."""
        return {"name": "FP32", "meaning": LEAVE_ALONE}


@attrs.frozen(kw_only=True)
class Page:
    """A format and all that its page says."""

    format: Format
    entry: Registered
    facts: FormatFacts
    codes: Codes
    given: Mapping[str, Any] = attrs.field(factory=dict)
    """The options it was built with; empty: the plugin's own summary describes it."""

    @property
    def name(self) -> str:
        """The name it was asked for by; under options, the one that tells it from its relatives."""
        return self.format.name if self.given else self.entry.name

    @property
    def summary(self) -> str:
        """What the plugin says of it; a summary knows of no options but the defaults."""
        if not self.given:
            return self.entry.component.summary
        options = listed(f"{key} = {written(value)}" for key, value in self.given.items())
        return f"{self.entry.name} with {options}"

    def lines(self, console: rich.console.Console) -> Iterator[str]:
        """Yield the page, its pictures and values as wide as the console."""
        width = max(_FEWEST_COLUMNS, console.width)
        yield f"{self.name}: {self.summary}"
        yield from (f"  {label:<15}  {text}" for label, text in _facts(self) if text)
        yield from ("", *_values(self, width), "")
        yield from pictures(self.format, width, ASCII if console.options.ascii_only else Ink())

    def plain(self) -> dict[str, Any]:
        """Return the facts, the special codes, and every value with its code, for JSON."""
        of_value = self.codes.of_value
        special = {name: some for name, some in attrs.asdict(self.codes).items() if name != "of_value"}
        values = [{"value": value, "code": of_value.get(value)} for value in self.format.values.tolist()]
        about = {"name": self.name, **owner(self.entry), "summary": self.summary, **self.facts.plain()}
        return {**about, "special_codes": special, "values": values}


def page(name: str, registry: Registry) -> Page | Unquantized:
    """Return the page of a format by its name, or by an inline TOML table as in an experiment file.

    Raises UsageError for what is not installed, what is no such table, and what its plugin fails to build.
    """
    spec = _spec(name)
    given = dict(spec) if isinstance(spec, dict) else {"plugin": spec}
    plugin = given.pop("plugin", "ExMy")
    try:
        format = format_or_none(spec, registry)
    except UsageError as error:
        raise UsageError(f"{error}{_way_out(name, registry)}") from error
    except PluginError as error:
        raise UsageError(str(error)) from error
    if format is None:
        return Unquantized()
    entry = registry.find("format", plugin)
    return Page(format=format, entry=entry, facts=facts(format), codes=codes(format), given=given)


def _way_out(name: str, registry: Registry) -> str:
    """Return how to ask for an ExMy format without a name, or for one with options, if that was meant."""
    if shape := re.fullmatch(r"[Ee](\d+)[Mm](\d+)", name):
        table = f"{{exponent_bits = {shape[1]}, mantissa_bits = {shape[2]}}}"
    elif found := [entry for entry in registry.of_kind("format") if entry.name == name]:
        table = format_spec(found[0], registry)
    else:
        return ""
    return f"; try: altgrad formats '{table}'"


def _spec(name: str) -> Any:
    if not name.lstrip().startswith("{"):
        return name
    try:
        return tomllib.loads(f"format = {name}")["format"]
    except tomllib.TOMLDecodeError as error:
        example = "{exponent_bits = 4, mantissa_bits = 5, bias = 7}"
        raise UsageError(f"{name!r} is no inline TOML table such as {example}: {error}") from error


def _facts(page: Page) -> Iterator[tuple[str, str]]:
    one = page.facts
    yield "bits", f"{one.bits}{_fields(one)}"
    positive = len(page.format.values) - 1 - int((page.format.values < 0).sum())
    yield "values", f"{one.count} finite, {positive} of them positive"
    yield "largest", exact(one.largest)
    yield "smallest", exact(one.smallest)
    yield "smallest normal", "" if one.smallest_normal is None else exact(one.smallest_normal)
    yield "lowest", "" if one.lowest == -one.largest else exact(one.lowest)
    yield "range", f"{math.log2(one.largest / one.smallest):.1f} binades from smallest to largest"
    uniform = f"{exact(one.finest)} everywhere: a uniform grid"
    yield "spacing", uniform if one.uniform else f"{exact(one.finest)} to {exact(one.coarsest)}"
    yield "special codes", "; ".join(_special_codes(page.codes, one.bits))
    yield "from", f"{page.entry.owner}, {page.entry.component.target}"
    yield "source", page.entry.component.source


def _fields(one: FormatFacts) -> str:
    if one.exponent_bits is None or one.mantissa_bits is None:
        return ""
    fields = f": 1 sign, {one.exponent_bits} exponent, {one.mantissa_bits} mantissa"
    return f"{fields}; bias {one.bias}, specials {one.specials}"


def _special_codes(codes: Codes, bits: int) -> Iterator[str]:
    named = (("-0", codes.negative_zero), ("inf", codes.inf), ("NaN", codes.nan), ("no value", codes.unused))
    for name, found in named:
        if found:
            yield f"{name} {hexadecimal(found, bits)}"


Coded = tuple[int, float]
"""A code and the magnitude of its value."""


def _values(page: Page, width: int) -> Iterator[str]:
    """Yield the positive values, and the negative ones where they do not only mirror the others."""
    of_value, bits = page.codes.of_value, page.format.bits
    coded = [(of_value.get(value, -1), value) for value in page.format.values.tolist()]
    yield f"positive values by binade, codes in hexadecimal; 0 is {hexadecimal([of_value[0.0]], bits)}"
    yield ""
    yield from _binades([one for one in coded if one[1] > 0], bits, width)
    negative = [(code, -value) for code, value in reversed(coded) if value < 0]
    if is_symmetric(page.format):
        ends = (f"{hexadecimal([code], bits)} = {exact(-one)}" for code, one in (negative[0], negative[-1]))
        yield from ("", f"negative values mirror them: {' to '.join(ends)}")
    elif negative:
        yield from ("", "magnitudes of the negative values", "")
        yield from _binades(negative, bits, width)


def _binades(coded: Sequence[Coded], bits: int, width: int) -> Iterator[str]:
    by_binade = [(exponent, list(some)) for exponent, some in groupby(coded, key=lambda one: _binade(one[1]))]
    if bits > _MOST_LISTED:
        yield from _abbreviated(by_binade, bits)
    elif len(coded) < 3 * len(by_binade):  # a row for each would be nearly empty
        yield from _rows("", coded, bits, width)
    else:
        for exponent, some in by_binade:
            yield from _rows(f"2^{exponent}", some, bits, width)


def _binade(value: float) -> int:
    return math.frexp(value)[1] - 1


def _rows(label: str, coded: Sequence[Coded], bits: int, width: int) -> Iterator[str]:
    """Yield lines of 16, 8, 4, ... values, their codes in front, the unit of whole multiples behind."""
    cells, unit = _cells([value for _, value in coded])
    pitch = max(_SHORT, *(len(cell) + 1 for cell in cells))
    at_once = next(n for n in (16, 8, 4, 2, 1) if n == 1 or _FRONT + n * pitch + _BEHIND <= width)
    for begin, end in _lines_of(coded, at_once):
        inside = _between(coded[begin][0], coded[end - 1][0], bits)
        line = "".join(f"{cell:>{pitch}}" for cell in cells[begin:end])
        yield f"  {label if begin == 0 else '':<5}  {inside:<6}{line}{unit}".rstrip()


def _lines_of(coded: Sequence[Coded], at_once: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of lines within which the codes count up, or down, by one."""
    begin = 0
    for at in range(1, len(coded) + 1):
        together = at < len(coded) and abs(coded[at][0] - coded[at - 1][0]) == 1 and at - begin < at_once
        if not together:
            yield begin, at
            begin = at


def _between(first: int, last: int, bits: int) -> str:
    names = ["none" if code < 0 else hexadecimal([code], bits) for code in (first, last)]
    return names[0] if first == last else "..".join(names)


def _cells(values: Sequence[float]) -> tuple[list[str], str]:
    """Return the values in words, and the power of two that the words are multiples of, if they are."""
    written = [exact(value) for value in values]
    unit = min(odd_times_power(value)[1] for value in values)
    multiples = [str(int(value / 2.0**unit)) for value in values]
    if len(values) == 1 or max(map(len, written)) < _SHORT or max(map(len, multiples)) >= _SHORT:
        return written, ""
    return multiples, f"  x 2^{unit}"


def _abbreviated(by_binade: Sequence[tuple[int, list[Coded]]], bits: int) -> Iterator[str]:
    """Yield a line for each of the lowest and highest binades, and for that of 1."""
    last = len(by_binade) - 1
    left_out = False
    for at, (exponent, coded) in enumerate(by_binade):
        if min(at, last - at) >= _BINADES_AT_AN_END and exponent != 0:
            left_out = True
            continue
        if left_out:
            yield "  ..."
        left_out = False
        values = [value for _, value in coded]
        some = exact(values[0]) if len(values) == 1 else f"{exact(values[0])} to {exact(values[-1])}"
        yield f"  2^{exponent:<5} {_between(coded[0][0], coded[-1][0], bits):<11} {len(values):>6}  {some}"
