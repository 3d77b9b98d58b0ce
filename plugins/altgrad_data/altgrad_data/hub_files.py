"""A hub's data set in files on disk: which of them hold which split, and their rows.

A folder is laid out as the hub's own: `train-00000-of-00002.parquet`, `validation-00000-of-00001.parquet`,
alone or in a folder named after the configuration. JSON lines may stand in for Parquet
(`eurlex_train.jsonl.xz`): whatever the name, the word `train` or `validation` in it says the split. A single
file holds all splits; a key `split` of its rows says which is which, and without one a hash of the text
holds out a tenth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from altgrad_data.files import existing
from altgrad_data.rows import Row, json_lines, parquet_rows, split_of, text_of
from altgrad_data.split import drawn_split

WANTED = (
    "a folder with train and validation files (.parquet, .jsonl, .jsonl.gz, .jsonl.xz), or one such file; "
    "or leave it empty for the hub"
)

READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".parquet": parquet_rows,
    ".jsonl": json_lines,
    ".jsonl.gz": json_lines,
    ".jsonl.xz": json_lines,
}

VALIDATION_FRACTION = 0.1
"""Of the texts of a single file whose rows name no split."""


class HubFiles:
    """The files that an option `path` names."""

    def __init__(self, path: str, configuration: str) -> None:
        found = existing(path, "path", WANTED)
        self._alone = found.is_file()
        if self._alone:
            if _kind(found) is None:
                raise ValueError(f"path = {path!r} is none of {', '.join(READERS)}; set path to {WANTED}")
            self._of_split = {"train": [found], "validation": [found]}
            return
        inner = found / configuration
        folder = inner if inner.is_dir() else found
        self._of_split = {split: _files(folder, split) for split in ("train", "validation")}
        for split, files in self._of_split.items():
            if not files:
                raise FileNotFoundError(f"path = {path!r}: no {split} file in {folder}; set path to {WANTED}")

    @property
    def all(self) -> list[Path]:
        return list(dict.fromkeys(file for files in self._of_split.values() for file in files))

    def rows(self, split: str) -> Iterator[tuple[str, Row]]:
        for file in self._of_split[split]:
            for where, row in READERS[_kind(file) or ""](file):
                if not self._alone or _split(row, where) == split:
                    yield where, row


def _split(row: Row, where: str) -> str:
    if "split" in row:
        return split_of(row, "split", "", where)
    return drawn_split(text_of(row, "text", "", where), VALIDATION_FRACTION)


def _files(folder: Path, split: str) -> list[Path]:
    """Return the files of a split in the order of their names, of one kind: Parquet where there is any."""
    word = re.compile(rf"(?<![a-z]){split}(?![a-z])")
    files = [file for file in sorted(folder.iterdir()) if _kind(file) and word.search(file.name.lower())]
    kinds = [_kind(file) for file in files]
    chosen = next((kind for kind in READERS if kind in kinds), None)
    return [file for file, kind in zip(files, kinds, strict=True) if kind == chosen]


def _kind(file: Path) -> str | None:
    return next((ending for ending in READERS if file.name.endswith(ending)), None)
