"""The user's own documents: one JSON object a line, plain, .gz or .xz.

What the validation split is, one of three says: a file of its own, a key of each object, or else a hash of
the text, so that copies of a text stay together and appended lines move none of the others.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from altgrad_core.hookspecs import Document
from altgrad_data import JsonlOptions
from altgrad_data.files import content_hash, existing

LAYOUT = 1
"""Part of the fingerprint: raise it when the same files give other documents or splits."""

SPLITS = ("train", "validation", "test")


class JsonLines:
    """The `jsonl` data set: a `TextSource`."""

    def __init__(self, options: JsonlOptions) -> None:
        wanted = "a .jsonl, .jsonl.gz or .jsonl.xz file"
        self._options = options
        self._files = {"train": existing(options.path, "path", wanted)}
        if options.validation:
            self._files["validation"] = existing(options.validation, "validation", wanted)
        for option, path in zip(("path", "validation"), self._files.values(), strict=False):
            if path.is_dir():
                raise FileNotFoundError(f"{option} = {str(path)!r} is a folder; set {option} to {wanted}")

    def fingerprint(self) -> str:
        chosen = self._options
        settings = (chosen.split, chosen.field, chosen.labels, chosen.validation_fraction)
        return content_hash(self._files.values(), "jsonl", LAYOUT, *settings)

    def documents(self, split: str) -> Iterator[Document]:
        path = self._files.get(split, self._files["train"])
        for where, row in _rows(path):
            document = Document(self._text(row, where), self._labels(row, where))
            if self._options.validation or self._split(row, document.text, where) == split:
                yield document

    def _text(self, row: dict[str, Any], where: str) -> str:
        value = _value(row, self._options.field, "field", where)
        parts = value if isinstance(value, list) else [value]
        if not all(isinstance(part, str) for part in parts):
            raise ValueError(
                f"{where}: {self._options.field!r} is {_short(value)}; expected text or a list of texts"
            )
        return "\n".join(parts)

    def _labels(self, row: dict[str, Any], where: str) -> tuple[int, ...]:
        value = row.get(self._options.labels)
        labels = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(label) is int and label >= 0 for label in labels):
            raise ValueError(
                f"{where}: {self._options.labels!r} is {_short(value)}; expected a label's index, 0 or more, "
                "or a list of them"
            )
        return tuple(labels)

    def _split(self, row: dict[str, Any], text: str, where: str) -> str:
        if not self._options.split:
            drawn = int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8]) / 2**64
            return "validation" if drawn < self._options.validation_fraction else "train"
        split = _value(row, self._options.split, "split", where)
        if split not in SPLITS:
            raise ValueError(
                f"{where}: {self._options.split!r} is {_short(split)}; expected one of {', '.join(SPLITS)}"
            )
        return cast(str, split)


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _opened(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))
    return cast(BinaryIO, lzma.open(path)) if path.suffix == ".xz" else path.open("rb")


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(  # noqa: TRY004 - the file is wrong, not a type of ours
            f"{where}: expected a JSON object, got {_short(row)}"
        )
    return row


def _value(row: dict[str, Any], key: str, option: str, where: str) -> Any:
    if key not in row:
        raise ValueError(
            f"{where}: no key {key!r}; its keys are {', '.join(row) or 'none'}: set {option} to one"
        )
    return row[key]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
