import copy
import math
import pickle
from typing import ClassVar

import attrs
import pytest
import torch
from torch import nn

from altgrad_core.elementwise import wide_codes
from altgrad_core.error_feedback import ErrorFeedback, ResidualCodes, gap_beside
from altgrad_core.experiment_file import ExperimentError, load_experiment
from altgrad_core.format import Format
from altgrad_core.groups import param_groups
from altgrad_core.quantizer import quantizer_of
from altgrad_core.registry import Registry, UsageError
from altgrad_core.rows import Row
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import dequantize_model, quantize_model

CODEBOOK = Format(name="CODEBOOK", bits=4, values=[-3.0, -1.25, -0.5, 0.0, 0.25, 0.75, 1.5, 3.0])
EIGHT_BITS = ("E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0")


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, arXiv 2302.06675: the sign of an interpolated momentum."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                moment = self.state[weight].setdefault("exp_avg", torch.zeros_like(weight))
                weight.sub_(group["lr"] * moment.lerp(weight.grad, 1 - group["betas"][0]).sign())
                moment.lerp_(weight.grad, 1 - group["betas"][1])


OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "SGD with momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True, weight_decay=0.0),
    "Lion": lambda groups: Lion(groups, lr=0.003),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda groups: torch.optim.Muon(
        [group for group in groups if all(one.dim() == 2 for one in group["params"])],
        lr=0.01,
        weight_decay=0.0,
    )


@pytest.fixture
def formats(table):
    return [*map(table, ("E0M7", "E3M4", "E4M3", "E5M2", "E7M0", "BF16")), CODEBOOK]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def perceptron(format, **options):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    return quantize_model(model, format, **options)


def forward_weights(model):
    """The weights of the Linears as the forward pass sees them."""
    return [quantizer_of(model[at].weight).quantized(model[at].weight).detach().clone() for at in (0, 3)]


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def single(values, format, **options):
    """A model of one weight of these values, which SGD moves by exactly what `push` says."""
    model = nn.Sequential(nn.Linear(len(values), 1, bias=False))
    model[0].weight.data = torch.tensor([values])
    quantize_model(model, format)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return model[0].weight, optimizer, store_on_grid(optimizer, "error_feedback", **options)


def residual(storage):
    """The first weight's residual, in weight units."""
    return storage.feedback.residual(0, storage.weights[0].detach(), storage.scales.scales[0])


# --- by hand: E0M7 at scale 1, whose spacing is 1/128 and whose residuals are multiples of 1/256 of it ------


def test_the_first_residual_is_what_the_first_snap_took(uniform):
    weight, _, storage = single([0.5, 0.25 + 0.25 / 128, 0.25 - 0.125 / 128], uniform)
    assert (weight * 128).tolist() == [[64, 32, 32]]
    assert (residual(storage) * 128).tolist() == [[0, 0.25, -0.125]]


def test_residuals_add_up_until_the_weight_moves(uniform, push):
    weight, optimizer, storage = single([0.5], uniform)
    seen = []
    for _ in range(4):
        push(weight, optimizer, 0.375 / 128)
        seen.append((weight.item() * 128, residual(storage).item() * 128))
    assert seen == [(64, 0.375), (65, -0.25), (65, 0.125), (66, -127 / 256)]  # 65.5 is a tie


def test_small_updates_that_nearest_rounding_loses_arrive(uniform, push):
    weight, optimizer, _ = single([0.5, 0.25], uniform)
    for _ in range(128):
        push(weight, optimizer, 1 / 64 / 128, -1 / 64 / 128)
    assert (weight * 128).tolist() == [[66, 30]]


def test_the_optimizer_sees_the_weight_with_its_residual_and_the_forward_pass_without(uniform, push):
    seen = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["params"][0].detach() * 128)
            super().step(closure)

    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    model[0].weight.data.fill_(64.25 / 128)
    quantize_model(model, uniform, scale_mode="static", amax=127 / 128)
    optimizer = Watching(model.parameters(), lr=1.0)
    store_on_grid(optimizer, "error_feedback")
    assert model(torch.ones(1, 1)).item() == 0.5
    push(model[0].weight, optimizer, 0.125 / 128)
    push(model[0].weight, optimizer, 0.0)
    assert model(torch.ones(1, 1)).item() == 0.5
    assert [one.item() for one in seen] == [64.25, 64.375]


def test_what_monitors_see_as_intended_is_the_update_alone(uniform, push):
    weight, optimizer, storage = single([0.5, 64.25 / 128], uniform)
    storage.watched = {weight: weight.detach().clone()}
    push(weight, optimizer, 0.125 / 128)
    assert (storage.intended[weight] * 128).tolist() == [[0.125, 0.125]]
    storage.watched = {}
    push(weight, optimizer, 0.125 / 128)
    assert storage.intended == {}


def test_when_the_scale_shrinks_a_residual_is_what_the_new_grid_leaves(uniform, push):
    weight, optimizer, storage = single([0.5, 32.25 / 128], uniform)
    push(weight, optimizer, 3.0, 0.0)  # scale 1/4, spacing 1/32: 32.25/128 is 8.0625/32
    assert (weight * 32).tolist() == [[112, 8]]
    assert (residual(storage) * 32).tolist() == [[0, 0.0625]]


def test_when_the_scale_grows_the_finer_grid_takes_up_the_residual(uniform, push):
    weight, optimizer, storage = single([0.5, 32.5 / 128 + 2**-11], uniform)
    push(weight, optimizer, -0.375, -0.125)  # 0.125 would fit a scale of 4, and is served by 2
    assert quantizer_of(weight).scale.item() == 2
    assert (weight * 256).tolist() == [[32, 33]]
    assert (residual(storage) * 256).tolist() == [[0, 0.125]]


def test_the_scale_shrinks_only_if_a_weight_rounds_past_the_largest_value(uniform, push):
    weight, optimizer, storage = single([0.5], uniform)
    push(weight, optimizer, 0.5 - 0.875 / 128)  # 127.125/128
    assert (quantizer_of(weight).scale.item(), weight.item() * 128) == (1, 127)
    assert residual(storage).item() * 128 == 0.125
    push(weight, optimizer, 0.5 / 128)  # 127.625/128
    assert (quantizer_of(weight).scale.item(), weight.item() * 64) == (0.5, 64)


@pytest.mark.parametrize("residual_format", ["same", "FP32"])
def test_a_bounded_weight_comes_back_at_once(uniform, residual_format, push):
    options = {"bound": 1.51, "scale_mode": "initial", "residual_format": residual_format}
    weight, optimizer, _ = single([0.5, -0.5], uniform, **options)
    push(weight, optimizer, 0.4, -0.4)  # 0.755 is the bound, 96/128 the largest value within
    assert (weight * 128).tolist() == [[96, -96]]
    push(weight, optimizer, -10 / 128, 10 / 128)
    assert (weight * 128).abs().tolist() in ([[86, 86]], [[87, 87]])


def test_a_float32_residual_keeps_what_a_bounded_master_has(uniform, push):
    weight, optimizer, storage = single(
        [0.5, -0.5], uniform, bound=1.51, scale_mode="initial", residual_format="FP32"
    )
    push(weight, optimizer, 0.4, 0.1)
    bound = torch.tensor(1.51) * 0.5
    assert torch.equal((weight + residual(storage))[0], torch.stack([bound, torch.tensor(-0.5) + 0.1]))


def test_behind_a_fixed_scale_a_format_forgets_what_saturates_and_float32_does_not(uniform, push):
    backs = []
    for residual_format in ("same", "FP32"):
        options = {"scale_mode": "initial", "residual_format": residual_format}
        weight, optimizer, _ = single([0.5], uniform, **options)
        push(weight, optimizer, 3.0)
        push(weight, optimizer, -0.25)
        backs.append(weight.item() * 128)
    assert backs == [95, 127]


@pytest.mark.parametrize("residual_format", ["same", "FP32"])
def test_a_nan_is_seen_and_stays(uniform, residual_format, push):
    weight, optimizer, storage = single([0.5, 0.25], uniform, residual_format=residual_format)
    push(weight, optimizer, math.nan, 0.25 / 128)
    push(weight, optimizer, 0.0, 0.5 / 128)
    assert weight.isnan().tolist() == [[True, False]]
    assert (weight[0, 1].item() * 128, residual(storage)[0, 1].item() * 128) == (33, -0.25)


# --- residuals as codes -------------------------------------------------------------------------------


def test_the_gap_is_that_on_the_side_of_the_residual(table):
    scale, one = torch.tensor(4.0), torch.tensor([0.25])  # 1.0 in the format's own units
    gaps = [gap_beside(table("E4M3"), one, scale, torch.tensor([sign])).item() for sign in (1.0, -1.0)]
    assert gaps == [1 / 8 / 4, 1 / 16 / 4]
    values = torch.tensor([-3.0, 0.0, 0.25, 3.0])
    up, down = (gap_beside(CODEBOOK, values, torch.tensor(1.0), torch.full((4,), s)) for s in (1.0, -1.0))
    assert up.tolist() == [1.75, 0.25, 0.5, 1.5]
    assert down.tolist() == [1.75, 0.5, 0.25, 1.5]


def test_no_residual_of_nearest_rounding_exceeds_half_of_that_gap(formats):
    for format in formats:
        scale = torch.tensor(2.0)
        x = torch.randn(20_000, generator=generator()) * format.largest / 8
        x = x.clamp(float(format.values[0]) / 2, format.largest / 2)
        weight = format.fake_quantize(x, scale)
        multiple = (x - weight) / gap_beside(format, weight, scale, x - weight)
        assert multiple.abs().max() <= 0.5, format
        assert multiple.abs().max() > 0.49, format


def test_half_a_spacing_uses_the_range_of_every_format(table):
    largest = {"E0M7": 127 / 256, "E1M6": 127 / 256, "E4M3": 15 / 32, "E5M2": 7 / 16, "E7M0": 1 / 4}
    for name, expected in largest.items():
        codes = ResidualCodes(table(name))
        assert codes.decode(codes.encode(torch.tensor([0.5, 9.0, -9.0]))).tolist() == [
            expected,
            expected,
            -expected,
        ], name


def test_every_code_survives_and_every_multiple_goes_to_the_nearest(formats):
    for format in formats:
        if format.bits > 8:
            continue
        codes = ResidualCodes(format)
        grid = codes.decode(codes.encode(format.values / codes.factor)).unique()
        assert torch.equal(codes.decode(codes.encode(grid)), grid)
        assert grid.abs().max() < 0.5
        x = torch.linspace(float(grid[0]), float(grid[-1]), 2001)
        nearest = (x[:, None].double() - grid.double()).abs().amin(dim=1)
        assert torch.equal((codes.decode(codes.encode(x)).double() - x.double()).abs(), nearest), format


def test_codes_are_rungs_also_where_they_are_looked_up(formats):
    for format in (*formats, Format(name="ODD", bits=3, values=[-1.0, -0.25, 0.0, 0.5, 4.0])):
        codes = ResidualCodes(format)
        x = torch.cat((torch.linspace(-0.7, 0.7, 4001), torch.tensor([math.inf, -math.inf, -0.0])))
        rungs = format.rung(x * codes.factor)
        inside = format.rung(codes.decode(codes.encode(torch.tensor([-9.0, 9.0]))) * codes.factor)
        expected = rungs.clamp(*inside.tolist()) - inside[0]
        assert torch.equal(wide_codes(codes.encode(x)), expected), format
        assert codes.encode(torch.tensor([math.nan, 0.0])).shape == (2,)


def test_a_residual_takes_as_many_bits_as_its_format(table, uniform):
    dtypes = {"E4M3": torch.uint8, "E2M1": torch.uint8, "BF16": torch.int16}
    for name, dtype in dtypes.items():
        _, _, storage = single([0.5, 0.3], uniform, residual_format=table(name))
        (stored,) = storage.feedback.stored
        assert (stored.dtype, stored.shape) == (dtype, (1, 2))


def test_a_weight_that_nothing_moves_stays(formats):
    x = torch.randn(5000, generator=generator(3)) * torch.exp2(torch.randn(5000, generator=generator(4)))
    for format in formats:
        for stored_in in (*formats, None):
            scale = torch.tensor(format.largest / 16).log2().floor().exp2().clamp(max=2.0**100)
            weight = format.fake_quantize(x, scale)
            feedback = ErrorFeedback([weight], [format], stored_in)
            feedback.keep([0], Row([weight]), weight, scale, x - weight)
            before = feedback.stored[0].clone()
            given = weight + feedback.residual(0, weight, scale)
            assert torch.equal(format.fake_quantize(given, scale), weight), (format, stored_in)
            feedback.keep([0], Row([weight]), weight, scale, given - weight)
            assert stored_in is CODEBOOK or format is CODEBOOK or torch.equal(feedback.stored[0], before)


@pytest.mark.parametrize("residual_format", ["same", "FP32"])
def test_without_a_gradient_and_at_lr_zero_weights_and_residuals_stay(table, residual_format, train):
    model = perceptron(table("E4M3"))
    optimizer = torch.optim.AdamW(param_groups(model), lr=0.03)
    storage = store_on_grid(optimizer, "error_feedback", residual_format=residual_format)
    train(model, optimizer, 5)
    before = [*forward_weights(model), *(one.clone() for one in storage.feedback.stored)]
    assert any(one.bool().any() for one in storage.feedback.stored)
    optimizer.zero_grad()
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 3)
    assert same(before, [*forward_weights(model), *storage.feedback.stored])


# --- float32 residuals are float32 masters ------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_with_float32_residuals_a_fixed_scale_and_no_decay_the_run_is_that_of_masters(make, formats, train):
    for format in formats:
        runs = []
        for stored in (False, True):
            model = perceptron(format, scale_mode="initial")
            optimizer = make([{**group, "weight_decay": 0.0} for group in param_groups(model)])
            if stored:
                store_on_grid(optimizer, "error_feedback", scale_mode="initial", residual_format="FP32")
            seen = []
            for step in range(12):
                seen += [torch.tensor(train(model, optimizer, 1, step)), *forward_weights(model)]
            runs.append(seen)
        assert same(*runs), format
        assert not torch.equal(runs[0][1], runs[0][-2]), "the weights have moved"


@pytest.mark.slow
def test_with_residuals_of_eight_bits_a_model_learns_where_nearest_rounding_stalls(table, uniform, train):
    final = {}
    for rounding, options in {
        "nearest_even": {},
        "error_feedback": {},
        "error_feedback, FP32": {"residual_format": "FP32"},
    }.items():
        model = perceptron(uniform)
        optimizer = torch.optim.AdamW(param_groups(model)[:1], lr=1e-3)
        store_on_grid(optimizer, rounding.partition(",")[0], **options)
        losses = train(model, optimizer, 250)
        final[rounding] = sum(losses[-20:]) / sum(losses[:20])
    assert final["nearest_even"] > 0.95
    assert final["error_feedback"] < 0.7
    assert abs(final["error_feedback"] - final["error_feedback, FP32"]) < 0.02


# --- any optimizer, any format --------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("residual_format", ["same", "FP32", CODEBOOK], ids=str)
def test_after_every_step_the_weights_are_on_their_grids(make, residual_format, table, train, is_on_grid):
    for format in (table("E4M3"), table("E7M0"), CODEBOOK):
        model = perceptron(format)
        optimizer = make(param_groups(model))
        storage = store_on_grid(optimizer, "error_feedback", bound=2.0, residual_format=residual_format)
        for step in range(5):
            assert all(map(is_on_grid, storage.weights))
            train(model, optimizer, 1, step)
        assert all(map(is_on_grid, storage.weights))


def test_e0m7_and_e1m6_train_alike_to_the_bit(table, train):
    runs = []
    for name in ("E0M7", "E1M6"):
        model = perceptron(table(name))
        optimizer = torch.optim.AdamW(param_groups(model), lr=0.03)
        storage = store_on_grid(optimizer, "error_feedback", bound=8.0)
        runs.append([torch.tensor(train(model, optimizer, 40)), *forward_weights(model)])
        assert storage.scales.rescales.sum() > 0, "the scales have moved"
    assert same(*runs)


# --- saving, copying, failing ---------------------------------------------------------------------------


@pytest.mark.parametrize("residual_format", ["same", "FP32"])
def test_a_fresh_run_resumes_to_the_bit(table, residual_format, train, saved):
    def fresh(seed):
        model = perceptron(table("E4M3"))
        model[0].weight.data.mul_(seed)
        optimizer = torch.optim.AdamW(
            [{"params": group["params"]} for group in param_groups(model)], lr=0.003
        )
        options = {"bound": 4.0, "residual_format": residual_format}
        return model, optimizer, store_on_grid(optimizer, "error_feedback", **options)

    model, optimizer, storage = fresh(seed=5)
    train(model, optimizer, 10)
    states = saved(*(one.state_dict() for one in (model, optimizer, storage)))
    losses = train(model, optimizer, 10, start=10)
    other = fresh(seed=1)
    for part, state in zip(other, states, strict=True):
        part.load_state_dict(state)
    assert train(*other[:2], 10, start=10) == losses
    assert same(forward_weights(model), forward_weights(other[0]))
    assert same(storage.feedback.stored, other[2].feedback.stored)


def test_a_state_of_other_residuals_is_refused(table, uniform):
    _, _, storage = single([0.5], uniform)
    _, _, exact = single([0.5], uniform, residual_format="FP32")
    _, _, longer = single([0.5, 0.5], uniform)
    with pytest.raises(ValueError, match="stored in E0M7, these in FP32: give the same residual_format"):
        exact.load_state_dict(storage.state_dict())
    with pytest.raises(ValueError, match=r"of shape \(1, 1\), its weight \(1, 2\)"):
        longer.load_state_dict(storage.state_dict())
    state = storage.state_dict()
    del state["residuals"]
    with pytest.raises(ValueError, match="has no residuals, storage rounding here is 'error_feedback'"):
        storage.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_model_optimizer_and_storage_are_copied_together(uniform, copied, train):
    model = perceptron(uniform)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    storage = store_on_grid(optimizer, "error_feedback")
    train(model, optimizer, 3)
    before = [*forward_weights(model), *(one.clone() for one in storage.feedback.stored)]
    twins = copied((model, optimizer, storage))
    losses = train(*twins[:2], 5, start=3)
    assert same(before, [*forward_weights(model), *storage.feedback.stored])
    assert train(model, optimizer, 5, start=3) == losses


def test_a_step_that_fails_gives_the_residuals_once(uniform, push):
    weight, optimizer, storage = single([64.25 / 128], uniform)

    def fail(*_):
        raise RuntimeError

    hook = optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError):
        push(weight, optimizer, 0.0)
    hook.remove()
    push(weight, optimizer, 0.0)
    assert (weight.item() * 128, residual(storage).item() * 128) == (64, 0.25)


def test_a_step_that_calls_that_of_its_superclass_keeps_the_residuals(uniform, push):
    class Decaying(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            with torch.no_grad():
                self.param_groups[0]["params"][0].sub_(0.125 / 128)

    torch.optim.SGD([nn.Parameter(torch.ones(1))])  # from now on torch runs hooks around SGD's own step too
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    model[0].weight.data.fill_(64.25 / 128)
    optimizer = Decaying(quantize_model(model, uniform).parameters(), lr=1.0)
    storage = store_on_grid(optimizer, "error_feedback")
    storage.watched = {model[0].weight: model[0].weight.detach()}
    push(model[0].weight, optimizer, 0.1875 / 128)
    assert (model[0].weight.item() * 128, residual(storage).item() * 128) == (64, 0.3125)
    assert storage.intended[model[0].weight].item() * 128 == 0.0625


def test_a_refused_closure_leaves_the_weights_alone(uniform):
    weight, optimizer, _ = single([64.25 / 128], uniform)
    with pytest.raises(ValueError, match="without a closure"):
        optimizer.step(lambda: 0.0)
    assert weight.item() == 0.5


def test_a_dequantized_model_is_given_no_residuals(uniform, train):
    model = perceptron(uniform)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    store_on_grid(optimizer, "error_feedback")
    dequantize_model(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train(model, optimizer, 2)
    assert same(before, model.parameters())


# --- refusals, and the experiment file ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rounding": "eco", "residual_format": "FP32"}, "is for rounding='error_feedback', not 'eco'"),
        ({"rounding": "error_feedback", "residual_format": "E9M9"}, "no format named 'E9M9'"),
        ({"rounding": "feedback"}, "stochastic, error_feedback, eco, not 'feedback'"),
    ],
)
def test_a_wrong_option_is_refused_and_nothing_is_snapped(uniform, options, reason):
    model = perceptron(uniform)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises((ValueError, UsageError), match=reason):
        store_on_grid(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), **options)
    assert same(before, model.parameters())


STORED = """
name = "e"
[quantize]
format = "E5M2"
storage = "grid"
storage_rounding = "error_feedback"
"""


@pytest.mark.parametrize(
    ("line", "expected"),
    [("", "same"), ("residual_format = 'same'", "same"), ("residual_format = 'BF16'", "BF16")],
)
def test_a_file_names_the_format_of_residuals(experiment, line, expected):
    found = experiment(STORED + line)
    assert found.plain()["quantize"]["residual_format"] == expected


def test_a_file_may_ask_for_float32_residuals(experiment):
    assert experiment(STORED + "residual_format = 'FP32'").quantize.residual_format.unquantized


def test_a_file_with_a_residual_format_and_no_residuals_is_refused(mistakes):
    text = STORED.replace("error_feedback", "eco") + "residual_format = 'BF16'"
    assert mistakes(text) == [
        'e.toml:7: quantize.residual_format: goes with storage_rounding = "error_feedback", not "eco"; '
        "set that, or leave it out"
    ]


def test_an_unknown_residual_format_is_refused(mistakes):
    (line,) = mistakes(STORED + "residual_format = 'E5M3'")
    assert line.startswith(
        "e.toml:7: quantize.residual_format: expected one of 'same'; got 'E5M3'; or no format"
    )


@attrs.frozen(kw_only=True)
class Landing:
    """Options of an optimizer that rounds by itself."""

    stores_on_grid: ClassVar[bool] = True
    storage_roundings: ClassVar[tuple[str, ...]] = ("nearest_even", "stochastic")


@attrs.frozen(kw_only=True)
class Rounded:
    """Options of one that is rounded, and has a moment for residuals where it is told to."""

    momentum: float = 0.0

    @property
    def storage_roundings(self):
        return ("nearest_even", "error_feedback", *(["eco"] if self.momentum else []))


@pytest.fixture
def problems(tmp_path, registry, registered):
    """Return a function that gives the mistakes of a file with an optimizer of these options."""

    def found(options, text, more=""):
        path = tmp_path / "e.toml"
        path.write_text(f'{text}[optimizer]\nplugin = "Own"\n{more}')
        own = Registry(registered=(*registry.registered, registered("optimizer", "Own", options)))
        try:
            load_experiment(path, (), own)
        except ExperimentError as error:
            return [line.removeprefix(f"{tmp_path}/") for line in error.lines]
        return []

    return found


def test_an_optimizer_that_rounds_by_itself_names_what_it_takes_whatever_the_storage(problems):
    expected = [
        'e.toml:6: quantize.storage_rounding: "error_feedback" does not go with Own, which lands on the grid '
        'by itself; use "nearest_even" or "stochastic", or another optimizer'
    ]
    assert problems(Landing, STORED) == expected
    assert problems(Landing, STORED.replace('"grid"', '"master"')) == expected
    assert problems(Landing, STORED.replace("error_feedback", "stochastic")) == []


def test_an_optimizer_that_is_rounded_names_what_goes_with_its_options(problems):
    eco = STORED.replace("error_feedback", "eco")
    assert problems(Rounded, STORED) == []
    assert problems(Rounded, eco) == [
        'e.toml:6: quantize.storage_rounding: "eco" does not go with Own and its options; use "nearest_even" '
        'or "error_feedback", or another optimizer'
    ]
    assert problems(Rounded, eco, "momentum = 0.9") == []


def test_nothing_is_refused_for_a_rounding_where_no_weight_is_on_the_grid(problems):
    master = STORED.replace("error_feedback", "eco").replace('"grid"', '"master"')
    assert problems(Rounded, master) == []
    assert problems(Rounded, master + "[[quantize.rule]]\nlayers = '.*c_fc'\nstorage = 'grid'\n") != []
    assert problems(Rounded, master.replace('"E5M2"', '"FP32"')) == []
