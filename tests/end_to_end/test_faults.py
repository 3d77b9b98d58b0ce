"""Runs that are killed, starved and misled: what is left, and what the next command makes of it."""

import json
import os
import pathlib
import pickle
import shutil
import signal
import sys
import time

import pytest
import torch
from torch import nn

import altgrad_core as altgrad
from altgrad_core import checkpoint, loop, run_checkpoint
from altgrad_core import registry as registry_module
from altgrad_core.apps import guarded, run_app
from altgrad_core.record import read_json, read_lines
from altgrad_core.registry import PluginError, UsageError
from altgrad_core.state_tree import pack

TINY = """
name = "tiny"
seed = 7
steps = 30
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
batch_size = 4
gradient_accumulation = 2
device = "cpu"
warmup_steps = 2
eval_every = 9
eval_batches = 2
log_every = 7
checkpoint_every = 3
keep_checkpoints = 2
"""
STORED = "[quantize]\nformat = 'E4M3'\nstorage = 'grid'\nstorage_rounding = 'stochastic'\nbound = 4.0\n"
ARMS = {
    "AdamW": STORED + "[optimizer]\nplugin = 'AdamW'\n",
    "ManifoldAdamW": "[quantize]\nformat = 'E4M3'\n[optimizer]\nplugin = 'ManifoldAdamW'\n",
    "GridOptim": STORED + "[optimizer]\nplugin = 'GridOptim'\nnormalize = 'adam'\nstep_scale = 0.3\n",
}
WATCHED = (
    "[[monitor]]\nplugin='flip'\nevery=2\n[[monitor]]\nplugin='stall'\n[[fallback]]\nplugin='nan_guard'\n"
)
PLAIN = TINY + "[optimizer]\nplugin = 'AdamW'\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def write(text: str) -> pathlib.Path:
        (tmp_path / "experiment.toml").write_text(text)
        return tmp_path / "experiment.toml"

    return write


def state_bytes(folder, step=30):
    """The model's bytes, and the optimizer's tensors', of the last step."""
    last = folder / "checkpoints" / checkpoint.step_name(step)
    saved = checkpoint.load(last)
    _, tensors = pack(saved.state["optimizer"])
    return (last / checkpoint.MODEL).read_bytes(), {key: one.tolist() for key, one in tensors.items()}


@pytest.mark.slow
def test_a_worker_that_is_killed_leaves_the_other_cells_alone(write, tmp_path, wait_until, ended, start):
    path = write(PLAIN + "[grid]\nseed = [1, 2, 3]\n")
    command = start(path, "--out", tmp_path, "--jobs", "2", "--set", "steps=300")
    lock = tmp_path / "tiny" / "seed=1" / ".lock"
    wait_until(lambda: lock.exists() and lock.read_text())
    os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
    code, out, err = ended(command)
    assert code == 1
    assert "its process died" in err
    rows = [line.split() for line in out.splitlines() if "tiny/seed=" in line]
    ends = [(outcome, folder.rpartition("/")[2]) for outcome, *_, folder in rows]
    assert ends == [("failed", "seed=1"), ("finished", "seed=2"), ("finished", "seed=3")]


@pytest.mark.slow  # three processes that import torch
@pytest.mark.parametrize("to_the_group", [True, False])
def test_sigint_to_a_grid_leaves_checkpoints_and_no_process(
    to_the_group, write, tmp_path, wait_until, ended, start
):
    path = write(PLAIN + "[grid]\nseed = [1, 2, 3]\n")
    options = ["--out", tmp_path, "--jobs", "2", "--set", "steps=100000"]
    command = start(path, *options, start_new_session=True)
    folders = [tmp_path / "tiny" / f"seed={seed}" for seed in (1, 2)]
    wait_until(lambda: all(list((one / "checkpoints").glob("step_*")) for one in folders))
    workers = [int((one / ".lock").read_text().split()[1]) for one in folders]
    (os.killpg if to_the_group else os.kill)(command.pid, signal.SIGINT)
    code, out, err = ended(command)
    assert code == 130, err
    assert "not begun: 1\nrun the same command to go on" in out
    assert "Traceback" not in err
    assert not any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers)
    passed_on = "interrupted" if to_the_group else "terminated"
    assert all(read_json(one / "summary.json")["outcome"] == passed_on for one in folders)


def test_a_stopped_run_says_so_and_is_not_run_again(write, tmp_path, capsys, run):
    path = write(PLAIN + "lr = 1e30\n[[fallback]]\nplugin='nan_guard'\nnan_patience=2\n")
    overrides = ["train.grad_clip=0.0"]
    first = run(path, tmp_path, *overrides)
    assert first.summary["message"].startswith("nan_guard: the loss was not finite")
    before = (first.folder / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert guarded(run_app, [str(path), "--out", str(tmp_path), "--set", *overrides, "--quiet"]) == 1
    out = capsys.readouterr().out
    assert "was stopped at step" in out
    assert "nan_guard" in out
    assert (first.folder / "metrics.jsonl").read_text() == before


def test_a_run_killed_between_its_stop_and_its_summary_stays_stopped(write, tmp_path, run):
    path = write(PLAIN + "lr = 1e30\n[[fallback]]\nplugin='nan_guard'\nnan_patience=2\n")
    first = run(path, tmp_path, "train.grad_clip=0.0")
    (first.folder / "summary.json").unlink()
    again = run(path, tmp_path, "train.grad_clip=0.0")
    assert (again.outcome, again.summary["step"]) == ("stopped", first.summary["step"])
    assert again.summary["message"] == first.summary["message"]


def test_resume_goes_on_in_the_very_folder_it_was_given(write, tmp_path, run):
    path = write(PLAIN)
    first = run(path, tmp_path / "runs", "steps=3")
    moved = tmp_path / "kept" / "elsewhere"
    moved.parent.mkdir()
    first.folder.rename(moved)
    (moved / "summary.json").unlink()
    assert guarded(run_app, [str(path), "--resume", str(moved), "--set", "steps=3", "--quiet"]) == 0
    assert (moved / "summary.json").exists()
    assert not first.folder.exists()


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("model.n_embd=32", "model.n_embd: 16 -> 32"),
        ("quantize.format='E5M2'", "quantize.format: 'E4M3' -> 'E5M2'"),
        ("optimizer.plugin='ManifoldAdamW'", "optimizer.plugin: 'AdamW' -> 'ManifoldAdamW'"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused_by_the_field(override, field, write, tmp_path, run):
    path = write(TINY + ARMS["AdamW"])
    first = run(path, tmp_path / "runs", "steps=3")
    for name in ("resolved.json", "summary.json"):
        (first.folder / name).unlink()
    with pytest.raises(UsageError) as refused:
        run(path, tmp_path / "runs", "steps=3", override)
    assert field in str(refused.value)
    assert "--out" in str(refused.value)


def rewritten(result, change):
    """Let a finished run's last checkpoint be what `change` makes of its state, and the run be unfinished."""
    (result.folder / "summary.json").unlink()
    found, _ = checkpoint.newest(result.folder / "checkpoints")
    change(found.state)
    checkpoint.save(
        result.folder / "checkpoints", checkpoint.step_name(found.state["step"]), found.model, found.state
    )


@pytest.mark.parametrize("distribution", ["altgrad-core", "altgrad-optim", "altgrad-formats"])
def test_a_checkpoint_of_another_version_of_a_plugin_is_refused_by_its_name(
    distribution, write, tmp_path, run
):
    path = write(TINY + ARMS["AdamW"])
    rewritten(run(path, tmp_path, "steps=3"), lambda state: state["versions"].update({distribution: "0.0.7"}))
    with pytest.raises(UsageError, match=rf"{distribution}: '0.0.7' -> '0.1.0'; install those again, or"):
        run(path, tmp_path, "steps=3")


def test_a_checkpoint_of_another_model_is_refused_by_the_tensor_whatever_its_options_say(
    write, tmp_path, run
):
    path = write(PLAIN)
    small, large = (
        run(path, tmp_path / "a", "steps=3"),
        run(path, tmp_path / "b", "steps=3", "model.n_embd=32"),
    )
    found, other = (checkpoint.newest(one.folder / "checkpoints")[0] for one in (small, large))
    checkpoint.save(small.folder / "checkpoints", checkpoint.step_name(3), other.model, found.state)
    (small.folder / "summary.json").unlink()
    with pytest.raises(
        UsageError, match=r"another model: .*transformer\.wte\.weight: \(16, 32\) -> \(16, 16\);"
    ):
        run(path, tmp_path / "a", "steps=3")


def test_a_plugin_that_a_run_does_not_use_may_change(write, tmp_path, run):
    path = write(PLAIN)
    result = run(path, tmp_path, "steps=3")
    found, _ = checkpoint.newest(result.folder / "checkpoints")
    assert found.state["versions"].keys() == {"altgrad-core", "altgrad-data", "altgrad-optim"}


@pytest.mark.parametrize(("field", "other"), [("threads", 64), ("torch", "2.8.0"), ("device", "cuda")])
def test_another_machine_is_warned_of_and_the_run_goes_on(field, other, write, tmp_path, lines, run):
    path = write(PLAIN)
    rewritten(run(path, tmp_path, "steps=3"), lambda state: state["machine"].update({field: other}))
    result = run(path, tmp_path, "steps=3")
    assert result.outcome == "finished"
    (warning,) = [line for line in lines(result.folder, "events.jsonl") if line["event"] == "warning"]
    assert warning["message"].startswith(f"{field}: {other!r} -> ")
    assert "may differ in bits" in warning["message"]


def test_a_run_begun_on_another_device_says_which(write, tmp_path, run):
    path = write(PLAIN)
    first = run(path, tmp_path / "runs", "steps=3")
    resolved = json.loads((first.folder / "resolved.json").read_text())
    resolved["device"], resolved["options"]["steps"] = "cuda", 4
    (first.folder / "resolved.json").write_text(json.dumps(resolved))
    with pytest.raises(UsageError, match=r"begun on cuda, this is cpu: go on with --device cuda"):
        run(path, tmp_path / "runs", "steps=3")


@pytest.mark.parametrize("every", [2, 5])
def test_a_metric_is_logged_once_when_it_was_observed(every, write, tmp_path, lines, run):
    text = TINY + ARMS["AdamW"] + f"[[monitor]]\nplugin='flip'\nevery={every}\n"
    result = run(write(text), tmp_path, "train.log_every=1", "steps=10")
    seen = [line["step"] for line in lines(result.folder, "metrics.jsonl") if "flip/flip_count/total" in line]
    assert seen == list(range(every, 11, every))


def test_every_other_step_counts_the_flips_of_that_step_alone(write, tmp_path, lines, run):
    text = TINY + ARMS["AdamW"] + "[[monitor]]\nplugin='flip'\n[[monitor]]\nplugin='stall'\nevery={}\n"
    rare, often = (
        run(write(text.format(every)), tmp_path / str(every), "train.log_every=1", "steps=10")
        for every in (5, 1)
    )
    name = "stall/stall_ratio/total"
    found = [
        {line["step"]: line[name] for line in lines(one.folder, "metrics.jsonl") if name in line}
        for one in (rare, often)
    ]
    assert found[0] == {step: found[1][step] for step in (5, 10)}


def test_a_monitor_that_draws_from_the_global_stream_leaves_the_run_alone(write, tmp_path, monkeypatch, run):
    from altgrad_monitors.flip import Flip

    path = write(TINY + ARMS["AdamW"] + "[[monitor]]\nplugin='flip'\n")
    plain = run(path, tmp_path / "plain")
    monkeypatch.setattr(Flip, "observe", lambda self, step: {"flip/x/total": torch.rand(())})
    assert state_bytes(run(path, tmp_path / "drawn").folder) == state_bytes(plain.folder)


def test_a_monitor_that_writes_to_a_weight_ends_the_run_by_its_name(write, tmp_path, monkeypatch, run):
    from altgrad_core.watched import PluginFailure
    from altgrad_monitors.flip import Flip

    def halve(self, step):
        for weight in step.weights.values():
            weight.value.mul_(0.5)
        return {}

    monkeypatch.setattr(Flip, "observe", halve)
    path = write(TINY + ARMS["AdamW"] + "[[monitor]]\nplugin='flip'\n")
    with pytest.raises(PluginFailure, match=r"flip of altgrad-monitors .* wrote to .*clone first"):
        run(path, tmp_path)
    assert read_json(tmp_path / "tiny" / "run" / "summary.json")["outcome"] == "failed"


def test_a_monitor_that_ends_training_mode_ends_the_run_by_its_name(write, tmp_path, monkeypatch, run):
    from altgrad_core.watched import PluginFailure
    from altgrad_monitors.flip import Flip

    def no_dropout(self, step):
        self.model.eval()
        return {}

    monkeypatch.setattr(Flip, "start", lambda self, run: setattr(self, "model", run.model))
    monkeypatch.setattr(Flip, "observe", no_dropout)
    path = write(TINY + ARMS["AdamW"] + "[[monitor]]\nplugin='flip'\n")
    with pytest.raises(PluginFailure, match=r"flip of altgrad-monitors .* changed the training mode of"):
        run(path, tmp_path)


def test_a_monitor_that_was_dropped_stays_dropped_after_a_resume(write, tmp_path, monkeypatch, lines, run):
    from altgrad_monitors.flip import Flip

    path = write(TINY + ARMS["AdamW"] + "[[monitor]]\nplugin='flip'\n")
    with monkeypatch.context() as broken:
        broken.setattr(Flip, "observe", lambda self, step: {"flip/x/total": "many"})
        broken.setattr(loop, "_checkpoint", lambda run: (run_checkpoint.save(run), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            run(path, tmp_path)
    result = run(path, tmp_path)
    assert not any("flip/flip_count/total" in line for line in lines(result.folder, "metrics.jsonl"))


def test_a_signal_in_the_evaluation_still_gets_its_checkpoint(write, tmp_path, monkeypatch, run):
    whole = loop.evaluate

    def interrupted(run):
        if run.step == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(run)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    result = run(write(PLAIN), tmp_path)
    assert result.outcome == "interrupted"
    found, _ = checkpoint.newest(result.folder / "checkpoints")
    assert found.state["step"] == result.summary["step"] == 9


@pytest.mark.parametrize("by", ["command", "Python"])
def test_a_signal_in_the_last_step_lets_a_cell_finish_and_no_other_begin(
    by, write, tmp_path, monkeypatch, capsys
):
    whole = loop.evaluate

    def interrupted(run, *batches):
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(run, *batches)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    path = write(PLAIN.replace("steps = 30", "steps = 3") + "[grid]\nseed = [1, 2]\n")
    if by == "Python":
        (result,) = altgrad.run_all(altgrad.load_experiment(path), out=tmp_path, quiet=True)
        assert (result.outcome, result.asked) == ("finished", "interrupted")
    else:
        assert guarded(run_app, [str(path), "--out", str(tmp_path), "--quiet"]) == 130
        assert "not begun: 1\nrun the same command to go on" in capsys.readouterr().out
    assert read_json(tmp_path / "tiny" / "seed=1" / "summary.json")["outcome"] == "finished"
    assert not (tmp_path / "tiny" / "seed=2").exists()


# --- where a run is taken up -------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 9, pytest.param(12, marks=pytest.mark.slow), 30])
def test_a_run_that_dies_is_taken_up_bit_for_bit(step, write, tmp_path, killed_at, lines, run):
    path = write(TINY + ARMS["GridOptim"] + WATCHED)
    whole = run(path, tmp_path / "whole").folder
    killed_at(path, tmp_path / "parts", step)
    parts = run(path, tmp_path / "parts").folder
    assert state_bytes(whole) == state_bytes(parts)
    for name in ("metrics.jsonl", "events.jsonl"):
        assert json.dumps(lines(whole, name)) == json.dumps(lines(parts, name))


def test_a_checkpoint_holds_the_scales_of_its_step_whether_or_not_it_was_evaluated(write, tmp_path, run):
    """What monitors count in the step after a resume is compared with codes under these scales."""
    path = write(TINY + "[quantize]\nformat = 'E4M3'\nscale_rule = 'exact'\n[optimizer]\nplugin = 'AdamW'\n")
    evaluated, plain = (
        run(path, tmp_path / str(every), "steps=7", f"train.eval_every={every}") for every in (6, 0)
    )
    one, other = (
        checkpoint.load(result.folder / "checkpoints" / checkpoint.step_name(6)).state["scales"]
        for result in (evaluated, plain)
    )
    assert {name: scale.item() for name, scale in one.items()} == {
        name: scale.item() for name, scale in other.items()
    }


def test_torn_and_damaged_lines_are_skipped_and_a_resume_cuts_them_off(
    write, tmp_path, killed_at, lines, run
):
    path = write(PLAIN)
    whole = run(path, tmp_path / "whole").folder
    killed_at(path, tmp_path / "parts", 9)
    parts = tmp_path / "parts" / "tiny" / "run"
    with (parts / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n{"stop": 3}\n\xff\x00\n{"step": 10, "train/lo')
    run(path, tmp_path / "parts")
    assert json.dumps(lines(whole, "metrics.jsonl")) == json.dumps(lines(parts, "metrics.jsonl"))
    for line in (parts / "metrics.jsonl").read_text().splitlines():
        assert "step" in json.loads(line)


def test_data_that_changed_since_the_checkpoint_are_refused(write, tmp_path, killed_at, run):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 200)
    table = f'plugin = "text"\npath = {str(text)!r}'
    path = write(PLAIN.replace('plugin = "markov"\ntokens = 4000', table))
    killed_at(path, tmp_path / "runs", 3)
    text.write_text("to be or not to bee" * 200)
    with pytest.raises(UsageError, match=r"the data have changed since the checkpoint .* --out"):
        run(path, tmp_path / "runs")


def test_a_pickle_where_a_checkpoint_is_expected_is_passed_over_and_does_not_run(
    write, tmp_path, killed_at, lines, run
):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path, checkpoints = write(PLAIN), tmp_path / "tiny" / "run" / "checkpoints"
    killed_at(path, tmp_path, 9)
    torch.save({"model": Payload()}, checkpoints / checkpoint.step_name(12))
    (checkpoints / checkpoint.step_name(9) / checkpoint.MODEL).write_bytes(pickle.dumps(Payload()))
    result = run(path, tmp_path)
    said = [line["message"] for line in lines(result.folder, "events.jsonl") if line["event"] == "warning"]
    assert [checkpoint.step_name(12) in said[0], checkpoint.step_name(9) in said[1]] == [True, True]
    assert result.outcome == "finished"
    assert not (tmp_path / "ran").exists()


UNBOUND = "[quantize]\nformat = 'E4M3'\nstorage = 'grid'\n"
ADAPTED = """
[[monitor]]
plugin = "stall"
[[fallback]]
plugin = "emergency_shift"
measure = "ratio"
stall_threshold = 0.01
patience = 4
warmup = 2
chain = {E4M3 = "BF16", BF16 = "none"}
[quantize.activations]
format = "E5M2"
"""


@pytest.mark.parametrize("arm", ["", UNBOUND + ADAPTED])
def test_where_those_of_all_steps_are_damaged_the_best_is_gone_on_with_bit_for_bit(
    arm, write, tmp_path, killed_at, lines, run
):
    path = write(TINY + "[optimizer]\nplugin = 'AdamW'\nlr = 1e-2\n" + arm)
    whole = run(path, tmp_path / "whole").folder
    killed_at(path, tmp_path / "parts", 24)
    parts = tmp_path / "parts" / "tiny" / "run"
    for manifest in parts.glob(f"checkpoints/step_*/{checkpoint.MANIFEST}"):
        manifest.unlink()
    best = checkpoint.load(parts / "checkpoints" / checkpoint.BEST).state["step"]
    assert best in (9, 18)
    assert run(path, tmp_path / "parts").outcome == "finished"
    assert state_bytes(parts) == state_bytes(whole)
    assert lines(parts) == lines(whole)
    told = lines(parts, "events.jsonl")
    warned = [one["message"] for one in told if one["event"] == "warning"]
    assert f"checkpoints/best is taken, of step {best}; none of a step is whole" in warned[-1]
    assert [one for one in told if one["event"] != "warning"] == lines(whole, "events.jsonl")


def test_the_best_is_kept_once_monitors_have_heard_of_its_evaluation(write, tmp_path, monkeypatch, run):
    """Else a run that goes on from it would have monitors that never do."""
    from altgrad_monitors.stall import Stall

    heard = []
    monkeypatch.setattr(Stall, "evaluated", lambda self, step, _: heard.append(step), raising=False)
    monkeypatch.setattr(Stall, "state_dict", lambda self: {"heard": list(heard)}, raising=False)
    monitored = write(
        TINY + STORED + "[optimizer]\nplugin = 'AdamW'\nlr = 1e-2\n[[monitor]]\nplugin = 'stall'\n"
    )
    state = checkpoint.load(run(monitored, tmp_path).folder / "checkpoints" / checkpoint.BEST).state
    assert state["plugins"]["stall"]["heard"][-1] == state["step"]


def test_what_happens_after_a_damaged_checkpoint_is_in_the_events(write, tmp_path, killed_at, lines, run):
    path, folder = write(PLAIN), tmp_path / "tiny" / "run"
    killed_at(path, tmp_path, 9)
    (folder / "checkpoints" / checkpoint.step_name(9) / checkpoint.MANIFEST).unlink()
    run(path, tmp_path)
    steps = [one["step"] for one in lines(folder, "events.jsonl") if one["event"] == "checkpoint"]
    assert steps == list(range(3, 31, 3))


def test_without_a_whole_checkpoint_nothing_begins_anew_in_silence(write, tmp_path, killed_at, run):
    path, folder = write(PLAIN), tmp_path / "tiny" / "run"
    killed_at(path, tmp_path, 6)
    for manifest in folder.rglob(checkpoint.MANIFEST):
        manifest.unlink()
    before = (folder / "metrics.jsonl").read_text()
    with pytest.raises(UsageError, match="no whole checkpoint is left; start anew with --out"):
        run(path, tmp_path)
    assert (folder / "metrics.jsonl").read_text() == before


def test_without_a_checkpoint_of_a_step_it_is_said_that_a_run_begins_anew(write, tmp_path, killed_at, run):
    path, folder = write(PLAIN.replace("steps = 30", "steps = 7")), tmp_path / "tiny" / "run"
    killed_at(path, tmp_path, 7)
    for step in folder.glob("checkpoints/step_*"):
        shutil.rmtree(step)
    (folder / "log.txt").unlink()
    run(path, tmp_path)
    first, *_ = (folder / "log.txt").read_text().splitlines()
    assert first == f"{folder} has no checkpoint of a step: beginning anew at step 0"


class PlainAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)


class PlainBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1, self.ln_2, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), PlainAttention(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})


def test_the_model_file_is_one_of_plain_nanogpt(write, tmp_path, run):
    """Its names and shapes, as in nanoGPT's model.py, biases included."""
    from safetensors.torch import load_file

    folder = run(write(TINY + ARMS["GridOptim"]), tmp_path, "steps=3", "model.bias=true").folder
    saved = load_file(folder / "checkpoints" / checkpoint.step_name(3) / checkpoint.MODEL)
    vocabulary, width = saved["lm_head.weight"].shape
    tables = {"wte": nn.Embedding(vocabulary, width), "wpe": nn.Embedding(16, width)}
    blocks = nn.ModuleList([PlainBlock(width)])
    transformer = nn.ModuleDict({**tables, "h": blocks, "ln_f": nn.LayerNorm(width)})
    head = nn.Linear(width, vocabulary, bias=False)
    head.weight = tables["wte"].weight
    plain = nn.ModuleDict({"transformer": transformer, "lm_head": head})
    assert str(plain.load_state_dict(saved, strict=True)) == "<All keys matched successfully>"


# --- folders and locks -------------------------------------------------------------------------------


SEEDS = "[grid]\nseed = [1, 2]\n"
COMPARED = "[grid]\n'optimizer.lr' = [1e-3, 2e-3]\n[compare]\narm = 'optimizer.lr'\nseeds = [3]\n"


@pytest.mark.parametrize(("place", "tables"), [("out", ""), ("out", SEEDS), ("out", COMPARED), ("cache", "")])
def test_a_folder_that_cannot_be_written_ends_the_command_before_step_1(
    place, tables, write, tmp_path, monkeypatch, capsys
):
    path = write(PLAIN + tables)
    (tmp_path / "file").write_text("")
    out = tmp_path / ("file" if place == "out" else "runs")
    if place == "cache":
        monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path / "file" / "cache"))
    assert guarded(run_app, [str(path), "--out", str(out), "--quiet"]) == 2
    err = capsys.readouterr().err
    assert "cannot" in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl", "events.jsonl", "log.txt"])
def test_what_is_in_the_way_of_a_run_ends_the_command_before_step_1(name, write, tmp_path, capsys):
    """As would a folder of checkpoints, or a file, on a disk that is gone or may only be read."""
    place = tmp_path / "tiny" / "run" / name
    place.parent.mkdir(parents=True)
    place.write_text("") if name == "checkpoints" else place.mkdir()
    assert guarded(run_app, [str(write(PLAIN)), "--out", str(tmp_path), "--quiet"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith(str(place))
    assert "cannot be written" in error


def test_the_lock_of_a_process_that_died_is_taken_over(write, tmp_path, run):
    folder = tmp_path / "tiny" / "run"
    folder.mkdir(parents=True)
    (folder / ".lock").write_text("process 1 on another machine")
    assert run(write(PLAIN), tmp_path, "steps=3").outcome == "finished"
    assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.slow
def test_of_two_processes_that_begin_one_run_one_is_refused(write, launch, tmp_path, lines):
    path = write(PLAIN)
    both = [launch(path, "--out", tmp_path, "--set", "steps=500") for _ in range(2)]
    for process in both:
        process.join()
    assert sorted(process.exitcode for process in both) == [0, 2]
    steps = [line["step"] for line in lines(tmp_path / "tiny" / "run", "metrics.jsonl")]
    assert steps == sorted(set(steps))


# --- signals -----------------------------------------------------------------------------------------

STRUCK = """
import importlib, os
place, _, name = {function!r}.rpartition(".")
module, _, owner = place.partition(":")
owner = getattr(importlib.import_module(module), owner) if owner else importlib.import_module(module)
whole, calls = getattr(owner, name), []
def struck(*arguments, **options):
    calls.append(name)
    if len(calls) == {call}:
        os.kill(os.getpid(), {number})
    return whole(*arguments, **options)
setattr(owner, name, struck)
"""
"""What a process runs first, so that a signal reaches it within a call of one function."""


def overriding(overrides):
    return [token for override in overrides for token in ("--set", override)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "call", "number", "code"),
    [
        ("torch:Tensor.backward", 6, signal.SIGTERM, 143),
        ("altgrad_core.tasks:TokenScores.add", 8, signal.SIGINT, 130),
        ("altgrad_core.checkpoint.save_file", 3, signal.SIGTERM, 143),
        ("altgrad_core.checkpoint._digest", 8, signal.SIGINT, 130),
        ("altgrad_core.checkpoint._replace", 3, signal.SIGTERM, 143),
    ],
)
def test_a_signal_gets_its_checkpoint_wherever_it_comes(
    function, call, number, code, write, launch, start, ended, tmp_path, lines
):
    path = write(TINY + ARMS["GridOptim"] + WATCHED)
    often = ("steps=12", "train.log_every=1", "train.eval_every=1", "train.checkpoint_every=2")
    options = overriding(often)
    whole, parts = tmp_path / "whole" / "tiny" / "run", tmp_path / "parts" / "tiny" / "run"
    launch(path, "--out", tmp_path / "whole", *options).join()
    strike = STRUCK.format(function=function, call=call, number=int(number))
    found, _, err = ended(start(path, "--out", tmp_path / "parts", *options, "--quiet", before=strike))
    assert found == code, err
    saved, passed_over = checkpoint.newest(parts / "checkpoints")
    assert passed_over == []
    assert 0 < saved.state["step"] == lines(parts, "metrics.jsonl")[-1]["step"] < 12
    second = launch(path, "--out", tmp_path / "parts", *options)
    second.join()
    assert second.exitcode == 0
    assert state_bytes(whole, 12) == state_bytes(parts, 12)
    assert json.dumps(lines(whole, "metrics.jsonl")) == json.dumps(lines(parts, "metrics.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "number", "code"),
    [("array", signal.SIGTERM, 143), ("finish", signal.SIGINT, 130), ("finish", signal.SIGTERM, 143)],
)
def test_a_signal_while_data_are_prepared_leaves_nothing_half_done(
    function, number, code, write, launch, start, ended, cache, tmp_path
):
    path = write(PLAIN)
    before = {one.name for one in cache.iterdir()}
    strike = STRUCK.format(function=f"altgrad_core.token_cache:Writer.{function}", call=1, number=int(number))
    environment = {**os.environ, "ALTGRAD_CACHE": str(cache)}
    options = overriding((f"data.tokens={30000 + len(before)}", "steps=3"))
    found, _, err = ended(start(path, "--out", tmp_path, *options, before=strike, env=environment))
    assert found == code, err
    assert {one.name for one in cache.iterdir()} == before
    assert not list(tmp_path.rglob("step_*"))
    second = launch(path, "--out", tmp_path, "--set", "steps=3")
    second.join()
    assert second.exitcode == 0  # nothing was trained there: the folder is free for other options


SENDING = """
import os, signal, sys
class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {number})
sys.meta_path.insert(0, Sender())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "number", "code"),
    [
        (
            "numpy._core.numeric",
            signal.SIGTERM,
            143,
        ),  # which torch's start-up imports, deaf to what it raises
        ("cyclopts", signal.SIGINT, 130),  # among the first
        ("numpy.lib", signal.SIGINT, 130),
        ("torch.nn", signal.SIGINT, 130),
        ("altgrad_optim.adamw", signal.SIGTERM, 143),
    ],
)
def test_a_signal_during_an_import_is_heard(module, number, code, write, start, ended, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SENDING.format(module=module, number=int(number)))
    folders = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": folders}
    options = ["--out", tmp_path, "--set", "steps=1000000"]
    found, _, err = ended(start(write(PLAIN), *options, env=environment))
    assert found == code, err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_second_sigint_ends_a_run_at_once(write, launch, tmp_path, lines, wait_until):
    path, folder = write(PLAIN), tmp_path / "tiny" / "run"
    process = launch(path, "--out", tmp_path, "--set", "train.gradient_accumulation=100000")
    wait_until(lambda: len(lines(folder, "metrics.jsonl")) == 1)
    time.sleep(0.3)
    os.kill(process.pid, signal.SIGINT)
    process.join(1)
    assert process.is_alive()  # it finishes its step
    os.kill(process.pid, signal.SIGINT)
    process.join(5)
    assert process.exitcode == 130
    assert not list(folder.rglob(".unfinished-*"))


@pytest.mark.slow  # the compiler takes a minute
def test_a_signal_while_the_model_is_compiled_gets_its_checkpoint(write, launch, tmp_path, lines, wait_until):
    path, folder = write(PLAIN), tmp_path / "tiny" / "run"
    process = launch(path, "--out", tmp_path, "--set", "train.compile=true")
    log = folder / "log.txt"
    wait_until(lambda: log.exists() and "folder" in log.read_text())  # the header: training begins
    time.sleep(1)
    assert lines(folder, "metrics.jsonl") == []  # not even the first evaluation is there
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    assert process.exitcode == 143
    assert checkpoint.newest(folder / "checkpoints")[0].state["step"] == 1


# --- clocks ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_that_is_stopped_for_a_while_keeps_sane_timers(write, start, ended, tmp_path, wait_until):
    path, folder = write(TINY + STORED + "[[monitor]]\nplugin = 'flip'\n"), tmp_path / "tiny" / "run"
    options, begun = ("train.log_every=1", "steps=9"), time.monotonic()
    in_the_fifth = STRUCK.format(function="torch:Tensor.backward", call=9, number=int(signal.SIGSTOP))
    process = start(path, "--out", tmp_path, *overriding(options), before=in_the_fifth)
    state = pathlib.Path(f"/proc/{process.pid}/stat")
    wait_until(lambda: state.read_text().rpartition(")")[2].split()[0] == "T")
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    code, _, err = ended(process)
    assert code == 0, err
    logged = [line for line in read_lines(folder / "metrics.jsonl") if line["step"]]
    assert [line["step"] for line in logged if "time/step" not in line] == [5]
    assert [line["step"] for line in logged if "cost/flip" not in line] == [5]
    assert read_json(folder / "summary.json")["seconds"] < time.monotonic() - begun - 4


def test_how_little_was_left_of_a_step_that_was_stopped_speeds_nothing_up(write, tmp_path, monkeypatch, run):
    whole = loop._one_step

    def stopped(run):
        whole(run)
        time.sleep(0.02)
        if run.step == 4:
            os.kill(os.getpid(), signal.SIGCONT)  # what comes when a stopped process goes on

    monkeypatch.setattr(loop, "_one_step", stopped)
    result = run(write(PLAIN), tmp_path, "steps=6", "train.log_every=3")
    _, *logged = read_lines(result.folder / "metrics.jsonl")
    assert [line["time/step"] >= 0.02 for line in logged] == [True, True]
    assert result.summary["seconds"] == pytest.approx(sum(3 * line["time/step"] for line in logged))


def test_a_clock_that_is_set_back_changes_no_timer(write, tmp_path, monkeypatch, run):
    later = iter(range(10**9, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(later)))
    result = run(write(PLAIN), tmp_path)
    times = [line["time/step"] for line in read_lines(result.folder / "metrics.jsonl") if "time/step" in line]
    assert 0 < min(times) <= max(times) < 60
    assert 0 < result.summary["seconds"] < 60


# --- numbers that are not finite ---------------------------------------------------------------------


def spoiled(place, value):
    """Return how the loop computes the gradients of a step, with one number spoiled before the fifth."""
    whole = loop._forward_backward

    def forward_backward(run):
        if run.step != 4:
            return whole(run)
        parameter = next(iter(run.trained.values()))
        if place == "weight":
            parameter.data.view(-1)[0] = value
        loss = whole(run)
        if place == "gradient":
            parameter.grad.view(-1)[0] = value
        return loss * value if place == "loss" else loss

    return forward_backward


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("place", "actions"),
    [("loss", ["SkipStep"]), ("gradient", ["SkipStep"]), ("weight", ["SkipStep", "SkipStep", "Stop"])],
)
def test_one_number_that_is_not_finite_is_not_stepped_with(
    place, actions, value, write, tmp_path, monkeypatch, lines, run
):
    stepped = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *rest: (stepped.append(1), step(self, *rest))[1]
    )
    monkeypatch.setattr(loop, "_forward_backward", spoiled(place, value))
    result = run(write(PLAIN + "[[fallback]]\nplugin='nan_guard'\nnan_patience=3\n"), tmp_path, "steps=9")
    events = [line for line in lines(result.folder, "events.jsonl") if line["event"] == "policy"]
    assert [(line["step"], line["action"]) for line in events] == list(zip((5, 6, 7), actions, strict=False))
    assert len(stepped) == (4 if place == "weight" else 8)
    assert result.outcome == ("stopped" if place == "weight" else "finished")


# --- plugins that fail -------------------------------------------------------------------------------

ACME = """
import attrs
from altgrad_core.hookspecs import Component, hookimpl

@attrs.frozen(kw_only=True)
class Options:
    pass

@hookimpl
def altgrad_formats():
    return [Component(name="ACME", summary="", options=Options, target="acme_altgrad:build_format", bits=3)]

@hookimpl
def altgrad_optimizers():
    return [Component(name="Acme", summary="", options=Options, target="acme_altgrad:build_optimizer")]

def build_format(options):
    from altgrad_core.format import Format

    class Acme(Format):
        def _quantize(self, x, rounding, overflow, uniform):
            {format}
            return super()._quantize(x, rounding, overflow, uniform)

    return Acme(name="ACME", bits=3, values=[-1.0, -0.5, 0.0, 0.5, 1.0])

def build_optimizer(options, inputs):
    import torch

    class Acme(torch.optim.SGD):
        def step(self, closure=None):
            {optimizer}
            return super().step(closure)

    return Acme(inputs.groups, lr=0.1)
"""


@pytest.fixture
def acme(tmp_path, monkeypatch):
    """Return a function that installs a distribution with a format and an optimizer, each as told."""
    place = tmp_path / "site"

    def install(*, format="pass", optimizer="pass"):
        (place / "acme-3.1.dist-info").mkdir(parents=True)
        (place / "acme_altgrad.py").write_text(ACME.format(format=format, optimizer=optimizer))
        (place / "acme-3.1.dist-info" / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: acme\nVersion: 3.1\n"
        )
        (place / "acme-3.1.dist-info" / "entry_points.txt").write_text("[altgrad]\nacme = acme_altgrad\n")
        registry_module._discover.cache_clear()

    monkeypatch.syspath_prepend(str(place))
    yield install
    sys.modules.pop("acme_altgrad", None)
    registry_module._discover.cache_clear()


THIRD = TINY + "[quantize]\nformat = 'ACME'\n[optimizer]\nplugin = 'Acme'\n"


def test_a_third_partys_format_and_optimizer_train(write, acme, tmp_path, run):
    acme()
    assert run(write(THIRD), tmp_path, "steps=3").outcome == "finished"


@pytest.mark.parametrize("result", ["x.flatten()", "x[:1]"])
def test_a_format_that_returns_another_shape_ends_the_run_by_its_name(result, write, acme, tmp_path, run):
    acme(format=f"return {result}")
    with pytest.raises(PluginError, match=r"format 'ACME' of acme 3\.1 cannot round: ValueError: it returns"):
        run(write(THIRD), tmp_path, "steps=3")


SPOILED = "raise ArithmeticError('spoiled')"


@pytest.mark.parametrize(
    ("part", "place"),
    [
        ({"format": f"if len(x) > 9: {SPOILED}"}, []),
        ({"optimizer": SPOILED}, ["in a step of optimizer 'Acme' of acme 3.1"]),
    ],
)
def test_a_format_or_optimizer_that_raises_ends_the_run_by_its_name(part, place, write, acme, tmp_path, run):
    acme(**part)
    with pytest.raises(ArithmeticError) as raised:
        run(write(THIRD), tmp_path, "steps=3")
    summary = read_json(tmp_path / "tiny" / "run" / "summary.json")
    notes = [*place, "raised in acme_altgrad of acme 3.1, here for format 'ACME', optimizer 'Acme'"]
    assert sorted(raised.value.__notes__) == sorted(notes)
    assert (summary["outcome"], summary["message"]) == (
        "failed",
        "; ".join(["ArithmeticError: spoiled", *notes]),
    )
