"""Rows of documents in files: JSON lines, plain, .gz or .xz, and Parquet; with errors that name the row."""

from __future__ import annotations

import gzip
import importlib
import json
import lzma
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

from altgrad_core.wording import shown

SPLITS = ("train", "validation", "test")

Row = Mapping[str, Any]


def json_lines(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield each line's place, as `file:line`, and its object."""
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", _object(line, f"{path}:{number}")
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: damaged after line {number}: {error}; download or compress it again"
        ) from error


def parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield each row's place and its columns."""
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(
            f"{path}: Parquet is read by pyarrow, which is not installed: pip install 'altgrad-data[hub]'"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (OSError, ValueError) as error:  # pyarrow says one to damaged pages, the other to a damaged end
        raise ValueError(f"{path}: damaged after row {number}: {error}; download it again") from error


def text_of(row: Row, key: str, option: str, where: str) -> str:
    """Return the row's text; paragraphs in a list are joined by newlines."""
    value = value_of(row, key, option, where)
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{where}: {key!r} is {shown(value)}; expected text or a list of texts")
    return "\n".join(parts)


def labels_of(value: Any, key: str, where: str) -> tuple[int, ...]:
    """Return the indices of a row's labels: of one, of several, or of none."""
    labels = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(label) is int and label >= 0 for label in labels):
        raise ValueError(
            f"{where}: {key!r} is {shown(value)}; expected a label's index, 0 or more, or a list of them"
        )
    return tuple(labels)


def split_of(row: Row, key: str, option: str, where: str) -> str:
    """Return the name of the split that the row says it is of."""
    split = value_of(row, key, option, where)
    if split not in SPLITS:
        raise ValueError(f"{where}: {key!r} is {shown(split)}; expected one of {', '.join(SPLITS)}")
    return cast(str, split)


def value_of(row: Row, key: str, option: str, where: str) -> Any:
    """Return what a row has under a key. Raises ValueError, which names the option that says the key."""
    if key not in row:
        way_out = f": set {option} to one" if option else ""
        raise ValueError(f"{where}: no key {key!r}; its keys are {', '.join(row) or 'none'}{way_out}")
    return row[key]


def _opened(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    return cast(BinaryIO, lzma.open(path)) if path.suffix == ".xz" else path.open("rb")


def _object(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
    except RecursionError as error:
        raise ValueError(
            f"{where}: its JSON is nested too deep; expected an object of text and labels"
        ) from error
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(  # noqa: TRY004 - the file is wrong, not a type of ours
            f"{where}: expected a JSON object, got {shown(row)}"
        )
    return row
