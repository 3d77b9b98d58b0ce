"""The mirror to Weights & Biases, before a wandb package that records, raises or hangs; then the real one."""

import gc
import importlib
import importlib.util
import math
import random
import sys
import textwrap
import threading
import time
import types

import numpy as np
import pytest
import torch

from altgrad_core.experiment import Experiment
from altgrad_monitors import WandbOptions
from altgrad_monitors.wandb import NO_PACKAGE, QUEUE_LINES, Wandb

PACKAGE = '''
"""Records what it is asked to do."""

import threading

calls = []
gate = threading.Event()


class Settings:
    def __init__(self, **options):
        self.options = options


class Run:
    def __init__(self):
        self.summary = {}

    def log(self, metrics, step):
        calls.append(("log", step, metrics))

    def finish(self, exit_code):
        calls.append(("finish", exit_code, dict(self.summary)))


def init(**arguments):
    calls.append(("init", arguments))
    return Run()
'''

FAILURES = {
    "import": "raise ImportError('no kernel')",
    "init": "def init(**arguments):\n    raise OSError('no kernel')",
    "log": "def log(self, metrics, step):\n    raise ValueError('no kernel')\nRun.log = log",
    "finish": "def finish(self, exit_code):\n    raise SystemExit('no kernel')\nRun.finish = finish",
}

HANGS = {
    "import": "gate.wait(30)",
    "init": "init_now = init\ndef init(**arguments):\n    gate.wait(30)\n    return init_now(**arguments)",
    "log": "def log(self, metrics, step):\n    gate.wait(30)\nRun.log = log",
    "finish": "def finish(self, exit_code):\n    gate.wait(30)\nRun.finish = finish",
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Return a function that puts a package `wandb` on the path, changed at its end by some lines."""

    def make(changes=""):
        folder = tmp_path / "site" / "wandb"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(PACKAGE + textwrap.dedent(changes))
        monkeypatch.syspath_prepend(str(folder.parent))
        monkeypatch.delitem(sys.modules, "wandb", raising=False)

    yield make
    until = time.monotonic() + 20
    while (threads := wandb_threads()) and time.monotonic() < until:
        gate = getattr(sys.modules.get("wandb"), "gate", None)
        if gate is not None:
            gate.set()
        threads[0].join(0.05)
    sys.modules.pop("wandb", None)


def wandb_threads():
    return [thread for thread in threading.enumerate() if thread.name == "wandb"]


class Run(types.SimpleNamespace):
    """What the monitor uses of a run."""

    def __init__(self, folder):
        super().__init__(
            folder=types.SimpleNamespace(path=folder),
            cell="lr=1e-3",
            experiment=Experiment(name="study", steps=7),
            layers={"h.0.weight": "h.0", "h.1.weight": "h.1"},
            warnings=[],
        )
        self.warn = self.warnings.append


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "runs")


def mirrored(run, lines, outcome="finished", **options):
    """Run a monitor through these lines of metrics, and return it."""
    monitor = Wandb(WandbOptions(**options))
    monitor.start(run)
    for step, metrics in lines:
        monitor.logged(step, metrics)
    monitor.end(run, outcome)
    return monitor


def calls(kind):
    return [call for call in sys.modules["wandb"].calls if call[0] == kind]


def test_every_line_arrives_under_its_own_step(package, run):
    package()
    mirrored(run, [(0, {"validation/loss": 3.0}), (5, {"train/loss": 2.5, "flip/flip_count/total": 7.0})])
    assert calls("log") == [
        ("log", 0, {"validation/loss": 3.0}),
        ("log", 5, {"train/loss": 2.5, "flip/flip_count/total": 7.0}),
    ]
    assert run.warnings == []


def test_steps_and_layers_can_be_chosen(package, run):
    package()
    metrics = {"train/loss": 2.5, **dict.fromkeys(("rank/stable_rank/h.0", "rank/stable_rank/h.1"), 4.0)}
    metrics |= {"rank/stable_rank/total": 4.0, "rank/stable_rank/mlp": 4.0, "epoch/rank/stable_rank": 4.0}
    mirrored(run, [(step, metrics) for step in (0, 5, 10, 15)], every=10, layers=r"h\.1")
    del metrics["rank/stable_rank/h.0"]
    assert calls("log") == [("log", 0, metrics), ("log", 10, metrics)]


def test_numbers_that_are_not_finite_arrive_too(package, run):
    package()
    mirrored(run, [(1, {"train/loss": math.nan, "fidelity/snr_db/total": math.inf})])
    ((_, _, metrics),) = calls("log")
    assert math.isnan(metrics["train/loss"])
    assert metrics["fidelity/snr_db/total"] == math.inf


def test_a_line_that_is_changed_afterwards_arrives_as_it_was(package, run):
    package(HANGS["init"])
    monitor, line = Wandb(WandbOptions()), {"train/loss": 1.0}
    monitor.start(run)
    monitor.logged(1, line)
    line["train/loss"] = 2.0
    importlib.import_module("wandb").gate.set()
    monitor.end(run, "finished")
    assert calls("log") == [("log", 1, {"train/loss": 1.0})]


def test_the_group_is_the_experiment_and_the_job_type_the_cell(package, run):
    package()
    mirrored(run, [], project="formats", entity="lab")
    ((_, given),) = calls("init")
    assert (given["group"], given["job_type"], given["name"]) == ("study", "lr=1e-3", "study/lr=1e-3")
    assert (given["project"], given["entity"]) == ("formats", "lab")
    assert given["dir"] == str(run.folder.path)
    assert given["config"]["steps"] == 7


@pytest.mark.parametrize(("mode", "resume"), [("offline", None), ("online", "allow")])
def test_offline_is_the_default_and_only_online_resumes_by_itself(package, run, mode, resume):
    package()
    mirrored(run, [], **{} if mode == "offline" else {"mode": mode})
    ((_, given),) = calls("init")
    assert (given["mode"], given["resume"]) == (mode, resume)


@pytest.mark.parametrize(
    ("outcome", "code"), [("finished", 0), ("stopped", 1), ("interrupted", 130), ("failed", 1)]
)
def test_the_outcome_is_told_at_the_end(package, run, outcome, code):
    package()
    mirrored(run, [], outcome)
    assert calls("finish") == [("finish", code, {"outcome": outcome})]


def test_a_resumed_run_goes_on_under_the_same_id(package, run):
    package()
    state = mirrored(run, [(1, {})], "interrupted").state_dict()
    again = Wandb(WandbOptions())
    again.load_state_dict(state)
    again.start(run)
    again.end(run, "finished")
    (_, first), (_, second) = calls("init")
    assert first["id"] == second["id"] == again.state_dict()["id"]


def test_two_runs_have_two_ids():
    assert Wandb(WandbOptions()).state_dict() != Wandb(WandbOptions()).state_dict()


def test_disabled_does_not_even_import_it(package, run):
    package()
    mirrored(run, [(1, {"train/loss": 1.0})], mode="disabled")
    assert "wandb" not in sys.modules
    assert run.warnings == []


def test_no_step_is_observed(package):
    assert 10**9 % Wandb.every
    assert Wandb(WandbOptions()).observe(None) == {}


def test_without_the_package_one_warning_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    mirrored(run, [(1, {}), (2, {})])
    assert run.warnings == [NO_PACKAGE]
    assert "pip install 'altgrad-monitors[wandb]'" in NO_PACKAGE


def test_a_folder_of_the_name_that_wandb_itself_has_left_is_no_package(run, monkeypatch, tmp_path):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert importlib.util.find_spec("wandb") is not None
    mirrored(run, [(1, {})])
    assert run.warnings == [NO_PACKAGE]


@pytest.mark.parametrize("where", FAILURES)
def test_a_failure_is_reported_once_and_nothing_stops(package, run, where):
    package(FAILURES[where])
    mirrored(run, [(step, {"train/loss": 1.0}) for step in range(1, 20)])
    (warning,) = run.warnings
    assert "no kernel" in warning
    assert "run folder" in warning


@pytest.mark.parametrize("where", HANGS)
def test_one_that_hangs_holds_up_no_line_and_the_end_for_its_patience_only(package, run, where):
    package(HANGS[where])
    begun = time.monotonic()
    mirrored(run, [(step, {"train/loss": 1.0}) for step in range(50)], patience=0.2)
    assert time.monotonic() - begun < 10  # the fake hangs for 30 s
    assert all(thread.daemon for thread in wandb_threads())  # the process can end
    (warning,) = run.warnings
    assert "0.2 s after the run's end" in warning


def test_what_waits_is_bounded_and_a_full_queue_is_reported_once(package, run):
    package(HANGS["init"])
    begun = time.monotonic()
    mirrored(run, [(step, {"train/loss": 1.0}) for step in range(QUEUE_LINES + 50)], patience=0.2)
    assert time.monotonic() - begun < 10
    (warning,) = run.warnings
    assert f"{QUEUE_LINES} lines" in warning


def test_a_run_that_fails_without_an_end_does_not_leave_its_thread_behind(package, run):
    package()
    monitor = Wandb(WandbOptions())
    monitor.start(run)
    monitor.logged(1, {})
    (thread,) = wandb_threads()
    del monitor
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    assert calls("finish") == [("finish", 1, {"outcome": "failed"})]


@pytest.mark.slow
def test_the_real_package_writes_offline_into_the_run_folder_and_draws_no_random_numbers(
    run, tmp_path, monkeypatch
):
    pytest.importorskip("wandb", reason="altgrad-monitors[wandb] is not installed")
    monkeypatch.chdir(tmp_path)
    run.folder.path.mkdir()
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()
    monitor = mirrored(run, [(0, {"validation/loss": 3.0}), (5, {"train/loss": 2.5})], patience=60.0)
    assert run.warnings == []
    assert (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()) == before
    (written,) = run.folder.path.glob("wandb/offline-run-*/run-*.wandb")
    assert monitor.state_dict()["id"] in written.name
    content = written.read_bytes()
    assert all(word in content for word in (b"train/loss", b"validation/loss", b"study/lr=1e-3", b"finished"))
    assert not (tmp_path / "wandb").exists()
