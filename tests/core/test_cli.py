"""What the command `altgrad` says of broken, conflicting and ambiguous plugins, on fake ones."""

import json
import sys

import pytest

from altgrad_core.apps import app, guarded

ONE = """
@attrs.frozen(kw_only=True)
class Options:
    needed: int = attrs.field(metadata={{"example": 7}})
    word: str = attrs.field()
    maybe: float | None = attrs.field(default=None, metadata={{"help": "left out or not", "unit": "nats"}})
    many: tuple[str, ...] = ()

@hookimpl
def altgrad_{kind}():
    return [Component(name="{name}", summary="does things", target="a:b", options=Options, source="a paper")]
"""


@pytest.fixture
def altgrad(capsys):
    """Return a function that runs `altgrad ...` in this process: exit code, output, errors."""

    def command(*tokens):
        code = guarded(app, tokens)
        return code, *capsys.readouterr()

    return command


def test_a_command_whose_output_is_closed_says_nothing(monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdout", None)
    assert guarded(app, ["plugins"]) == 0
    assert capfd.readouterr() == ("", "")


def test_broken_and_conflicting_plugins_are_listed_with_the_reason(install, altgrad):
    install("one", ONE.format(kind="monitors", name="m"))
    install("two", ONE.format(kind="monitors", name="m"))
    module = install("three", "1 / 0", version="0.3")
    code, out, _ = altgrad("plugins", "--kind", "monitor")
    assert (code, out) == (
        0,
        "monitor  m  one 1.0  does things\n"
        "monitor  m  two 1.0  does things\n"
        "\n"
        f"broken: three 0.3 (ZeroDivisionError: division by zero ({module}.py:4))\n"
        "\n"
        "conflict: monitor 'm' is owned by one 1.0 and two 1.0; say which: "
        'plugin = "one:m" or plugin = "two:m"\n',
    )


def test_broken_and_conflicting_plugins_are_in_the_json(install, altgrad):
    install("one", ONE.format(kind="monitors", name="m"))
    install("two", ONE.format(kind="monitors", name="m"))
    module = install("three", "1 / 0", version="0.3")
    listing = json.loads(altgrad("plugins", "--json")[1])
    assert listing["conflicts"] == [{"kind": "monitor", "name": "m", "distributions": ["one", "two"]}]
    reason = f"ZeroDivisionError: division by zero ({module}.py:4)"
    assert listing["broken"] == [{"distribution": "three", "version": "0.3", "reason": reason}]


def test_a_component_on_a_page(install, altgrad, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    install("one", ONE.format(kind="monitors", name="m"))
    assert altgrad("show", "m")[1] == (
        "m: does things\n"
        "  kind    monitor\n"
        "  from    one 1.0, a:b\n"
        "  source  a paper\n"
        "\n"
        "options\n"
        "  needed  whole number  required\n"
        "  word    text          required\n"
        "  maybe   number        left out  left out or not (nats)\n"
        "  many    list of text  []\n"
        "\n"
        "in an experiment file\n"
        "\n"
        "[[monitor]]\n"
        'plugin = "m"\n'
        "needed = 7\n"
        'word = "..."\n'
        "# maybe = ...\n"
        "many = []\n"
    )


def test_the_snippet_of_a_name_with_two_owners_says_which(install, altgrad):
    install("one", ONE.format(kind="monitors", name="m"))
    install("two", ONE.format(kind="monitors", name="m"))
    code, _, err = altgrad("show", "m")
    assert code == 2
    assert 'say which: plugin = "one:m" or plugin = "two:m"' in err
    assert 'plugin = "two:m"\n' in altgrad("show", "two:m")[1]


def test_a_name_of_two_kinds_is_asked_back(install, altgrad):
    install("one", ONE.format(kind="monitors", name="m"))
    install("two", ONE.format(kind="fallbacks", name="m"))
    code, _, err = altgrad("show", "m")
    assert code == 2
    choices = "altgrad show monitor/m or altgrad show fallback/m"
    assert err == f"'m' is the name of several components; say which: {choices}\n"
    assert "[[fallback]]" in altgrad("show", "fallback/m")[1]


def test_a_stiffness_is_shown_without_snippet_where_no_optimizer_takes_one(install, altgrad):
    install("one", ONE.format(kind="optimizers", name="O"))
    out = altgrad("show", "stiffness/grid")[1]
    assert "in an experiment file" not in out


def test_broken_plugins_are_named_where_nothing_has_the_name(install, altgrad):
    install("three", "1 / 0", version="0.3")
    err = altgrad("show", "xyzzy")[2]
    assert "broken plugins, where it may be: three 0.3 (ZeroDivisionError" in err
