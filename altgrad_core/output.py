"""Standard output that cannot be written: full disks, pipes that nobody reads, characters it has not."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

import attrs

from altgrad_core.durable import WriteError


@attrs.frozen
class _Told:
    """A stream whose errors say what they are of; a reader that has gone stays a BrokenPipeError."""

    stream: TextIO

    def write(self, text: str) -> int:
        with _telling():
            return self.stream.write(text)

    def flush(self) -> None:
        with _telling():
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise WriteError(f"the output cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def told() -> Iterator[None]:
    """Have what is printed and cannot be written raise WriteError, or BrokenPipeError; flushed at the end.

    After either, nothing more is written: Python would say the same again at its exit.
    """
    stream: TextIO | None = sys.stdout
    if stream is None:  # closed before the command began: print says nothing then
        yield
        return
    try:
        with contextlib.redirect_stdout(_Told(stream)):
            yield
            sys.stdout.flush()
    except (WriteError, BrokenPipeError):
        _discard(stream)
        raise


def escape() -> None:
    """Have standard output show what it cannot encode, the name of a folder perhaps, by its number."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _discard(stream: TextIO) -> None:
    with contextlib.suppress(OSError, ValueError):  # a stream without a file, as tests have them
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
