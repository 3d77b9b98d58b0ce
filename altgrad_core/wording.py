"""Values, lists and suggestions as error messages write them."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def shown(value: Any) -> str:
    """Return a value for an error message, short and on one line whatever it is."""
    try:
        text = repr(value).lower() if isinstance(value, bool) else repr(value)  # as TOML writes it
    except (ValueError, RecursionError):  # Python refuses to write out integers of thousands of digits
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Iterable[str]) -> str:
    """Return names with commas between them; `none` for none."""
    return ", ".join(names) or "none"


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or the empty text; case does not matter."""
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(word.lower(), by_lower)
    if not close:
        return ""
    given = word.lower()
    best = max(close, key=lambda one: (_likeness(one, given), one[0] == given[0]))
    return f"; did you mean {by_lower[best]!r}?"


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def described(error: BaseException, target: str) -> str:
    """Return an error's type and text, and at which line of a target's package it was raised, if it was.

    target: `package.module:attribute`, or a module alone.
    """
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    package = target.partition(":")[0].partition(".")[0]
    lines = [
        f"{Path(frame.f_code.co_filename).name}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package
    ]
    return f"{text} ({lines[-1]})" if lines else text
