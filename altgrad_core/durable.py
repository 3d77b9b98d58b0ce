"""Files and folders that a crash finds whole: synced to the disk, or written aside and renamed."""

from __future__ import annotations

import os
from pathlib import Path


class WriteError(RuntimeError):
    """The disk refuses: full, read-only or gone; the run ends."""


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file that is closed, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str, writer: str = "") -> None:
    """Write a file of UTF-8: readers, and a crash, find the old one or the new one, and nothing beside it.

    writer: tells those apart who may write it at once.
    """
    scratch = path.with_name(f".{path.name}{writer}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
