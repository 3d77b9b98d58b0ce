"""The user's own files: found with errors that help, identified by content."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path


def existing(path: str, option: str, wanted: str) -> Path:
    """Return the path if something is there; FileNotFoundError names option, path and what was wanted."""
    found = Path(os.path.expanduser(path))
    if not found.exists():
        where = "" if found.is_absolute() else f" (relative to {Path.cwd()})"
        raise FileNotFoundError(f"{option} = {path!r}{where} does not exist; set {option} to {wanted}")
    return found


def content_hash(files: Iterable[Path], *settings: object) -> str:
    """Return the hash of the files' content, in order, and of settings; not of where they lie."""
    digest = hashlib.sha256(repr(settings).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
