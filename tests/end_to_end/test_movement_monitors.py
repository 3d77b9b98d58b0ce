"""`ulp`, `position` and `oscillation` in real runs: what they report, also after a resume."""

import math

import pytest
import torch

from altgrad_core.record import read_lines
from altgrad_core.registry import UsageError

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
eval_every = 6
eval_batches = 2
log_every = 3
checkpoint_every = 4
keep_checkpoints = 5
[quantize]
format = "E4M3"
storage = "grid"
storage_rounding = "stochastic"
bound = 4.0
[[monitor]]
plugin = "ulp"
every = 3
[[monitor]]
plugin = "oscillation"
"""
COUNTING = "[optimizer]\nplugin = 'ManifoldAdamW'\nlr = 1e-2\ntrack_position = true\n"
POSITION = "[[monitor]]\nplugin = 'position'\nevery = 3\n"
RUNGS = "[optimizer]\nplugin = 'GridOptim'\nnormalize = 'adam'\nstep_scale = 0.3\n"


def reported(result):
    """Return what the three monitors reported, by line."""
    return [
        {
            name: value
            for name, value in line.items()
            if name.startswith(("ulp/", "position/", "oscillation/"))
        }
        for line in read_lines(result.folder / "metrics.jsonl")
    ]


def test_a_run_reports_how_its_weights_move(run_text):
    result = run_text(TINY + COUNTING + POSITION, "runs")
    last = reported(result)[-1]
    assert all(math.isfinite(value) for value in last.values())
    total = {name.removesuffix("/total"): value for name, value in last.items() if name.endswith("/total")}
    assert len(total) == 9 + 8 + 1
    assert 0 < total["ulp/zero_fraction"] < 1 <= total["ulp/max"]
    assert total["position/min"] < 0 < total["position/max"]
    assert total["position/rung_max"] <= 126 < total["position/rung_max"] - total["position/rung_min"]
    assert 0 <= total["oscillation/fraction"] <= 1
    assert not [line for line in read_lines(result.folder / "events.jsonl") if "dropped" in str(line)]


@pytest.mark.parametrize("optimizer", [RUNGS, COUNTING.replace("true", "false")])
def test_positions_that_nobody_counts_are_refused_with_the_way_out(optimizer, run_text):
    with pytest.raises(UsageError, match="track_position = true"):
        run_text(TINY + optimizer + POSITION, "runs")


def test_updates_in_rungs_are_measured_too(run_text):
    last = reported(run_text(TINY + RUNGS, "runs"))[-1]
    assert last["ulp/max/total"] <= 2, "0.3 rungs are asked for, and rounded stochastically"
    assert last["ulp/rounding_noise/total"] > 0


def test_a_resumed_run_reports_what_an_uninterrupted_one_does(interrupted_at, last_checkpoint, run_text):
    text = TINY + COUNTING + POSITION
    whole = run_text(text, "whole")
    undo = interrupted_at(7)
    assert run_text(text, "parts").outcome == "interrupted"
    undo()
    parts = run_text(text, "parts")
    assert reported(whole) == reported(parts)
    one, other = (last_checkpoint(result).state for result in (whole, parts))
    for place, state in one["optimizer"]["state"].items():
        if "position" in state:
            assert torch.equal(state["position"], other["optimizer"]["state"][place]["position"])
    kept = one["plugins"]["oscillation"]
    assert kept.keys() == other["plugins"]["oscillation"].keys()
    for name, history in kept.items():
        for key in ("frequency", "direction"):
            assert torch.equal(history[key], other["plugins"]["oscillation"][name][key])
