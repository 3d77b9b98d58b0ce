"""Regular expressions over names of layers and parameters: whether they are any, and can be matched at all.

Python's matcher backtracks: one that repeats what it repeats, as `(.*)*x` does, may take years over a name.
"""

from __future__ import annotations

import functools
import re
import signal
import warnings
from collections.abc import Callable, Collection
from typing import Any

from altgrad_core import interrupts

NAMES = ("transformer.h.11.attn.c_attn.weight", "transformer.h.11.mlp.c_proj", "lm_head")
"""What a pattern is tried on before a model is known; they are nanoGPT's longest."""

_PATIENCE = 0.05
"""Seconds of processor time for a try; what is not catastrophic takes microseconds."""

_PATIENCE_PER_NAME = 5e-5
"""Seconds of processor time more for every name; one takes some two of 1e-6."""


@functools.lru_cache
def problem(pattern: str) -> str | None:
    """Return why a pattern cannot be used, None where it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of what Python may come to read in another way
            re.compile(pattern)
    except FutureWarning as error:
        return f"is ambiguous: {error}; put a backslash before what stands for itself"
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression: {error}"
    return endless(pattern, NAMES)


def endless(pattern: str, names: Collection[str]) -> str | None:
    """Return that a pattern takes too long to match one of these names, and which; None: it does not.

    Assumed not to outside of the main thread, which alone has timers.
    """
    compiled = re.compile(pattern)
    reached = ""

    def match_all() -> None:
        nonlocal reached
        for reached in names:
            compiled.fullmatch(reached)
            compiled.search(reached)

    if _ends_within(_PATIENCE + _PATIENCE_PER_NAME * len(names), match_all):
        return None
    return f"takes too long to match {reached!r}; do not repeat what is repeated, as '(.*)*' does"


class _TooLongError(Exception):
    """The patience is over."""


def _ends_within(seconds: float, call: Callable[[], object]) -> bool:
    """Whether a call ends within so much processor time; outside of the main thread it is not called."""

    def stop(_: int, frame: Any) -> None:
        raise _TooLongError

    with interrupts.handling({signal.SIGVTALRM: stop}) as ours:
        if not ours:
            return True
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
            call()
        except _TooLongError:
            return False
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    return True
