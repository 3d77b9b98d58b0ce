"""What a person sees of a run."""

import io

import pytest
import rich.console

from altgrad_core.terminal import Terminal


@pytest.fixture
def shown():
    """Return a function that runs something on a terminal of 60 columns and returns what it showed."""

    def shown(what, *, is_terminal, **options):
        screen = io.StringIO()
        console = rich.console.Console(
            file=screen, force_terminal=is_terminal, width=60, no_color=True, soft_wrap=True, highlight=False
        )
        what(Terminal(console=console, **options))
        return screen.getvalue()

    return shown


def test_a_long_text_is_folded_under_itself_on_a_terminal(shown):
    rows = [("a", "x"), ("optimizer", "word " * 20)]
    lines = shown(lambda terminal: terminal.table(rows), is_terminal=True).splitlines()
    assert len(lines) > 2
    assert all(len(line) <= 60 for line in lines)
    assert lines[2].startswith("             word")


def test_a_long_text_stays_one_line_in_a_pipe(shown):
    rows = [("optimizer", "word " * 20)]
    assert len(shown(lambda terminal: terminal.table(rows), is_terminal=False).splitlines()) == 1


def test_the_live_line_names_no_number_that_is_not_there(shown):
    def evaluated_first(terminal):
        terminal.begin(0, 10)
        terminal.line(0, {"validation/loss": 2.5})
        terminal.end()

    assert "nan" not in shown(evaluated_first, is_terminal=True)


def test_quiet_prints_warnings_alone_and_logs_the_rest(shown):
    logged = []

    def speak(terminal):
        terminal.log = logged.append
        terminal.say("a line")
        terminal.warning("mind the gap")

    assert shown(speak, is_terminal=False, quiet=True) == "warning: mind the gap\n"
    assert logged == ["a line", "warning: mind the gap"]
