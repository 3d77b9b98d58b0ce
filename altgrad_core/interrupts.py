"""SIGINT and SIGTERM outside of training, which answers them itself: they unwind the command, but no import.

A handler that raises while a module is imported may not be heard: start-up code in C (torch's, which imports
numpy) swallows the exception and goes on with half a module, other code turns it into an ImportError. A
signal that comes then is sent again a moment later, until the import is over. A second one does not wait.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"
"""The file of the frames that stand between an `import` and the module's own code."""

_A_MOMENT = 0.05
"""Seconds until a signal that found an import is sent again."""


class Terminated(BaseException):
    """SIGTERM, as KeyboardInterrupt is SIGINT."""


def answered(command: Callable[[], int]) -> int:
    """Run a command and return its exit code, or that of the signal which has ended it."""
    try:
        with unwinding():
            return command()
    except KeyboardInterrupt:
        return _ended("interrupted", 130)
    except Terminated:
        return _ended("terminated", 143)


def _ended(outcome: str, code: int) -> int:
    print(f"{outcome}; a run goes on from its newest checkpoint, if it has one", file=sys.stderr)
    return code


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


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Have SIGINT and SIGTERM wait for the end of the block, whoever answers them.

    For calls into libraries that take what a handler raises for an error of their own.
    """
    waiting: list[int] = []
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number))]
    try:
        before = {number: signal.signal(number, lambda one, _: waiting.append(one)) for number in numbers}
    except ValueError:  # not the main thread: handlers do not run here
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for one in waiting:
            signal.raise_signal(one)


def _imports(frame: FrameType | None) -> int:
    """Return how many frames of the import system stand on the stack that ends in `frame`."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == _IMPORT_SYSTEM
        frame = frame.f_back
    return count
