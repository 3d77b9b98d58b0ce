"""Runs in this process, and in processes of their own, forked from one that has imported everything."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core import checkpoint, loop
from altgrad_core.record import read_lines

PRELOADED = [
    *("__main__", "torch._dynamo", "torch.profiler", "numpy", "safetensors.torch"),
    *("altgrad_core.commands", "altgrad_core.assemble", "altgrad_core.loop"),
    *("altgrad_optim.adamw", "altgrad_data.markov", "altgrad_formats.layout"),
]
SCRIPT = "from altgrad_core.cli import altgrad_run; altgrad_run()"
CLOCKS = ("time/", "cost/", "memory/")
"""What the names of metrics begin with that no two runs have in common."""


# --- in this process ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The token cache of all tests, so that each text is prepared once, and each loop in C compiled once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)
def _cached(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALTGRAD_CACHE", str(cache))
        yield


@pytest.fixture
def write(tmp_path):
    """Return a function that writes an experiment file, and returns its path."""

    def write(text, name="experiment.toml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def run():
    """Return a function that runs a file into a folder, with `--set` flags."""

    def run(path, out, *flags):
        return altgrad.run(altgrad.load_experiment(path, flags), out=out, quiet=True)

    return run


@pytest.fixture
def run_text(write, run, tmp_path):
    """Return a function that runs an experiment's text, in a folder of that name."""

    def run_text(text, name="runs", *flags):
        return run(write(text, f"{name}.toml"), tmp_path / name, *flags)

    return run_text


@pytest.fixture
def killed_at(run):
    """Return a function that runs a file until a step is over, 0: until the first begins, and no further."""

    def killed_at(path, out, step):
        place, whole = ("_checkpoint", loop._checkpoint) if step else ("_one_step", lambda run: None)

        def die(run):
            whole(run)
            if run.step == step:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, place, die)
            with pytest.raises(KeyboardInterrupt):
                run(path, out)
        assert not list(out.rglob("summary.json"))

    return killed_at


@pytest.fixture
def interrupted_at(monkeypatch):
    """Return a function that has SIGINT come in the middle of a step; what it returns takes that back."""
    whole = loop._one_step

    def interrupted_at(step):
        def until(run):
            if run.step == step - 1:
                os.kill(os.getpid(), signal.SIGINT)
            whole(run)

        monkeypatch.setattr(loop, "_one_step", until)
        return lambda: monkeypatch.setattr(loop, "_one_step", whole)

    return interrupted_at


# --- what a run has left -----------------------------------------------------------------------------


@pytest.fixture(scope="session")
def lines():
    """Return a function that gives the records of a run's metrics, or of another file, without its clocks."""

    def lines(folder, name="metrics.jsonl"):
        return [_without_clocks(line) for line in read_lines(folder / name)]

    return lines


@pytest.fixture(scope="session")
def warnings():
    """Return a function that gives the warnings among a run's events."""

    def warnings(folder):
        events = read_lines(folder / "events.jsonl")
        return [event["message"] for event in events if event["event"] == "warning"]

    return warnings


@pytest.fixture(scope="session")
def last_checkpoint():
    """Return a function that reads a run's newest checkpoint, which is whole."""

    def last_checkpoint(result):
        found, passed_over = checkpoint.newest(result.folder / "checkpoints")
        assert not passed_over
        return found

    return last_checkpoint


@pytest.fixture(scope="session")
def without_clocks():
    """Return a function that gives the state in a checkpoint without what no two runs have in common."""

    def without_clocks(state):
        return {
            key: _without_clocks(value) if key in ("last", "best") else value
            for key, value in state.items()
            if key not in ("seconds", "interval")
        }

    return without_clocks


def _without_clocks(numbers):
    return {name: number for name, number in numbers.items() if not name.startswith(CLOCKS)}


@pytest.fixture(scope="session")
def same_tree():
    """Return a function that tells whether two trees of state are alike to the last bit."""

    def same_tree(one, other):
        if isinstance(one, torch.Tensor):
            return one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(same_tree(one[key], other[key]) for key in one)
        if isinstance(one, list | tuple):
            return len(one) == len(other) and all(map(same_tree, one, other))
        return one == other or (one != one and other != other)  # NaN

    return same_tree


# --- in processes of their own -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def forking(cache):
    """What forks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALTGRAD_CACHE", str(cache))
        first = context.Process(target=os.getpid)  # the server takes the environment of its first process
        first.start()
    first.join()
    return context


@pytest.fixture
def launch(forking, monkeypatch):
    """Return a function that starts `altgrad-run`, quiet, with its arguments, and returns the process."""
    from altgrad_core.cli import altgrad_run

    processes = []

    def launch(*arguments):
        monkeypatch.setattr(sys, "argv", ["altgrad-run", *map(str, arguments), "--quiet"])
        processes.append(forking.Process(target=altgrad_run))
        processes[-1].start()
        return processes[-1]

    yield launch
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture(scope="session")
def start():
    """Return a function that starts `altgrad-run` in a new interpreter, and returns the process.

    before: what the interpreter runs first, as text.
    """

    def start(*arguments, before="", **more):
        whole = [sys.executable, "-c", f"{before}\n{SCRIPT}", *map(str, arguments)]
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(whole, **{**piped, **more})

    return start


@pytest.fixture(scope="session")
def ended():
    """Return a function that waits for such a process; gives its exit code and what it wrote."""

    def ended(process):
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    return ended


@pytest.fixture(scope="session")
def wait_until():
    """Return a function that waits until something holds, for a minute at most."""

    def wait_until(condition):
        deadline = time.monotonic() + 60
        while not (found := condition()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert found

    return wait_until
