"""SIGINT and SIGTERM outside of training, which answers them itself: they unwind the command, but no import.

A handler that raises while a module is imported may not be heard: start-up code in C (torch's, which imports
numpy) swallows the exception and goes on with half a module, other code turns it into an ImportError. A
signal that comes then is sent again a moment later, until the import is over. A second one does not wait.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from collections.abc import Iterator
from types import FrameType

_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"
"""The file of the frames that stand between an `import` and the module's own code."""

_A_MOMENT = 0.05
"""Seconds until a signal that found an import is sent again."""


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


@contextlib.contextmanager
def unwinding() -> Iterator[None]:
    """Have SIGINT and SIGTERM raise where the block is, so that files and folders are left as they should be.

    One that the process ignores (a shell's background job) stays ignored.
    """
    raised = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    outside = _imports(sys._getframe())
    waiting: list[int] = []

    def unwind(number: int, frame: FrameType | None) -> None:
        if waiting or _imports(frame) == outside:
            raise raised[signal.Signals(number)]
        waiting.append(number)
        signal.setitimer(signal.ITIMER_REAL, _A_MOMENT)

    def send_again(_: int, frame: FrameType | None) -> None:
        if _imports(frame) > outside:
            signal.setitimer(signal.ITIMER_REAL, _A_MOMENT)
        else:
            signal.raise_signal(waiting.pop())  # by now it may be training that answers

    handlers = {number: unwind for number in raised if signal.getsignal(number) != signal.SIG_IGN}
    try:
        before = {
            number: signal.signal(number, handler)
            for number, handler in {**handlers, signal.SIGALRM: send_again}.items()
        }
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _imports(frame: FrameType | None) -> int:
    """Return how many frames of the import system stand on the stack that ends in `frame`."""
    return sum(one.f_code.co_filename == _IMPORT_SYSTEM for one, _ in traceback.walk_stack(frame))
