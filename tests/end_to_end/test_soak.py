"""What must hold wherever the fault strikes: kills, resumes, flipped bytes and mutated files in numbers.

A few of each by default; with ALTGRAD_SOAK=1, as `nox -s soak` sets it, as many as a release takes. The draws
are seeded, so that a failure comes back.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch

from altgrad_core import checkpoint
from altgrad_core.checkpoint import CheckpointError
from altgrad_core.record import read_lines

pytestmark = pytest.mark.slow

SOAK = bool(os.environ.get("ALTGRAD_SOAK"))
KILLS = 200 if SOAK else 5
FILES = 1000 if SOAK else 50
NUMBERS = 1_000_000 if SOAK else 5_000
"""Numbers in the checkpoint that is damaged."""
STRIDE = 4096 if SOAK else 1024
"""Bytes of which one is flipped."""
CPU_SECONDS_PER_FILE = 1.0

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
batch_size = 2
gradient_accumulation = 2
device = "cpu"
warmup_steps = 2
eval_every = 10
eval_batches = 2
log_every = 7
checkpoint_every = 1
keep_checkpoints = 2
[[monitor]]
plugin = "flip"
every = 2
[[monitor]]
plugin = "stall"
[[fallback]]
plugin = "nan_guard"
[optimizer]
plugin = "{optimizer}"
[quantize]
format = "E4M3"
{storage}
[quantize.activations]
format = "E4M3"
amax_history = 3
"""
GRID = "storage = 'grid'\nstorage_rounding = '{}'\nbound = 4.0"
STORAGES = {
    "master": "storage = 'master'",
    **{
        rounding: GRID.format(rounding)
        for rounding in ("nearest_even", "stochastic", "error_feedback", "eco")
    },
}
ACCEPTED = {
    "AdamW": ("master", "stochastic", "error_feedback", "eco"),
    "ManifoldAdamW": ("master", "stochastic", "error_feedback", "eco"),
    "GridOptim": ("master", "nearest_even", "stochastic"),
    "Madam": ("master", "stochastic", "error_feedback"),
    "RiemannianAdam": ("master", "stochastic", "error_feedback"),
}
"""Optimizer to the storages it accepts."""
IN_CI = [
    *((optimizer, storage) for optimizer in ("AdamW", "ManifoldAdamW") for storage in ACCEPTED["AdamW"][:3]),
    *(("GridOptim", storage) for storage in ACCEPTED["GridOptim"]),
]
ARMS = [(optimizer, storage) for optimizer in ACCEPTED for storage in ACCEPTED[optimizer]] if SOAK else IN_CI
KILLED = [("GridOptim", "stochastic"), ("AdamW", "error_feedback"), ("ManifoldAdamW", "master")]
CLOCKS = ("time/", "cost/", "memory/")


@pytest.fixture
def write(tmp_path):
    """Return a function that writes the experiment of an arm, and returns its path."""

    def write(arm):
        optimizer, storage = arm
        if optimizer == "RiemannianAdam":
            pytest.importorskip("geoopt")
        path = tmp_path / "experiment.toml"
        path.write_text(TINY.format(optimizer=optimizer, storage=STORAGES[storage]))
        return path

    return write


def step_of(folder):
    """The newest step that has a checkpoint, whole or not; -1 without one."""
    return max((int(one.name[5:]) for one in (folder / "checkpoints").glob("step_*")), default=-1)


def wait_until(condition, process):
    deadline = time.monotonic() + 120
    while not condition() and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def bits(value):
    """Nested state with every tensor as its bytes, without what clocks have measured."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        clocks = ("seconds", "interval")
        kept = [key for key in value if key not in clocks and not str(key).startswith(CLOCKS)]
        return {key: bits(value[key]) for key in kept}
    if isinstance(value, list | tuple):
        return [bits(one) for one in value]
    return repr(value)


def left(folder):
    """Everything that a run leaves, apart from clocks: weights, states, metrics, events."""
    saved, passed_over = checkpoint.newest(folder / "checkpoints")
    assert passed_over == []
    assert (folder / "summary.json").exists()
    records = [
        [bits(line) for line in read_lines(folder / name)] for name in ("metrics.jsonl", "events.jsonl")
    ]
    return {"model": bits(saved.model), **bits(saved.state), "metrics": records[0], "events": records[1]}


def differing(one, other):
    return [key for key in one if one[key] != other[key]]


@pytest.mark.parametrize("arm", ARMS, ids="-".join)
def test_a_run_that_goes_on_in_a_new_process_equals_an_uninterrupted_one_bit_for_bit(
    arm, write, launch, tmp_path
):
    path, sparse = write(arm), ("--set", "train.checkpoint_every=30")
    whole = launch(path, "--out", tmp_path / "whole", *sparse)
    whole.join()
    first = launch(path, "--out", tmp_path / "parts", *sparse)
    folder = tmp_path / "parts" / "tiny" / "run"
    wait_until(lambda: step_of(folder) >= 30, first)
    os.kill(first.pid, signal.SIGTERM)
    first.join()
    second = launch(path, "--out", tmp_path / "parts", *sparse)
    second.join()
    assert (whole.exitcode, first.exitcode, second.exitcode) == (0, 143, 0)
    expected, found = left(tmp_path / "whole" / "tiny" / "run"), left(folder)
    interruption = [line for line in found["events"] if line not in expected["events"]]
    assert len(interruption) == 1  # the checkpoint that the signal asked for
    found["events"] = [line for line in found["events"] if line not in interruption]
    assert differing(expected, found) == []


@pytest.mark.parametrize("arm", KILLED, ids="-".join)
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(arm, write, launch, tmp_path):
    """Half of the kills strike soon after a checkpoint, probably in the next save; half of them anywhere."""
    draw, path, finished = random.Random(str(arm)), write(arm), []
    launch(path, "--out", tmp_path / "whole").join()
    expected = left(tmp_path / "whole" / "tiny" / "run")
    for kill in range(-(-KILLS // len(KILLED)) if SOAK else KILLS):
        out = tmp_path / f"parts{len(finished)}"
        folder = out / "tiny" / "run"
        before, process = step_of(folder), launch(path, "--out", out)
        if kill % 2 == 0:
            wait_until(lambda folder=folder, before=before: step_of(folder) > before, process)
        process.join(draw.uniform(0, 0.2))
        process.kill()
        process.join()
        saved, passed_over = checkpoint.newest(folder / "checkpoints")
        assert passed_over == []
        assert (saved.state["step"] if saved else -1) >= before, "a checkpoint was lost"
        if process.exitcode == 0:
            finished.append(folder)
    last = launch(path, "--out", tmp_path / f"parts{len(finished)}")
    last.join()
    assert last.exitcode == 0
    for folder in (*finished, tmp_path / f"parts{len(finished)}" / "tiny" / "run"):
        assert differing(expected, left(folder)) == []
        assert list(folder.rglob(".unfinished-*")) == []


# --- damaged checkpoints -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with two checkpoints; the newer one is damaged by the tests, and mended again."""
    folder = tmp_path_factory.mktemp("checkpoints")
    weight = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(1))
    for step in (1, 2):
        moments = {index: {"exp_avg": weight[:99] * index} for index in range(99)}
        state = {"step": step, "optimizer": {"state": moments, "names": [f"layer {n}" for n in range(99)]}}
        checkpoint.save(folder, checkpoint.step_name(step), {"weight": weight}, state)
    return folder / checkpoint.step_name(2)


FILES_OF_A_CHECKPOINT = [checkpoint.MODEL, checkpoint.TENSORS, checkpoint.TREE, checkpoint.MANIFEST]


@pytest.mark.parametrize("name", FILES_OF_A_CHECKPOINT)
def test_a_byte_flipped_anywhere_is_found(name, saved):
    draw, path = random.Random(name), saved / name
    whole = path.read_bytes()
    stride = 1 if name == checkpoint.MANIFEST else STRIDE
    with path.open("r+b", buffering=0) as file:
        for block in range(0, len(whole), stride):
            place = min(block + draw.randrange(stride), len(whole) - 1)
            os.pwrite(file.fileno(), bytes([whole[place] ^ 1 << draw.randrange(8)]), place)
            with pytest.raises(CheckpointError):
                checkpoint.load(saved)
            os.pwrite(file.fileno(), whole[place : place + 1], place)
    assert checkpoint.load(saved).state["step"] == 2


@pytest.mark.parametrize("length", [0, 0.5, -1], ids=["nothing", "half", "one byte less"])
@pytest.mark.parametrize("name", FILES_OF_A_CHECKPOINT)
def test_behind_a_file_that_is_cut_the_checkpoint_before_is_used(name, length, saved):
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(whole[: int(len(whole) * length) if length >= 0 else length])
    found, passed_over = checkpoint.newest(saved.parent)
    (saved / name).write_bytes(whole)
    assert found.state["step"] == 1
    assert len(passed_over) == 1
    assert str(saved) in passed_over[0]


# --- mutated files -----------------------------------------------------------------------------------

JUNK = [
    *(
        "true",
        "-1",
        "2.7",
        "1e400",
        "nan",
        "9" * 400,
        '"false"',
        '""',
        "[]",
        "{}",
        "[[1], {a = 2}]",
        "1979-05-27",
    ),
    *(
        "[" * 90 + "]" * 90,
        "[" * 9000,
        "{a = " * 90 + "1" + "}" * 90,
        '"\\u0000"',
        '"' + "x" * 9000 + '"',
        '"E9M9"',
    ),
]
KEYS = [
    "x = 1",
    "[x]",
    "[[model]]",
    "[on.gpu]\nx = 1",
    "a." * 500 + "a = 1",
    "[model.n_layer]",
    "\ufeff",
    "seed",
]
ENCODINGS = ["utf-16", "utf-32", "utf-8-sig", "cp500"]


def mutated(text, draw):
    """Return the bytes of an experiment file after one to three mistakes."""
    for _ in range(draw.randint(1, 3)):
        lines = text.split("\n")
        at = draw.randrange(len(lines))
        kind = draw.randrange(6)
        if kind == 0:  # a wrong value
            lines[at] = lines[at].partition("=")[0] + "= " + draw.choice(JUNK)
        elif kind == 1:  # something unknown
            lines.insert(at, draw.choice(KEYS))
        elif kind == 2:  # a line lost
            del lines[at]
        elif kind == 3:  # a line twice
            lines.insert(at, lines[at])
        text = "\n".join(lines)
        at = draw.randrange(len(text) + 1)
        if kind == 4:  # cut
            text = text[:at]
        elif kind == 5:  # a character that does not belong
            text = text[:at] + draw.choice("\x00\x07\r\"'[]{}=#é\U0001f600") + text[at:]
    whole = text.encode(draw.choice(["utf-8"] * 9 + ENCODINGS), errors="ignore")
    if draw.randrange(9) == 0 and whole:
        at = draw.randrange(len(whole))
        whole = whole[:at] + bytes([draw.randrange(256)]) + whole[at + 1 :]
    return whole


def checked(path):
    """Return exit code, errors and CPU seconds of `altgrad-run --check`."""
    script = "from altgrad_core.cli import altgrad_run; altgrad_run()"
    command = [sys.executable, "-c", script, str(path), "--check"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    return process.returncode, errors.decode(), used.ru_utime + used.ru_stime


def test_a_mutated_file_is_right_or_refused_by_its_lines_within_a_second(tmp_path):
    draw, path, codes = random.Random(5), tmp_path / "e.toml", set()
    text = TINY.format(optimizer="GridOptim", storage=STORAGES["stochastic"])
    for _ in range(FILES):
        path.write_bytes(mutated(text, draw))
        code, errors, seconds = checked(path)
        codes.add(code)
        given = f"{path.read_bytes()!r}\n{errors}"
        assert code in (0, 2), given
        assert seconds < CPU_SECONDS_PER_FILE, given
        assert bool(errors) == (code == 2), given
        for line in errors.splitlines():
            assert re.match(rf"{re.escape(str(path))}:\d+: ", line), given
    assert codes == {0, 2}


def test_the_file_that_is_mutated_is_right(tmp_path):
    (tmp_path / "e.toml").write_text(TINY.format(optimizer="GridOptim", storage=STORAGES["stochastic"]))
    code, errors, _ = checked(tmp_path / "e.toml")
    assert (code, json.dumps(errors)) == (0, '""')
