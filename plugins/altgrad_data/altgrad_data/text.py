"""The user's own text files: one document a file.

Without a `validation` of its own the text is split by a rule that depends on the files' content only. Many
small files: whole files, in the order of their hashes, until the share is reached, so that copies of a
file stay together. Few or large files: the tail of each, from the start of a line.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from altgrad_core.hookspecs import Document
from altgrad_data import TextOptions
from altgrad_data.files import content_hash, existing
from altgrad_data.split import held_out

LAYOUT = 1
"""Part of the fingerprint: raise it when the same files give other documents or splits."""


class TextFiles:
    """The `text` data set: a `TextSource`."""

    def __init__(self, options: TextOptions) -> None:
        self._fraction = options.validation_fraction
        self._files = _find(options.path, "path")
        self._validation_files = _find(options.validation, "validation") if options.validation else None

    def fingerprint(self) -> str:
        validation = self._validation_files
        rule = self._fraction if validation is None else len(validation)
        return content_hash([*self._files, *(validation or [])], "text", LAYOUT, rule)

    def documents(self, split: str) -> Iterator[Document]:
        if self._validation_files is not None:
            files = self._validation_files if split == "validation" else self._files
            yield from (Document(_read(file)) for file in files)
        elif self._held_out:
            for file in self._files:
                if (_hash(file) in self._held_out) == (split == "validation"):
                    yield Document(_read(file))
        else:
            for file in self._files:
                head, tail = _cut(_read(file), self._fraction)
                if part := tail if split == "validation" else head:
                    yield Document(part)

    @cached_property
    def _held_out(self) -> frozenset[str]:
        """The hashes of the files that are held out whole; none where they are too few or too large."""
        sizes = {_hash(file): file.stat().st_size for file in self._files}
        amount = self._fraction * sum(sizes.values())
        chosen = held_out(sizes, amount)
        return chosen if sum(sizes[name] for name in chosen) >= amount else frozenset()


def _find(path: str, option: str) -> list[Path]:
    wanted = "a text file, a folder of .txt files, or a glob"
    own = os.path.expanduser(path)
    if glob.has_magic(path) and not os.path.exists(own):
        matches = (Path(name) for name in glob.glob(own, recursive=True))
        files = sorted(match for match in matches if match.is_file())
        missing = "no file matches it"
    else:
        found = existing(path, option, wanted)
        files = sorted(found.rglob("*.txt")) if found.is_dir() else [found]
        missing = "no .txt file is below it"
    if not files:
        raise FileNotFoundError(f"{option} = {path!r}: {missing}; set {option} to {wanted}")
    return files


def _read(file: Path) -> str:
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: not UTF-8 text: {error}; convert it, or leave it out of the path"
        ) from error


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _cut(text: str, fraction: float) -> tuple[str, str]:
    """Return the text in two, the second `fraction` of it, or up to a fifth more to start with a line."""
    cut = round(len(text) * (1.0 - fraction))
    line = text.rfind("\n", cut - (len(text) - cut) // 5, cut) + 1
    return text[: line or cut], text[line or cut :]
