"""Actions on formats and scales: on quantizers, on storage, and through a run that has plugins of its own."""

import copy
import math
import pathlib
import textwrap

import pytest
import torch
from torch import nn

from altgrad_core import actions
from altgrad_core.assemble import assemble
from altgrad_core.deciding import to_host
from altgrad_core.experiment_file import load_experiment
from altgrad_core.flow_quantizer import FlowQuantizer
from altgrad_core.grid_scales import GridScales
from altgrad_core.groups import param_groups
from altgrad_core.hookspecs import AdjustScale, ClipGradients, ScaleLearningRate, SwitchFormat
from altgrad_core.layer_recipes import LayerRecipes
from altgrad_core.master_bound import MasterBound
from altgrad_core.quantizer import quantizer_of
from altgrad_core.recipe import Recipe, flow_recipe
from altgrad_core.record import RunFolder
from altgrad_core.registry import UsageError, discover
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import held_weights, quantize_model, requantize
from altgrad_core.terminal import Terminal


@pytest.fixture
def linear():
    """Return a function that makes one Linear with given weights, quantized."""

    def make(values, format, **options):
        layer = nn.Linear(len(values), 1, bias=False)
        layer.weight.data = torch.tensor([values])
        quantize_model(nn.Sequential(layer), format, **options)
        return layer

    return make


def test_an_adjusted_scale_follows_the_weight_at_a_fixed_ratio(linear, table):
    layer = linear([1.0, 0.5], table("E4M3"))
    quantizer = quantizer_of(layer.weight)
    assert float(quantizer.scale) == 256  # the largest 2^k with 1.0 * 2^k <= 448
    quantizer.adjust(0.5)
    assert float(quantizer.scale) == 128
    layer.weight.data *= 4
    with held_weights(layer):
        assert float(quantizer.scale) == 32


def test_weights_fitted_together_keep_their_own_adjustments(table):
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False))
    for layer in model:
        layer.weight.data = torch.ones(1, 2)
    quantize_model(model, table("E4M3"))
    quantizer_of(model[1].weight).adjust(2.0)
    with held_weights(model):
        assert [float(layer.quantizer.scale) for layer in model] == [256, 512]


def test_a_fixed_scale_is_adjusted_too(linear, table):
    layer = linear([1.0], table("E4M3"), scale_mode="initial")
    quantizer_of(layer.weight).adjust(0.25)
    layer(torch.ones(1, 1))
    assert float(layer.quantizer.scale) == 64


def test_adjusting_for_ever_ends_at_the_last_normal_power(linear, table):
    quantizer = quantizer_of(linear([1.0], table("E4M3")).weight)
    for _ in range(300):
        quantizer.adjust(0.5)
    assert (quantizer.adjustment, float(quantizer.scale)) == (2.0**-126, 2.0**-126)


@pytest.mark.parametrize("mode", ["current", "delayed", "static"])
def test_an_adjusted_flow_saturates_earlier(mode, table):
    amax = {"amax": 1.0} if mode == "static" else {}
    flow = FlowQuantizer(Recipe(format=table("E4M3"), scale_mode=mode, **amax), torch.device("cpu"))
    assert float(flow.quantized(torch.tensor([1.0]), True)) == 1.0
    flow.adjust(2.0)
    assert float(flow.quantized(torch.tensor([1.0]), True)) == 448 / 512


def test_a_flow_takes_up_its_adjustment_from_a_saved_state(table):
    recipe = flow_recipe(table("E4M3"))
    one, other = (FlowQuantizer(recipe, torch.device("cpu")) for _ in range(2))
    one.adjust(2.0)
    one.quantized(torch.tensor([1.0]), True)
    other.load_state_dict({key: value.clone() for key, value in one.state_dict().items()})
    assert float(other.quantized(torch.tensor([1.0]), True)) == 448 / 512


def test_an_adjusted_grid_scale_is_the_rules_own_times_the_factor(table):
    """Whatever the magnitudes: hysteresis sees the scale that the rule has found."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, generator=generator)

    def scales(factor):
        return GridScales(
            [weight], [table("E4M3")], [torch.ones(())], fitted=[True], adaptive=[True], adjustments=[factor]
        )

    plain, adjusted = scales(1.0), scales(0.125)
    for size in torch.exp(4 * torch.randn(100, generator=generator)).double():
        for one in (plain, adjusted):
            one.adapt(size.reshape(1))
        assert float(adjusted.scales[0]) == 0.125 * float(plain.scales[0])
    assert int(plain.rescales) > 10


NO_LIMITS = [math.nan, math.inf, -1.0, 0.0, "0.5", None]


@pytest.mark.parametrize("number", NO_LIMITS)
def test_a_number_that_is_not_finite_or_not_above_zero_cannot_be_carried_out(number):
    for action in (ScaleLearningRate(reason="", factor=number), ClipGradients(reason="", norm=number)):
        with pytest.raises(ValueError, match=rf"(factor|norm)={number!r} is no finite number above 0"):
            actions.carry_out(None, action)


def test_rates_may_rise_and_norms_be_small():
    assert actions.carry_out(None, ScaleLearningRate(reason="", factor=3)) == {}
    assert actions.carry_out(None, ClipGradients(reason="", norm=1e-30)) == {}


ROUNDINGS = ["nearest_even", "stochastic", "error_feedback", "eco"]


def two_layers(format, seed=0):
    torch.manual_seed(seed)
    return quantize_model(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), format)


def stored(format, rounding="nearest_even", **options):
    """Return a model, its optimizer and its storage, after three steps."""
    model = two_layers(format)
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.03)
    storage = store_on_grid(optimizer, rounding, torch.Generator().manual_seed(1), **options)
    train(model, optimizer, 3)
    return model, optimizer, storage


def train(model, optimizer, steps):
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        optimizer.zero_grad()
        with held_weights(model):
            model(torch.randn(7, 6, generator=generator)).square().sum().backward()
        optimizer.step()


def switch(storage, layer, format, kept="grid", covered=True):
    recipes = LayerRecipes(weights=Recipe(format=format), storage=kept, covered=covered)
    with storage.regridding([layer.weight]):
        requantize([layer], recipes)


def on_grid(weight):
    quantizer = quantizer_of(weight)
    scaled = weight.detach() * quantizer.scale
    return torch.equal(quantizer.format.quantize(scaled), scaled)


def moments_of(optimizer):
    return [
        value.clone() for state in optimizer.state.values() for value in state.values() if value.dim() > 0
    ]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("to", ["E5M2", "E3M4", "E7M0", "E0M7"])
def test_a_switched_weight_goes_on_on_its_new_grid(rounding, to, table):
    model, optimizer, storage = stored(table("E4M3"), rounding)
    moments = moments_of(optimizer)
    switch(storage, model[0], table(to))
    assert quantizer_of(model[0].weight).format.name == to
    assert all(map(torch.equal, moments, moments_of(optimizer)))
    for steps in range(3):
        assert on_grid(model[0].weight), steps
        assert on_grid(model[2].weight), steps
        train(model, optimizer, 1)


def test_a_switched_weight_is_rounded_to_nearest_under_a_fitted_scale(table):
    model, _, storage = stored(table("E4M3"), "stochastic")
    before, e5m2 = model[0].weight.detach().clone(), table("E5M2")
    switch(storage, model[0], e5m2)
    scale = Recipe(format=e5m2).scale_of(before)
    assert float(quantizer_of(model[0].weight).scale) == float(scale)
    assert torch.equal(model[0].weight, e5m2.quantize(before * scale) / scale)


def test_the_other_weight_does_not_notice(table):
    one, other = (stored(table("E4M3"), "error_feedback") for _ in range(2))
    switch(one[2], one[0][0], table("E5M2"))
    assert torch.equal(one[0][2].weight, other[0][2].weight)
    assert torch.equal(one[2].scales.exponents[1], other[2].scales.exponents[1])
    residuals = [storage.feedback.stored[1] for _, _, storage in (one, other)]
    assert torch.equal(*residuals)
    assert residuals[0].unique().numel() > 1


def test_the_bound_stays_a_multiple_of_the_first_rms(table):
    model, _, storage = stored(table("E4M3"), bound=1.25)
    before = storage.scales.bounds().clone()
    switch(storage, model[0], table("E5M2"))
    assert torch.equal(storage.scales.bounds(), before)
    assert float(model[0].weight.detach().abs().max()) <= float(before[0])


def test_error_feedback_loses_nothing_in_a_switch(table):
    model, _, storage = stored(table("E4M3"), "error_feedback", residual_format="FP32")
    layer = model[0]
    whole = layer.weight.detach() + storage.feedback.stored[0]
    switch(storage, layer, table("E7M0"))
    assert not torch.equal(whole, layer.weight)
    assert torch.equal(layer.weight + storage.feedback.stored[0], whole)


def test_error_feedback_loses_nothing_in_an_adjustment(table):
    model, _, storage = stored(table("E4M3"), "error_feedback", residual_format="FP32")
    layer = model[0]
    whole = layer.weight.detach() + storage.feedback.stored[0]
    with storage.regridding([layer.weight]):
        layer.quantizer.adjust(2.0**-12)  # so far down that most weights change
    assert torch.equal(layer.weight + storage.feedback.stored[0], whole)


def test_residuals_in_a_format_are_of_the_new_format(table):
    model, _, storage = stored(table("E4M3"), "error_feedback")
    switch(storage, model[0], table("E5M2"))
    assert storage.state_dict()["residuals"]["formats"] == ["E5M2", "E4M3"]


def test_an_adjusted_grid_keeps_its_scale_times_the_factor(table):
    model, optimizer, storage = stored(table("E4M3"))
    weight, quantizer = model[0].weight, quantizer_of(model[0].weight)
    before, scale = weight.detach().clone(), float(quantizer.scale)
    with storage.regridding([weight]):
        quantizer.adjust(2.0**-9)
    assert float(quantizer.scale) == scale * 2.0**-9
    assert torch.equal(weight, table("E4M3").fake_quantize(before, quantizer.scale))
    assert not torch.equal(weight, before)
    train(model, optimizer, 2)
    assert on_grid(weight)
    assert float(quantizer.scale) <= scale * 2.0**-8


def test_a_weight_leaves_the_grid_and_comes_back(table):
    model, optimizer, storage = stored(table("E4M3"))
    switch(storage, model[0], table("BF16"), kept="master", covered=False)
    assert [*map(id, storage.weights)] == [id(model[2].weight)]
    assert not quantizer_of(model[0].weight).on_grid
    train(model, optimizer, 2)
    assert not on_grid(model[0].weight)  # a float32 master
    switch(storage, model[0], table("E5M2"))
    train(model, optimizer, 1)
    assert on_grid(model[0].weight)


def test_all_weights_may_leave_the_grid(table):
    model, optimizer, storage = stored(table("E4M3"))
    for layer in (model[0], model[2]):
        with storage.regridding([layer.weight]):
            requantize([layer], LayerRecipes())
    before = model[0].weight.detach().clone()
    train(model, optimizer, 2)
    assert storage.weights == []
    assert quantizer_of(model[0].weight) is None
    assert not torch.equal(model[0].weight, before)


def test_a_switched_storage_takes_up_its_own_state(table):
    one, other = (stored(table("E4M3"), "error_feedback") for _ in range(2))
    for model, _, storage in (one, other):
        switch(storage, model[0], table("E5M2"))
    train(*one[:2], 2)
    for mine, theirs in zip(other[0].parameters(), one[0].parameters(), strict=True):
        mine.data.copy_(theirs)
    other[2].load_state_dict(copy.deepcopy(one[2].state_dict()))
    other[1].load_state_dict(copy.deepcopy(one[1].state_dict()))
    for model, optimizer, _ in (one, other):
        train(model, optimizer, 2)
    assert all(map(torch.equal, one[0].parameters(), other[0].parameters()))


def test_a_master_that_becomes_high_precision_has_no_bound(table):
    model = two_layers(table("E4M3"))
    weights = [model[0].weight, model[2].weight]
    optimizer = torch.optim.SGD(model.parameters(), lr=100.0)
    bound = MasterBound(optimizer, weights, 1.0)
    requantize([model[0]], LayerRecipes())
    bound.follow_formats()
    train(model, optimizer, 1)
    within = [bool((w.abs() <= limit).all()) for w, limit in zip(weights, bound.limits, strict=True)]
    assert within == [False, True]


@pytest.mark.slow
def test_a_compiled_model_notices_a_switch(table):
    model = two_layers(table("E4M3"))
    compiled, x = torch.compile(model, backend="eager"), torch.randn(4, 6)
    with held_weights(model):  # as the training loop does
        compiled(x)
    requantize([model[0]], LayerRecipes(weights=Recipe(format=table("E2M1")), storage="master"))
    requantize([model[2]], LayerRecipes())
    with held_weights(model):
        assert torch.equal(compiled(x), model(x))
    assert not torch.equal(model(x), two_layers(table("E4M3"))(x))


def test_a_group_of_which_a_part_is_switched_becomes_two(table):
    model, optimizer, storage = stored(table("E4M3"))
    switch(storage, model[0], table("E5M2"))
    actions.regroup(optimizer, [model[0].weight])
    grids = [group for group in optimizer.param_groups if group["format"] is not None]
    assert [group["format"].name for group in grids] == ["E4M3", "E5M2"]
    assert [[id(one) for one in group["params"]] for group in grids] == [
        [id(model[2].weight)],
        [id(model[0].weight)],
    ]
    assert [group["scale"][0] is quantizer_of(group["params"][0]).scale for group in grids] == [True, True]
    assert {group["lr"] for group in grids} == {0.03}


def test_a_group_that_is_switched_whole_stays_one(table):
    model, optimizer, _ = stored(table("E4M3"))
    for layer in (model[0], model[2]):
        requantize([layer], LayerRecipes())
    actions.regroup(optimizer, [model[0].weight, model[2].weight])
    assert len(optimizer.param_groups) == 2
    assert [(group["format"], group["scale"]) for group in optimizer.param_groups] == [(None, None)] * 2


PLUGIN = """
@attrs.frozen(kw_only=True)
class Source:
    vocab_size: int = 4

@attrs.frozen(kw_only=True)
class Script:
    needs: tuple[str, ...] = ()

def log4(options):
    from altgrad_core.format import Format
    powers = [2.0**k for k in range(7)]
    return Format(name="LOG4", bits=4, values=[*(-one for one in powers[::-1]), 0.0, *powers])

def int4(options):
    from altgrad_core.format import Format
    return Format(name="INT4", bits=4, values=[float(k) for k in range(-7, 8)])

def int9(options):
    from altgrad_core.format import Format
    return Format(name="INT9", bits=9, values=[float(k) for k in range(-200, 201)])

class Tokens:
    vocab_size, loss_floor = 4, None
    def __init__(self, options): pass
    def fingerprint(self): return "fixed"
    def tokens(self, split):
        import numpy
        return (numpy.arange(400) * 7 // 3 % 4).astype("uint16")

def adam(options, inputs):
    import torch
    return torch.optim.AdamW(inputs.groups, lr=1e-2)

class Policy:
    def __init__(self, options): self.needs = options.needs
    def decide(self, step, metrics): return None

class Watch:
    needs = ()
    provides = {"count": "sum", "share": "mean", "other": ""}
    def __init__(self, options): pass
    def observe(self, step):
        return {"watch/count/total": 1.0}

def component(name, target, options=None, **more):
    given = {} if options is None else {"options": options}
    return Component(name=name, summary="", target=f"{__name__}:{target}", **given, **more)

@hookimpl
def altgrad_formats():
    found = {"LOG4": ("log4", 4), "INT4": ("int4", 4), "INT9": ("int9", 9)}
    return [component(name, target, bits=bits) for name, (target, bits) in found.items()]

@hookimpl
def altgrad_datasets():
    return [component("fixed", "Tokens", Source)]

@hookimpl
def altgrad_optimizers():
    return [component("Plain", "adam")]

@hookimpl
def altgrad_fallbacks():
    return [component("scripted", "Policy", Script)]

@hookimpl
def altgrad_monitors():
    return [component("watch", "Watch")]
"""

EXPERIMENT = """
name = "e"
steps = 8
data = "fixed"
optimizer = "Plain"
[model]
n_layer = 1
n_head = 1
n_embd = 8
block_size = 8
[train]
batch_size = 2
device = "cpu"
eval_batches = 1
warmup_steps = 0
eval_every = 0
log_every = 1
[quantize]
format = "INT4"
storage = "grid"
"""
MONITORED = "[[monitor]]\nplugin = 'watch'\n"
HEAD = "[[quantize.rule]]\nlayers = 'lm_head'\nformat = 'INT4'\n"
FLOWS = "[quantize.gradients]\nformat = 'INT4'\n"


@pytest.fixture
def assembled(install, tmp_path, monkeypatch):
    """Return a function that assembles the run of an experiment, by plugins of this file's own."""
    monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path / "cache"))
    install("own-plugins", PLUGIN)
    folders = []

    def make(more="", *flags):
        path = pathlib.Path(tmp_path / "e.toml")
        path.write_text(EXPERIMENT + textwrap.dedent(more))
        file = load_experiment(path, flags, discover())
        folders.append(RunFolder(tmp_path / f"run{len(folders)}"))
        return assemble(file.cells_on["cpu"][0], file.registry, folders[-1], Terminal(quiet=True), "cpu")

    yield make
    for folder in folders:
        folder.close()


def switched(run, layers, to):
    return actions.carry_out(run, SwitchFormat(reason="", layers=layers, to=to))


def adjusted(run, layers, factor, of):
    return actions.carry_out(run, AdjustScale(reason="", layers=layers, factor=factor, of=of))


def test_a_run_tells_what_was_switched(assembled):
    run = assembled()
    share = run.share_on_grid
    effects = switched(run, ".*mlp.*", "LOG4")
    mlp = ["transformer.h.0.mlp.c_fc", "transformer.h.0.mlp.c_proj"]
    assert effects == {"layers": mlp, "formats_before": dict.fromkeys(mlp, "INT4")}
    assert {layer for layer, format in run.formats.items() if format == "LOG4"} == set(mlp)
    assert run.switches == [(".*mlp.*", "LOG4")]
    assert run.share_on_grid == share > 0.9


@pytest.mark.parametrize("to", ["none", "FP32", "INT9"])
def test_high_precision_is_off_the_grid(to, assembled):
    run = assembled()
    switched(run, ".*mlp.*", to)
    weights = run.weights()
    assert {one.storage for name, one in weights.items() if "mlp" in name} == {"master"}
    assert {one.storage for name, one in weights.items() if "attn.c" in name} == {"grid"}
    assert 0.3 < run.share_on_grid < 0.4  # attention has 4 of 12 parts


def test_an_unquantized_tied_head_is_no_candidate(assembled):
    run = assembled()
    switched(run, ".*", "LOG4")
    assert "lm_head" not in run.formats
    assert quantizer_of(run.model.lm_head.weight) is None


def test_a_quantized_tied_head_is_switched_in_its_forward_pass(assembled):
    run = assembled(HEAD)
    before = run.model.lm_head.weight.detach().clone()
    switched(run, "lm_head", "LOG4")
    quantizer = quantizer_of(run.model.lm_head.weight)
    assert (quantizer.format.name, quantizer.covered, quantizer.on_grid) == ("LOG4", False, False)
    assert torch.equal(run.model.lm_head.weight, before)


def test_layers_in_that_format_already_stay_as_they_are(assembled):
    run = assembled()
    adjusted(run, ".*c_fc", 0.5, "weights")
    assert switched(run, ".*", "INT4")["layers"] == []
    assert run.model.get_submodule("transformer.h.0.mlp.c_fc").quantizer.adjustment == 0.5


def test_a_switch_ends_an_adjustment(assembled):
    run = assembled()
    adjusted(run, ".*c_fc", 0.5, "weights")
    switched(run, ".*", "LOG4")
    assert run.model.get_submodule("transformer.h.0.mlp.c_fc").quantizer.adjustment == 1.0


def test_factors_multiply_up(assembled):
    run = assembled(FLOWS)
    adjusted(run, ".*c_fc", 0.5, "gradients")
    assert adjusted(run, ".*mlp.*", 0.25, "gradients")["adjustments"] == {
        "transformer.h.0.mlp.c_fc": 0.125,
        "transformer.h.0.mlp.c_proj": 0.25,
    }


@pytest.mark.parametrize(
    ("layers", "to", "problem"),
    [
        (".*", "LOG5", r"LOG5.*did you mean 'LOG4'"),
        ("mlp", "LOG4", r"'mlp' matches no layer with a quantized weight.*'\.\*mlp\.\*' does"),
        ("lm_head", "LOG4", "'lm_head' matches no layer"),
        ("(", "LOG4", "no regular expression"),
    ],
)
def test_a_switch_that_cannot_be_changes_nothing_and_says_why(layers, to, problem, assembled):
    run = assembled()
    before = {name: one.detach().clone() for name, one in run.model.named_parameters()}
    with pytest.raises(ValueError, match=problem):
        switched(run, layers, to)
    assert all(torch.equal(one, before[name]) for name, one in run.model.named_parameters())
    assert run.switches == []


@pytest.mark.parametrize(
    ("factor", "of", "problem"),
    [
        (0.3, "weights", "factor=0.3 is no power of two"),
        (0.0, "weights", "no power of two"),
        (-2.0, "weights", "no power of two"),
        (float("inf"), "weights", "no power of two"),
        (0.5, "biases", "of='biases' is not one of weights, activations, gradients"),
        (0.5, "gradients", "no layer has quantized gradients"),
    ],
)
def test_an_adjustment_that_cannot_be_says_why(factor, of, problem, assembled):
    with pytest.raises(ValueError, match=problem):
        adjusted(assembled(), ".*", factor, of)


def test_bound_and_rule_of_a_master_layer_hold_after_a_switch(assembled):
    rule = "[[quantize.rule]]\nlayers = '.*attn.*'\nstorage = 'master'\n"
    run = assembled("bound = 2.0\n" + rule)
    switched(run, ".*", "LOG4")
    storages = {one.layer: one.storage for one in run.weights().values() if one.format is not None}
    assert {layer for layer, storage in storages.items() if storage == "master"} == {
        "transformer.h.0.attn.c_attn",
        "transformer.h.0.attn.c_proj",
    }
    assert run.master_bound.bounded == [True, True]
    switched(run, ".*", "INT9")
    assert run.master_bound.bounded == [False, False]


@pytest.mark.parametrize(
    ("need", "problem"),
    [
        ("stall/ratio/total", "no monitor named 'stall' is installed; there are: watch"),
        ("train/los", "no monitor named 'train' .*did you mean 'train/loss'"),
        ("watch/coumt/total", r"'watch' provides: count, share, other; did you mean 'count'\?"),
        ("watch/count/transformer.h.0.mlp.c_fk", r"no layer .*did you mean 'transformer.h.0.mlp.c_fc'\?"),
        ("watch/count", "a metric is named <monitor>/<quantity>/<layer>"),
    ],
)
def test_a_need_that_nobody_serves_is_refused_at_assembly(need, problem, assembled):
    with pytest.raises(UsageError, match=f"'scripted' needs the metric '{need}'.*{problem}"):
        assembled(f"{MONITORED}[[fallback]]\nplugin = 'scripted'\nneeds = ['{need}']\n")


def test_a_need_of_a_monitor_that_the_experiment_leaves_out_says_how_to_add_it(assembled):
    with pytest.raises(UsageError, match=r"'watch/count/total'; add \[\[monitor\]\] plugin = 'watch'$"):
        assembled("[[fallback]]\nplugin = 'scripted'\nneeds = ['watch/count/total']\n")


def test_numbers_come_over_by_one_transfer_for_each_device():
    class Counted(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, function, types, arguments=(), keywords=None):
            self.calls += function in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__float__)
            return function(*arguments, **(keywords or {}))

    values = [torch.tensor(1), 2.5, torch.tensor([3.0]), torch.tensor(True), torch.tensor(5.0).double()]
    with Counted() as counted:
        assert to_host(values) == [1.0, 2.5, 3.0, 1.0, 5.0]
    assert counted.calls == 1
