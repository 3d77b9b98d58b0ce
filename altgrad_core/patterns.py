"""Regular expressions over names of layers and parameters: whether they are any, and can be matched at all.

Python's matcher backtracks: one that repeats what it repeats, as `(.*)*x` does, may take years over a name.
"""

from __future__ import annotations

import functools
import re
import signal
import warnings
from collections.abc import Callable
from typing import Any

NAMES = ("transformer.h.11.attn.c_attn.weight", "transformer.h.11.mlp.c_proj", "lm_head")
"""What a pattern is tried on before it is matched with every name of a model; they are nanoGPT's longest."""

_PATIENCE = 0.05
"""Seconds of processor time for a try; what is not catastrophic takes microseconds."""


@functools.lru_cache
def problem(pattern: str) -> str | None:
    """Return why a pattern cannot be used, None where it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of what Python may come to read in another way
            compiled = re.compile(pattern)
    except FutureWarning as error:
        return f"is ambiguous: {error}; put a backslash before what stands for itself"
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression: {error}"
    for name in NAMES:
        if not all(_ends_soon(functools.partial(how, name)) for how in (compiled.fullmatch, compiled.search)):
            return f"takes too long to match {name!r}; do not repeat what is repeated, as '(.*)*' does"
    return None


class _TooLongError(Exception):
    """The patience is over."""


def _ends_soon(call: Callable[[], object]) -> bool:
    """Whether a call ends within the patience; assumed outside of the main thread, which alone has timers."""

    def stop(_: int, frame: Any) -> None:
        raise _TooLongError

    try:
        before = signal.signal(signal.SIGVTALRM, stop)
    except ValueError:
        return True
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, _PATIENCE)
        call()
    except _TooLongError:
        return False
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    return True
