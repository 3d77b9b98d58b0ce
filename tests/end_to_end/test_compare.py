"""Comparisons: what is run, what is chosen, and what an interrupted or longer one runs again."""

import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import threading
import time

import pytest

import altgrad_core as altgrad
from altgrad_core import commands, compare, comparing
from altgrad_core.record import RunFolder, read_json, read_lines
from altgrad_core.registry import UsageError

TINY = """
name = "tiny"
steps = 3
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
warmup_steps = 1
eval_every = 0
eval_batches = 2
log_every = 1
checkpoint_every = 0
[quantize]
format = "E5M2"
storage = "grid"
storage_rounding = "stochastic"
[grid]
optimizer = [
  {plugin = "AdamW", lr = 1e-2, weight_decay = 0.0},
  {plugin = "ManifoldAdamW", weight_decay = 0.0, step_of = 0},
]
[compare]
arm = "optimizer"
tune = [0.1, 1.0, 10.0]
tune_seeds = [1]
seeds = [2, 3]
[compare.references]
fp32 = {"quantize.format" = "FP32"}
"""
ADAMW = "optimizer=AdamW(lr=0.01,weight_decay=0.0)"
MATCHED = "optimizer=ManifoldAdamW(weight_decay=0.0,step_of=0)"
GROUPS = {ADAMW, MATCHED, f"format=FP32,{ADAMW}", f"format=FP32,{MATCHED},of_format=E5M2"}


def test_every_optimizer_with_a_stiffness_has_a_run_on_float32(write):
    arm = '{plugin = "RiemannianAdam", weight_decay = 0.0}'
    file = altgrad.load_experiment(write(TINY.replace("]\n[compare]", f"  {arm},\n]\n[compare]")))
    groups = [group for group in file.comparison.groups if group.roles[0].kind == "intrinsic"]
    assert [group.roles[0].arm for group in groups] == [1, 2]
    stiffness = comparing.cells_of(file, groups[1].name, 2, 1.0)["cpu"].experiment.optimizer.options.stiffness
    assert stiffness.geometry.of_format.plugin == "E5M2"


def test_tuning_adamw_leaves_the_other_parameters_at_the_rate_of_the_file(write):
    file = altgrad.load_experiment(write(TINY))
    options = comparing.cells_of(file, ADAMW, 1, 10.0)["cpu"].experiment.optimizer.options
    assert (options.lr, options.other_lr) == (0.1, 0.01)


@pytest.fixture
def write(tmp_path):
    """Write an experiment file, and return its path."""

    def write(text=TINY) -> pathlib.Path:
        path = tmp_path / "experiment.toml"
        path.write_text(text)
        return path

    return write


def run(path, out, *overrides, resume=None):
    """Run a file in this process, as the command does; returns its exit code."""
    file = altgrad.load_experiment(path, overrides)
    options = {"without": (), "device": "auto", "jobs": 1, "quiet": True}
    return commands.run_file(file, out=out, resume=resume, **options)


def told(out):
    """Return compare.json, with its groups by name."""
    found = read_json(out / "tiny" / "compare.json")
    return found | {"groups": {group["name"]: group for group in found["groups"]}}


def folders(out):
    return {path.name: path for path in (out / "tiny").iterdir() if path.is_dir()}


def ends(out):
    """Return what a reader of the folders finds at the end of every run."""
    return {name: read_json(path / "summary.json")["final"] for name, path in folders(out).items()}


def without_clocks(found):
    return {
        name: {key: value for key, value in final.items() if not key.startswith(("time/", "memory/"))}
        for name, final in found.items()
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A comparison that was run in one go: its experiment file and its folder."""
    out = tmp_path_factory.mktemp("whole")
    path = out / "whole.toml"
    path.write_text(TINY)
    assert run(path, out) == 0
    return path, out


# --- what is run -------------------------------------------------------------------------------------


def test_the_best_factor_of_the_tuning_seeds_is_compared_on_the_others(whole):
    _, out = whole
    groups = told(out)["groups"]
    assert groups.keys() == GROUPS
    for name in (ADAMW, f"format=FP32,{ADAMW}"):
        losses = {float(factor): seeds["1"]["loss"] for factor, seeds in groups[name]["tuning"].items()}
        assert groups[name]["factor"] == min(losses, key=losses.get)
        assert groups[name]["step_size"]["cpu"] == pytest.approx(0.01 * groups[name]["factor"])
        for seeds in groups[name]["tuning"].values():
            assert read_json(out / "tiny" / seeds["1"]["run"] / "summary.json")["outcome"] == "finished"
    runs = {run for group in groups.values() for run in group["runs"].values()}
    tuning = {
        seed["run"]
        for group in groups.values()
        for seeds in group["tuning"].values()
        for seed in seeds.values()
    }
    assert runs | tuning == folders(out).keys()
    assert not runs & tuning
    assert len(runs) == 2 * len(GROUPS)


def test_a_matched_arm_takes_the_tuned_step_size_of_its_own_regime(whole):
    _, out = whole
    groups = told(out)["groups"]
    for prefix, suffix in (("", ""), ("format=FP32,", ",of_format=E5M2")):
        tuned, matched = groups[f"{prefix}{ADAMW}"], groups[f"{prefix}{MATCHED}{suffix}"]
        assert matched["step_of"] == tuned["name"]
        assert (matched["factor"], matched["step_size"]) == (tuned["factor"], tuned["step_size"])
        for name in matched["runs"].values():
            options = read_json(out / "tiny" / name / "resolved.json")["options"]
            assert options["optimizer"]["lr"] == tuned["step_size"]["cpu"]


def test_the_roles_say_what_each_group_is_there_for(whole):
    groups = told(whole[1])["groups"]
    kinds = {name: [role["kind"] for role in group["roles"]] for name, group in groups.items()}
    assert kinds == {
        ADAMW: ["arm"],
        MATCHED: ["arm"],
        f"format=FP32,{ADAMW}": ["reference", "intrinsic"],
        f"format=FP32,{MATCHED},of_format=E5M2": ["intrinsic"],
    }
    assert {role["format"] for role in groups[MATCHED]["roles"]} == {"E5M2"}


def test_arms_of_one_seed_start_from_the_same_weights_and_see_the_same_data(whole):
    _, out = whole
    groups = told(out)["groups"]
    for seed in ("2", "3"):
        first, second = (
            list(read_lines(out / "tiny" / groups[name]["runs"][seed] / "metrics.jsonl"))
            for name in (ADAMW, MATCHED)
        )
        assert first[0]["validation/loss"] == second[0]["validation/loss"]
        assert first[1]["train/loss"] == second[1]["train/loss"]
        assert first[2]["train/loss"] != second[2]["train/loss"]
    seeds = [groups[ADAMW]["runs"][seed] for seed in ("2", "3")]
    one, other = (next(read_lines(out / "tiny" / name / "metrics.jsonl")) for name in seeds)
    assert one["validation/loss"] != other["validation/loss"]


def test_the_last_evaluation_reads_the_whole_split_and_the_best_is_on_the_usual_windows(write, tmp_path):
    path, options = write(TINY[: TINY.index("[grid]")]), ["seed=6", "train.eval_batches=1"]
    run(path, tmp_path / "every", *options[:1], "train.eval_batches=0")
    run(path, tmp_path / "last", *options, "train.final_eval_batches=0")
    run(path, tmp_path / "few", *options)
    every, last, few = (
        read_json(tmp_path / name / "tiny" / "run" / "summary.json") for name in ("every", "last", "few")
    )
    losses = [summary["final"]["validation/loss"] for summary in (every, last, few)]
    assert losses[0] == losses[1] < losses[2]
    assert last["best"] == few["best"]
    assert last["best"]["step"] == 0  # on the usual windows the run was never better than at its start
    steps = [line["step"] for line in read_lines(tmp_path / "last" / "tiny" / "run" / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3]


def test_the_hash_of_the_table_and_of_earlier_ones_is_kept(whole, tmp_path):
    path, _ = whole
    tune = ["compare.tune=[1.0]"]
    run(path, tmp_path, *tune)
    first = told(tmp_path)
    assert first["hash"] == altgrad.load_experiment(path, tune).comparison.options.digest
    assert first["earlier_hashes"] == []
    run(path, tmp_path, *tune, "compare.seeds=[2, 3, 4]")
    assert told(tmp_path)["earlier_hashes"] == [first["hash"]]


# --- again, and further ------------------------------------------------------------------------------


def test_the_same_command_again_runs_nothing_and_finds_the_same(write, tmp_path, capsys):
    path = write(TINY.replace("tune = [0.1, 1.0, 10.0]", "tune = [1.0, 3.0]"))
    run(path, tmp_path)
    before = (tmp_path / "tiny" / "compare.json").read_text(), ends(tmp_path)
    capsys.readouterr()
    assert run(path, tmp_path) == 0
    assert ((tmp_path / "tiny" / "compare.json").read_text(), ends(tmp_path)) == before
    outcomes = {line.split()[0] for line in capsys.readouterr().out.splitlines() if "tiny/" in line}
    assert outcomes == {"skipped"}


def test_a_seed_that_is_added_later_runs_alone(write, tmp_path, capsys):
    path = write()
    tune = "compare.tune=[1.0]"
    run(path, tmp_path, tune)
    before = ends(tmp_path)
    assert run(path, tmp_path, tune, "compare.seeds=[2, 3, 4]") == 0
    after = ends(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {name.partition(",seed=")[2] for name in after.keys() - before.keys()} == {"4,step=1.0"}
    assert len(after) == 3 * len(GROUPS)


@pytest.mark.parametrize("number", [2, 9])
def test_an_interrupted_comparison_ends_as_one_that_was_not(
    number, write, whole, tmp_path, monkeypatch, capsys
):
    from altgrad_core import loop

    step, steps = loop._one_step, []

    def until(run):
        steps.append(1)
        if len(steps) == 3 * number - 1:
            os.kill(os.getpid(), signal.SIGINT)
        step(run)

    path = write()
    with monkeypatch.context() as interrupted:
        interrupted.setattr(loop, "_one_step", until)
        assert run(path, tmp_path) == 130
    assert "run the same command to go on" in capsys.readouterr().out
    monkeypatch.setattr(loop, "_one_step", lambda run: steps.append(1) or step(run))
    assert run(path, tmp_path) == 0
    assert told(tmp_path) == told(whole[1])
    assert without_clocks(ends(tmp_path)) == without_clocks(ends(whole[1]))
    assert len(steps) == 3 * len(folders(tmp_path))  # no step was done twice


def forked(*arguments):
    """Run a file in a process of its own, which has imported everything already."""
    process = multiprocessing.get_context("fork").Process(target=lambda: os._exit(run(*arguments)))
    process.start()
    return process


def test_a_killed_comparison_ends_as_one_that_was_not(write, whole, tmp_path):
    path = write()
    killed = forked(path, tmp_path)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("tiny/*/summary.json"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    killed.kill()
    killed.join()
    assert run(path, tmp_path) == 0
    assert told(tmp_path) == told(whole[1])
    assert without_clocks(ends(tmp_path)) == without_clocks(ends(whole[1]))


def test_two_commands_share_a_comparison_and_both_see_its_end(write, whole, tmp_path):
    path = write()
    both = [forked(path, tmp_path) for _ in range(2)]
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert told(tmp_path) == told(whole[1])
    assert without_clocks(ends(tmp_path)) == without_clocks(ends(whole[1]))
    for path in folders(tmp_path).values():
        assert (path / "log.txt").read_text().count("finished at step") == 1


def test_a_comparison_waits_for_a_run_of_another_process_and_takes_it_over(
    write, whole, tmp_path, capsys, wait_until
):
    held = RunFolder(tmp_path / "tiny" / f"{ADAMW},seed=1,step=0.1")

    def release():
        wait_until(lambda: len(list(tmp_path.rglob("summary.json"))) == 5)  # the other tuning runs
        time.sleep(1)
        held.close()

    threading.Thread(target=release).start()
    assert run(write(), tmp_path) == 0
    assert "waiting for a run of another process" in capsys.readouterr().out
    assert told(tmp_path) == told(whole[1])


def test_a_run_of_a_comparison_is_gone_on_with_in_its_folder(write, tmp_path, monkeypatch):
    from altgrad_core import loop

    step = loop._one_step
    with monkeypatch.context() as interrupted:
        interrupted.setattr(loop, "_one_step", lambda run: os.kill(os.getpid(), signal.SIGINT) or step(run))
        run(write(), tmp_path)
    ((name, folder),) = folders(tmp_path).items()
    assert read_json(folder / "summary.json")["outcome"] == "interrupted"
    assert run(write(), tmp_path, resume=folder) == 0
    assert list(folders(tmp_path)) == [name]
    assert read_json(folder / "summary.json")["outcome"] == "finished"


def test_a_comparison_is_run_by_the_command_alone(write, tmp_path):
    with pytest.raises(UsageError, match=r"has a \[compare\], .*: use altgrad-run"):
        altgrad.run_all(altgrad.load_experiment(write()), out=tmp_path)


# --- compare.json of several commands ----------------------------------------------------------------

PAIR = TINY.replace('[compare.references]\nfp32 = {"quantize.format" = "FP32"}\n', "").replace(
    "tune = [0.1, 1.0, 10.0]", "tune = [1.0, 3.0]"
)
"""Two arms, and no more."""


@pytest.fixture
def finished(write, tmp_path):
    """A comparison of two arms that is over: its file, and what a report is told."""
    path = write(PAIR)
    assert run(path, tmp_path) == 0
    return path, told(tmp_path)


@pytest.mark.parametrize("more", [[], ["compare.seeds=[2, 3, 4]"], ["compare.tune=[1.0]"]])
def test_a_file_whose_runs_are_all_refused_takes_nothing_back(finished, tmp_path, more, capsys):
    path, before = finished
    assert run(path, tmp_path, "steps=4", "optimizer.betas=[0.8, 0.9]", *more) == 1
    assert "was begun with other options: steps: 3 -> 4" in capsys.readouterr().err
    assert told(tmp_path) == before


def test_an_arm_that_is_new_is_not_told_beside_others_whose_runs_are_refused(
    finished, write, tmp_path, capsys
):
    _, before = finished
    third = PAIR.replace("step_of = 0},", "step_of = 0},\n  {plugin = 'Madam'},")
    assert run(write(third), tmp_path, "steps=4") == 1
    assert told(tmp_path) == before
    said = f"compare.json stays as it was: it has the step size of format=FP32,{ADAMW}, which this command"
    assert said in capsys.readouterr().out


def test_an_arm_that_is_new_is_told_beside_those_that_are_over(finished, write, tmp_path):
    _, before = finished
    assert run(write(PAIR.replace("step_of = 0},", "step_of = 0},\n  {plugin = 'Madam'},")), tmp_path) == 0
    after = told(tmp_path)["groups"]
    assert len(after["optimizer=Madam"]["runs"]) == 2
    assert after[ADAMW] == before["groups"][ADAMW]


def test_what_is_over_is_told_before_anything_runs_again(finished, tmp_path, monkeypatch):
    """A seed more: what was chosen follows from the folders, an interruption takes nothing of it back."""
    path, before = finished
    monkeypatch.setattr("altgrad_core.comparing.run_grid", lambda *_, **__: [])
    assert run(path, tmp_path, "compare.seeds=[2, 3, 4]") == 130
    groups = told(tmp_path)["groups"]
    assert {name: group["factor"] for name, group in groups.items()} == {
        name: group["factor"] for name, group in before["groups"].items()
    }
    assert {tuple(group["runs"]) for group in groups.values() if "FP32" not in group["name"]} == {
        ("2", "3", "4")
    }


def test_a_choice_whose_folders_are_gone_stays_until_there_is_another(finished, tmp_path, monkeypatch):
    path, before = finished
    shutil.rmtree(tmp_path / "tiny" / f"{ADAMW},seed=1,step=1.0")
    with monkeypatch.context() as interrupted:
        interrupted.setattr("altgrad_core.comparing.run_grid", lambda *_, **__: [])
        assert run(path, tmp_path) == 130
    assert told(tmp_path) == before
    assert run(path, tmp_path) == 0
    assert told(tmp_path) == before


def _hold(folder):
    RunFolder(folder)
    signal.pause()


def test_of_two_commands_with_other_tables_the_later_one_is_told(write, tmp_path, wait_until):
    """The first has a seed less and ends last: the second waits for a run that it may not see the end of."""
    path, fork = write(PAIR), multiprocessing.get_context("fork")
    holder = fork.Process(target=_hold, args=(tmp_path / "tiny" / f"{ADAMW},seed=2,step=1.0",), daemon=True)
    holder.start()
    over = lambda: len(list(tmp_path.glob("tiny/*/summary.json")))  # noqa: E731 - asked again and again
    first = forked(path, tmp_path, "compare.tune=[1.0]", "compare.seeds=[2, 3]")
    wait_until(lambda: over() == 7)
    second = forked(path, tmp_path, "compare.tune=[1.0]", "compare.seeds=[2, 3, 4]")
    wait_until(lambda: over() == 11)
    holder.kill()
    for process in (first, second):
        process.join(60)
        assert process.exitcode == 0
    assert {tuple(group["runs"]) for group in told(tmp_path)["groups"].values()} == {("2", "3", "4")}


# --- what goes wrong ---------------------------------------------------------------------------------


def test_an_arm_that_fails_leaves_no_other_without_its_runs(write, tmp_path, capsys, monkeypatch):
    from altgrad_optim import Madam

    monkeypatch.setattr(Madam, "step", lambda self, closure=None: 1 / 0)
    text = TINY.replace('{plugin = "ManifoldAdamW", weight_decay = 0.0, step_of = 0}', '{plugin = "Madam"}')
    assert run(write(text), tmp_path, "compare.tune=[0.5, 1.0]") == 1
    groups = told(tmp_path)["groups"]
    assert groups["optimizer=Madam"]["factor"] is None
    assert groups["optimizer=Madam"]["runs"] == {}
    for name in (ADAMW, f"format=FP32,{ADAMW}"):
        assert len(groups[name]["runs"]) == 2
        assert set(groups[name]["runs"].values()) <= folders(tmp_path).keys()
    assert "optimizer=Madam,seed=1,step=0.5: Traceback" in capsys.readouterr().err


def test_a_step_size_that_diverges_is_not_chosen_and_no_failure(write, tmp_path):
    text = TINY.replace("tune = [0.1, 1.0, 10.0]", "tune = [1.0, 1e32, 1e33]").replace(
        "eval_every", "grad_clip = 0.0\neval_every"
    )
    text = text.replace("[grid]", "[[fallback]]\nplugin = 'nan_guard'\nnan_patience = 1\n[grid]")
    assert run(write(text), tmp_path, "compare.seeds=[2]", "quantize.format=FP32") == 0
    (group,) = [one for one in told(tmp_path)["groups"].values() if one["step_of"] is None]
    assert group["factor"] < 1e32
    assert [seeds["1"]["diverged"] for seeds in group["tuning"].values()].count(True) >= 2


def test_an_optimum_that_stays_on_the_edge_is_marked(write, tmp_path):
    text = TINY.replace("tune = [0.1, 1.0, 10.0]", "tune = [0.2, 0.3]")
    run(write(text), tmp_path, "compare.seeds=[2]", "quantize.storage=master")
    group = told(tmp_path)["groups"][ADAMW]
    assert list(group["tuning"]) == ["0.2", "0.3", "0.45", "0.675"]
    assert (group["factor"], group["on_the_edge"]) == (0.675, True)
    assert told(tmp_path)["groups"][MATCHED]["on_the_edge"]


def test_a_metric_that_a_run_does_not_have_is_told_with_those_it_has(write, tmp_path, capsys):
    assert run(write(), tmp_path, 'compare.metric="validation/bits_per_byte"', "compare.tune=[0.5, 1.0]") == 1
    err = capsys.readouterr().err
    assert "its end has no 'validation/bits_per_byte'; there are: " in err
    assert "validation/loss" in err


def test_every_runs_step_option_is_known_without_torch():
    """The optimizers that are installed all have a step size that a comparison can tune."""
    from altgrad_core.options import OptimizerChoice
    from altgrad_core.registry import discover

    found = {
        entry.name: compare.step_option(OptimizerChoice(entry.name, entry.component.options()))
        for entry in discover().of_kind("optimizer")
    }
    assert found.pop("GridOptim") == "step_scale"
    assert set(found.values()) == {"lr"}
    assert json.dumps(found)
