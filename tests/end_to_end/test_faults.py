"""Runs that are killed, starved and misled: what is left, and what the next command makes of it."""

import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core import checkpoint
from altgrad_core.record import read_json, read_lines
from altgrad_core.registry import UsageError

TINY = """
name = "tiny"
seed = 7
steps = 60
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
eval_every = 10
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
SCRIPT = "from altgrad_core.cli import altgrad_run; altgrad_run()"
CLOCKS = ("time/", "cost/", "memory/")


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def write(text: str) -> pathlib.Path:
        (tmp_path / "experiment.toml").write_text(text)
        return tmp_path / "experiment.toml"

    return write


def start(*arguments, **more):
    whole = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.Popen(whole, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)


def ended(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def run(path, out, *overrides):
    return altgrad.run(altgrad.load_experiment(path, overrides), out=out, quiet=True)


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def lines(folder, name):
    return [
        {key: value for key, value in line.items() if not key.startswith(CLOCKS)}
        for line in read_lines(folder / name)
    ]


def state_bytes(folder):
    """The model's bytes, and the optimizer's tensors', of the last step."""
    last = folder / "checkpoints" / checkpoint.step_name(60)
    saved = checkpoint.load(last)
    tensors = {}
    checkpoint._packed(saved.state["optimizer"], "", tensors)
    return (last / checkpoint.MODEL).read_bytes(), {key: one.tolist() for key, one in tensors.items()}


@pytest.mark.parametrize(
    "arm", [arm if arm == "GridOptim" else pytest.param(arm, marks=pytest.mark.slow) for arm in ARMS]
)
def test_a_run_that_is_killed_at_random_ends_as_one_that_was_not(arm, write, tmp_path):
    path = write(TINY + ARMS[arm] + WATCHED)
    whole, parts = tmp_path / "whole" / "tiny" / "run", tmp_path / "parts" / "tiny" / "run"
    first, killed = start(path, "--out", tmp_path / "whole"), start(path, "--out", tmp_path / "parts")
    wait_until(lambda: (parts / "checkpoints" / checkpoint.step_name(3)).exists())
    time.sleep(random.random() * 0.3)
    killed.kill()
    killed.communicate()
    assert ended(first)[0] == 0
    assert ended(start(path, "--out", tmp_path / "parts"))[0] == 0
    assert state_bytes(whole) == state_bytes(parts)
    assert json.dumps(lines(whole, "metrics.jsonl")) == json.dumps(lines(parts, "metrics.jsonl"))
    assert lines(whole, "events.jsonl") == lines(parts, "events.jsonl")


@pytest.mark.slow
def test_a_worker_that_is_killed_leaves_the_other_cells_alone(write, tmp_path):
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
def test_sigint_to_a_grid_leaves_checkpoints_and_no_process(to_the_group, write, tmp_path):
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


def test_a_stopped_run_says_so_and_is_not_run_again(write, tmp_path):
    path = write(PLAIN + "lr = 1e30\n[[fallback]]\nplugin='nan_guard'\nnan_patience=2\n")
    overrides = ["train.grad_clip=0.0"]
    first = run(path, tmp_path, *overrides)
    assert first.summary["message"].startswith("nan_guard: the loss was not finite")
    before = (first.folder / "metrics.jsonl").read_text()
    code, out, _ = ended(start(path, "--out", tmp_path, "--set", *overrides, "--quiet"))
    assert code == 1
    assert "was stopped at step" in out
    assert "nan_guard" in out
    assert (first.folder / "metrics.jsonl").read_text() == before


def test_a_run_killed_between_its_stop_and_its_summary_stays_stopped(write, tmp_path):
    path = write(PLAIN + "lr = 1e30\n[[fallback]]\nplugin='nan_guard'\nnan_patience=2\n")
    first = run(path, tmp_path, "train.grad_clip=0.0")
    (first.folder / "summary.json").unlink()
    again = run(path, tmp_path, "train.grad_clip=0.0")
    assert (again.outcome, again.summary["step"]) == ("stopped", first.summary["step"])
    assert again.summary["message"] == first.summary["message"]


def test_resume_goes_on_in_the_very_folder_it_was_given(write, tmp_path):
    path = write(PLAIN)
    first = run(path, tmp_path / "runs", "steps=3")
    moved = tmp_path / "kept" / "elsewhere"
    moved.parent.mkdir()
    first.folder.rename(moved)
    (moved / "summary.json").unlink()
    code, _, err = ended(start(path, "--resume", moved, "--set", "steps=3"))
    assert code == 0, err
    assert (moved / "summary.json").exists()
    assert not first.folder.exists()


def test_a_checkpoint_of_other_options_is_refused_by_the_field(write, tmp_path):
    path = write(PLAIN)
    first = run(path, tmp_path / "runs")
    for name in ("resolved.json", "summary.json"):
        (first.folder / name).unlink()
    with pytest.raises(UsageError, match=r"n_embd: 16 -> 32"):
        run(path, tmp_path / "runs", "model.n_embd=32")


def test_a_run_begun_on_another_device_says_which(write, tmp_path):
    path = write(PLAIN)
    first = run(path, tmp_path / "runs", "steps=3")
    resolved = json.loads((first.folder / "resolved.json").read_text())
    resolved["device"], resolved["options"]["steps"] = "cuda", 4
    (first.folder / "resolved.json").write_text(json.dumps(resolved))
    with pytest.raises(UsageError, match=r"begun on cuda, this is cpu: go on with --device cuda"):
        run(path, tmp_path / "runs", "steps=3")


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_the_last_checkpoint(write, tmp_path):
    path = write(PLAIN)
    run(path, tmp_path, "steps=3")
    size = (tmp_path / "tiny" / "run" / "checkpoints" / "step_00000003" / "state.json").stat().st_size

    def starve():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    code, _, err = ended(start(path, "--out", tmp_path / "starved", preexec_fn=starve))
    assert code == 1
    assert "cannot be written" in err
    assert "Traceback" not in err
    assert not list((tmp_path / "starved").rglob(".unfinished-*"))


@pytest.mark.parametrize("every", [2, 5])
def test_a_metric_is_logged_once_when_it_was_observed(every, write, tmp_path):
    text = TINY + ARMS["AdamW"] + f"[[monitor]]\nplugin='flip'\nevery={every}\n"
    result = run(write(text), tmp_path, "train.log_every=1", "steps=10")
    seen = [line["step"] for line in lines(result.folder, "metrics.jsonl") if "flip/flip_count/total" in line]
    assert seen == list(range(every, 11, every))


def test_every_other_step_counts_the_flips_of_that_step_alone(write, tmp_path):
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


def test_a_monitor_that_draws_from_the_global_stream_leaves_the_run_alone(write, tmp_path, monkeypatch):
    from altgrad_monitors.flip import Flip

    path = write(TINY + ARMS["AdamW"] + "[[monitor]]\nplugin='flip'\n")
    plain = run(path, tmp_path / "plain")
    monkeypatch.setattr(Flip, "observe", lambda self, step: {"flip/x/total": torch.rand(())})
    assert state_bytes(run(path, tmp_path / "drawn").folder) == state_bytes(plain.folder)


def test_a_monitor_that_writes_to_a_weight_ends_the_run_by_its_name(write, tmp_path, monkeypatch):
    from altgrad_core.run_state import PluginFailure
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


def test_a_monitor_that_was_dropped_stays_dropped_after_a_resume(write, tmp_path, monkeypatch):
    from altgrad_core import loop
    from altgrad_monitors.flip import Flip

    path = write(TINY + ARMS["AdamW"] + "[[monitor]]\nplugin='flip'\n")
    with monkeypatch.context() as broken:
        broken.setattr(Flip, "observe", lambda self, step: {"flip/x/total": "many"})
        broken.setattr(loop, "_checkpoint", lambda run: (run.save(), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            run(path, tmp_path)
    result = run(path, tmp_path)
    assert not any("flip/flip_count/total" in line for line in lines(result.folder, "metrics.jsonl"))


def test_a_signal_in_the_evaluation_still_gets_its_checkpoint(write, tmp_path, monkeypatch):
    from altgrad_core import loop

    whole = loop.evaluate

    def interrupted(run):
        if run.step == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(run)

    monkeypatch.setattr(loop, "evaluate", interrupted)
    result = run(write(PLAIN), tmp_path)
    assert result.outcome == "interrupted"
    found, _ = checkpoint.newest(result.folder / "checkpoints")
    assert found.state["step"] == result.summary["step"] == 10
