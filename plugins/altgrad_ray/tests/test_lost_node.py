"""A grid of real runs, started by the command: a node goes in mid-grid, or a signal comes."""

import json
import os
import pathlib
import signal
import time

import pytest

pytest.importorskip("ray", reason="the executor's tests run in an environment of their own: nox -s isolated")

from altgrad_core.record import read_json, read_lines

GRID = """
name = "tiny"
steps = 60
[data]
plugin = "digits"
[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
dropout = 0.2
[train]
batch_size = 4
device = "cpu"
warmup_steps = 2
eval_every = 20
eval_batches = 2
log_every = 7
checkpoint_every = 5
[quantize]
format = "T5"
storage = "grid"
storage_rounding = "stochastic"
[optimizer]
plugin = "Adam"
[grid]
seed = [1, 2, 3]
"""
CELLS = ["seed=1", "seed=2", "seed=3"]
CLOCKS = ("time/", "cost/", "memory/")


EXECUTOR = """
[executor]
plugin = "ray"
address = "{}"
gpus_per_cell = 0
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes the grid's file; commands run on one thread, as Ray's workers do."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def write(name, *more):
        (tmp_path / name).write_text(GRID + "".join(more))
        return tmp_path / name

    return write


def wait_until(condition):
    deadline = time.monotonic() + 90
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert found
    return found


def ended(process):
    out, err = process.communicate(timeout=180)
    return process.returncode, out, err


def begun(folder):
    """Return the cells of a grid that have a checkpoint and no end, and the process of each."""
    cells = [cell for cell in CELLS if list((folder / cell / "checkpoints").glob("step_*"))]
    open_ones = [cell for cell in cells if not (folder / cell / "summary.json").exists()]
    return {cell: int((folder / cell / ".lock").read_text().split()[1]) for cell in open_ones}


def parent(process):
    """Return a process's parent; None for one that has ended."""
    try:
        state, parent = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[:2]
    except FileNotFoundError:
        return None
    return None if state == "Z" else int(parent)


def result_of(folder):
    """Return the bytes of the last weights, and the lines of metrics without clocks."""
    last = max((folder / "checkpoints").glob("step_*"))
    lines = [
        {key: value for key, value in line.items() if not key.startswith(CLOCKS)}
        for line in read_lines(folder / "metrics.jsonl")
    ]
    return last.name, (last / "model.safetensors").read_bytes(), json.dumps(lines)


def test_a_node_lost_in_mid_grid_changes_no_bit(write, tmp_path, cluster, command):
    steps = ["--set", "steps=200"]
    whole, parts = tmp_path / "whole" / "tiny", tmp_path / "parts" / "tiny"
    running = command(write("ray.toml", EXECUTOR.format(cluster.address)), "--out", parts.parent, *steps)
    raylet = cluster.second.all_processes["raylet"][0].process.pid
    lost = wait_until(lambda: [cell for cell, process in begun(parts).items() if parent(process) == raylet])
    cluster.remove_node(cluster.second, allow_graceful=False)
    code, out, err = ended(running)
    assert (code, err) == (0, ""), out
    assert f"{lost[0]}: lost in 1 of 4 tries" in out
    assert sorted(line.split()[0] for line in out.splitlines() if " of 3)" in line) == [
        f"{one}:" for one in CELLS
    ]
    assert ended(command(write("serial.toml"), "--out", whole.parent, *steps))[0] == 0
    for cell in CELLS:
        assert read_json(parts / cell / "summary.json")["outcome"] == "finished"
        assert result_of(parts / cell) == result_of(whole / cell)
    assert "resuming" in (parts / lost[0] / "log.txt").read_text()


@pytest.mark.parametrize(
    ("send", "sent", "code"),
    [(os.killpg, "SIGINT", 130), (os.kill, "SIGTERM", 143)],  # a terminal's Ctrl-C reaches the whole group
)
def test_a_signal_leaves_checkpoints_and_no_process(send, sent, code, write, tmp_path, command):
    path = write("ray.toml", EXECUTOR.format(""))
    running = command(path, "--out", tmp_path, "--set", "steps=100000", start_new_session=True)
    processes = wait_until(lambda: begun(tmp_path / "tiny"))
    send(running.pid, signal.Signals[sent])
    found, out, err = ended(running)
    assert (found, err) == (code, ""), out
    for cell, process in processes.items():
        assert read_json(tmp_path / "tiny" / cell / "summary.json")["outcome"] == "interrupted"
        wait_until(lambda process=process: parent(process) is None)
