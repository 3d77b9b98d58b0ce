"""Signals outside of training: they end what runs, and let what is imported be imported."""

import importlib
import os
import signal
import sys
import threading
import time

import pytest

from altgrad_core import interrupts

RAISED = {"SIGINT": KeyboardInterrupt, "SIGTERM": interrupts.Terminated}
KILL = "import os, signal\nos.kill(os.getpid(), signal.{name})\n"
DEAF = """
try:
    import deafened_inner
except BaseException:
    pass
"""

COMMAND = """
from altgrad_core import interrupts
with interrupts.unwinding():
    import os, signal
    os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that writes a module that can be imported."""
    monkeypatch.syspath_prepend(tmp_path)
    written = []

    def module(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        written.append(name)

    yield module
    for name in written:
        sys.modules.pop(name, None)


def import_and_go_on(name):
    importlib.import_module(name)
    for _ in range(1000):
        time.sleep(0.01)


@pytest.mark.parametrize("name", RAISED)
def test_a_signal_raises_where_the_block_is(name):
    with pytest.raises(RAISED[name]), interrupts.unwinding():
        os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", RAISED)
def test_a_module_that_is_being_imported_is_whole_before_a_signal_raises(name, module):
    module("whole_module", KILL.format(name=name) + "import time\ntime.sleep(0.2)\nend = 1\n")
    with pytest.raises(RAISED[name]), interrupts.unwinding():
        import_and_go_on("whole_module")
    assert sys.modules["whole_module"].end == 1


@pytest.mark.parametrize("name", RAISED)
def test_a_signal_is_heard_though_the_importing_code_swallows_every_exception(name, module):
    module("deafened_inner", KILL.format(name=name))
    module("deafened", DEAF)
    with pytest.raises(RAISED[name]), interrupts.unwinding():
        import_and_go_on("deafened")


def test_a_second_signal_does_not_wait_for_an_import(module):
    module("twice", KILL.format(name="SIGTERM") + KILL.format(name="SIGINT") + "end = 1\n")
    with pytest.raises(KeyboardInterrupt), interrupts.unwinding():
        import twice  # noqa: F401
    assert "twice" not in sys.modules


def test_a_signal_that_an_import_has_put_off_goes_to_whoever_answers_by_then(module):
    heard = []
    module("answered", KILL.format(name="SIGINT"))
    with interrupts.unwinding():
        import answered  # noqa: F401

        signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
        time.sleep(0.2)
    assert heard == [signal.SIGINT]


def test_a_command_that_is_itself_imported_can_be_ended(module):
    module("ended", COMMAND)
    with pytest.raises(interrupts.Terminated):
        import ended  # noqa: F401


def test_handlers_are_given_back_and_none_is_taken_of_a_signal_that_is_ignored():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    outside = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        before = [signal.getsignal(number) for number in numbers]
        with interrupts.unwinding():
            os.kill(os.getpid(), signal.SIGINT)
        assert [signal.getsignal(number) for number in numbers] == before
    finally:
        signal.signal(signal.SIGINT, outside)


def test_a_signal_waits_for_the_end_of_a_block_that_holds_it():
    done = []

    def block():
        with interrupts.unwinding(), interrupts.held():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("the rest")

    with pytest.raises(KeyboardInterrupt):
        block()
    assert done


@pytest.mark.parametrize("block", [interrupts.unwinding, interrupts.held])
def test_in_another_thread_signals_are_left_alone(block):
    before, found = signal.getsignal(signal.SIGTERM), []

    def command():
        with block():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=command)
    thread.start()
    thread.join()
    assert found == [before]
