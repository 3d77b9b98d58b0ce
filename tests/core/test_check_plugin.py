"""What `altgrad check-plugin` says of plugins that are right, wrong, or cannot be checked as they are."""

import pytest

from altgrad_core.apps import app, guarded
from altgrad_core.registry import discover
from altgrad_core.testing.plugins import check_plugin

IN = {
    "format": "altgrad_formats",
    "stiffness": "altgrad_stiffness",
    "optimizer": "altgrad_optimizers",
    "monitor": "altgrad_monitors",
    "fallback": "altgrad_fallbacks",
    "dataset": "altgrad_datasets",
    "executor": "altgrad_executors",
}


@pytest.fixture
def verdict(install):
    """Return a function that installs a plugin of one component and returns what the kit says of it."""

    def of(kind, source, options="NoOptions"):
        register = f"""
            from altgrad_core.hookspecs import *

            @hookimpl
            def {IN[kind]}():
                return [Component(name="it", summary="", options={options}, target=f"{{__name__}}:It")]
            """
        indented = "\n".join(f"            {line}" for line in source.splitlines())
        install("fake", indented + register)
        (found,) = check_plugin("fake", discover())
        return found

    return of


MONITOR = """
class It:
    needs = ()
    def __init__(self, options): pass
    def start(self, run): self.run = run
    def observe(self, step):
        return {"it/steps/total": float(step.index)}
"""
SLOWER = "self.run.optimizer.param_groups[0]['initial_lr'] = 0"
WRITES = "next(iter(step.weights.values())).value.zero_()"
POLICY = """
class It:
    needs = ()
    def __init__(self, options): pass
    def start(self, run): self.run = run
    def decide(self, step, metrics):
        return None
"""
ONCE = "self.seen = getattr(self, 'seen', 0) + 1; return SkipStep(reason='') if self.seen == 3 else None"
TEXTS = """
class It:
    def __init__(self, options): pass
    def fingerprint(self): return "1"
    def documents(self, split): yield Document(text=split)
"""
EXECUTOR = """
class It:
    def __init__(self, options): pass
    def run(self, cells, run_cell, jobs): return [run_cell(cell) for cell in cells]
"""


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("monitor", MONITOR),
        ("fallback", POLICY),
        ("fallback", POLICY.replace("()", "('train/loss',)", 1)),
        ("dataset", TEXTS),
        ("executor", EXECUTOR),
    ],
)
def test_what_keeps_its_contract_is_ok(kind, source, verdict):
    found = verdict(kind, source)
    assert (found.outcome, found.message) == ("ok", "")


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("monitor", MONITOR.replace("needs = ()", "needs = ('befor',)"), "any of before, intended"),
        ("monitor", MONITOR.replace("needs = ()", "needs = 'before'"), "must be a collection of names"),
        ("monitor", MONITOR.replace("observe", "look"), "it must have needs and observe"),
        ("monitor", MONITOR.replace("needs", "provides = {'steps': 'avg'}; needs"), "any of 'sum', 'mean'"),
        ("monitor", MONITOR.replace("it/steps", "another/steps"), "the monitor is dropped"),
        ("monitor", MONITOR.replace("return {", "0 / 0; return {"), "observe raised ZeroDivisionError"),
        ("monitor", MONITOR.replace("return", f"{SLOWER}; return"), "must leave the run alone"),
        ("monitor", MONITOR.replace("return", f"{WRITES}; return"), "it of fake"),
        ("fallback", POLICY.replace("return None", "return Stop(reason='no')"), "must come to its end"),
        ("fallback", POLICY.replace("return None", "0 / 0"), "decide raised ZeroDivisionError"),
        ("fallback", POLICY.replace("return None", "return 'skip'"), "it must be an action"),
        ("fallback", POLICY.replace("return", f"{SLOWER}; return"), "must act by its answers alone"),
        ("fallback", POLICY.replace("return None", ONCE), "must answer alike after a pause"),
        ("dataset", TEXTS.replace("text=split", "text=str(id(self))"), "splits never change"),
        ("dataset", TEXTS.replace("Document(text=split)", "split"), "one Document or more"),
        ("dataset", TEXTS.replace('return "1"', "return str(id(self))"), "the same text each time"),
        ("dataset", TEXTS.replace('return "1"', "return 1"), "expected: one str"),
        ("dataset", TEXTS.replace("yield Document(text=split)", "0 / 0"), "raised ZeroDivisionError"),
        ("dataset", "def It(options): return 3", "a TextSource or a TokenSource"),
        ("format", "It = 3", "expected: a Format"),
        ("stiffness", "def It(options): return 3", "is no formula but int: mend its plugin"),
        ("stiffness", "def It(options): return lambda *_: 0 / 0", "raised ZeroDivisionError"),
        (
            "executor",
            EXECUTOR.replace("in cells]", "in cells if cell != 'fails']"),
            "every cell has one result",
        ),
    ],
)
def test_what_breaks_its_contract_fails_and_says_how(kind, source, message, verdict):
    found = verdict(kind, source)
    assert found.outcome == "failed"
    assert message in found.message


def test_a_format_goes_through_the_kit(verdict):
    source = """
from altgrad_core.format import Format
class Odd(Format):
    def _spacing(self, x): return x
It = Odd(name='it', bits=3, values=[-1.0, 0.0, 1.0])
"""
    found = verdict("format", source)
    assert found.outcome == "failed"
    assert found.message.startswith("it: ")


def test_a_formula_that_is_a_pure_number_is_said_to_be_one(verdict):
    source = """
import torch
def It(options): return lambda weight, format, scale: torch.ones_like(weight)
"""
    assert verdict("stiffness", source).message == "a pure number, not in weight units"


@pytest.mark.parametrize(("maximize", "outcome"), [(False, "ok"), (True, "failed")])
def test_an_optimizer_goes_through_the_kit_at_its_own_learning_rate(maximize, outcome, verdict):
    source = f"""
import torch
def It(options, inputs): return torch.optim.SGD(inputs.groups, lr=0.01, maximize={maximize})
"""
    assert verdict("optimizer", source).outcome == outcome


def test_an_option_without_default_and_example_is_the_reason_why_not(verdict):
    options = """
from altgrad_core.options import option
@attrs.frozen(kw_only=True)
class Options:
    path: str = option("a file")
"""
    found = verdict("dataset", options + TEXTS, options="Options")
    assert (found.outcome, found.message) == ("not checked", "path must be given, and has no `example`")


def test_a_data_set_may_refuse_what_is_not_there(verdict):
    found = verdict("dataset", TEXTS.replace("options): pass", "options): raise OSError('no network')"))
    assert (found.outcome, found.message) == ("not checked", "no network")


def test_the_command_exits_with_1_where_something_fails(install, capsys):
    source = "[Component(name='it', summary='', target='nowhere:it')]"
    install("fake", f"@hookimpl\ndef altgrad_formats():\n    return {source}")
    assert guarded(app, ["check-plugin", "fake"]) == 1
    assert "failed  format it: format 'it' of fake 1.0: its target 'nowhere:it'" in capsys.readouterr().out


def test_a_plugin_that_is_not_installed_or_broken_is_refused_with_the_reason(install, capsys):
    install("fake", "0 / 0")
    assert guarded(app, ["check-plugin", "fak"]) == guarded(app, ["check-plugin", "fake"]) == 2
    refused = capsys.readouterr().err
    assert "no plugin of a distribution 'fak' is installed" in refused
    assert "the plugin is broken: fake 1.0 (ZeroDivisionError" in refused


FORGETS = """
class It:
    needs, seen = (), 0
    def __init__(self, options): pass
    def observe(self, step):
        self.seen += 1
        return {"it/seen/total": float(self.seen)}
"""
REMEMBERS = (
    FORGETS
    + """
    def state_dict(self): return {"seen": self.seen}
    def load_state_dict(self, state): self.seen = state["seen"]
"""
)
REFUSES = """
    def state_dict(self): return {"seen": 1}
    def load_state_dict(self, state): raise KeyError("no")
"""


def test_a_monitor_that_forgets_what_it_saw_before_a_pause_is_found_out(verdict):
    found = verdict("monitor", FORGETS)
    assert (found.outcome, "as if there had been no pause" in found.message) == ("failed", True)
    assert "it/seen/total in step" in found.message


def test_a_monitor_that_remembers_what_it_saw_before_a_pause_is_right(verdict):
    assert verdict("monitor", REMEMBERS).outcome == "ok"


@pytest.mark.parametrize(("kind", "source"), [("monitor", MONITOR), ("fallback", POLICY)])
def test_one_that_cannot_take_up_its_own_state_is_found_out(verdict, kind, source):
    found = verdict(kind, source + REFUSES)
    assert (found.outcome, "load_state_dict raised KeyError" in found.message) == ("failed", True)


@pytest.mark.parametrize("document", ["text=1", "text='a', labels=(2,)", "text='a', labels=(-1,)"])
def test_documents_without_text_or_with_labels_that_are_none_are_found_out(verdict, document):
    source = f"""
class It:
    label_count = 2
    def __init__(self, options): pass
    def fingerprint(self): return "1"
    def documents(self, split): return [Document({document})]
"""
    found = verdict("dataset", source)
    assert (found.outcome, "labels from 0 to 1" in found.message) == ("failed", True)


def test_an_executor_whose_results_are_no_list_is_found_out(verdict):
    source = """
class It:
    def __init__(self, options): pass
    def run(self, cells, run_cell, jobs): return map(run_cell, cells)
"""
    found = verdict("executor", source)
    assert (found.outcome, "the results are a list" in found.message) == ("failed", True)
