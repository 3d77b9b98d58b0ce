"""Runs in which a third party's policy adjusts scales and switches formats: what becomes of the weights, and
that a resume repeats it, whenever it comes."""

import copy
import functools
import pathlib
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core import checkpoint
from altgrad_core import registry as registry_module
from altgrad_core.actions import regroup
from altgrad_core.layer_recipes import LayerRecipes
from altgrad_core.quantizer import quantizer_of
from altgrad_core.recipe import Recipe
from altgrad_core.record import read_lines
from altgrad_core.registry import UsageError
from altgrad_core.surgery import requantize
from altgrad_core.watched import PluginFailure
from altgrad_optim import GridOptim

PLUGIN = '''
"""A policy that answers by a script, and a monitor that counts. Light."""

import attrs

from altgrad_core.hookspecs import AdjustScale, ClipGradients, Component, ScaleLearningRate, SkipStep
from altgrad_core.hookspecs import Stop, SwitchFormat, hookimpl
from altgrad_core.options import option


@attrs.frozen(kw_only=True)
class ScriptOptions:
    script: tuple[str, ...] = option("lines: step, then what to do", default=())
    needs: tuple[str, ...] = option("metrics to read", default=())
    every: int = option("steps between looks", default=1)


class Scripted:
    def __init__(self, options):
        self.needs, self.every, self.seen = options.needs, options.every, {}
        self.lines = {int(line.split()[0]): line.split()[1:] for line in options.script}

    def decide(self, step, metrics):
        self.seen[step] = {name: metrics[name] for name in self.needs if name in metrics}
        kind, *rest = self.lines.get(step, ["nothing"])
        if kind == "switch":
            return SwitchFormat(reason="as the script says", layers=rest[0], to=rest[1])
        if kind == "adjust":
            return AdjustScale(reason="so", layers=rest[0], factor=float(rest[1]), of=rest[2])
        if kind in ("rate", "clip"):
            number = float(rest[0])
            rate, clip = ScaleLearningRate(reason="", factor=number), ClipGradients(reason="", norm=number)
            return rate if kind == "rate" else clip
        return {"skip": SkipStep(reason="s"), "stop": Stop(reason="s"), "odd": "odd"}.get(kind)


class Counts:
    """Reports the step's index; a share that is defined in even steps only."""

    needs, provides, undefined_is_nan = (), {"count": "sum", "share": "mean", "other": ""}, True

    def __init__(self, options):
        self.every, self.stray = options.every, options.stray

    def observe(self, step):
        index = step.loss.new_tensor(float(step.index))
        share = index if step.index % 2 == 0 else index * float("nan")
        found = {"counts/count/total": index.long(), "counts/share/total": share, "counts/other/total": index}
        if step.index == self.stray:
            found["counts/stray/total"] = 1.0
        return found


@attrs.frozen(kw_only=True)
class CountsOptions:
    every: int = option("steps", default=1)
    stray: int = option("the step in which it reports what it has not declared", default=0)


@hookimpl
def altgrad_fallbacks():
    return [Component(name="scripted", summary="", options=ScriptOptions, target="scripted_actions:Scripted")]


@hookimpl
def altgrad_monitors():
    return [Component(name="counts", summary="", options=CountsOptions, target="scripted_actions:Counts")]
'''

TINY = """
name = "tiny"
seed = 7
steps = 8
[data]
plugin = "markov"
tokens = 4000
[model]
n_layer = 1
n_head = 1
n_embd = 16
block_size = 16
dropout = 0.2
[train]
batch_size = 2
device = "cpu"
warmup_steps = 2
eval_every = 4
eval_batches = 1
log_every = 3
checkpoint_every = 3
keep_checkpoints = 9
"""

STORED = "[quantize]\nformat='E4M3'\nstorage='grid'\nbound=4.0\nstorage_rounding='{}'\n"
FLOWS = "[quantize.activations]\nformat='E4M3'\n[quantize.gradients]\nformat='E5M2'\nrounding='stochastic'\n"
ADAMW = "[optimizer]\nplugin='AdamW'\nlr=1e-2\n"
RUNGS = "[optimizer]\nplugin='GridOptim'\nnormalize='{}'\nstep_scale={}\n"
ARMS = {
    "stochastic": STORED.format("stochastic") + ADAMW,
    "rungs": STORED.format("stochastic") + RUNGS.format("adam", 0.3),
    "flows": "[quantize]\nformat='E4M3'\nbound=4.0\n" + FLOWS + "[optimizer]\nplugin='ManifoldAdamW'\n",
    "nearest": STORED.format("nearest_even") + "[optimizer]\nplugin='ManifoldAdamW'\nlr=1e-2\n",
    "feedback": STORED.format("error_feedback") + ADAMW,
    "eco": STORED.format("eco") + ADAMW,
    "raw_rungs": STORED.format("stochastic") + RUNGS.format("none", 6.0),
    "rungs_on_master": "[quantize]\nformat='E4M3'\n" + RUNGS.format("none", 6.0),
    "madam": STORED.format("stochastic") + "[optimizer]\nplugin='Madam'\n",
}
QUICK = ("stochastic", "rungs", "flows")


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Install the plugin for this process, and return a function that writes an experiment with a script."""
    site = tmp_path / "site"
    info = site / "scripted_actions-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "scripted_actions.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scripted-actions\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[altgrad]\nscripted-actions = scripted_actions\n")
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("PYTHONPATH", str(site))
    registry_module._discover.cache_clear()

    def write(arm, *script, more="", policy="", base=TINY) -> pathlib.Path:
        path = tmp_path / "experiment.toml"
        lines = ", ".join(f"'{line}'" for line in script)
        path.write_text(
            base + ARMS.get(arm, arm) + f"[[fallback]]\nplugin='scripted'\nscript=[{lines}]\n{policy}" + more
        )
        return path

    yield write
    registry_module._discover.cache_clear()
    sys.modules.pop("scripted_actions", None)


def of_any_process(state):
    """Leave out the streams of Python and NumPy, which nobody seeds."""
    return {**state, "random": state["random"]["torch"]}


def on_grid(saved, name, format):
    scaled = saved.model[name] * saved.state["scales"][name]
    return torch.equal(altgrad.get_format(format).quantize(scaled), scaled)


def policies(result):
    return [line for line in read_lines(result.folder / "events.jsonl") if line["event"] == "policy"]


SCRIPT = (
    "2 adjust .* 0.25 weights",
    "4 switch .*mlp.* E7M0",
    "5 switch .*attn.* BF16",
    "6 adjust .*mlp.* 0.5 weights",
    "7 switch .*attn.* E5M2",
)
"""Before and after a checkpoint at step 4 or 6: adjusted, switched, off the grid and back."""


@pytest.mark.parametrize(
    "arm", [arm if arm in QUICK else pytest.param(arm, marks=pytest.mark.slow) for arm in ARMS]
)
def test_a_resume_repeats_what_policies_did_bit_for_bit(
    arm, write, tmp_path, interrupted_at, last_checkpoint, lines, run, same_tree, without_clocks
):
    path = write(arm, *SCRIPT, more="[[monitor]]\nplugin='counts'\nevery=2\n")
    whole = run(path, tmp_path / "whole")
    assert len(policies(whole)) == len(SCRIPT)
    for step in (4, 6):
        restore = interrupted_at(step)
        assert run(path, tmp_path / str(step)).outcome == "interrupted"
        restore()
        parts = run(path, tmp_path / str(step))
        one, other = last_checkpoint(whole), last_checkpoint(parts)
        assert same_tree(one.model, other.model)
        assert same_tree(without_clocks(one.state), without_clocks(other.state))
        assert same_tree(lines(whole.folder, "metrics.jsonl"), lines(parts.folder, "metrics.jsonl"))
        assert same_tree(policies(whole), policies(parts))


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize(
    "arm",
    [
        arm if arm in ("rungs",) else pytest.param(arm, marks=pytest.mark.slow)
        for arm in ARMS
        if arm not in ("flows", "rungs_on_master")
    ],
)
def test_every_stored_weight_is_on_its_grid_after_a_switch(arm, steps, write, tmp_path, last_checkpoint, run):
    saved = last_checkpoint(run(write(arm, *SCRIPT), tmp_path / "runs", f"steps={steps}"))
    attention = "E5M2" if steps == 8 else "E4M3"
    formats = {name: "E7M0" if ".mlp." in name else attention for name in saved.state["scales"]}
    assert len(formats) == 4
    assert all(on_grid(saved, name, format) for name, format in formats.items())
    assert not any(on_grid(saved, name, "E0M7") for name in formats)


@pytest.mark.parametrize("arm", ["rungs", pytest.param("raw_rungs", marks=pytest.mark.slow)])
def test_everything_may_go_to_high_precision_and_trains_on(arm, write, tmp_path, last_checkpoint, run):
    result = run(write(arm, "4 switch .* none"), tmp_path / "runs")
    saved = last_checkpoint(result)
    assert saved.state["scales"] == {}
    assert result.summary["share_on_grid"] == 0.0
    weight = saved.model["transformer.h.0.mlp.c_fc.weight"]
    assert len(torch.unique(weight)) > 512 > 2**8  # no grid of 8 bits


def rungs(storage, normalize="none"):
    """Return a Linear and its GridOptim after two steps."""
    torch.manual_seed(0)
    model = altgrad.quantize_model(torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False)), "E4M3")
    optimizer = GridOptim(
        altgrad.param_groups(model), 0.7, normalize=normalize, storage=storage, bound=1.5, other_lr=0.1
    )
    for _ in range(2):
        step(model, optimizer)
    return model, optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.eye(8)).square().sum().backward()
    optimizer.step()


def moved_to(model, optimizer, format):
    recipes = LayerRecipes(weights=format and Recipe(format=format), covered=format != "BF16")
    requantize([model[0]], recipes)
    regroup(optimizer, [model[0].weight])
    optimizer.regrid([model[0].weight])


@pytest.mark.parametrize("normalize", ["none", "adam"])
def test_weights_in_rungs_go_on_on_the_new_grid_with_their_moments_and_bound(normalize, same_tree):
    model, optimizer = rungs("grid", normalize)
    weight, e5m2 = model[0].weight, altgrad.get_format("E5M2")
    before, state = weight.detach().clone(), copy.deepcopy(optimizer.state[weight])
    bounds = optimizer.scales.bounds().clone()
    moved_to(model, optimizer, "E5M2")
    scale = quantizer_of(weight).scale
    assert torch.equal(scale, Recipe(format=e5m2).scale_of(before))
    assert torch.equal(weight, e5m2.quantize(before * scale) / scale)
    assert same_tree(dict(optimizer.state[weight]), dict(state))
    assert torch.equal(optimizer.scales.bounds(), bounds)
    step(model, optimizer)
    scaled = weight.detach() * scale
    assert torch.equal(e5m2.quantize(scaled), scaled)
    assert not torch.equal(weight, before)


def test_a_rung_coordinate_follows_from_the_weights_value():
    model, optimizer = rungs("master")
    weight, e5m2 = model[0].weight, altgrad.get_format("E5M2")
    value = weight.detach().clone()
    moved_to(model, optimizer, "E5M2")
    u = optimizer.state[weight]["rung_coordinate"]
    scaled = weight.detach() * quantizer_of(weight).scale
    assert torch.equal(e5m2.rung(scaled).float(), u.round())
    assert not torch.equal(u, u.round())  # an E4M3 value lies between those of E5M2
    assert torch.equal(scaled, e5m2.quantize(value * quantizer_of(weight).scale))


@pytest.mark.parametrize("to", [None, "BF16"])
def test_a_weight_that_ceases_to_move_in_rungs_begins_adamw(to):
    model, optimizer = rungs("grid")
    weight = model[0].weight
    moved_to(model, optimizer, to)
    before = weight.detach().clone()
    step(model, optimizer)
    assert set(optimizer.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert float(optimizer.state[weight]["step"]) == 1
    # the first step of Adam is its learning rate, in the sign of the gradient
    assert torch.allclose((weight - before).abs(), torch.full_like(weight, 0.1), rtol=1e-3)


def test_under_adam_a_weight_that_ceases_to_move_in_rungs_keeps_its_moments():
    model, optimizer = rungs("grid", "adam")
    moment = optimizer.state[model[0].weight]["exp_avg"].clone()
    moved_to(model, optimizer, None)
    assert torch.equal(optimizer.state[model[0].weight]["exp_avg"], moment)
    step(model, optimizer)
    assert float(optimizer.state[model[0].weight]["step"]) == 3


def test_a_step_that_is_not_finite_is_not_taken_whatever_the_action(
    write, tmp_path, monkeypatch, last_checkpoint, run
):
    from altgrad_core import loop

    whole = loop._forward_backward

    def spoilt(run):
        loss = whole(run)
        return loss * float("nan") if run.step == 3 else loss

    monkeypatch.setattr(loop, "_forward_backward", spoilt)
    result = run(write("stochastic", "4 switch .* E5M2"), tmp_path / "runs", "steps=4")
    (event,) = policies(result)
    assert event["update"] == "skipped"
    saved = last_checkpoint(result)
    assert {int(state["step"]) for state in saved.state["optimizer"]["state"].values()} == {3}
    assert all(on_grid(saved, name, "E5M2") for name in saved.state["scales"])


def test_the_event_tells_layers_formats_and_numbers(write, tmp_path, run):
    (event,) = policies(run(write("stochastic", "3 switch .*mlp.* E5M2"), tmp_path / "runs", "steps=4"))
    mlp = ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
    assert (event["step"], event["policy"], event["action"]) == (3, "scripted", "SwitchFormat")
    assert event["message"] == "as the script says"
    assert event["details"] == {"layers": ".*mlp.*", "to": "E5M2"}
    assert event["layers"] == mlp
    assert event["formats_before"] == dict.fromkeys(mlp, "E4M3")
    assert event["metrics"]["train/loss"] > 0
    assert event["update"] == "taken"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("2 switch .* E5M3", r"SwitchFormat cannot be carried out: .*E5M3.*did you mean"),
        ("2 switch mlp E5M2", r"SwitchFormat cannot .*'mlp' matches no layer"),
        ("2 adjust .* 0.3 weights", r"AdjustScale cannot .*no power of two"),
        ("2 adjust .* 0.5 gradients", r"AdjustScale cannot .*no layer has quantized gradients"),
        ("2 rate nan", r"ScaleLearningRate cannot be carried out: factor=nan is no finite number above 0"),
        ("2 rate -1", r"ScaleLearningRate cannot .*factor=-1\.0"),
        ("2 clip nan", r"ClipGradients cannot .*norm=nan"),
        ("2 clip -1", r"ClipGradients cannot .*norm=-1\.0"),
        ("2 odd", r"decide answered 'odd'; it must be an action"),
    ],
)
def test_an_action_that_cannot_be_ends_the_run_and_names_the_policy(line, problem, write, tmp_path, run):
    with pytest.raises(PluginFailure, match=rf"scripted of scripted-actions 1.0: {problem}"):
        run(write("stochastic", line), tmp_path / "runs")


def test_an_adjusted_gradient_scale_is_in_every_later_step(write, tmp_path, last_checkpoint, run):
    script = "3 adjust .*c_fc 0.5 gradients"
    saved = last_checkpoint(run(write("flows", script, "4 " + script[2:]), tmp_path / "runs"))
    factors = {name: float(flow["adjustment"]) for name, flow in saved.state["flows"].items()}
    assert factors.pop("transformer.h.0.mlp.c_fc.gradients") == 0.25
    assert set(factors.values()) == {1.0}


def test_a_policy_reads_its_monitor_in_every_step_and_as_of_the_step_before(
    write, tmp_path, monkeypatch, run
):
    path = write(
        "stochastic", policy="needs=['counts/count/total']\n", more="[[monitor]]\nplugin='counts'\nevery=5\n"
    )
    import scripted_actions

    seen = []
    monkeypatch.setattr(
        scripted_actions.Scripted, "decide", lambda self, step, metrics: seen.append((step, dict(metrics)))
    )
    run(path, tmp_path / "runs")
    assert [found.get("counts/count/total") for _, found in seen] == [None, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def test_a_policy_may_look_every_few_steps_only(write, tmp_path, lines, run):
    path = write(
        "stochastic",
        policy="needs=['counts/count/total']\nevery=3\n",
        more="[[monitor]]\nplugin='counts'\nevery=100\n",
    )
    result = run(path, tmp_path / "runs")
    found = [
        line["counts/count/total"]
        for line in lines(result.folder, "metrics.jsonl")
        if "counts/count/total" in line
    ]
    assert found == [3.0, 6.0]


def test_a_quantity_that_no_monitor_declares_is_refused(write, tmp_path, run):
    path = write("stochastic", policy="needs=['counts/cuont/total']\n", more="[[monitor]]\nplugin='counts'\n")
    with pytest.raises(
        UsageError, match=r"'counts/cuont/total'; 'counts' provides: count.*did you mean 'count'"
    ):
        run(path, tmp_path / "runs")


def test_an_undeclared_metric_drops_its_monitor_with_all_it_reported(
    write, tmp_path, last_checkpoint, lines, run
):
    more = "[[monitor]]\nplugin='counts'\nstray=5\n"
    path = write("stochastic", policy="needs=['counts/count/total']\n", more=more)
    result = run(path, tmp_path / "runs")
    (warning,) = [line for line in lines(result.folder, "events.jsonl") if line["event"] == "warning"]
    assert "'counts/stray/total' is not in its `provides`: count, share, other" in warning["message"]
    assert warning["message"].endswith("without its metrics: scripted")
    assert not any(name.startswith("counts/") for name in last_checkpoint(result).state["observed"])


EPOCHS = TINY.replace("tokens = 4000", "tokens = 160")  # 32 of 160 tokens a step: an epoch is 5 steps


def epochs(result):
    return [
        {key: value for key, value in line.items() if key.startswith("epoch/") and "loss" not in key}
        for line in read_lines(result.folder / "metrics.jsonl")
        if "epoch/index" in line
    ]


def test_an_epoch_sums_up_what_monitors_declare(write, tmp_path, run):
    path = write("stochastic", more="[[monitor]]\nplugin='counts'\n", base=EPOCHS)
    found = epochs(run(path, tmp_path / "runs", "steps=10", "train.log_every=1"))
    assert found == [
        {"epoch/index": 1.0, "epoch/counts/count": 15.0, "epoch/counts/share": 3.0},  # 1+2+..+5; (2+4)/2
        {"epoch/index": 2.0, "epoch/counts/count": 40.0, "epoch/counts/share": 8.0},
    ]


def test_an_epoch_counts_observed_steps_only_and_logs_nothing_undefined(write, tmp_path, run):
    path = write("stochastic", more="[[monitor]]\nplugin='counts'\nevery=3\n", base=EPOCHS)
    found = epochs(run(path, tmp_path / "runs", "steps=5", "train.log_every=1"))
    assert found == [{"epoch/index": 1.0, "epoch/counts/count": 3.0}]  # step 3 alone, which is odd


def test_an_epoch_survives_a_resume(write, tmp_path, interrupted_at, run):
    path = write("stochastic", more="[[monitor]]\nplugin='counts'\n", base=EPOCHS)
    whole = run(path, tmp_path / "whole", "steps=10")
    restore = interrupted_at(4)
    run(path, tmp_path / "parts", "steps=10")
    restore()
    assert epochs(run(path, tmp_path / "parts", "steps=10")) == epochs(whole) != []


def test_between_backward_and_step_there_is_one_host_read(write, tmp_path, monkeypatch, run):
    from altgrad_core import loop

    class Reads(torch.overrides.TorchFunctionMode):
        names = ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy")
        count = 0

        def __torch_function__(self, function, types, arguments=(), keywords=None):
            self.count += any(function is getattr(torch.Tensor, name) for name in self.names)
            return function(*arguments, **(keywords or {}))

    reads = {"decision": [], "observe_after": []}

    def counted(name):
        whole = getattr(loop, name)

        def call(*arguments):
            with Reads() as seen:
                found = whole(*arguments)
            reads[name].append(seen.count)
            return found

        return call

    for name in reads:
        monkeypatch.setattr(loop, name, counted(name))
    monitors = "".join(f"[[monitor]]\nplugin='{name}'\n" for name in ("counts", "stall", "flip", "descent"))
    needs = "needs=['counts/count/total', 'stall/stall_ratio/total', 'descent/quality/total']\n"
    run(write("stochastic", policy=needs, more=monitors), tmp_path / "runs")
    assert reads == {"decision": [1] * 8, "observe_after": [0] * 8}


@pytest.mark.slow  # processes that import torch
def test_a_run_that_is_killed_right_after_a_switch_ends_as_one_that_was_not(
    write, tmp_path, same_tree, without_clocks
):
    path = write("rungs", "5 switch .* E7M0", "7 adjust .* 0.5 weights")
    killing = textwrap.dedent(
        """
        import os, signal
        from altgrad_core import loop
        whole = loop._one_step
        def until(run):
            whole(run)
            if run.step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        loop._one_step = until
        """
    )
    command = "from altgrad_core.cli import altgrad_run; altgrad_run()"
    arguments = [str(path), "--quiet", "--out"]

    def call(before, out):
        whole = [sys.executable, "-c", f"{before}\n{command}", *arguments, str(out)]
        return subprocess.run(whole, check=False, timeout=120, capture_output=True, text=True).returncode

    assert call("", tmp_path / "whole") == 0
    assert call(killing, tmp_path / "parts") == -signal.SIGKILL
    assert call("", tmp_path / "parts") == 0
    ends = [
        checkpoint.load(tmp_path / name / "tiny" / "run" / "checkpoints" / checkpoint.step_name(8))
        for name in ("whole", "parts")
    ]
    assert same_tree(ends[0].model, ends[1].model)
    assert same_tree(*(of_any_process(without_clocks(end.state)) for end in ends))


@pytest.mark.slow  # traces the model six times
def test_a_compiled_run_switches(write, tmp_path, monkeypatch, run):
    path = write("flows", "2 adjust .* 0.5 gradients", "3 switch .*mlp.* E5M2", "5 switch .*attn.* none")
    plain = run(path, tmp_path / "plain", "model.dropout=0.0")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # no C++
    result = run(path, tmp_path / "runs", "train.compile=true", "model.dropout=0.0")
    assert [line["action"] for line in policies(result)] == ["AdjustScale", "SwitchFormat", "SwitchFormat"]
    losses = [one.summary["final"]["validation/loss"] for one in (result, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_the_summary_tells_what_policies_did_and_the_formats_now(write, tmp_path, run):
    summary = run(write("stochastic", "3 switch .*mlp.* E5M2", "5 skip"), tmp_path / "runs").summary
    assert summary["actions"] == {"scripted": {"SwitchFormat": 1, "SkipStep": 1}}
    assert {layer.split(".")[3]: format for layer, format in summary["formats"].items()} == {
        "attn": "E4M3",
        "mlp": "E5M2",
    }
    log = (tmp_path / "runs" / "tiny" / "run" / "log.txt").read_text()
    assert "1 x SwitchFormat, 1 x SkipStep" in log
    assert "E4M3 in 2 layers, E5M2 in 2 layers" in log


def test_the_summary_of_a_run_without_a_switch_tells_no_formats(write, tmp_path, run):
    summary = run(write("stochastic"), tmp_path / "runs").summary
    assert (summary["actions"], summary["formats"]) == ({}, None)
