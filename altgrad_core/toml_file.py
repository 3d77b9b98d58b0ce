"""The text of an experiment file, and its tables; what is no TOML is refused with the line."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import tomli

from altgrad_core import locator
from altgrad_core.mistakes import ExperimentError, one_line
from altgrad_core.overrides import DEEPEST, is_deep

_TOO_DEEP = f"tables and lists are nested more than {DEEPEST} levels deep"


def read(path: pathlib.Path) -> tuple[str, dict[str, Any]]:
    """Return a file's text and its tables. Raises ExperimentError, with the line, where it is no TOML."""
    text = _text(path)
    tables = _tables(path, text)
    if is_deep(tables):
        deep = (line for at, line in locator.lines(text).items() if len(at) > DEEPEST)
        raise ExperimentError([f"{path}:{min(deep, default=1)}: {_TOO_DEEP}"])
    return text, tables


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")  # Windows editors put a byte order mark first
    except OSError as error:
        raise ExperimentError(
            [f"{path}: cannot be read: {error.strerror}; give the path of a TOML file"]
        ) from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ExperimentError(
            [f"{path}:{line}: is not UTF-8 text: {error.reason}; save it as UTF-8"]
        ) from error


def _tables(path: pathlib.Path, text: str) -> dict[str, Any]:
    try:
        return tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        place = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", str(error))
        line = int(place[1]) if place and place[1] else text.count("\n") + 1
        reason = str(error)[: place.start()] if place else str(error)
        reason += " (text needs quotes)" if reason == "Invalid value" else ""
        raise ExperimentError([f"{path}:{line}: is no TOML: {one_line(reason)}"]) from error
    except ValueError as error:  # what Python says to an integer of thousands of digits
        raise ExperimentError([f"{path}:1: is no TOML that can be read: {error}"]) from error
    except RecursionError as error:
        raise ExperimentError([f"{path}:1: {_TOO_DEEP}"]) from error
