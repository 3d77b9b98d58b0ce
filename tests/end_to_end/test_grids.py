"""Grids of runs: several commands on one grid, a command that is killed, executors, the live table."""

import io
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys

import attrs
import pytest
import rich.console

import altgrad_core as altgrad
from altgrad_core import checkpoint, commands, live_table
from altgrad_core.hookspecs import CellResult, Component, NoOptions
from altgrad_core.options import option
from altgrad_core.record import RunFolder, read_json, read_lines
from altgrad_core.registry import Registered, Registry, UsageError, discover

TINY = """
name = "tiny"
steps = 6
[data]
plugin = "markov"
tokens = 2000
validation_tokens = 500
[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
[train]
batch_size = 4
device = "cpu"
warmup_steps = 2
eval_every = 0
eval_batches = 2
log_every = 2
checkpoint_every = 3
[grid]
seed = {seeds}
"""


@pytest.fixture
def write(tmp_path):
    """Write an experiment file, and return its path."""

    def write(seeds, text=TINY) -> pathlib.Path:
        path = tmp_path / "experiment.toml"
        path.write_text(text.format(seeds=seeds))
        return path

    return write


def run(path, out, *overrides, jobs=1, registry=None, quiet=True):
    """Run a file in this process, as the command does; returns its exit code."""
    file = altgrad.load_experiment(path, overrides, registry)
    options = {"without": (), "device": "auto", "resume": None, "jobs": jobs, "quiet": quiet}
    return commands.run_file(file, out=out, **options)


def outcomes(out):
    """Return how the cells of a command's closing table ended, by name."""
    rows = [line.split() for line in out.splitlines() if "tiny/" in line]
    return {row[-1].rpartition("/")[2]: row[0] for row in rows}


def model_bytes(folder):
    found, _ = checkpoint.newest(folder / "checkpoints")
    return {name: tensor.numpy().tobytes() for name, tensor in found.model.items()}


# --- who runs what -----------------------------------------------------------------------------------


def test_finished_cells_are_passed_over_and_added_ones_run(write, tmp_path, capsys):
    assert run(write([1, 2]), tmp_path) == 0
    before = (tmp_path / "tiny" / "seed=1" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert run(write([1, 2, 3]), tmp_path) == 0
    assert outcomes(capsys.readouterr().out) == {
        "seed=1": "skipped",
        "seed=2": "skipped",
        "seed=3": "finished",
    }
    assert (tmp_path / "tiny" / "seed=1" / "metrics.jsonl").read_bytes() == before


def test_a_finished_cell_of_other_options_is_refused_and_the_others_run(write, tmp_path, capsys):
    run(write([1]), tmp_path)
    assert run(write([1, 2]), tmp_path, "steps=5") == 1
    out, err = capsys.readouterr()
    assert "steps: 6 -> 5" in err
    assert {"seed=1": "failed", "seed=2": "finished"}.items() <= outcomes(out).items()


def test_a_cell_that_fails_lets_the_others_finish_and_is_told_at_the_end(write, tmp_path, capsys):
    text = TINY.replace("seed = {seeds}", '"data.tokens" = [20, 2000, 10, 3000]').replace(
        "block_size = 16", "block_size = 18"
    )
    assert run(write([], text), tmp_path) == 1
    out, err = capsys.readouterr()
    assert outcomes(out) == {
        "tokens=20": "finished",
        "tokens=2000": "finished",
        "tokens=10": "failed",
        "tokens=3000": "finished",
    }
    assert "tokens=10: the train split" in err


def test_a_cell_that_another_process_runs_is_left_to_it(write, tmp_path, capsys):
    held = RunFolder(tmp_path / "tiny" / "seed=1")
    assert run(write([1, 2]), tmp_path) == 0
    held.close()
    out = capsys.readouterr().out
    assert outcomes(out) == {"seed=1": "busy", "seed=2": "finished"}
    assert "run the same command to go on" in out


def test_a_busy_cell_is_taken_over_when_its_process_has_let_go(write, tmp_path, capsys, monkeypatch):
    from altgrad_core import grids

    held = RunFolder(tmp_path / "tiny" / "seed=1")
    whole = grids.run_cell

    def run_cell(request, name):
        if name == "seed=2":
            held.close()
        return whole(request, name)

    monkeypatch.setattr(grids, "run_cell", run_cell)
    assert run(write([1, 2]), tmp_path) == 0
    assert outcomes(capsys.readouterr().out) == {"seed=1": "finished", "seed=2": "finished"}


def test_a_file_that_is_edited_meanwhile_changes_no_cell(write, tmp_path, monkeypatch):
    from altgrad_core import grids

    whole = grids.run_cell
    path = write([1, 2])

    def run_cell(request, name):
        path.write_text("name = 'other'")
        return whole(request, name)

    monkeypatch.setattr(grids, "run_cell", run_cell)
    assert run(path, tmp_path) == 0
    kept = (tmp_path / "tiny" / "seed=2" / "experiment.toml").read_text()
    assert kept == TINY.format(seeds=[1, 2])


def forked(*arguments):
    """Run a file in a process of its own, which has imported everything already."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(run(*arguments)))
    process.start()
    return process


def test_two_commands_share_a_grid_and_run_no_cell_twice(write, tmp_path):
    path, shared = write(list(range(6))), tmp_path / "shared"
    both = [forked(path, shared) for _ in range(2)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    folders = sorted((shared / "tiny").iterdir())
    assert len(folders) == 6
    for folder in folders:
        assert read_json(folder / "summary.json")["outcome"] == "finished"
        assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [0, 2, 4, 6]
        assert (folder / "log.txt").read_text().count("finished at step") == 1


LONGER = ("steps=40", "train.checkpoint_every=5")


def goes_on(path, out, whole, capsys, overrides):
    """Run a grid to its end, and compare it with one that was never interrupted."""
    first = out / "tiny" / "seed=1"
    assert (read_json(first / "summary.json") or {}).get("outcome") in (None, "terminated")
    assert run(path, out, *overrides) == 0
    assert set(outcomes(capsys.readouterr().out).values()) == {"finished"}
    run(path, whole, *overrides)
    for seed in ("seed=1", "seed=2"):
        assert model_bytes(out / "tiny" / seed) == model_bytes(whole / "tiny" / seed)


def test_a_command_that_is_killed_in_mid_grid_is_gone_on_with(write, tmp_path, capsys, monkeypatch):
    path, out, saves, whole = write([1, 2]), tmp_path / "runs", [], checkpoint.save

    def killed_in_the_third(*arguments):
        saves.append(whole(*arguments))
        if len(saves) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return saves[-1]

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed_in_the_third)
        command = forked(path, out, *LONGER)
    command.join()
    assert command.exitcode == -signal.SIGKILL
    goes_on(path, out, tmp_path / "whole", capsys, LONGER)


@pytest.mark.slow  # three processes that import torch
def test_the_processes_of_a_command_that_is_killed_write_their_checkpoints(
    write, tmp_path, capsys, wait_until, start
):
    path, out = write([1, 2]), tmp_path / "runs"
    longer = ("steps=500", "train.checkpoint_every=5")  # they are still at it when their command is killed
    flags = [part for one in longer for part in ("--set", one)]
    command = start(path, "--out", out, "--jobs", "2", *flags, "--quiet", start_new_session=True)
    wait_until(lambda: list(out.glob("tiny/seed=1/checkpoints/step_*")))
    workers = {int(lock.read_text().split()[1]) for lock in out.glob("tiny/*/.lock")}
    os.kill(command.pid, signal.SIGKILL)
    command.communicate()
    wait_until(lambda: not any(pathlib.Path(f"/proc/{pid}").exists() for pid in workers))
    assert read_json(out / "tiny" / "seed=1" / "summary.json")["outcome"] == "terminated"
    goes_on(path, out, tmp_path / "whole", capsys, longer)


# --- executors ---------------------------------------------------------------------------------------


class Backwards:
    """An executor that runs the cells from the last to the first, through pickle."""

    def __init__(self, attempts):
        self.attempts = attempts

    def run(self, cells, run_cell, jobs):
        import pickle

        run_cell = pickle.loads(pickle.dumps(run_cell))
        return [run_cell(cell) for cell in reversed(cells)]


class Failing:
    def run(self, cells, run_cell, jobs):
        raise ConnectionError("nobody is there")


class Unreachable:
    def run(self, cells, run_cell, jobs):
        raise UsageError("no cluster at 'x'; start one")


@attrs.frozen(kw_only=True)
class BackwardsOptions:
    attempts: int = option("how often a cell is tried", default=1)


def backwards(options):
    return Backwards(options.attempts)


def failing(options):
    return Failing()


def unreachable(options):
    return Unreachable()


@pytest.fixture
def executors():
    """A registry with what is installed and the executors above."""
    installed = discover()
    made = [
        Registered(
            kind="executor",
            component=Component(
                name=one.__name__,
                summary="",
                options=BackwardsOptions if one is backwards else NoOptions,
                target=f"executors_of_tests:{one.__name__}",
            ),
            distribution="far-away",
            version="0.1",
        )
        for one in (backwards, failing, unreachable)
    ]
    sys.modules["executors_of_tests"] = sys.modules[__name__]
    yield Registry(registered=(*installed.registered, *made))
    del sys.modules["executors_of_tests"]


def test_the_executor_of_the_file_runs_the_cells(write, tmp_path, executors, capsys):
    assert run(write([1, 2]), tmp_path, "executor=backwards", registry=executors) == 0
    assert outcomes(capsys.readouterr().out) == {"seed=1": "finished", "seed=2": "finished"}
    began = [(tmp_path / "tiny" / f"seed={seed}" / "resolved.json").stat().st_mtime_ns for seed in (1, 2)]
    assert began[0] > began[1]


def test_a_single_run_goes_through_the_executor_too(write, tmp_path, executors, capsys):
    text = TINY.replace("[grid]\nseed = {seeds}\n", "[executor]\nplugin = 'backwards'\n")
    assert run(write([], text), tmp_path, registry=executors) == 0
    assert outcomes(capsys.readouterr().out) == {"run": "finished"}


@pytest.mark.parametrize("written", ["executor = 'backwards'\n", "", "[executor]\nplugin = 'backwards'\n"])
def test_options_of_an_executor_may_be_set_by_flag(write, executors, written):
    path = write([1], written + TINY if written.startswith("executor") else TINY + written)
    flags = ["executor.attempts=2", *([] if written else ["executor=backwards"])]
    chosen = altgrad.load_experiment(path, flags, executors).executor
    assert (chosen.plugin, chosen.options.attempts) == ("backwards", 2)
    with pytest.raises(UsageError, match=r"--set executor\.attempts=true: .*: expected a whole"):
        altgrad.load_experiment(path, ["executor=backwards", "executor.attempts=true"], executors)


def test_the_executor_is_no_option_of_a_run(write, tmp_path, executors, capsys):
    run(write([1]), tmp_path, "executor=backwards", registry=executors)
    assert "executor" not in read_json(tmp_path / "tiny" / "seed=1" / "resolved.json")["options"]
    capsys.readouterr()
    assert run(write([1, 2]), tmp_path, registry=executors) == 0
    assert outcomes(capsys.readouterr().out) == {"seed=1": "skipped", "seed=2": "finished"}


def test_an_executor_that_raises_is_named_with_its_distribution(write, tmp_path, executors, capsys):
    assert run(write([1, 2]), tmp_path, "executor=failing", registry=executors) == 1
    err = capsys.readouterr().err
    assert "executor 'failing' of far-away 0.1: run raised ConnectionError: nobody is there" in err


def test_an_executor_may_say_what_to_do(write, tmp_path, executors):
    with pytest.raises(UsageError, match="no cluster at 'x'; start one"):
        run(write([1, 2]), tmp_path, "executor=unreachable", registry=executors)


def test_check_refuses_an_executor_that_is_not_there_at_its_line(write, ended, start):
    path = write([1], TINY + "[executor]\nplugin = 'slurm'\n")
    code, _, err = ended(start(path, "--check"))
    assert code == 2
    assert f"{path}:{TINY.count(chr(10)) + 2}: executor.plugin: no executor named 'slurm'" in err


# --- the live table ----------------------------------------------------------------------------------


@pytest.fixture
def table(tmp_path):
    """Return a function from cells to a live table of them, as a terminal shows it."""

    def table(*names):
        made = live_table.LiveTable({name: tmp_path / name for name in names}, dict.fromkeys(names, 60))
        screen = io.StringIO()
        rich.console.Console(file=screen, width=100, no_color=True).print(made)
        return screen.getvalue()

    return table


def lines_of(folder, *lines, torn=""):
    (folder.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)


def test_the_table_shows_the_last_numbers_of_the_cells_that_run(tmp_path, table):
    running = RunFolder(tmp_path / "seed=1")
    lines_of(
        running,
        {"step": 30, "train/loss": 3.5, "validation/loss": 3.6},
        {"step": 40, "train/loss": 3.25, "time/tokens_per_second": 1234.0},
        torn='{"step": 50, "tra',
    )
    shown = table("seed=1", "seed=2")
    assert "0 of 2 runs ended" in shown
    (row,) = [line.split() for line in shown.splitlines() if line.startswith("seed=")]
    assert row == ["seed=1", "40/60", "3.2500", "1,234", "3.6000"]
    running.close()


def test_a_cell_that_has_ended_is_counted_by_its_outcome(tmp_path, table):
    for name, outcome in (("a", "finished"), ("b", "stopped"), ("c", "finished")):
        folder = RunFolder(tmp_path / name)
        folder.finish({"outcome": outcome})
        folder.close()
    shown = table("a", "b", "c", "d")
    assert "3 of 4 runs ended (2 finished, 1 stopped)" in shown
    assert "60" not in shown


def test_a_cell_whose_process_died_is_not_shown_as_running(tmp_path, table):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    folder = RunFolder(tmp_path / "a")
    (folder.path / ".lock").write_text(
        (folder.path / ".lock").read_text().replace(str(os.getpid()), str(process.pid))
    )
    folder.close()
    assert "/60" not in table("a")


def test_more_cells_than_fit_are_counted(tmp_path, table):
    folders = [RunFolder(tmp_path / f"seed={seed}") for seed in range(23)]
    shown = table(*(f"seed={seed}" for seed in range(23)))
    assert shown.count("0/60") == 20
    assert "and 3 more" in shown
    for folder in folders:
        folder.close()


def test_there_is_no_table_in_a_pipe(tmp_path):
    screen = io.StringIO()
    with live_table.shown({"a": tmp_path}, {"a": 1}, rich.console.Console(file=screen)):
        pass
    assert screen.getvalue() == ""


@pytest.mark.slow  # three processes that import torch
def test_jobs_on_a_terminal_show_the_table_and_plain_lines_in_a_pipe(write, tmp_path, ended, start):
    import pty

    path, arguments = write([1, 2]), ["--jobs", "2", "--set", "steps=300"]
    code, out, _ = ended(start(path, "--out", tmp_path / "pipe", *arguments))
    assert code == 0
    assert "(2 of 2)" in out
    assert "runs ended" not in out
    ours, theirs = pty.openpty()
    shared = {"stdout": theirs, "stderr": theirs, "env": {**os.environ, "TERM": "xterm"}}
    process = start(path, "--out", tmp_path / "terminal", *arguments, **shared)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # how Linux says that the other end is closed
        pass
    assert process.wait() == 0
    assert b"of 2 runs ended" in shown
    assert b"(2 of 2)" in shown


def test_an_outcome_of_an_executor_is_shown_as_it_is(write, tmp_path, executors, monkeypatch, capsys):
    def run_none(self, cells, run_cell, jobs):
        return [CellResult(cell=cells[0], outcome="interrupted")]

    monkeypatch.setattr(Backwards, "run", run_none)
    assert run(write([1, 2, 3]), tmp_path, "executor=backwards", registry=executors) == 130
    assert "not begun: 2" in capsys.readouterr().out
