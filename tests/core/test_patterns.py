"""Regular expressions in experiment files: refused by name and place where they cannot be used."""

import re
import signal
import threading
import time

import pytest

from altgrad_core import patterns
from altgrad_core.apps import guarded, run_app
from altgrad_core.model_options import ModelOptions
from altgrad_core.rules import Rule
from altgrad_core.shapes import Architecture, linear_shapes, parameter_shapes

CATASTROPHIC = ["(.*)*(.*)*(.*)*(.*)*x", r"(\w+\.?)+!", "(.+)+q", r"(lm_head)?([a-z_.0-9]+)*!"]
CATASTROPHIC += ["(.+)+[^t]", "(?!t)(.+)+q"]  # only where the whole name must match, only where a part may
FINE = [".*", "lm_head", r".*(attn|mlp)\..*", r"(.*\.)*c_attn", r"transformer\.h\.[0-9]+\..*", r"[\\[]x", ""]


@pytest.mark.parametrize("pattern", FINE)
def test_what_ends_has_no_problem(pattern):
    assert patterns.problem(pattern) is None


@pytest.mark.parametrize("pattern", CATASTROPHIC)
def test_what_takes_for_ever_is_told_within_a_second(pattern):
    began = time.process_time()
    found = patterns.problem(pattern)
    assert time.process_time() - began < 1
    assert found == (
        "takes too long to match 'transformer.h.11.attn.c_attn.weight'; do not repeat what is repeated, as "
        "'(.*)*' does"
    )


def test_names_are_those_of_a_model():
    architecture = Architecture(ModelOptions(n_layer=12), vocab_size=256)
    assert set(patterns.NAMES) <= {*linear_shapes(architecture), *parameter_shapes(architecture)}


def test_what_python_reads_otherwise_one_day_is_refused_and_not_warned_of(recwarn):
    for _ in range(2):
        patterns.problem.cache_clear()
        assert patterns.problem("[[a].*") == (
            "is ambiguous: Possible nested set at position 1; put a backslash before what stands for itself"
        )
    assert not recwarn.list


@pytest.mark.parametrize("pattern", ["(a", ".{99999999999}", "*"])
def test_what_is_no_regular_expression_says_why(pattern):
    assert patterns.problem(pattern).startswith("is no regular expression: ")


def test_timer_and_handler_are_given_back():
    before = signal.getsignal(signal.SIGVTALRM)
    for pattern in ("([a-z]+.?)*#", "[a-z]+#"):
        patterns.problem(pattern)
        assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
        assert signal.getsignal(signal.SIGVTALRM) is before


def test_in_another_thread_patterns_are_taken_as_they_are():
    found = []
    thread = threading.Thread(target=lambda: found.append(patterns.problem(r"(other)?lm_head")))
    thread.start()
    thread.join()
    assert found == [None]


@pytest.mark.parametrize(
    ("table", "place"),
    [
        ("[quantize]\nformat = 'E4M3'\n[[quantize.rule]]\nlayers = '{}'", "9: quantize.rule[0].layers: "),
        ("[train]\nfreeze = ['lm_head', '{}']", "7: train.freeze: "),
        ("[[monitor]]\nplugin = 'flip'\nlayers = '{}'", "8: monitor[0].layers: "),
    ],
)
def test_check_names_the_pattern_and_its_line(table, place, tmp_path, capsys):
    path = tmp_path / "experiment.toml"
    head = "name = 'tiny'\n[data]\nplugin = 'markov'\ntokens = 4000\n\n"
    path.write_text(head + table.format(CATASTROPHIC[0]))
    assert guarded(run_app, [str(path), "--check"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{path}:{place}{CATASTROPHIC[0]!r} takes too long to match ")


@pytest.mark.parametrize(
    "table", ["[quantize]\nformat = 'E4M3'\nrule = [{layers = '%s'}]", "train.freeze = ['%s']"]
)
def test_a_pattern_that_takes_for_ever_on_one_name_of_the_model_alone_is_told(table, tmp_path, capsys):
    pattern = r"transformer\.h\.3\.(.*)*(.*)*(.*)*(.*)*!|.*"
    assert patterns.problem(pattern) is None
    path = tmp_path / "experiment.toml"
    path.write_text(f"name = 'tiny'\ndata = 'markov'\n{table % pattern}")
    began = time.process_time()
    assert guarded(run_app, [str(path), "--check"]) == 2
    assert time.process_time() - began < 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "takes too long to match 'transformer.h.3." in line


def test_a_pattern_that_is_none_is_told_of_a_monitor_that_does_not_look_itself(mistakes):
    told = "e.toml:4: monitor[0].layers: '(' is no regular expression: missing ), unterminated subpattern"
    (line,) = mistakes("name = 'e'\n[[monitor]]\nplugin = 'flip'\nlayers = '('")
    assert line.startswith(told)


def test_very_many_names_are_no_reason_to_refuse_a_pattern():
    architecture = Architecture(ModelOptions(n_layer=1000), vocab_size=256)
    for pattern in FINE:
        assert patterns.endless(pattern, parameter_shapes(architecture)) is None


def test_a_rule_of_the_python_face_is_held_to_the_same():
    with pytest.raises(ValueError, match=re.escape("the rule '(.+)+q' takes too long")):
        Rule("(.+)+q", "E4M3")
