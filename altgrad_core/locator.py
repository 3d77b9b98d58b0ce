"""Finds where a path is written in a TOML file, so that an error can name the line.

tomli checks the grammar and gives the data, but keeps no positions. `lines` walks a text that tomli has
already accepted, so it needs only as much grammar as tells where keys and values begin: it steps over
strings, comments and scalars by regular expressions, treats commas as blanks, and lets tomli decode quoted
keys. Open arrays and inline tables wait on a list, not on Python's stack: no nesting that tomli takes is
too deep here.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import tomli

if TYPE_CHECKING:
    from altgrad_core.options import Path

_BLANK = re.compile(r"(?:[ \t\r\n,]|#[^\n]*)*")
_EQUALS = re.compile(r"[ \t]*=[ \t]*")
_KEY_PART = re.compile(r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\])*"|'[^']*'""")
_DOT = re.compile(r"[ \t]*\.[ \t]*")
_SCALAR = re.compile(
    r"""
      "{3}(?:\\.|[^\\])*?"{3,5}   # up to two quotes may stand before the closing three
    | '{3}.*?'{3,5}
    | "(?:\\.|[^"\\])*"
    | '[^']*'
    | [^,\]}\#\n]+              # numbers, booleans, dates; "1979-05-27 07:32:00" has a blank in it
    """,
    re.DOTALL | re.VERBOSE,
)


def lines(text: str) -> dict[Path, int]:
    """Return the 1-based line of every key, table header and array element of a TOML text.

    A table that is only ever mentioned on the way (`a` in `a.b = 1` or `[a.b]`) is where it is first
    mentioned; one that has a header is at its header. An array of tables is at its first element.
    `text` must be one that `tomli.loads` accepts.
    """
    scanner = _Scanner(text)
    scanner.scan()
    breaks = [match.start() for match in re.finditer("\n", text)]
    return {path: bisect.bisect_left(breaks, start) + 1 for path, start in scanner.starts.items()}


def locate(positions: Mapping[Path, int], path: Path) -> int:
    """Return the line of `path`, else of its nearest recorded ancestor, else 1."""
    for length in range(len(path), 0, -1):
        if (line := positions.get(path[:length])) is not None:
            return line
    return 1


class _Scanner:
    """The place in the text, and the offset at which each path was found to start."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.starts: dict[Path, int] = {}
        self.table_counts: dict[Path, int] = {}  # elements so far of each array of tables
        # (path, elements so far; None for a table) of what is open, innermost last; first the table in force
        self.open: list[tuple[Path, int | None]] = [((), None)]

    def scan(self) -> None:
        """Walk the text; the innermost open table or array decides what may come next."""
        self.step_over(_BLANK)
        while self.at < len(self.text):
            path, elements = self.open[-1]
            if self.text[self.at] in "]}":
                self.at += 1
                self.open.pop()
            elif elements is not None:
                self.open[-1] = (path, elements + 1)
                path = (*path, elements)
                self.record(path, self.at)
                self.value(path)
            elif len(self.open) == 1 and self.text[self.at] == "[":
                self.open[0] = (self.header(), None)
            else:
                path = self.key(path)
                self.step_over(_EQUALS)
                self.value(path)
            self.step_over(_BLANK)

    def value(self, path: Path) -> None:
        """Step over a scalar, or open an array or inline table."""
        if (bracket := self.text[self.at]) in "[{":
            self.at += 1
            self.open.append((path, 0 if bracket == "[" else None))
        else:
            self.step_over(_SCALAR)

    def key(self, table: Path) -> Path:
        """Step over a key, dotted or not, and return its path."""
        start = self.at
        for part in self.key_parts():
            table = (*table, part)
            self.record(table, start)
        return table

    def header(self) -> Path:
        """Step over `[table]` or `[[array]]` and return the path of the table it opens."""
        start = self.at
        is_array = self.text.startswith("[[", start)
        brackets = 2 if is_array else 1
        self.at += brackets
        self.step_over(_BLANK)
        *parents, name = self.key_parts()
        self.step_over(_BLANK)
        self.at += brackets

        path: Path = ()
        for part in parents:
            path = (*path, part)
            self.record(path, start)
            if path in self.table_counts:  # a header speaks of the last element
                path = (*path, self.table_counts[path] - 1)
        path = (*path, name)
        if not is_array:
            self.starts[path] = start  # wins over an earlier mention on the way to a sub-table
            return path
        self.record(path, start)
        index = self.table_counts.get(path, 0)
        self.table_counts[path] = index + 1
        self.record((*path, index), start)
        return (*path, index)

    def key_parts(self) -> list[str]:
        """Step over a key and return its parts, decoded."""
        parts = [self.key_part()]
        while self.step_over(_DOT):
            parts.append(self.key_part())
        return parts

    def key_part(self) -> str:
        part = self.step_over(_KEY_PART)
        return tomli.loads(f"key = {part}")["key"] if part[0] in "\"'" else part

    def step_over(self, pattern: re.Pattern[str]) -> str:
        """Advance past `pattern`, if it is here, and return what it matched."""
        match = pattern.match(self.text, self.at)
        if match is None:
            return ""
        self.at = match.end()
        return match.group()

    def record(self, path: Path, start: int) -> None:
        """Keep the first mention of `path`."""
        self.starts.setdefault(path, start)
