"""Plain text in columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def aligned(rows: Iterable[tuple[str, ...]], indent: str = "  ") -> Iterator[str]:
    """Yield the rows as lines, each column as wide as its widest cell; none for no rows."""
    table = list(rows)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        yield (indent + "  ".join(cells)).rstrip()
