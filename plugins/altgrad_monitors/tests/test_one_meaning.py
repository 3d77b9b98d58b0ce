"""Metrics of codes and ranges in real runs: the same whatever `every`, other monitors, and after a resume."""

import pytest

import altgrad_core as altgrad
from altgrad_core import loop, native_landing, step_seen
from altgrad_core.hookspecs import SkipStep, SwitchFormat
from altgrad_core.record import read_lines

pytest.importorskip("altgrad_formats", reason="the runs are in formats of altgrad-formats")
pytest.importorskip("altgrad_optim", reason="a step is skipped by the policy of altgrad-policies")
guard = pytest.importorskip("altgrad_policies.nan_guard", reason="a policy stands in for all of them")

TINY = """
name = "tiny"
seed = 7
steps = 12
[data]
plugin = "markov"
tokens = 4000
[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
[train]
batch_size = 4
device = "cpu"
warmup_steps = 2
eval_every = 0
log_every = 1
checkpoint_every = 1
keep_checkpoints = 50
[optimizer]
plugin = "AdamW"
lr = 1e-2
[[fallback]]
plugin = "nan_guard"
[quantize]
format = "E3M4"
"""
ARMS = {
    "master": "granularity = 'channel'\n",  # whose scales move in most steps
    "grid": "storage = 'grid'\nstorage_rounding = 'stochastic'\n",
    "flows": "[quantize.activations]\nformat = 'E4M3'\n[quantize.gradients]\nformat = 'E5M2'\n",
}
PLAN = {
    4: SkipStep(reason="a test"),
    6: SwitchFormat(reason="a test", layers=".*c_fc", to="none"),
    8: SwitchFormat(reason="a test", layers=".*c_fc", to="E5M2"),
}
THERE_AND_BACK = {
    3: SwitchFormat(reason="a test", layers=".*", to="none"),
    5: SwitchFormat(reason="a test", layers=".*", to="E5M2"),
}
CODES = ("flip", "stall", "oscillation")


def monitors(**every):
    return "".join(f"[[monitor]]\nplugin = '{name}'\nevery = {each}\n" for name, each in every.items())


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Return a function that runs an experiment under PLAN, and returns its lines of metrics by step.

    pause: after which step the run is interrupted, and then resumed.
    """
    monkeypatch.setattr(guard.NanGuard, "decide", lambda self, step, metrics: PLAN.get(step))
    one_step = loop._one_step

    def train(text, name, pause=0):
        file, out = tmp_path / f"{name}.toml", tmp_path / name
        file.write_text(text)

        def step_then_pause(run):
            one_step(run)
            if run.step == pause:
                run.outcome = "interrupted"

        monkeypatch.setattr(loop, "_one_step", step_then_pause)
        result = altgrad.run(altgrad.load_experiment(file), out=out, quiet=True)
        monkeypatch.setattr(loop, "_one_step", one_step)
        if pause:
            result = altgrad.run(altgrad.load_experiment(file), out=out, quiet=True)
        assert result.outcome == "finished"
        return {line["step"]: line for line in read_lines(result.folder / "metrics.jsonl")}

    return train


def of(lines, *names):
    """Return the metrics of some monitors, by step."""
    return {
        step: found
        for step, line in lines.items()
        if (found := {name: one for name, one in line.items() if name.partition("/")[0] in names})
    }


@pytest.mark.parametrize("arm", ["master", "grid"])
def test_flips_and_stalls_are_the_same_whatever_steps_are_looked_at(trained, arm):
    text = TINY + ARMS[arm]
    always = of(trained(text + monitors(flip=1, stall=1), "always"), "flip", "stall")
    sometimes = of(trained(text + monitors(flip=3, stall=3), "sometimes"), "flip", "stall")
    assert {*sometimes} == {3, 6, 9, 12}
    assert sometimes == {step: always[step] for step in sometimes}


def test_flips_and_stalls_of_weights_that_land_in_torch_are_those_of_the_loop(trained, monkeypatch):
    text = TINY + ARMS["grid"] + monitors(flip=1, stall=1, descent=1)
    in_c = of(trained(text, "in_c"), *CODES, "descent")
    monkeypatch.setattr(native_landing, "land", lambda *_: (set(), {}))
    in_torch = of(trained(text, "in_torch"), *CODES, "descent")
    assert {*in_c} == {*in_torch}
    for step, found in in_c.items():
        assert in_torch[step] == pytest.approx(found, rel=1e-6, abs=1e-6)
        counts = {name: one for name, one in found.items() if name.startswith("flip/")}
        assert counts == {name: in_torch[step][name] for name in counts}


@pytest.mark.parametrize("every", [{"stall": 3}, {"stall": 3, "descent": 1}], ids=["flip", "flip+descent"])
def test_who_looks_now_and_then_finds_what_others_were_told_of(trained, every):
    text = TINY + ARMS["grid"]
    always = of(trained(text + monitors(flip=1, stall=1, descent=1), "always"), "flip", "stall", "descent")
    lines = of(trained(text + monitors(flip=1, **every), "mixed"), "flip", "stall", "descent")
    assert all(found.items() <= always[step].items() for step, found in lines.items())
    assert [step for step, found in lines.items() if any(name.startswith("stall/") for name in found)] == [
        3,
        6,
        9,
        12,
    ]


def test_weights_that_land_are_not_copied_for_who_is_told_of_them(trained, monkeypatch):
    copied = []
    copy = step_seen._copied
    monkeypatch.setattr(step_seen, "_copied", lambda run, one: copied.append(run.step) or copy(run, one))
    trained(TINY + ARMS["grid"] + monitors(flip=1, stall=1, descent=1), "told")
    assert copied == [4, 5, 7]  # after the step that was skipped, where formats are switched


@pytest.mark.parametrize("arm", ["master", "grid"])
def test_flips_are_the_same_whoever_else_looks(trained, arm):
    text = TINY + ARMS[arm]
    alone = of(trained(text + monitors(flip=1), "alone"), "flip")
    among = of(trained(text + monitors(flip=1, stall=1, descent=1, ulp=1), "among"), "flip")
    assert alone == among


@pytest.mark.parametrize("arm", ["master", "grid"])
def test_who_oscillates_does_not_depend_on_who_else_looks(trained, arm):
    text = TINY + ARMS[arm]
    alone = of(trained(text + monitors(oscillation=3), "alone"), "oscillation")
    assert alone == of(trained(text + monitors(oscillation=3, flip=1, stall=1), "among"), "oscillation")


@pytest.mark.parametrize(
    ("arm", "every", "pauses"),
    [
        ("master", 3, [5]),
        ("grid", 1, [4]),
        *(pytest.param(arm, each, [4, 5, 6, 8], marks=pytest.mark.slow) for arm in ARMS for each in (1, 3)),
    ],
)
def test_metrics_after_a_resume_are_the_bits_of_the_run_that_was_not_interrupted(trained, arm, every, pauses):
    names = (*CODES, "range")
    text = TINY + ARMS[arm] + monitors(**dict.fromkeys(names, every))
    whole = of(trained(text, "whole"), *names)
    for pause in pauses:
        assert of(trained(text, f"paused{pause}", pause), *names) == whole, pause


def test_layers_that_come_back_from_high_precision_are_counted_at_once(trained):
    lines = trained(TINY + monitors(range=1), "back")
    metric = "range/forward_overflow_count/transformer.h.0.mlp.c_fc"
    assert [step for step in lines if metric in lines[step]] == [1, 2, 3, 4, 5, 6, 9, 10, 11, 12]
    assert all(lines[step]["range/amax_weights/transformer.h.0.mlp.c_fc"] > 0 for step in (6, 9))


@pytest.mark.parametrize("every", [1, 3])
def test_a_model_that_comes_back_from_high_precision_is_counted_at_once(trained, monkeypatch, every):
    monkeypatch.setattr(guard.NanGuard, "decide", lambda self, step, metrics: THERE_AND_BACK.get(step))
    lines = trained(TINY + monitors(range=every), "back")
    counted = [step for step, line in lines.items() if "range/forward_underflow_fraction/total" in line]
    assert counted == [step for step in (1, 2, 3, 6, 7, 8, 9, 10, 11, 12) if step % every == 0]
    assert sum(line.get("range/rescale/total", 0.0) for step, line in lines.items() if step <= 6) == 0
