"""The monitors of weights and gradients in real runs: what they show, that they disturb nothing, resume."""

import math
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import altgrad_core as altgrad
from altgrad_core import loop
from altgrad_core.hookspecs import Step, Weight
from altgrad_core.registry import UsageError, discover

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
eval_every = 12
eval_batches = 2
log_every = 3
checkpoint_every = 6
keep_checkpoints = 5
"""

ARMS = {
    "grid": "[quantize]\nformat='E4M3'\nstorage='grid'\nstorage_rounding='stochastic'\n"
    "[optimizer]\nplugin='AdamW'\nlr=1e-2\n",
    "master": "[quantize]\nformat='E3M4'\n[optimizer]\nplugin='ManifoldAdamW'\nlr=1e-2\n",
    "channels": "[quantize]\nformat='E5M2'\ngranularity='channel'\n[optimizer]\nplugin='AdamW'\n",
    "rungs": "[quantize]\nformat='E5M2'\nstorage='grid'\nstorage_rounding='stochastic'\n"
    "[optimizer]\nplugin='GridOptim'\nnormalize='adam'\nstep_scale=0.3\n",
}
NAMES = ("rank", "gradient", "stiffness", "alignment")
WATCHED = "".join(f"[[monitor]]\nplugin='{name}'\nevery=3\n" for name in NAMES)
WATCHED = WATCHED.replace("'rank'\n", "'rank'\nwarmup=3\n").replace("'gradient'\n", "'gradient'\nwindow=2\n")


EVERYTHING = ("flip", "stall", "descent", "range", "ulp", "oscillation", "magnitude")
EXTRA_PASSES = ("fidelity", "fisher", "kurtosis", "attention_entropy")


@pytest.mark.parametrize("arm", ["grid", "master", "rungs"])
def test_where_a_gradient_is_nan_every_monitor_stays_and_shows_it(
    arm, lines, run_text, warnings, monkeypatch
):
    whole = loop._forward_backward

    def poisoned(run):
        loss = whole(run)
        if run.step == 5:
            run.trained["transformer.h.0.mlp.c_fc.weight"].grad[0, 0] = float("nan")
        return loss

    monkeypatch.setattr(loop, "_forward_backward", poisoned)
    others = "".join(f"[[monitor]]\nplugin='{name}'\nevery=3\n" for name in (*EVERYTHING, *EXTRA_PASSES))
    result = run_text(TINY + ARMS[arm] + WATCHED + others)
    assert warnings(result.folder) == []
    before, after = lines(result.folder)[1:3]
    for name in ("gradient/l2", "gradient/snr", "rank/stable_rank", "rank/warning", "descent/quality"):
        shown = f"{name}/transformer.h.0.mlp.c_fc"
        assert math.isfinite(before[shown])
        assert math.isnan(after[shown])
    assert {name.partition("/")[0] for name in after} >= {*NAMES, *EVERYTHING, *EXTRA_PASSES}


@pytest.mark.parametrize("arm", ARMS)
def test_the_monitors_report_on_every_kind_of_storage(arm, lines, run_text, warnings):
    result = run_text(TINY + ARMS[arm] + WATCHED)
    line = lines(result.folder)[-1]
    assert warnings(result.folder) == []
    assert {name.partition("/")[0] for name in line} >= set(NAMES)
    assert line["rank/warning/lm_head"] == 0
    assert not any("wte" in name for name in line)
    assert 1 <= line["rank/stable_rank/total"] <= line["rank/effective_rank/total"] <= 16
    assert line["gradient/l2/total"] == pytest.approx(min(1.0, line["train/gradient_norm"]), rel=1e-4)
    assert 0 <= line["gradient/dead_fraction/total"] < 1
    assert line["stiffness/log2_p05/total"] <= line["stiffness/log2_p95/total"] < 0
    assert -1 <= line["stiffness/correlation/total"] <= 1
    assert 0 < line["alignment/code_utilization/total"] < 1


def test_weights_on_the_grid_are_there_and_masters_are_half_a_gap_away_at_most(lines, run_text):
    stored, master = (
        lines(run_text(TINY + ARMS[arm] + WATCHED, arm).folder)[-1] for arm in ("grid", "master")
    )
    assert stored["alignment/on_grid_fraction/total"] == 1
    assert stored["alignment/distance_max/total"] == 0
    assert master["alignment/on_grid_fraction/total"] < 0.5
    assert 0.4 < master["alignment/distance_max/total"] <= 0.5
    assert stored["gradient/zero_update_fraction/total"] > master["gradient/zero_update_fraction/total"]


@pytest.mark.parametrize("arm", ["grid", "rungs"])
def test_the_monitors_leave_the_run_as_it_is(arm, last_checkpoint, run_text, same_tree):
    one, other = (
        last_checkpoint(run_text(TINY + ARMS[arm] + more, str(len(more)))) for more in ("", WATCHED)
    )
    assert same_tree(one.model, other.model)
    for key in ("optimizer", "storage", "random", "scales"):
        assert same_tree(one.state[key], other.state[key])


@pytest.mark.parametrize("arm", ["grid", "rungs"])
def test_a_resumed_run_shows_the_same_metrics_bit_for_bit(
    arm, run, monkeypatch, last_checkpoint, lines, run_text, same_tree
):
    text = TINY + ARMS[arm] + WATCHED
    whole = run_text(text, "whole")
    step = loop._one_step

    def stopping(run):
        step(run)
        run.outcome = "interrupted" if run.step == 7 else run.outcome

    monkeypatch.setattr(loop, "_one_step", stopping)
    assert run_text(text, "parts").outcome == "interrupted"
    monkeypatch.setattr(loop, "_one_step", step)
    parts = run_text(text, "parts")
    assert same_tree(last_checkpoint(whole).state["plugins"], last_checkpoint(parts).state["plugins"])
    last = [lines(one.folder)[-1] for one in (whole, parts)]
    assert last[0].keys() == last[1].keys()
    assert same_tree(*last)


def test_a_run_against_itself_as_the_baseline_does_not_warn(lines, run_text, warnings):
    first = run_text(TINY + ARMS["grid"] + WATCHED, "first")
    against = WATCHED.replace("warmup=3\n", f"baseline='{first.folder}'\n")
    second = run_text(TINY + ARMS["grid"] + against, "second")
    assert warnings(second.folder) == []
    assert [line.get("rank/warning/total") for line in lines(second.folder)] == [None, 0, 0, 0, 0]


def test_a_baseline_that_is_no_run_ends_it_before_it_begins(run_text):
    wrong = WATCHED.replace("warmup=3\n", "baseline='nowhere'\n")
    with pytest.raises(UsageError, match=r"baseline 'nowhere' is no run: it has no metrics\.jsonl"):
        run_text(TINY + ARMS["grid"] + wrong)


class HostReads(TorchDispatchMode):
    """Counts numbers read from tensors."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_observing_reads_nothing_from_the_device(name):
    format, scale = altgrad.get_format("E4M3"), torch.tensor(64.0)
    values = format.fake_quantize(torch.randn(12, 8, generator=torch.Generator().manual_seed(1)), scale)
    step = Step(
        index=100,
        loss=torch.tensor(1.0),
        weights={"h.weight": Weight(value=values, layer="h", format=format, scale=scale)},
        gradients={"h.weight": torch.ones(12, 8)},
        before={"h.weight": values.clone()},
        intended={},
    )
    registry = discover()
    found = registry.find("monitor", name)
    monitor = found.build(found.component.options())
    if hasattr(monitor, "start"):
        monitor.start(types.SimpleNamespace(registry=registry))
    monitor.observe(step)  # facts of a format are looked up once
    with torch.no_grad(), HostReads() as reads:
        assert monitor.observe(step)
    assert reads.count == 0
