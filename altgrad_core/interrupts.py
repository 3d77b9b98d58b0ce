"""What SIGINT and SIGTERM do: they unwind a command, but no import; they ask a run, or a grid, for its end.

A handler that raises while a module is imported may not be heard: start-up code in C (torch's, which imports
numpy) swallows the exception and goes on with half a module, other code turns it into an ImportError. A
signal that comes then is sent again a moment later, until the import is over. A second one does not wait.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType

_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"
"""The file of the frames that stand between an `import` and the module's own code."""

_A_MOMENT = 0.05
"""Seconds until a signal that found an import is sent again."""


OUTCOMES: Mapping[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
"""Signal to the outcome that it asks for."""

ASKED = tuple(OUTCOMES.values())
"""Outcomes of what a signal has ended."""

Handler = Callable[[int, FrameType | None], object] | signal.Handlers


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
def handling(handlers: Mapping[int, Handler]) -> Iterator[bool]:
    """Have signals answered by these handlers inside, and afterwards by those that did before.

    Yields whether they are: outside of the main thread signals are somebody else's.
    """
    before = {}
    with contextlib.suppress(ValueError):
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield bool(before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def collected(pass_on: Callable[[], object] = lambda: None) -> Iterator[list[str]]:
    """Collect the outcomes that SIGINT and SIGTERM ask for inside; a second SIGINT raises KeyboardInterrupt.

    pass_on: called at each of them.
    """
    asked: list[str] = []

    def collect(number: int, _: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt  # it waits for no checkpoint
        asked.append(OUTCOMES[number])
        pass_on()

    with handling(dict.fromkeys(OUTCOMES, collect)):
        yield asked


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

    heard = [number for number in raised if signal.getsignal(number) != signal.SIG_IGN]
    with handling({**dict.fromkeys(heard, unwind), signal.SIGALRM: send_again}) as ours:
        try:
            yield
        finally:
            if ours:
                signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Have SIGINT and SIGTERM wait for the end of the block, whoever answers them.

    For calls into libraries that take what a handler raises for an error of their own.
    """
    waiting: list[int] = []
    numbers = [number for number in OUTCOMES if callable(signal.getsignal(number))]
    try:
        with handling(dict.fromkeys(numbers, lambda one, _: waiting.append(one))):
            yield
    finally:
        for one in waiting:
            signal.raise_signal(one)


def _imports(frame: FrameType | None) -> int:
    """Return how many frames of the import system stand on the stack that ends in `frame`."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == _IMPORT_SYSTEM
        frame = frame.f_back
    return count
