"""Each fallback policy in a real run in which it fires, and in a healthy one in which it does not."""

import math
import pathlib

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core.record import read_lines
from altgrad_core.registry import UsageError

SMALL = """
name = "small"
seed = 7
steps = 16

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
device = "cpu"
warmup_steps = 2
min_lr_ratio = 1.0
eval_every = 16
eval_batches = 1
log_every = 8
checkpoint_every = 4
keep_checkpoints = 9

[optimizer]
plugin = "AdamW"
lr = {lr}
"""

GRID = """
[quantize]
format = "E3M4"
storage = "grid"
storage_rounding = "{rounding}"
"""

MASTER = '[quantize]\nformat = "E3M4"\n'

SHIFT = """
[[monitor]]
plugin = "descent"
[[monitor]]
plugin = "stall"
[[fallback]]
plugin = "emergency_shift"
patience = 5
warmup = 3
"""

DEFAULT = """
[[monitor]]
plugin = "descent"
[[fallback]]
plugin = "emergency_shift"
"""

LONG = ("steps=600", "train.eval_every=0", "train.checkpoint_every=0", "train.min_lr_ratio=0.1")

LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.fixture
def run(tmp_path):
    """Return a function that runs the text of an experiment in a folder of its own."""

    def run(text: str, *overrides: str, name: str = "runs"):
        path = pathlib.Path(tmp_path / "experiment.toml")
        path.write_text(text)
        return altgrad.run(altgrad.load_experiment(path, overrides), out=tmp_path / name, quiet=True)

    return run


def actions(result):
    """Return (step, policy, action, details, metrics) of every action of a policy."""
    return [
        (line["step"], line["policy"], line["action"], line["details"], line["metrics"])
        for line in read_lines(result.folder / "events.jsonl")
        if line["event"] == "policy"
    ]


def on_grid(found, format, layers=LINEARS):
    format = altgrad.get_format(format)
    for name in (f"transformer.h.0.{layer}.weight" for layer in layers):
        scaled = found.model[name] * found.state["scales"][name]
        if not torch.equal(format.quantize(scaled), scaled):
            return False
    return True


STEP = 1e-4
"""A learning rate far below most spacings: rounded to nearest, a sixth of the update arrives."""

LOST = SMALL.format(lr=STEP) + GRID.format(rounding="nearest_even") + SHIFT
RUNGS = (
    SMALL.format(lr=STEP)
    .replace("AdamW", "GridOptim")
    .replace(f"lr = {STEP}", "step_scale = 0.3\nnormalize = 'adam'")
)
ARRIVES = {
    "master": SMALL.format(lr=STEP) + MASTER,
    "stochastic": SMALL.format(lr=STEP) + GRID.format(rounding="stochastic"),
    "error_feedback": SMALL.format(lr=STEP) + GRID.format(rounding="error_feedback"),
    "eco": SMALL.format(lr=STEP) + GRID.format(rounding="eco"),
    "GridOptim": RUNGS + GRID.format(rounding="stochastic"),
}


def test_updates_lost_on_the_grid_move_every_layer_to_the_next_format(run, last_checkpoint):
    result = run(LOST, "steps=10")
    ((step, policy, action, details, metrics),) = actions(result)
    assert (step, policy, action, details["to"]) == (9, "emergency_shift", "SwitchFormat", "E5M2")
    assert metrics["descent/delivered/total"] < 0.2
    assert on_grid(last_checkpoint(result), "E5M2")
    assert not on_grid(last_checkpoint(result), "E3M4")


def test_when_the_chain_ends_the_run_stops_and_says_so(run):
    result = run(LOST)
    assert [(step, action) for step, _, action, _, _ in actions(result)] == [
        (9, "SwitchFormat"),
        (14, "Stop"),
    ]
    assert result.outcome == "stopped"
    assert "no format follows E5M2 in the chain" in result.summary["message"]


def test_a_chain_to_a_wide_format_lets_the_run_go_on(run):
    result = run(LOST + 'chain = {E3M4 = "BF16"}\n')
    ((step, _, _, details, _),) = actions(result)
    assert (step, details["to"]) == (9, "BF16")
    assert result.outcome == "finished"
    assert result.summary["final"]["descent/quality/total"] == pytest.approx(1)


@pytest.mark.parametrize("arm", ARRIVES)
def test_updates_that_arrive_move_nothing_however_few_codes_change(run, arm):
    result = run(ARRIVES[arm] + SHIFT)
    assert result.outcome == "finished"
    assert actions(result) == []
    assert result.summary["final"]["stall/stall_ratio/total"] > 0.8


def test_the_founding_measure_fires_on_a_healthy_run_and_the_default_does_not(run):
    """Float32 masters that learn: the codes stand still, the updates arrive."""
    healthy = SMALL.format(lr=1e-3) + MASTER + SHIFT
    decays = "train.min_lr_ratio=0.1"
    default = run(healthy, decays)
    founding = run(healthy + 'measure = "ratio"\n', "steps=10", decays, name="ratio")
    assert actions(default) == []
    assert default.summary["final"]["descent/quality/total"] == pytest.approx(1)
    ((step, _, action, details, metrics),) = actions(founding)
    assert (step, action, details["to"]) == (9, "SwitchFormat", "E5M2")
    assert metrics["stall/stall_ratio/total"] > 0.5


HEALTHY = {
    "master": ("E5M2", MASTER),
    "stochastic": ("E5M2", GRID.format(rounding="stochastic")),
    "error_feedback": ("E4M3", GRID.format(rounding="error_feedback")),
    "error_feedback, few bits": ("E5M2", GRID.format(rounding="error_feedback")),
    "eco": ("E4M3", GRID.format(rounding="eco")),
    "GridOptim": ("E5M2", GRID.format(rounding="stochastic")),
}


@pytest.mark.slow  # 600 steps each
@pytest.mark.parametrize("arm", HEALTHY)
def test_the_default_moves_nothing_in_a_long_healthy_run_to_the_end_of_its_schedule(run, arm):
    format, quantize = HEALTHY[arm]
    begin = RUNGS if arm == "GridOptim" else SMALL.format(lr=1e-3)
    result = run(begin + quantize.replace("E3M4", format) + DEFAULT, *LONG)
    assert result.outcome == "finished"
    assert actions(result) == []


@pytest.mark.slow  # 71 steps of 600
def test_the_default_fires_as_soon_as_it_may_where_rounding_to_nearest_loses_the_updates(run):
    grid = GRID.replace("E3M4", "E4M3").format(rounding="nearest_even")
    result = run(SMALL.format(lr=STEP) + grid + DEFAULT, *LONG)
    assert [(step, action) for step, _, action, _, _ in actions(result)] == [(71, "Stop")]


@pytest.mark.slow  # 600 steps
def test_residuals_in_a_format_that_loses_them_too_are_no_shelter(run):
    """An update of 1e-4 is far below the spacings of E5M2, and below those of residuals in E5M2."""
    grid = GRID.replace("E3M4", "E5M2").format(rounding="error_feedback")
    result = run(SMALL.format(lr=STEP) + grid + DEFAULT, *LONG)
    assert [action for _, _, action, _, _ in actions(result)] == ["Stop"]
    wide = grid + 'residual_format = "FP32"\n'
    assert actions(run(SMALL.format(lr=STEP) + wide + DEFAULT, *LONG, name="wide")) == []


def test_only_the_stalled_one_of_two_formats_moves(run):
    rule = '[[quantize.rule]]\nlayers = ".*attn.*"\nformat = "E4M3"\nstorage = "master"\n'
    result = run(LOST.replace(SHIFT, rule + SHIFT), "steps=10")
    ((_, _, action, details, _),) = actions(result)
    assert (action, details["to"]) == ("SwitchFormat", "E5M2")
    assert details["layers"] == r"transformer\.h\.0\.mlp\.c_fc|transformer\.h\.0\.mlp\.c_proj"


def test_non_finite_losses_go_along_the_chain_to_its_end(run, last_checkpoint):
    """Weights of 1e30 are infinite in any format: two steps are skipped, then the format changes."""
    text = SMALL.format(lr=1e30) + MASTER + SHIFT
    result = run(text, "train.grad_clip=0.0")
    found = [(action, details.get("to")) for _, _, action, details, _ in actions(result)]
    skipped = [("SkipStep", None)] * 2
    assert found == [*skipped, ("SwitchFormat", "E5M2"), *skipped, ("Stop", None)]
    assert all(tensor.isfinite().all() for tensor in last_checkpoint(result).model.values())


def test_an_unknown_format_in_the_chain_is_refused_at_the_start(run):
    with pytest.raises(UsageError, match=r"emergency_shift: chain: .*E5M3.*did you mean 'E5M2'"):
        run(LOST + 'chain = {E3M4 = "E5M3"}\n')


TWO_FORMATS = '[[quantize.rule]]\nlayers = ".*attn.*"\nformat = "E4M3"\n'


@pytest.mark.parametrize(
    ("text", "option", "way_out"),
    [
        (MASTER + TWO_FORMATS + DEFAULT, 'per = "type"', 'set per = "layer"'),
        (MASTER + DEFAULT, 'layers = "transformer.ln_f"', "widen that pattern"),
    ],
)
def test_a_monitor_that_tells_the_policy_nothing_is_refused_before_the_first_step(run, text, option, way_out):
    observed = text.replace('"descent"\n', f'"descent"\n{option}\n')
    with pytest.raises(UsageError, match=way_out):
        run(SMALL.format(lr=STEP) + observed)


def test_an_unquantized_run_is_told_that_there_is_no_format_to_move(run):
    result = run(SMALL.format(lr=STEP) + DEFAULT, "steps=2")
    warnings = [
        line["message"] for line in read_lines(result.folder / "events.jsonl") if line["event"] == "warning"
    ]
    assert "emergency_shift has no format to move: no weights are quantized" in warnings


SPIKE = '[[fallback]]\nplugin = "loss_spike"\nwarmup = 1\n'


def test_a_loss_that_jumps_halves_the_learning_rate(run, last_checkpoint):
    result = run(SMALL.format(lr=10.0) + SPIKE)
    ((_, policy, action, details, metrics), *_) = actions(result)
    assert (policy, action, details) == ("loss_spike", "ScaleLearningRate", {"factor": 0.5})
    assert metrics["train/loss"] > 4
    assert last_checkpoint(result).state["lr_factor"] == 0.5 ** len(actions(result))


def test_a_loss_that_falls_leaves_the_learning_rate_alone(run, last_checkpoint):
    result = run(SMALL.format(lr=1e-2) + SPIKE)
    assert actions(result) == []
    assert last_checkpoint(result).state["lr_factor"] == 1.0


OUTLIERS = """
[[monitor]]
plugin = "kurtosis"
alert = {alert}
[[fallback]]
plugin = "high_precision_layer"
every = 4
patience = 2
"""


def test_a_layer_with_heavy_tails_moves_to_bf16_and_stays_there(run):
    """The inputs of attn.c_proj are averages, over few values at the first positions: these stick out."""
    result = run(SMALL.format(lr=1e-3) + MASTER + OUTLIERS.format(alert=1.0))
    ((step, _, action, details, _),) = actions(result)
    assert (step, action) == (9, "SwitchFormat")  # after checks of the steps 4 and 8
    assert details == {"layers": r"transformer\.h\.0\.attn\.c_proj", "to": "BF16"}


def test_activations_without_outliers_leave_every_layer_where_it_is(run):
    assert actions(run(SMALL.format(lr=1e-3) + MASTER + OUTLIERS.format(alert=10.0))) == []


STATIC = """
[quantize]
format = "E3M4"
[quantize.gradients]
format = "E4M3"
scale_mode = "static"
amax = {amax}
[[monitor]]
plugin = "range"
"""

CLIP = '[[fallback]]\nplugin = "partition_clip"\nbase_clip = 0.01\n'
BACKOFF = '[[fallback]]\nplugin = "scale_backoff"\nclean_steps = 6\n'


def test_overflowing_gradients_are_clipped_to_the_formats_share(run):
    result = run(SMALL.format(lr=1e-3) + STATIC.format(amax=1e-5) + CLIP)
    assert {action for _, _, action, _, _ in actions(result)} == {"ClipGradients"}
    _, _, _, details, metrics = actions(result)[0]
    octaves = (math.log2(1.75) + 17) / (math.log2(1.75) + 31)
    assert details["norm"] == pytest.approx(0.01 * octaves)
    assert metrics["range/backward_overflow_fraction/total"] >= 0.01


def test_gradients_within_their_range_are_not_clipped(run):
    assert actions(run(SMALL.format(lr=1e-3) + STATIC.format(amax=1.0) + CLIP)) == []


def test_saturated_gradients_get_half_the_scale_until_they_fit(run, last_checkpoint):
    result = run(SMALL.format(lr=1e-3) + STATIC.format(amax=1e-3) + BACKOFF, "steps=24")
    factors = [details["factor"] for _, _, _, details, _ in actions(result)]
    assert factors[0] == 0.5
    product = math.prod(factors)
    adjustments = {
        float(flow["adjustment"])
        for name, flow in last_checkpoint(result).state["flows"].items()
        if name.endswith(".gradients")
    }
    assert adjustments == {product}


def test_gradients_that_overflow_to_infinity_get_half_the_scale_in_each_skipped_step(run, last_checkpoint):
    """Nothing of these steps is taken: what a skipped step has shown halves the scale once."""
    infinite = STATIC.replace("{amax}", '1e-5\noverflow = "ieee"')
    result = run(SMALL.format(lr=1e-3) + infinite + BACKOFF.replace("6", "1000"), "steps=24")
    found = [(step, details["factor"], metrics) for step, _, _, details, metrics in actions(result)]
    skipped = [step for step, _, metrics in found if not metrics["train/gradient_finite"]]
    assert skipped[:12] == list(range(1, 13))
    assert {factor for _, factor, _ in found} == {0.5}
    assert len(found) < 16
    assert result.outcome == "finished"
    assert all(tensor.isfinite().all() for tensor in last_checkpoint(result).model.values())


def test_gradients_that_never_saturate_keep_their_scale(run):
    assert actions(run(SMALL.format(lr=1e-3) + STATIC.format(amax=1.0) + BACKOFF)) == []


RESUMED = {
    "grid": LOST,
    "master": ARRIVES["master"] + SHIFT + 'measure = "ratio"\n',
    "scale": SMALL.format(lr=1e-3) + STATIC.format(amax=1e-3) + BACKOFF,
}


@pytest.mark.slow  # twelve times two runs
@pytest.mark.parametrize("pause", [4, 8, 9, 12])
@pytest.mark.parametrize("arm", RESUMED)
def test_resume_around_an_action_reproduces_weights_and_decisions_bit_for_bit(
    run, interrupted_at, arm, pause, last_checkpoint
):
    whole = run(RESUMED[arm], "steps=13", name="whole")
    restore = interrupted_at(pause)
    assert run(RESUMED[arm], "steps=13", name="parts").outcome == "interrupted"
    restore()
    parts = run(RESUMED[arm], "steps=13", name="parts")
    one, other = last_checkpoint(whole), last_checkpoint(parts)
    assert actions(whole) == actions(parts) != []
    policy = "scale_backoff" if arm == "scale" else "emergency_shift"
    assert one.state["plugins"][policy] == other.state["plugins"][policy]
    assert one.model.keys() == other.model.keys()
    for name, tensor in one.model.items():
        assert tensor.numpy().tobytes() == other.model[name].numpy().tobytes()
