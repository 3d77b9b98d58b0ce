"""The monitor `range` in real runs: what it sees where gradients overflow, and that it leaves no trace."""

import pytest

from altgrad_core.record import read_lines

TINY = """
name = "tiny"
seed = 7
steps = 8

[data]
plugin = "markov"
tokens = 4000

[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
dropout = 0.2

[train]
batch_size = 2
gradient_accumulation = 2
device = "cpu"
warmup_steps = 2
eval_every = 4
eval_batches = 2
log_every = 2
checkpoint_every = 4
"""
FLOWS = """
[quantize.activations]
format = "E4M3"
amax_history = 3
[quantize.gradients]
format = "E5M2"
rounding = "stochastic"
"""
GRID = "[quantize]\nformat = 'E4M3'\nstorage = 'grid'\nstorage_rounding = 'stochastic'\nbound = 2.0\n"
ARMS = {
    "master": "[quantize]\nformat = 'E4M3'\n" + FLOWS,
    "grid": GRID + FLOWS + "[optimizer]\nplugin = 'AdamW'\nlr = 1e-2\n",
    "feedback": GRID.replace("stochastic", "error_feedback") + "[optimizer]\nplugin = 'AdamW'\nlr = 1e-2\n",
    "rungs": GRID + "[optimizer]\nplugin = 'GridOptim'\nstep_scale = 6.0\n",
}
RANGE = "[[monitor]]\nplugin = 'range'\nevery = {}\n"


def ranges(result):
    lines = read_lines(result.folder / "metrics.jsonl")
    return [{name: one for name, one in line.items() if name.startswith("range/")} for line in lines]


def state(saved):
    return [saved.state[key] for key in ("optimizer", "storage", "scales", "flows", "random")]


@pytest.mark.parametrize("arm", ARMS)
def test_counting_leaves_the_training_as_it_is_bit_for_bit(arm, last_checkpoint, run_text, same_tree):
    plain, watched = (
        run_text(TINY + ARMS[arm], "plain"),
        run_text(TINY + ARMS[arm] + RANGE.format(1), "watched"),
    )
    assert len(ranges(watched)[-1]) > 50
    assert same_tree(last_checkpoint(plain).model, last_checkpoint(watched).model)
    assert same_tree(state(last_checkpoint(plain)), state(last_checkpoint(watched)))


@pytest.mark.parametrize("arm", ["master", "rungs"])
def test_a_run_that_was_interrupted_counts_and_averages_as_one_in_one_go(
    arm, interrupted_at, last_checkpoint, run_text, same_tree
):
    text = TINY + ARMS[arm] + RANGE.format(3)
    whole = run_text(text, "whole")
    undo = interrupted_at(5)  # between two observations
    assert run_text(text, "parts").outcome == "interrupted"
    undo()
    parts = run_text(text, "parts")
    assert "range/amax_ema_weights/total" in ranges(parts)[3]
    assert ranges(whole) == ranges(parts)
    assert same_tree(last_checkpoint(whole).state["plugins"], last_checkpoint(parts).state["plugins"])


def test_gradients_overflow_under_a_scale_that_is_too_large_for_them(run_text):
    static = "scale_mode = 'static'\namax = 1e-7\n"
    result = run_text(TINY + ARMS["master"] + static + RANGE.format(1), "static")
    for line in ranges(result)[1:]:
        # all that dropout leaves of what comes from the residual stream; further back it is small already
        assert 0.75 < line["range/saturated_gradients/transformer.h.0.mlp.c_proj"] < 0.85
        assert line["range/saturated_gradients/total"] > 0.1
        assert line["range/backward_overflow_fraction/total"] == line["range/saturated_gradients/total"]
        assert line["range/forward_overflow_count/total"] == 0


def test_nothing_overflows_in_a_healthy_run(run_text):
    fresh = (
        TINY + "[quantize]\nformat = 'E4M3'\n" + FLOWS.replace("amax_history = 3", "scale_mode = 'current'")
    )
    fresh += "scale_mode = 'current'\n"
    for line in ranges(run_text(fresh + RANGE.format(1), "healthy"))[1:]:
        assert line["range/saturated_gradients/total"] == 0
        assert line["range/forward_overflow_count/total"] == 0
        assert (
            line["range/forward_nonfinite_count/total"] == line["range/backward_nonfinite_count/total"] == 0
        )


def test_the_observed_steps_alone_are_reported(run_text):
    lines = ranges(run_text(TINY + ARMS["master"] + RANGE.format(4), "rare", "train.log_every=1"))
    assert [bool(line) for line in lines] == [step % 4 == 0 and step > 0 for step in range(9)]


def test_weights_at_their_bound_are_counted_where_they_land(run_text):
    fast = ARMS["grid"].replace("1e-2", "1e-1")
    line = ranges(run_text(TINY + fast + RANGE.format(1), "bound"))[-1]
    assert line["range/optimizer_overflow_fraction/total"] > 0.1
    assert line["range/saturated_weights/total"] == line["range/optimizer_overflow_fraction/total"]
