"""The user's own documents: one JSON object a line, plain, .gz or .xz.

What the validation split is, one of three says: a file of its own, a key of each object, or else a hash of
the text, so that copies of a text stay together and appended lines move none of the others.
"""

from __future__ import annotations

from collections.abc import Iterator

from altgrad_core.hookspecs import Document
from altgrad_data import JsonlOptions
from altgrad_data.files import content_hash, existing
from altgrad_data.rows import Row, json_lines, labels_of, split_of, text_of, value_of
from altgrad_data.split import drawn_split

LAYOUT = 1
"""Part of the fingerprint: raise it when the same files give other documents or splits."""


class JsonLines:
    """The `jsonl` data set: a `TextSource`."""

    def __init__(self, options: JsonlOptions) -> None:
        wanted = "a .jsonl, .jsonl.gz or .jsonl.xz file"
        self._options = options
        self.label_count = options.label_count
        self._files = {"train": existing(options.path, "path", wanted)}
        if options.validation:
            self._files["validation"] = existing(options.validation, "validation", wanted)
        for option, path in zip(("path", "validation"), self._files.values(), strict=False):
            if path.is_dir():
                raise FileNotFoundError(f"{option} = {str(path)!r} is a folder; set {option} to {wanted}")

    def fingerprint(self) -> str:
        chosen = self._options
        settings = (chosen.split, chosen.field, chosen.labels, chosen.label_count, chosen.validation_fraction)
        return content_hash(self._files.values(), "jsonl", LAYOUT, *settings)

    def documents(self, split: str) -> Iterator[Document]:
        for where, row in json_lines(self._files.get(split, self._files["train"])):
            text = text_of(row, self._options.field, "field", where)
            document = Document(text, self._labels(row, where))
            if self._options.validation or self._split(row, text, where) == split:
                yield document

    def _labels(self, row: Row, where: str) -> tuple[int, ...]:
        """Return a row's labels; where it is said how many there are, a row must say its own."""
        key = self._options.labels
        value = value_of(row, key, "labels", where) if self.label_count else row.get(key)
        return labels_of(value, key, where)

    def _split(self, row: Row, text: str, where: str) -> str:
        if self._options.split:
            return split_of(row, self._options.split, "split", where)
        return drawn_split(text, self._options.validation_fraction)
