"""Values, lists and suggestions as error messages write them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def shown(value: Any) -> str:
    """Return a value for an error message, short and on one line whatever it is."""
    try:
        text = repr(value).lower() if isinstance(value, bool) else repr(value)  # as TOML writes it
    except (ValueError, RecursionError):  # Python refuses to write out integers of thousands of digits
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Iterable[str]) -> str:
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
