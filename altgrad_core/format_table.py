"""The table of `altgrad formats`: every installed format in a row.

A format with options is listed as a family, and stands in the table only if all options have a default. One
that cannot be built is named with the reason, and keeps nobody else off the table.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import rich.console
import rich.table

from altgrad_core.format_facts import FormatFacts, exact, facts, same_grid
from altgrad_core.lookup import get_format
from altgrad_core.options import fixed_default, written
from altgrad_core.registry import Registered, Registry
from altgrad_core.wording import listed

LEAVE_ALONE = (
    '"FP32" and "none" are no formats: where an experiment file asks for one, they say `leave it alone`,'
    " float32 and not quantized."
)
_MORE = "`altgrad formats NAME` shows the values of one format, and pictures of its grid."
_NUMBERS = ("bits", "E", "M", "bias", "largest", "smallest", "normal", "values")
_COLUMNS = ("format", *_NUMBERS[:4], "specials", *_NUMBERS[4:], "grid")
_WIDEST_NAMES = 24
"""Where names that share a note are wrapped."""


@attrs.frozen(kw_only=True)
class Overview:
    """Every installed format: built where its options have defaults, and what went wrong where it failed."""

    registry: Registry
    built: Mapping[str, tuple[Registered, FormatFacts]]
    families: Mapping[str, Registered]
    """Those with options, whether or not they are built from the defaults too."""
    failed: Mapping[str, str]
    same: list[tuple[str, str, float]]
    """(name, earlier name, factor): the values are the earlier format's times the factor."""

    def lines(self, console: rich.console.Console) -> Iterator[str]:
        """Yield the table, and what the plugins say of the formats, as wide as the console."""
        yield from _table(self)
        yield ""
        yield from _drawn(_pairs(_notes(self)), console)
        if self.families:
            yield from ("", "with options (`altgrad show NAME` explains them):", "")
            options = {name: listed(map(_signature, _fields(one))) for name, one in self.families.items()}
            yield from _drawn(_pairs(options), console)
        for name, reason in self.failed.items():
            yield from ("", f"broken: {name}: {reason}")
        for broken in self.registry.broken:
            yield from ("", f"broken: {broken}")
        yield ""
        yield from textwrap.wrap(f"{LEAVE_ALONE} {_MORE}", console.width)

    def plain(self) -> dict[str, Any]:
        """Return the same for JSON."""
        return {
            "formats": [
                {"name": name, **owner(entry), **one.plain()} for name, (entry, one) in self.built.items()
            ],
            "families": [
                {"name": name, **owner(entry), "options": [_option(field) for field in _fields(entry)]}
                for name, entry in self.families.items()
            ],
            "same_grid": [{"name": name, "as": other, "times": by} for name, other, by in self.same],
            "failed": dict(self.failed),
            "broken": [attrs.asdict(broken) for broken in self.registry.broken],
        }


def overview(registry: Registry) -> Overview:
    """Build what can be built without being told options."""
    entries = _by_name(registry)
    formats, described, failed = {}, {}, {}
    for name, entry in entries.items():
        if any(field.default is attrs.NOTHING for field in _fields(entry)):
            continue
        try:
            format = get_format(name, registry)
            described[name] = (entry, facts(format))
            formats[name] = format
        except Exception as error:  # noqa: BLE001 - whatever a plugin does, the others are listed
            failed[name] = " ".join(str(error).split()) or type(error).__name__
    return Overview(
        registry=registry,
        built=described,
        families={name: entry for name, entry in entries.items() if _fields(entry)},
        failed=failed,
        same=same_grid(formats),
    )


def _by_name(registry: Registry) -> dict[str, Registered]:
    """Return the formats by a name that finds them: `distribution:name` where two distributions own it."""
    shared = {entry for owners in registry.conflicts() for entry in owners}
    return {
        f"{entry.distribution}:{entry.name}" if entry in shared else entry.name: entry
        for entry in registry.of_kind("format")
    }


def _fields(entry: Registered) -> tuple[Any, ...]:
    return tuple(attrs.fields(entry.component.options))


def _table(seen: Overview) -> Iterator[str]:
    """Yield the table's lines, as wide as they are: half a number, on a narrow console, is a wrong one."""
    by_width = sorted(seen.built.items(), key=lambda item: item[1][1].bits)
    rows = [_COLUMNS, *((name, *_cells(one)) for name, (_, one) in by_width)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(_COLUMNS, row, widths, strict=True)
        padded = (cell.rjust(width) if name in _NUMBERS else cell.ljust(width) for name, cell, width in cells)
        yield " ".join(padded).rstrip()


def _cells(one: FormatFacts) -> Iterator[str]:
    for number in (one.bits, one.exponent_bits, one.mantissa_bits, one.bias, one.specials):
        yield "" if number is None else str(number)
    for value in (one.largest, one.smallest, one.smallest_normal):
        yield "" if value is None else exact(value)
    yield from (str(one.count), "uniform" if one.uniform else "")


def _notes(seen: Overview) -> dict[str, str]:
    """Return what the plugins say of the formats, one line for those of which they say the same."""
    named: dict[str, list[str]] = {}
    for name, (entry, _) in seen.built.items():
        source = f" ({entry.component.source})" if entry.component.source else ""
        named.setdefault(f"{entry.component.summary}{source}", []).append(name)
    notes = {listed(names): text for text, names in named.items() if text}
    twins = [f"{name} = {other}" + ("" if by == 1 else f" x {exact(by)}") for name, other, by in seen.same]
    return {**notes, **({"one grid": listed(twins)} if twins else {})}


def _pairs(rows: Mapping[str, str]) -> rich.table.Table:
    table = rich.table.Table.grid(padding=(0, 2, 0, 0))
    table.add_column(max_width=_WIDEST_NAMES)
    table.add_column()
    for name, text in rows.items():
        table.add_row(name, text)
    return table


def _drawn(what: rich.table.Table, console: rich.console.Console) -> list[str]:
    """Return what rich makes of it, as lines: `print` minds a reader that leaves early, rich exits with 1."""
    with console.capture() as captured:
        console.print(what, markup=False)
    return [line.rstrip() for line in captured.get().strip("\n").splitlines()]


def owner(entry: Registered) -> dict[str, str]:
    """Return what a component's plugin says of it, and which plugin that is, for JSON."""
    component = entry.component
    about = {"summary": component.summary, "source": component.source}
    return {**about, "distribution": entry.distribution, "version": entry.version}


def _option(field: Any) -> dict[str, Any]:
    required, default = field.default is attrs.NOTHING, fixed_default(field)
    shown = None if default is None else written(default)
    return {
        "name": field.name,
        "required": required,
        "default": shown,
        "help": field.metadata.get("help", ""),
    }


def _signature(field: Any) -> str:
    default = fixed_default(field)
    return str(field.name) if default is None else f"{field.name} = {written(default)}"
