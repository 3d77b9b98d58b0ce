"""One folder of the cache: written aside, published whole by one rename, checked whenever it is opened.

A folder holds arrays, other files, and `meta.json`, which says what they are and carries the checksum of
each, and of itself. A folder that is not exactly what was written is as good as none: it is made again.

Any number of processes may make the same folder at once: each writes a sibling of its own, the first to
finish renames it into place, the others use that one. A killed process leaves its sibling behind, which
nothing ever reads, and which is deleted a day later.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray

from altgrad_core.durable import sync

META = "meta.json"

LEFTOVER_AGE = 24 * 3600.0
"""Seconds after which an unfinished folder of a killed process is deleted."""

BLOCK = 2**24
"""Bytes read at a time to check a file: CRC-32 runs at about 2 GB/s, so 1 GB is checked in half a second."""

_REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""What a disk says that takes no more; where a source is read, other errors come up."""

Array = NDArray[Any]


@attrs.frozen(kw_only=True)
class Contents:
    """What a folder holds."""

    facts: Mapping[str, Any]
    """What is known beside the arrays; plain JSON."""
    arrays: Mapping[str, Array] = attrs.field(factory=dict)
    """File name to memory map."""


class Writer:
    """Writes the files of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrays: dict[str, tuple[str, list[int]]] = {}
        self._others: list[Path] = []

    @contextlib.contextmanager
    def stream(self, name: str, dtype: str) -> Any:
        """Yield a function that appends an array to the 1-d array of that name."""
        length = 0
        with (self.folder / name).open("wb") as file:

            def append(part: Array) -> None:
                nonlocal length
                length += len(part)
                file.write(np.ascontiguousarray(part, dtype=dtype).data)

            yield append
        sync(self.folder / name)
        self._arrays[name] = (dtype, [length])

    def array(self, name: str, values: Array) -> None:
        """Write a whole array of any shape."""
        (self.folder / name).write_bytes(np.ascontiguousarray(values).data)
        sync(self.folder / name)
        self._arrays[name] = (values.dtype.name, list(values.shape))

    def files(self, written: list[Path]) -> None:
        """Count in files that somebody else wrote into the folder."""
        for path in written:
            sync(path)
        self._others += written

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write meta.json: from here on the folder is complete."""
        names = [*self._arrays, *(path.name for path in self._others)]
        content = {
            "facts": facts,
            "arrays": self._arrays,
            "checksums": {name: checksum(self.folder / name) for name in names},
        }
        meta = self.folder / META
        meta.write_bytes(json.dumps({**content, "checksum": _checksum_of(content)}, indent=1).encode())
        sync(meta)
        sync(self.folder)


def opened(folder: Path) -> Contents | None:
    """Map the arrays of a folder; None where there is none, or where a byte of it is not as written."""
    try:
        content = json.loads((folder / META).read_bytes())
        if not isinstance(content, dict) or content.pop("checksum", None) != _checksum_of(content):
            return None
        if any(checksum(folder / name) != expected for name, expected in content["checksums"].items()):
            return None
        arrays = {
            name: np.memmap(folder / name, dtype=dtype, mode="r", shape=tuple(shape))
            for name, (dtype, shape) in content["arrays"].items()
        }
    except (OSError, ValueError):
        return None
    return Contents(facts=content["facts"], arrays=arrays)


def build(folder: Path, write: Callable[[Writer], None]) -> Contents:
    """Have `write` fill a sibling of `folder`, and put it in the place of `folder`.

    Raises OSError where nothing can be written there; whatever `write` raises goes through, and nothing is
    left.
    """
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        scratch.mkdir()
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        write(Writer(scratch))
        built = opened(scratch)
        _publish(scratch, folder)
    except OSError as error:
        if error.errno in _REFUSED:
            raise _unwritable(folder, error) from error
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # not there any more if it was published
    # The winner's, where another process was faster. Mapped files outlive a folder that is replaced.
    contents = opened(folder) or built
    if contents is None:
        raise OSError(f"{folder} does not hold what was just written to it: the disk, or its memory, fails")
    return contents


def checksum(path: Path) -> str:
    """Return the length and the CRC-32 of a file: every change of up to 32 neighboring bits shows."""
    value = length = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
            length += len(block)
    return f"{length}:{value:08x}"


def _checksum_of(content: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _unwritable(folder: Path, error: OSError) -> OSError:
    return OSError(
        f"cannot write prepared tokens to {folder.parent}: {error}; "
        "set ALTGRAD_CACHE to a folder that can be written and has room"
    )


def _publish(scratch: Path, folder: Path) -> None:
    """Rename `scratch` to `folder`, unless a whole folder is there already."""
    if folder.exists() and opened(folder) is None:
        damaged = scratch.with_name(f"{scratch.name}.damaged")
        with contextlib.suppress(FileNotFoundError):  # another process has just put it aside
            folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        scratch.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    sync(folder.parent)


def _sweep(folder: Path) -> None:
    """Delete what killed processes left of the same folder."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE:
                shutil.rmtree(leftover, ignore_errors=True)
