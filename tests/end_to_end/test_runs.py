"""Real runs with everything installed: resume, purity, policies, grids, and what is left in the folder."""

import json
import math
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core import checkpoint
from altgrad_core.format import Format
from altgrad_core.layer_recipes import refuse_inexact
from altgrad_core.recipe import Recipe
from altgrad_core.record import RunFolder, read_lines
from altgrad_core.registry import UsageError

TINY = """
name = "tiny"
seed = 7
steps = 12

[data]
plugin = "markov"
tokens = 4000

[model]
n_layer = 2
n_head = 2
n_embd = 16
block_size = 16
dropout = 0.2

[train]
batch_size = 4
device = "cpu"
warmup_steps = 2
eval_every = 4
eval_batches = 2
log_every = 3
checkpoint_every = 4
keep_checkpoints = 5
"""

STORED = """
[quantize]
format = "E4M3"
storage = "grid"
storage_rounding = "stochastic"
bound = 4.0
"""

FLOWS = """
[quantize.activations]
format = "E4M3"
amax_history = 3
[quantize.gradients]
format = "E5M2"
rounding = "stochastic"
"""

ADAMW = "[optimizer]\nplugin = 'AdamW'\nlr = 1e-2\n"

ARMS = {
    "unquantized": "[optimizer]\nplugin = 'AdamW'\n",
    "master": "[quantize]\nformat = 'E4M3'\n[optimizer]\nplugin = 'ManifoldAdamW'\n",
    "grid": STORED + "[optimizer]\nplugin = 'ManifoldAdamW'\nlr = 1e-2\n",
    "feedback": STORED.replace("stochastic", "error_feedback") + ADAMW,
    "eco": STORED.replace("stochastic", "eco") + ADAMW,
    "rungs": STORED + "[optimizer]\nplugin = 'GridOptim'\nnormalize = 'adam'\nstep_scale = 0.3\n",
    "flows": "[quantize]\nformat = 'E4M3'\n" + FLOWS,
    "grid_and_flows": STORED + FLOWS,
    "rungs_on_master": "[quantize]\nformat = 'E4M3'\n[optimizer]\nplugin = 'GridOptim'\nstep_scale = 6.0\n",
}
WATCHED = "[[monitor]]\nplugin='flip'\n[[monitor]]\nplugin='stall'\n[[monitor]]\nplugin='descent'\n"
GUARDED = "[[fallback]]\nplugin='nan_guard'\nnan_patience=3\n"


@pytest.mark.parametrize("arm", ARMS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    arm, write, tmp_path, last_checkpoint, lines, run, same_tree, without_clocks, interrupted_at
):
    accumulating = TINY.replace("batch_size = 4", "batch_size = 2\ngradient_accumulation = 2")
    path = write(accumulating + ARMS[arm] + WATCHED + GUARDED)
    whole = run(path, tmp_path / "whole")
    restore = interrupted_at(7)
    assert run(path, tmp_path / "parts").outcome == "interrupted"
    restore()
    parts = run(path, tmp_path / "parts")
    one, other = last_checkpoint(whole), last_checkpoint(parts)
    assert same_tree(one.model, other.model)
    assert same_tree(without_clocks(one.state), without_clocks(other.state))
    assert same_tree(lines(whole.folder), lines(parts.folder))


def test_monitors_evaluation_and_logging_leave_the_trajectory_alone(
    write, tmp_path, last_checkpoint, run, same_tree
):
    plain = run(write(TINY + ARMS["grid"]), tmp_path / "plain")
    watched = run(
        write(TINY + ARMS["grid"] + WATCHED, "watched.toml"),
        tmp_path / "watched",
        "train.eval_every=1",
        "train.log_every=1",
        "train.checkpoint_every=1",
    )
    assert same_tree(last_checkpoint(plain).model, last_checkpoint(watched).model)


def test_amax_histories_advance_once_a_step_and_not_in_evaluation(write, tmp_path, last_checkpoint, run):
    text = TINY.replace("batch_size = 4", "batch_size = 2\ngradient_accumulation = 2") + ARMS["flows"]
    saved = last_checkpoint(
        run(write(text), tmp_path / "runs", "steps=2", "quantize.gradients.amax_history=3")
    )
    flows = saved.state["flows"]
    assert len(flows) == 16
    assert {int((flow["history"] > 0).sum()) for flow in flows.values()} == {2}
    counters = {name.rpartition(".")[2]: int(flow["counter"]) for name, flow in flows.items()}
    assert counters == {"activations": 0, "gradients": 4}  # one draw for each of two micro-batches


def test_logging_and_evaluation_leave_flows_alone(write, tmp_path, last_checkpoint, run, same_tree):
    plain = run(write(TINY + ARMS["flows"]), tmp_path / "plain")
    watched = run(
        write(TINY + ARMS["flows"], "w.toml"), tmp_path / "w", "train.eval_every=1", "train.log_every=1"
    )
    one, other = last_checkpoint(plain), last_checkpoint(watched)
    assert same_tree(one.model, other.model)
    assert same_tree(one.state["flows"], other.state["flows"])


@pytest.mark.parametrize("name", ["mxfp8", "nvfp4"])
def test_the_microscaling_experiments_learn_within_a_few_steps(name, tmp_path, run):
    path = pathlib.Path(__file__).parents[2] / "experiments" / f"{name}.toml"
    small = [
        "model.n_layer=1",
        "model.n_embd=32",
        "model.n_head=2",
        "train.warmup_steps=0",
        "train.eval_batches=2",
    ]
    summary = run(path, tmp_path, "steps=12", "train.device=cpu", "train.eval_every=4", *small).summary
    assert summary["final"]["validation/loss"] < 5.2  # from log(256) = 5.55


def test_the_residuals_of_error_feedback_are_in_the_checkpoint_as_codes(
    write, tmp_path, last_checkpoint, run
):
    saved = last_checkpoint(run(write(TINY + ARMS["feedback"]), tmp_path / "runs", "steps=2"))
    assert {one.dtype for one in saved.state["storage"]["residuals"]["stored"]} == {torch.uint8}


@pytest.mark.parametrize("format", ["E4M3", "E0M7", "E7M0"])
@pytest.mark.parametrize("optimizer", ["AdamW", "ManifoldAdamW"])
def test_error_feedback_in_float32_is_the_run_on_masters_bit_for_bit(
    write, tmp_path, format, optimizer, last_checkpoint, lines, run
):
    base = f"{TINY}\n[optimizer]\nplugin='{optimizer}'\nlr=1e-2\n[quantize]\nformat='{format}'\n"
    base += "scale_mode='initial'\n"
    stored = "storage='grid'\nstorage_rounding='error_feedback'\nresidual_format='FP32'\n"
    master = run(write(base, "master.toml"), tmp_path / "master")
    grid = run(write(base + stored, "grid.toml"), tmp_path / "grid")
    losses = [[line.get("validation/loss") for line in lines(one.folder)] for one in (master, grid)]
    assert losses[0] == losses[1]
    one, other = last_checkpoint(master), last_checkpoint(grid)
    for name, scale in one.state["scales"].items():
        rounded = altgrad.get_format(format).fake_quantize(one.model[name], scale)
        assert torch.equal(rounded, other.model[name])


@pytest.mark.parametrize("rounding", ["error_feedback", "eco"])
def test_a_rounding_that_an_optimizer_of_rungs_does_not_know_is_refused_at_its_line(write, rounding):
    text = ARMS["rungs"].replace("stochastic", rounding)
    with pytest.raises(
        UsageError, match=rf'toml:5: quantize.storage_rounding: "{rounding}" does not go with'
    ):
        altgrad.load_experiment(write("name = 'e'" + text))


def test_a_rule_onto_the_grid_is_storage_on_the_grid_with_a_rule_off_it(
    write, tmp_path, last_checkpoint, run, same_tree
):
    """Adaptive scales included: at this rate they move."""
    rule = "[[quantize.rule]]\nlayers = '.*{}.*'\nstorage = '{}'\n"
    top = STORED.replace("bound = 4.0\n", "")
    onto = top.replace('storage = "grid"\n', "") + rule.format("mlp", "grid")
    off = top + rule.format("attn", "master")
    fast = ADAMW.replace("1e-2", "1e-1")
    one, other = (
        last_checkpoint(run(write(TINY + text + fast, f"{n}.toml"), tmp_path / str(n)))
        for n, text in enumerate((onto, off))
    )
    assert same_tree(one.model, other.model)
    assert one.state["storage"]["scales"]["rescales"].sum() > 0


def test_a_format_of_a_third_party_that_bfloat16_does_not_hold_says_which_key_to_change():
    fine = Recipe(format=Format(name="FINE", bits=3, values=[0.0, 1.0, 1 + 2.0**-8]))
    with pytest.raises(UsageError, match=r'FINE does not survive bfloat16 .*; set train.dtype = "float32"'):
        refuse_inexact(fine)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("scale_rule = 'exact'", 'E4M3 under scale_rule = "exact" has scales that are no powers of two'),
        ("granularity = 'block'\nblock_scale = 'E4M3'", "E4M3 under block_scale has scales"),
        ("[quantize.activations]\nformat = 'E4M11'", "E4M11 does not survive bfloat16 autocast"),
        ("[quantize.gradients]\nformat = 'E5M2'\nscale_rule = 'exact'", "E5M2 under scale_rule"),
    ],
)
def test_what_bfloat16_makes_inexact_is_refused_with_the_way_out(options, reason, write, tmp_path, run):
    text = TINY + f"[quantize]\nformat = 'E4M3'\n{options}\n"
    with pytest.raises(UsageError, match=f'{reason}.*train.dtype = "float32"'):
        run(write(text), tmp_path / "runs", "train.dtype=bf16")


def test_activations_and_gradients_train_under_bfloat16(write, tmp_path, run):
    result = run(write(TINY + ARMS["flows"]), tmp_path / "runs", "train.dtype=bf16")
    assert math.isfinite(result.summary["final"]["validation/loss"])


def test_an_adaptive_scale_may_be_asked_for_by_name(write, tmp_path, last_checkpoint, run, same_tree):
    text = TINY + STORED
    found = [
        last_checkpoint(run(write(body, f"{n}.toml"), tmp_path / str(n))).model
        for n, body in enumerate((text, text + "scale_mode = 'adaptive'\n"))
    ]
    assert same_tree(*found)


@pytest.mark.parametrize("arm", ["rungs", "feedback", "eco"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_every_grid_weight_of_the_checkpoint_is_on_the_grid(
    write, tmp_path, arm, steps, last_checkpoint, run
):
    saved = last_checkpoint(run(write(TINY + ARMS[arm]), tmp_path / "runs", f"steps={steps}"))
    e4m3 = altgrad.get_format("E4M3")
    assert len(saved.state["scales"]) == 8
    for name, scale in saved.state["scales"].items():
        scaled = saved.model[name] * scale
        assert torch.equal(e4m3.quantize(scaled), scaled)


def test_the_model_file_loads_strictly_into_a_plain_model(write, tmp_path, last_checkpoint, run):
    from altgrad_core.model import GPT
    from altgrad_core.model_options import ModelOptions

    saved = last_checkpoint(run(write(TINY + ARMS["grid"]), tmp_path / "runs"))
    options = ModelOptions(n_layer=2, n_head=2, n_embd=16, block_size=16)
    vocabulary = saved.model["lm_head.weight"].shape[0]
    GPT(options, vocabulary, torch.Generator()).load_state_dict(saved.model, strict=True)


def test_fp32_everywhere_equals_the_unquantized_run(write, tmp_path, last_checkpoint, run, same_tree):
    one = run(write(TINY + ARMS["unquantized"]), tmp_path / "one")
    named = TINY + ARMS["unquantized"] + "[quantize]\nformat='FP32'\nstorage='grid'\n"
    other = run(write(named, "other.toml"), tmp_path / "other")
    assert same_tree(last_checkpoint(one).model, last_checkpoint(other).model)


def test_a_finished_run_is_not_run_again(write, tmp_path, run):
    path = write(TINY + ARMS["unquantized"])
    first = run(path, tmp_path / "runs")
    lines = (first.folder / "metrics.jsonl").read_text()
    assert run(path, tmp_path / "runs").outcome == "skipped"
    assert (first.folder / "metrics.jsonl").read_text() == lines


def test_an_edited_file_is_refused_and_the_difference_named(write, tmp_path, run):
    path = write(TINY + ARMS["unquantized"])
    run(path, tmp_path / "runs")
    with pytest.raises(UsageError, match=r"train\.batch_size: 4 -> 5.*--out"):
        run(path, tmp_path / "runs", "train.batch_size=5")


def test_a_folder_in_use_is_refused_and_says_by_whom(write, tmp_path, run):
    held = RunFolder(tmp_path / "runs" / "tiny" / "run")
    with pytest.raises(UsageError, match="is being run by process"):
        run(write(TINY + ARMS["unquantized"]), tmp_path / "runs")
    held.close()


def test_an_unwritable_folder_is_refused_in_one_line(write, tmp_path, run):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written") as caught:
        run(write(TINY + ARMS["unquantized"]), tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(
    write, tmp_path, last_checkpoint, run, same_tree, interrupted_at
):
    path = write(TINY + ARMS["grid"])
    whole = run(path, tmp_path / "whole")
    restore = interrupted_at(9)
    parts = run(path, tmp_path / "parts")
    restore()
    damaged = parts.folder / "checkpoints" / checkpoint.step_name(9) / checkpoint.MODEL
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    again = run(path, tmp_path / "parts")
    assert same_tree(last_checkpoint(whole).model, last_checkpoint(again).model)
    warnings = [line for line in read_lines(again.folder / "events.jsonl") if line["event"] == "warning"]
    assert any("damaged" in line["message"] for line in warnings)


def test_no_metrics_line_is_written_twice_after_a_resume(write, tmp_path, run, interrupted_at):
    path = write(TINY + ARMS["grid"])
    restore = interrupted_at(7)
    run(path, tmp_path / "runs")
    restore()
    result = run(path, tmp_path / "runs")
    steps = [line["step"] for line in read_lines(result.folder / "metrics.jsonl")]
    assert steps == sorted(set(steps))
    assert steps[-1] == 12


def test_nan_guard_stops_a_diverged_run_and_keeps_the_last_finite_state(write, tmp_path, run):
    text = TINY + ARMS["unquantized"] + "lr = 1e30\n" + GUARDED
    result = run(write(text), tmp_path / "runs", "steps=30", "train.grad_clip=0.0")
    assert result.outcome == "stopped"
    events = list(read_lines(result.folder / "events.jsonl"))
    actions = [line["action"] for line in events if line["event"] == "policy"]
    assert actions == ["SkipStep", "SkipStep", "Stop"]
    kept = checkpoint.load(result.folder / "checkpoints" / checkpoint.LAST_FINITE)
    assert all(torch.isfinite(tensor).all() for tensor in kept.model.values())


def test_nan_guard_leaves_a_healthy_run_alone(write, tmp_path, last_checkpoint, run, same_tree):
    guarded = run(write(TINY + ARMS["grid"] + GUARDED), tmp_path / "guarded")
    assert not [line for line in read_lines(guarded.folder / "events.jsonl") if line["event"] == "policy"]
    plain = run(write(TINY + ARMS["grid"], "plain.toml"), tmp_path / "plain")
    assert same_tree(last_checkpoint(guarded).model, last_checkpoint(plain).model)


def test_without_a_guard_nan_stays_visible(write, tmp_path, run):
    result = run(write(TINY + ARMS["unquantized"] + "lr = 1e30\n"), tmp_path / "runs", "train.grad_clip=0.0")
    assert result.outcome == "finished"
    assert math.isnan(result.summary["final"]["validation/loss"])


def test_more_steps_for_a_finished_run_are_refused_with_a_way_out_that_works(
    write, tmp_path, last_checkpoint, run, same_tree
):
    path = write(TINY + ARMS["unquantized"])
    first = run(path, tmp_path / "runs")
    with pytest.raises(UsageError) as refused:
        run(path, tmp_path / "runs", "steps=14")
    found = re.search(r"steps: 12 -> 14; use --out .*, where (init_from = \".*\") starts", str(refused.value))
    more = run(path, tmp_path / "more", "steps=14", found[1].replace(" = ", "="))
    assert more.outcome == "finished"
    assert not same_tree(last_checkpoint(more).model, last_checkpoint(first).model)


def test_the_frozen_linears_do_not_move(write, tmp_path, last_checkpoint, run):
    path = write(TINY + ARMS["unquantized"])
    frozen = run(path, tmp_path / "frozen", "train.freeze=['.*(attn|mlp).*']")
    start = run(path, tmp_path / "start", "steps=1", "optimizer.lr=0.0", "optimizer.weight_decay=0.0")
    one, other = last_checkpoint(frozen).model, last_checkpoint(start).model
    moved = {name for name in one if not torch.equal(one[name], other[name])}
    assert moved == {name for name in one if "attn" not in name and "mlp" not in name}


def test_gradient_accumulation_sees_the_batches_and_averages_them(write, tmp_path, run):
    path = write(TINY.replace("dropout = 0.2", "") + ARMS["unquantized"])
    result = run(path, tmp_path / "runs", "train.gradient_accumulation=3")
    assert result.summary["tokens"] == 12 * 3 * 4 * 16


def test_a_policy_whose_metric_nobody_provides_is_refused_with_the_way_out(write, tmp_path, monkeypatch, run):
    from altgrad_policies.nan_guard import NanGuard

    monkeypatch.setattr(NanGuard, "needs", ("stall/stall_ratio/total",))
    with pytest.raises(UsageError, match=r"'nan_guard' needs .*\[\[monitor\]\] plugin = 'stall'"):
        run(write(TINY + ARMS["grid"] + GUARDED), tmp_path / "runs")


def test_a_policy_sees_its_metric_of_the_step_before_in_every_step(write, tmp_path, monkeypatch, run):
    from altgrad_policies.nan_guard import NanGuard

    seen = []

    def decide(self, step, metrics):
        seen.append((step, "stall/stall_ratio/total" in metrics))

    monkeypatch.setattr(NanGuard, "needs", ("stall/stall_ratio/total",))
    monkeypatch.setattr(NanGuard, "decide", decide)
    text = TINY + ARMS["grid"] + "[[monitor]]\nplugin='stall'\nevery=5\n" + GUARDED
    run(write(text), tmp_path / "runs")
    assert seen == [(1, False)] + [(step, True) for step in range(2, 13)]


def test_a_policy_that_raises_ends_the_run_and_is_named(write, tmp_path, monkeypatch, run):
    from altgrad_policies.nan_guard import NanGuard

    monkeypatch.setattr(NanGuard, "decide", lambda self, step, metrics: 1 / 0)
    from altgrad_core.watched import PluginFailure

    with pytest.raises(PluginFailure, match=r"nan_guard of altgrad-policies .*: decide raised Zero"):
        run(write(TINY + ARMS["grid"] + GUARDED), tmp_path / "runs")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda self, step: 1 / 0, "ZeroDivisionError"),
        (lambda self, step: {"other/x/total": 1.0}, "must be named 'flip/"),
        (lambda self, step: {"flip/flip_count/total": torch.zeros(3)}, "must be one number"),
    ],
)
def test_a_monitor_that_fails_is_named_and_dropped_and_training_goes_on(
    answer, reason, write, tmp_path, monkeypatch, run
):
    from altgrad_monitors.flip import Flip

    monkeypatch.setattr(Flip, "observe", answer)
    result = run(write(TINY + ARMS["grid"] + WATCHED), tmp_path / "runs")
    assert result.outcome == "finished"
    (warning,) = [line for line in read_lines(result.folder / "events.jsonl") if line["event"] == "warning"]
    assert "flip of altgrad-monitors" in warning["message"]
    assert reason in warning["message"]
    assert any(name.startswith("stall/") for name in result.summary["final"])


def test_stall_and_descent_tell_nearest_from_stochastic_rounding(write, tmp_path, run):
    path = write(TINY + ARMS["grid"].replace("lr = 1e-2", "lr = 1e-5") + WATCHED)
    lost = run(path, tmp_path / "nearest", "quantize.storage_rounding=nearest_even").summary["final"]
    kept = run(path, tmp_path / "stochastic").summary["final"]
    assert lost["stall/stall_ratio/total"] == 1.0
    assert lost["stall/expected_stall/total"] < 1.0
    assert abs(lost["descent/quality/total"]) < 1e-6
    assert 0.0 < kept["stall/stall_ratio/total"] < 1.0
    assert 0.2 < kept["descent/quality/total"] < 3.0


def command(*arguments):
    script = "from altgrad_core.cli import altgrad_run; altgrad_run()"
    whole = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(whole, capture_output=True, text=True, check=False)


@pytest.mark.slow  # five processes that import torch
def test_a_grid_skips_finished_cells_and_runs_added_ones(write, tmp_path):
    grid, out = TINY + ARMS["grid"] + "[grid]\nseed = {}\n", tmp_path / "runs"
    first = command(write(grid.format([1, 2])), "--out", out, "--jobs", "2")
    assert first.returncode == 0, first.stderr
    folders = {path.name for path in (tmp_path / "runs" / "tiny").iterdir()}
    assert folders == {"seed=1", "seed=2"}
    second = command(write(grid.format([1, 2, 3])), "--out", out, "--quiet")
    assert second.returncode == 0, second.stderr
    outcomes = [line.split()[0] for line in second.stdout.splitlines() if "seed=" in line]
    assert outcomes == ["skipped", "skipped", "finished"]


def test_a_failing_cell_lets_the_others_finish_and_the_command_fail(write, tmp_path):
    text = TINY + ARMS["unquantized"] + GUARDED + '[grid]\n"optimizer.lr" = [1e30, 1e-3]\n'
    ended = command(write(text), "--out", tmp_path / "runs", "--set", "train.grad_clip=0.0", "--quiet")
    assert ended.returncode == 1
    summaries = sorted(path for path in (tmp_path / "runs").rglob("summary.json"))
    assert sorted(json.loads(path.read_text())["outcome"] for path in summaries) == ["finished", "stopped"]


def test_sigint_finishes_the_step_writes_a_checkpoint_and_exits_with_130(write, tmp_path):
    path = write(TINY + ARMS["grid"])
    script = "from altgrad_core.cli import altgrad_run; altgrad_run()"
    options = ["--out", str(tmp_path / "runs"), "--set", "steps=100000", "--set", "train.log_every=1"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(path), *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    folder = tmp_path / "runs" / "tiny" / "run"
    deadline = time.monotonic() + 60
    while len(list(read_lines(folder / "metrics.jsonl"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, process.stderr.read()
    found, _ = checkpoint.newest(folder / "checkpoints")
    lines = list(read_lines(folder / "metrics.jsonl"))
    assert found.state["step"] == lines[-1]["step"]


def test_text_that_is_too_short_for_a_window_is_said_with_the_way_out(write, tmp_path, run):
    (tmp_path / "short.txt").write_text("too short")
    text = TINY.replace('"markov"', '"text"').replace("tokens = 4000", f'path = "{tmp_path / "short.txt"}"')
    with pytest.raises(UsageError, match=r"'text'.*(block_size|short)"):
        run(write(text + ARMS["unquantized"]), tmp_path / "runs")


def test_a_missing_text_file_ends_the_command_without_a_traceback(write, tmp_path):
    text = TINY.replace('"markov"', '"text"').replace("tokens = 4000", 'path = "nowhere.txt"')
    ended = command(write(text + ARMS["unquantized"]), "--out", tmp_path / "runs")
    assert ended.returncode in (1, 2)
    assert "nowhere.txt" in ended.stderr
    assert "Traceback" not in ended.stderr
