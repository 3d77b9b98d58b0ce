"""A run that asks for more memory than any machine has ends in one line, and leaves a summary."""

import sys

import pytest
import torch

from altgrad_core import memory
from altgrad_core.apps import guarded, run_app
from altgrad_core.experiment_file import load_experiment
from altgrad_core.record import read_json
from altgrad_core.registry import PluginError

TINY = """
name = "tiny"
steps = 4
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
gradient_accumulation = 2
device = "cpu"
eval_batches = 1
checkpoint_every = 2
"""
WIDE, LARGE = "model.n_embd=10000000000000", "train.batch_size=100000000000000"
WIDEST = "model.n_embd=4000000000000000000"
"""More than any address space has: no system can promise it."""


@pytest.fixture
def failed(write, tmp_path, capsys):
    """Return a function that runs a file with a flag, which fails; returns the message and the summary."""

    def failed(text, flag, *more):
        options = ["--out", str(tmp_path), "--set", flag, "--quiet", *more]
        assert guarded(run_app, [str(write(text)), *options]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line, read_json(next(tmp_path.glob("tiny/*/summary.json")))

    return failed


@pytest.mark.parametrize(
    ("flag", "asked", "refused"),
    [
        (WIDE, "1,200,000,000,000,350,000,000,000,000 parameters and reads 64 tokens", "DefaultCPUAllocator"),
        (LARGE, "3,632 parameters and reads 1,600,000,000,000,000 tokens", "Unable to allocate"),
        (WIDEST, "parameters and reads 64 tokens", "Storage size calculation overflowed"),
    ],
)
def test_what_was_asked_for_and_what_to_lower_is_said_in_one_line(flag, asked, refused, failed):
    line, summary = failed(TINY, flag)
    assert line.startswith("failed: out of memory: the model has ")
    assert f"{asked} at once; lower model.n_embd" in line
    assert refused in line
    assert summary["message"] == line.replace("failed", "OutOfMemoryError", 1)
    assert (summary["outcome"], summary["step"], summary["name"]) == ("failed", 0, "tiny")


def test_a_run_too_large_stops_no_other_of_its_grid(write, tmp_path, capsys):
    path = write(TINY + '[grid]\n"model.n_embd" = [10000000000000, 16]\n')
    assert guarded(run_app, [str(path), "--out", str(tmp_path), "--quiet"]) == 1
    assert "n_embd=10000000000000: out of memory: the model has " in capsys.readouterr().err
    ends = {one.parent.name: read_json(one)["outcome"] for one in tmp_path.glob("tiny/*/summary.json")}
    assert ends == {"n_embd=10000000000000": "failed", "n_embd=16": "finished"}


def test_what_is_known_of_a_run_stays_known_when_it_cannot_be_taken_up(
    write, run, interrupted_at, monkeypatch, tmp_path
):
    path, go_on = write(TINY), interrupted_at(3)
    before = run(path, tmp_path).summary
    go_on()
    monkeypatch.setitem(sys.modules, "altgrad_optim.adamw", None)
    with pytest.raises(PluginError, match="cannot be loaded") as got:
        run(path, tmp_path)
    after = read_json(tmp_path / "tiny" / "run" / "summary.json")
    assert after == {**before, "outcome": "failed", "message": f"PluginError: {got.value}"}
    assert (before["outcome"], before["step"]) == ("interrupted", 3)


@pytest.fixture
def experiment(write):
    return load_experiment(write(TINY)).cells_on["cpu"][0].experiment


def test_memory_of_a_gpu_is_told_alike(experiment):
    found = r"3,632 parameters .* \(CUDA out of memory\. Tried\)$"
    with pytest.raises(memory.OutOfMemoryError, match=found), memory.told(experiment):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")


@pytest.mark.parametrize(
    "error", [RuntimeError("mat1 and mat2"), ValueError("DefaultCPUAllocator"), KeyError()]
)
def test_other_errors_pass_as_they_are(error, experiment):
    with pytest.raises(type(error)) as got, memory.told(experiment):
        raise error
    assert got.value is error
