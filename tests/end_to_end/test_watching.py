"""What policies are shown, what lines and summaries keep, and what becomes of plugins that break a rule."""

import math
import random
import re
import sys

import numpy
import pytest
import torch

import altgrad_core as altgrad
from altgrad_core import checkpoint, loop
from altgrad_core import registry as registry_module
from altgrad_core.hookspecs import AdjustScale, SwitchFormat
from altgrad_core.record import read_lines
from altgrad_core.registry import UsageError
from altgrad_core.watched import PluginFailure

PLUGIN = '''
"""A monitor and a policy, to be told what to do by a test. Light."""

import attrs

from altgrad_core.hookspecs import Component, hookimpl
from altgrad_core.options import option


@attrs.frozen(kw_only=True)
class Options:
    every: int = option("steps", default=1)
    layers: str = option("which", default=".*")
    needs: tuple[str, ...] = option("what to read", default=())


class Eye:
    provides, undefined_is_nan = {"count": "sum", "share": "mean"}, True

    def __init__(self, options):
        self.every, self.needs, self.options, self.run = options.every, options.needs, options, None
        self.layers = options.layers

    def start(self, run):
        self.run = run

    def observe(self, step):
        return {"eye/count/total": float(step.index)}


class Hand:
    def __init__(self, options):
        self.every, self.needs, self.seen = options.every, options.needs, {}

    def decide(self, step, metrics):
        self.seen[step] = dict(metrics)


@hookimpl
def altgrad_fallbacks():
    return [Component(name="hand", summary="", options=Options, target="eye_and_hand:Hand")]


@hookimpl
def altgrad_monitors():
    return [Component(name="eye", summary="", options=Options, target="eye_and_hand:Eye")]
'''

TINY = """
name = "tiny"
seed = 7
steps = 8
[data]
plugin = "markov"
tokens = 160  # 32 a step: an epoch is 5 steps
[model]
n_layer = 1
n_head = 1
n_embd = 16
block_size = 16
[train]
batch_size = 2
device = "cpu"
eval_every = 100
eval_batches = 1
log_every = 1
checkpoint_every = 3
keep_checkpoints = 9
[optimizer]
plugin = "AdamW"
lr = 1e-2
[quantize]
format = "E4M3"
"""
EYE, HAND = "[[monitor]]\nplugin = 'eye'\n", "[[fallback]]\nplugin = 'hand'\nneeds = ['eye/count/total']\n"


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install the plugin for this process, and return its module."""
    info = tmp_path / "site" / "eye_and_hand-1.0.dist-info"
    info.mkdir(parents=True)
    (info.parent / "eye_and_hand.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: eye-and-hand\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[altgrad]\neye-and-hand = eye_and_hand\n")
    monkeypatch.syspath_prepend(str(info.parent))
    registry_module._discover.cache_clear()
    import eye_and_hand

    yield eye_and_hand
    registry_module._discover.cache_clear()
    sys.modules.pop("eye_and_hand", None)


@pytest.fixture
def train(plugin, tmp_path):
    """Return a function that runs the experiment with further tables."""

    def train(*tables, out="runs", overrides=()):
        path = tmp_path / "experiment.toml"
        path.write_text(TINY + "".join(tables))
        return altgrad.run(altgrad.load_experiment(path, overrides), out=tmp_path / out, quiet=True)

    return train


def lines(result, name="metrics.jsonl"):
    return list(read_lines(result.folder / name))


def warnings(result):
    return [line["message"] for line in lines(result, "events.jsonl") if line["event"] == "warning"]


@pytest.fixture
def shown(plugin, train, monkeypatch):
    """Return a function that runs, and returns by step the monitor's metric as the policy was shown it."""

    def shown(*tables, answers=None, **options):
        seen = {}

        def decide(self, step, metrics):
            seen[step] = metrics.get("eye/count/total")
            return (answers or {}).get(step)

        monkeypatch.setattr(plugin.Hand, "decide", decide)
        train(*tables, **options)
        return seen

    return shown


def test_no_observation_is_shown_twice_after_a_skipped_step(shown):
    from altgrad_core.hookspecs import SkipStep

    skips = {step: SkipStep(reason="") for step in (3, 4)}
    assert shown(EYE, HAND, answers=skips) == {
        1: None,
        2: 1.0,
        3: 2.0,
        4: None,
        5: None,
        6: 5.0,
        7: 6.0,
        8: 7.0,
    }


def test_a_policy_with_an_interval_is_shown_its_metrics_in_the_step_after_alone(shown):
    seen = shown(EYE + "every = 100\n", HAND + "every = 3\n")
    assert {step: value for step, value in seen.items() if value is not None} == {4: 3.0, 7: 6.0}


def test_what_a_monitor_leaves_out_is_not_shown(shown, plugin, monkeypatch):
    observe = plugin.Eye.observe
    monkeypatch.setattr(
        plugin.Eye, "observe", lambda self, step: {} if step.index == 3 else observe(self, step)
    )
    seen = shown(EYE, HAND)
    assert [seen[step] for step in (3, 4, 5)] == [2.0, None, 4.0]


def test_what_a_policy_is_shown_survives_a_resume(shown, interrupted_at):
    restore = interrupted_at(4)
    shown(EYE, HAND)
    restore()
    assert shown(EYE, HAND)[5] == 4.0


def test_a_skipped_step_is_shown_to_monitors_with_a_method_for_it(shown, plugin, monkeypatch):
    from altgrad_core.hookspecs import SkipStep

    def skipped(self, step):
        assert not step.before
        assert step.gradients
        return {"eye/count/total": -float(step.index)}

    monkeypatch.setattr(plugin.Eye, "skipped", skipped, raising=False)
    seen = shown(EYE + "needs = ['before']\n", HAND, answers={3: SkipStep(reason="")})
    assert [seen[step] for step in (3, 4, 5)] == [2.0, -3.0, 4.0]


def test_a_step_carries_the_scales_before_it(plugin, train, monkeypatch):
    """Master weights: the scales follow in the forward pass, which comes before the step's other needs."""
    before, after = {}, {}

    def observe(self, step):
        before[step.index] = {name: scale.clone() for name, scale in step.scales_before.items()}
        after[step.index] = {
            name: one.scale.clone() for name, one in step.weights.items() if one.scale is not None
        }
        return {"eye/count/total": 0.0}

    monkeypatch.setattr(plugin.Eye, "observe", observe)
    train(EYE + "needs = ['before']\n", overrides=["optimizer.lr=0.5", "train.warmup_steps=0"])
    assert all(before[step] == after[step - 1] for step in range(2, 9))
    assert any(before[step] != after[step] for step in range(2, 9))


@pytest.mark.parametrize("storage", ["master", "grid"])
def test_a_step_carries_what_was_before_it_of_the_layers_that_are_looked_at(
    storage, plugin, train, monkeypatch
):
    before, after, places = {}, {}, set()

    def observe(self, step):
        assert set(step.before) == set(step.scales_before) == set(step.intended)
        before[step.index] = {name: value.clone() for name, value in step.before.items()}
        after[step.index] = {name: step.weights[name].value.clone() for name in step.before}
        places.add(tuple(value.data_ptr() for value in step.before.values()))
        return {"eye/count/total": 0.0}

    monkeypatch.setattr(plugin.Eye, "observe", observe)
    looked_at = EYE + "needs = ['before', 'intended']\nlayers = '.*attn.*'\n"
    train(looked_at, overrides=[f"quantize.storage={storage}"])
    assert {len(one) for one in before.values()} == {2}
    assert all(".attn." in name for one in before.values() for name in one)
    assert all(
        torch.equal(before[step][name], after[step - 1][name]) for step in range(2, 9) for name in before[2]
    )
    assert len(places) == 1


@pytest.fixture
def flips(shown, train):
    """Return a function that runs with an action in step 3, and returns by step how many codes changed."""

    def flips(action, every, *overrides):
        watching = EYE, HAND, f"[[monitor]]\nplugin = 'flip'\nevery = {every}\n"
        options = {"overrides": overrides, "out": f"every {every}"}
        shown(*watching, answers={3: action}, **options)
        found = lines(train(*watching, **options))  # as it was finished
        return {
            line["step"]: line["flip/flip_count/total"] for line in found if "flip/flip_count/total" in line
        }

    return flips


ACTIONS = {
    "adjust": AdjustScale(reason="", layers=".*mlp.*", factor=2.0**-6, of="weights"),
    "switch": SwitchFormat(reason="", layers=".*mlp.*", to="E2M1"),
}


@pytest.mark.parametrize("storage", ["master", "grid"])
@pytest.mark.parametrize("action", ACTIONS)
def test_what_an_action_does_to_a_weight_is_no_flip_of_the_step(action, storage, flips):
    still = f"quantize.storage={storage}", "optimizer.lr=0.0"
    assert set(flips(ACTIONS[action], 1, *still).values()) == {0.0}
    assert set(flips(ACTIONS[action], 3, *still).values()) == {0.0}


@pytest.mark.parametrize("storage", ["master", "grid"])
@pytest.mark.parametrize("action", ACTIONS)
def test_flips_are_the_same_whatever_steps_are_looked_at(action, storage, flips):
    every_step = flips(ACTIONS[action], 1, f"quantize.storage={storage}")
    assert flips(ACTIONS[action], 3, f"quantize.storage={storage}") == {
        step: every_step[step] for step in (3, 6)
    }
    assert every_step[3] > 0


def says(by_step):
    """Return an `observe` that reports a share per step, nothing where there is none."""

    def observe(self, step):
        found = by_step.get(step.index)
        return {"eye/count/total": 1.0} | ({} if found is None else {"eye/share/total": found})

    return observe


@pytest.mark.parametrize("last", [math.nan, None])
def test_the_summary_holds_no_value_of_what_is_not_defined_any_more(last, plugin, train, monkeypatch):
    monkeypatch.setattr(plugin.Eye, "observe", says({6: 0.5, 7: 0.5, 8: last}))
    final = train(EYE).summary["final"]
    assert ("eye/count/total" in final, "eye/share/total" in final) == (True, False)


def test_the_summary_holds_the_last_observation_however_long_ago(train):
    assert train(EYE + "every = 5\n").summary["final"]["eye/count/total"] == 5.0


def test_the_summary_holds_nothing_of_a_monitor_that_was_dropped(plugin, train, monkeypatch):
    def observe(self, step):
        return {"eye/count/total": 1.0} if step.index < 7 else 1 / 0

    monkeypatch.setattr(plugin.Eye, "observe", observe)
    assert not any("eye" in name for name in train(EYE).summary["final"])


def test_nan_of_a_weight_that_is_nan_is_no_undefined_quantity(plugin, train, monkeypatch):
    sick, sound = "transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"

    def observe(self, step):
        return dict.fromkeys([f"eye/share/{layer}" for layer in (sick, sound, "total")], math.nan)

    monkeypatch.setattr(plugin.Eye, "observe", observe)
    whole = loop._one_step

    def poisoned(run):
        if run.step == 7:
            run.optimizer.step = lambda: run.model.get_submodule(sick).weight.data.fill_(math.nan)
        whole(run)

    monkeypatch.setattr(loop, "_one_step", poisoned)
    result = train(EYE)
    assert not any(name.startswith("eye/") for name in lines(result)[-2])
    final = result.summary["final"]
    assert {name for name in final if name.startswith("eye/")} == {f"eye/share/{sick}", "eye/share/total"}


def with_a_weight_that_is_nan(run):
    run.optimizer.step = lambda: run.model.lm_head.weight.data.fill_(math.nan)


@pytest.fixture
def in_step(monkeypatch):
    """Return a function that has something done to a run in a step, before it begins."""
    whole = loop._one_step

    def in_step(index, change):
        monkeypatch.setattr(
            loop, "_one_step", lambda run: (run.step + 1 == index and change(run), whole(run))
        )

    return in_step


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_number_that_is_not_finite_costs_a_monitor_its_place(value, plugin, train, monkeypatch):
    monkeypatch.setattr(plugin.Eye, "observe", says({5: value}))
    monkeypatch.setattr(plugin.Eye, "undefined_is_nan", False)
    result = train(EYE)
    (warning,) = warnings(result)
    assert warning.startswith(
        f"eye of eye-and-hand 1.0: observe raised ValueError: the metric 'eye/share/total' is {value} in a "
        "step whose loss and gradients are finite, as all weights are"
    )
    assert warning.endswith("; the monitor is dropped, training goes on")
    assert ["eye/count/total" in line for line in lines(result)] == [False, *[True] * 4, *[False] * 4]
    losses = [[line.get("train/loss") for line in lines(one)] for one in (result, train(out="without"))]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("value", "declared"),
    [(math.nan, {"undefined_is_nan": True}), (math.inf, {"may_be_infinite": ("share",)})],
)
def test_a_monitor_may_say_that_numbers_are_not_defined_or_infinite(
    value, declared, plugin, train, monkeypatch
):
    monkeypatch.setattr(plugin.Eye, "observe", says({5: value}))
    monkeypatch.setattr(plugin.Eye, "undefined_is_nan", False)
    for name, said in declared.items():
        monkeypatch.setattr(plugin.Eye, name, said, raising=False)
    result = train(EYE)
    assert warnings(result) == []
    assert lines(result)[5].get("eye/share/total") == (math.inf if value == math.inf else None)
    assert "eye/count/total" in lines(result)[8]


def test_while_a_weight_is_not_finite_no_number_is_a_fault(plugin, train, in_step, monkeypatch):
    monkeypatch.setattr(plugin.Eye, "observe", says({5: math.nan, 6: math.inf, 7: 1.0}))
    monkeypatch.setattr(plugin.Eye, "undefined_is_nan", False)
    in_step(5, with_a_weight_that_is_nan)
    result = train(EYE)
    assert warnings(result) == []
    assert math.isnan(lines(result)[5]["eye/share/total"])
    assert [line["eye/share/total"] for line in lines(result)[6:8]] == [math.inf, 1.0]


@pytest.mark.parametrize(("sick", "undefined"), [(3, False), (4, False), (4, True)])
def test_of_a_step_whose_loss_is_not_finite_no_number_is_a_fault(sick, undefined, plugin, train, monkeypatch):
    """The step that the number is of: a loss that was NaN in another explains nothing."""
    monkeypatch.setattr(plugin.Eye, "observe", says({4: math.nan}))
    monkeypatch.setattr(plugin.Eye, "undefined_is_nan", undefined)
    whole = loop._forward_backward
    monkeypatch.setattr(
        loop, "_forward_backward", lambda run: whole(run) * (math.nan if run.step + 1 == sick else 1)
    )
    result = train(EYE, overrides=["train.log_every=4"])
    line = next(line for line in lines(result) if line["step"] == 4)
    assert ("eye/share/total" in line) == (sick == 4)
    assert bool(warnings(result)) == (sick != 4 and not undefined)


def test_the_step_of_a_number_survives_a_resume(plugin, train, monkeypatch, interrupted_at):
    monkeypatch.setattr(plugin.Eye, "observe", says({3: math.nan}))
    monkeypatch.setattr(plugin.Eye, "undefined_is_nan", False)
    whole = loop._forward_backward
    monkeypatch.setattr(
        loop, "_forward_backward", lambda run: whole(run) * (math.nan if run.step == 2 else 1)
    )
    restore = interrupted_at(3)
    seldom = {"overrides": ["train.log_every=5"]}
    train(EYE + "every = 3\n", **seldom)
    restore()
    result = train(EYE + "every = 3\n", **seldom)
    assert warnings(result) == []


def epochs(result):
    kept = ("step", "epoch/index", "epoch/train_loss", "epoch/eye/count", "epoch/eye/share")
    return [{name: line[name] for name in kept if name in line} for line in lines(result) if kept[1] in line]


def test_every_epoch_is_closed_in_the_step_that_ends_it_whatever_the_log_interval(train):
    often, seldom = (
        train(EYE, out=every, overrides=["steps=21", f"train.log_every={every}", "train.checkpoint_every=0"])
        for every in ("1", "7")
    )
    assert epochs(seldom) == epochs(often)
    assert [(one["step"], one["epoch/eye/count"]) for one in epochs(seldom)] == [
        (5, 15.0),  # 1 + 2 + .. + 5
        (10, 40.0),
        (15, 65.0),
        (20, 90.0),
    ]


def test_an_epochs_mean_loss_is_that_of_its_steps(train):
    result = train(overrides=["steps=10", "train.log_every=1"])
    losses = [line["train/loss"] for line in lines(result) if "train/loss" in line]
    assert [one["epoch/train_loss"] for one in epochs(result)] == [sum(losses[:5]) / 5, sum(losses[5:]) / 5]


def test_a_line_of_an_epoch_leaves_the_lines_around_it_as_they_are(train):
    few, many = (
        [line["train/loss"] for line in lines(train(out=tokens, overrides=options)) if "train/loss" in line]
        for tokens, options in (
            ("epochs", ["train.log_every=4"]),
            ("none", ["train.log_every=4", "train.eval_every=4"]),
        )
    )
    assert few == many


def test_a_resume_in_an_interval_repeats_the_epochs(train, interrupted_at):
    options = {"overrides": ["steps=12", "train.log_every=50"]}
    whole = train(EYE, out="whole", **options)
    for step in (4, 7):
        restore = interrupted_at(step)
        train(EYE, out=str(step), **options)
        restore()
        assert epochs(train(EYE, out=str(step), **options)) == epochs(whole)
    assert len(epochs(whole)) == 2


@pytest.mark.parametrize("every", [0, -1, 1.5, None])
def test_an_interval_that_is_none_is_refused_by_the_plugins_name(every, plugin, train, monkeypatch):
    monkeypatch.setattr(
        plugin.Eye, "every", property(lambda self: every, lambda self, value: None), raising=False
    )
    with pytest.raises(UsageError, match=rf"eye of eye-and-hand 1\.0: every is {every}; it must be a whole"):
        train(EYE)


@pytest.mark.parametrize(("kind", "table"), [("Eye", EYE), ("Hand", HAND + EYE)])
@pytest.mark.parametrize("needs", [None, "before", 3])
def test_needs_that_are_no_names_are_refused_by_the_plugins_name(
    kind, table, needs, plugin, train, monkeypatch
):
    monkeypatch.setattr(
        getattr(plugin, kind), "needs", property(lambda self: needs, lambda self, value: None), raising=False
    )
    with pytest.raises(UsageError, match=rf"{kind.lower()} of eye-and-hand 1\.0: needs is {needs!r}"):
        train(table)


def raising(self, *arguments):
    raise RuntimeError("boom")


def test_a_monitor_that_comes_not_to_know_what_it_needs_is_dropped(plugin, train, monkeypatch):
    def needs(self):
        return () if self.run is None or self.run.step < 2 else 1 // 0

    monkeypatch.setattr(plugin.Eye, "needs", property(needs, lambda self, value: None), raising=False)
    result = train(EYE)
    (warning,) = warnings(result)
    assert warning.startswith("eye of eye-and-hand 1.0: needs raised ZeroDivisionError")
    assert warning.endswith("; the monitor is dropped, training goes on")


@pytest.mark.parametrize("save", [raising, lambda self: {"kept": lambda: 0}])
def test_a_monitor_whose_state_cannot_be_saved_is_dropped(save, plugin, train, monkeypatch):
    monkeypatch.setattr(plugin.Eye, "state_dict", save, raising=False)
    result = train(EYE)
    (warning,) = warnings(result)
    assert warning.startswith("eye of eye-and-hand 1.0: state_dict raised ")
    assert "eye/count/total" in lines(result)[3]
    assert "eye/count/total" not in lines(result)[-1]


def test_a_monitor_that_cannot_take_up_its_state_is_dropped(plugin, train, monkeypatch, interrupted_at):
    monkeypatch.setattr(plugin.Eye, "state_dict", lambda self: {"a": 1}, raising=False)
    monkeypatch.setattr(plugin.Eye, "load_state_dict", raising, raising=False)
    restore = interrupted_at(4)
    train(EYE)
    restore()
    result = train(EYE)
    (warning,) = warnings(result)
    assert warning.startswith("eye of eye-and-hand 1.0: load_state_dict raised RuntimeError: boom")
    assert not any("eye" in name for name in result.summary["final"])


@pytest.mark.parametrize("method", ["state_dict", "load_state_dict"])
def test_a_policy_whose_state_fails_ends_the_run_by_its_name(
    method, plugin, train, monkeypatch, interrupted_at
):
    monkeypatch.setattr(plugin.Hand, "state_dict", lambda self: {"a": 1}, raising=False)
    monkeypatch.setattr(plugin.Hand, method, raising, raising=False)
    restore = interrupted_at(2)

    def twice():
        train(EYE, HAND)
        restore()
        train(EYE, HAND)

    with pytest.raises(PluginFailure, match=rf"hand of eye-and-hand 1\.0: {method} raised .*boom"):
        twice()


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (torch.ones(2), r"ValueError: the metric 'eye/share/total' must be one number, its shape is \(2,\)"),
        ("1", "TypeError: the metric 'eye/share/total' must be a number, it is '1'"),
        (torch.tensor(1j), "TypeError: the metric 'eye/share/total' must be a real number"),
        (torch.tensor(1.0, device="meta"), "TypeError: the metric 'eye/share/total' must be a real number"),
        (10**400, "OverflowError: int too large to convert to float"),
    ],
    ids=["shape", "text", "complex", "meta", "int"],
)
def test_what_is_no_number_costs_a_monitor_its_place(value, error, plugin, train, monkeypatch):
    monkeypatch.setattr(plugin.Eye, "observe", says({2: value}))
    (warning,) = warnings(train(EYE, overrides=["steps=3"]))
    assert re.match(rf"eye of eye-and-hand 1\.0: observe raised {error}.*; the monitor is dropped", warning)


def write_state(run):
    next(iter(run.optimizer.state.values()))["exp_avg"].zero_()


def write_scale(run):
    next(iter(run.quantizers()))[1].scale.mul_(2)


def write_gradient(run):
    next(iter(run.trained.values())).grad.zero_()


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (write_state, "the optimizer's exp_avg of transformer"),
        (write_scale, "the scale of transformer"),
        (write_gradient, "the gradient of transformer"),
    ],
)
def test_a_monitor_that_writes_to_what_trains_ends_the_run(write, what, plugin, train, monkeypatch):
    monkeypatch.setattr(plugin.Eye, "observe", lambda self, step: write(self.run) or {})
    with pytest.raises(PluginFailure, match=rf"eye of eye-and-hand 1\.0 wrote to {what}.*clone first"):
        train(EYE)


def test_a_scale_that_is_given_back_has_not_been_written(plugin, train, monkeypatch):
    def observe(self, step):
        scale = next(iter(self.run.quantizers()))[1].scale
        scale.mul_(2).mul_(0.5)
        return {"eye/count/total": 1.0}

    monkeypatch.setattr(plugin.Eye, "observe", observe)
    assert train(EYE).summary["final"]["eye/count/total"] == 1.0


@pytest.mark.parametrize(("part", "method"), [("Eye", "observe"), ("Hand", "decide")])
def test_monitors_and_policies_draw_from_no_stream_of_the_training(part, method, plugin, train, monkeypatch):
    quiet = checkpoint.newest(train(EYE + HAND, out="quiet").folder / "checkpoints")[0].state["random"]
    kept = getattr(getattr(plugin, part), method)

    def drawing(self, *arguments):
        random.random(), numpy.random.rand(), torch.rand(())
        return kept(self, *arguments)

    monkeypatch.setattr(getattr(plugin, part), method, drawing)
    loud = checkpoint.newest(train(EYE + HAND, out="loud").folder / "checkpoints")[0].state["random"]
    assert quiet["python"] == loud["python"]
    assert torch.equal(quiet["numpy"][1], loud["numpy"][1])
    assert quiet["numpy"][2] == loud["numpy"][2]
    assert torch.equal(quiet["torch"], loud["torch"])


def test_a_monitor_without_anything_to_report_is_warned_of_once(plugin, train, monkeypatch, interrupted_at):
    monkeypatch.setattr(plugin.Eye, "observe", lambda self, step: {})
    restore = interrupted_at(4)
    train(EYE + "layers = 'lm_head'\n")
    restore()
    (warning,) = warnings(train(EYE + "layers = 'lm_head'\n"))
    assert warning.startswith("nothing to report: eye (layers = 'lm_head'); no layer that matches has")


def test_no_monitor_is_warned_of_that_falls_silent_later(plugin, train, monkeypatch):
    monkeypatch.setattr(
        plugin.Eye, "observe", lambda self, step: {"eye/count/total": 1.0} if step.index == 1 else {}
    )
    assert warnings(train(EYE)) == []


def test_what_the_core_keeps_for_monitors_is_on_their_account(train, monkeypatch):
    charged = []
    whole = loop.observe_after

    def looked(run, due, *arguments):
        charged.append({watched.name: watched.seconds for watched in run.monitors})
        whole(run, due, *arguments)

    monkeypatch.setattr(loop, "observe_after", looked)
    monkeypatch.setattr(loop, "keep_scales", lambda run, due: None)  # which has an account of its own
    train(EYE, *(f"[[monitor]]\nplugin = '{name}'\nevery = 1\n" for name in ("ulp", "stiffness")))
    assert all(one["eye"] == 0 < one["ulp"] == one["stiffness"] for one in charged)
