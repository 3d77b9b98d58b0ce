import copy
import io
import math

import pytest
import torch
from torch import nn

from altgrad_core.error_compensation import Momentum, adam_rate
from altgrad_core.format import Format
from altgrad_core.groups import param_groups
from altgrad_core.quantizer import quantizer_of
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import quantize_model

CODEBOOK = Format(name="CODEBOOK", bits=4, values=[-3.0, -1.25, -0.5, 0.0, 0.25, 0.75, 1.5, 3.0])

OPTIMIZERS = {
    "SGD with momentum": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9),
    "SGD, Nesterov": lambda groups: torch.optim.SGD(groups, lr=0.01, momentum=0.9, nesterov=True),
    "AdamW, fused": lambda groups: torch.optim.AdamW(groups, lr=0.01, fused=True),
    "AdamW, capturable": lambda groups: torch.optim.AdamW(groups, lr=torch.tensor(0.01), foreach=False),
    "Adam, amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.01, amsgrad=True),
}
on_all = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def perceptron(format):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    return quantize_model(model, format)


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def stored(values, format, make, rounding="eco", **options):
    """A weight of these values on the grid, and its optimizer; `give` steps with a gradient."""
    model = nn.Sequential(nn.Linear(len(values), 1, bias=False))
    model[0].weight.data = torch.tensor([values])
    quantize_model(model, format)
    optimizer = make(model.parameters())
    store_on_grid(optimizer, rounding, **options)
    return model[0].weight, optimizer


def give(weight, optimizer, *gradient):
    weight.grad = torch.tensor([gradient]).expand_as(weight).clone()
    optimizer.step()


# --- the rule, by hand and against float64 -----------------------------------------------------------------


def test_the_residual_goes_into_the_momentum_of_sgd(uniform):
    weight, optimizer = stored([0.5], uniform, lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.5))
    give(weight, optimizer, -0.5 / 128)  # 64.25 is rounded to 64; (1 - 1/0.5)*0.25/0.5 = -0.5
    assert weight.item() * 128 == 64
    assert optimizer.state[weight]["momentum_buffer"].item() * 128 == -0.5 - 0.5


def test_under_nesterov_the_rate_is_that_of_what_the_buffer_adds(uniform):
    weight, optimizer = stored(
        [0.5], uniform, lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.5, nesterov=True)
    )
    give(weight, optimizer, -0.25 / 128)  # the step is 0.5*1.5*0.25 = 0.1875, the rate 0.25
    assert weight.item() * 128 == 64
    assert optimizer.state[weight]["momentum_buffer"].item() * 128 == -0.25 - 0.75


@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_residual_goes_into_the_first_moment_of_adam_at_its_rate(table, amsgrad):
    lr, betas, eps, decay, format = 0.003, (0.9, 0.95), 1e-3, 0.1, table("E4M3")
    start = torch.rand(64, generator=generator(), dtype=torch.float64).float() + 0.1
    options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay, "amsgrad": amsgrad}
    weight, optimizer = stored(
        start.tolist(), format, lambda p: torch.optim.AdamW(p, **options), scale_mode="initial"
    )
    scale = quantizer_of(weight).scale
    w, m, v, top = weight.detach().double(), *torch.zeros(3, 1, 64, dtype=torch.float64)
    for t in range(1, 9):
        gradient = torch.randn(1, 64, generator=generator(t)) / t
        weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient.double() ** 2
        top = torch.maximum(top, v) if amsgrad else v
        root = (top / (1 - 0.95**t)).sqrt() + eps
        unrounded = w * (1 - lr * decay) - lr * m / (1 - 0.9**t) / root
        w = weight.detach().double()
        assert ((unrounded - w).abs() <= 0.5001 * format.spacing(unrounded.float() * scale) / scale).all()
        m = m + (1 - 0.9**t) * (1 - 1 / 0.9) * root / lr * (unrounded - w)
        torch.testing.assert_close(optimizer.state[weight]["exp_avg"].double(), m, rtol=2e-4, atol=2e-4)


def test_adams_rate_is_what_torch_subtracts_for_each_unit_of_its_first_moment():
    weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=0.1, betas=(0.8, 0.9), eps=0.01)
    for step in range(3):
        before = weight.detach().clone()
        weight.grad = torch.randn(5, generator=generator(step), dtype=torch.float64)
        optimizer.step()
        state = optimizer.state[weight]
    rate = adam_rate(state["exp_avg_sq"], state["step"], 0.1, (0.8, 0.9), 0.01)
    torch.testing.assert_close(before - weight.detach(), rate * state["exp_avg"])


# --- on a quadratic ----------------------------------------------------------------------------------------


def bias(format, rounding, make, steps=1000):
    """Minimize |w - target|^2/2 under a falling lr: the mean distance of the last weights, in spacings."""
    target = torch.rand(1, 512, generator=generator(3)) / 2 + 0.25
    start = target + (torch.rand(1, 512, generator=generator(4)) - 0.5) * 0.5
    weight, optimizer = stored(start[0].tolist(), format, make, rounding, scale_mode="initial")
    scale, (group,) = quantizer_of(weight).scale, optimizer.param_groups
    group["initial_lr"] = group["lr"]
    for step in range(steps):
        group["lr"] = group["initial_lr"] * (1 - 0.9 * step / steps)
        weight.grad = weight.detach() - target
        optimizer.step()
    return ((weight.detach() - target).abs() * scale / format.spacing(target * scale)).mean().item()


@pytest.mark.parametrize("name", ["E0M7", pytest.param("E4M3", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=2e-3, momentum=0.9),
        pytest.param(
            lambda p: torch.optim.SGD(p, lr=2e-3, momentum=0.9, nesterov=True), marks=pytest.mark.slow
        ),
        lambda p: torch.optim.Adam(p, lr=2e-3, amsgrad=True),
    ],
    ids=["SGD", "Nesterov", "Adam, amsgrad"],
)
def test_nearest_rounding_stalls_far_from_the_minimum_and_eco_arrives(table, name, make):
    assert bias(table(name), "nearest_even", make) > {"E0M7": 9, "E4M3": 2}[name]
    assert bias(table(name), "eco", make) < 0.5


def test_a_constant_residual_is_given_once_a_step(uniform):
    """At rest between two grid values the moment carries the push of one residual and no more."""
    weight, optimizer = stored([0.5], uniform, lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.5))
    seen = []
    for _ in range(6):
        give(weight, optimizer, -0.25 / 128 if not seen else 0.0)
        seen.append(optimizer.state[weight]["momentum_buffer"].item() * 128)
    assert seen == [-0.5] * 6  # 64.125 each time: never lost, never doubled


# --- what it leaves alone ----------------------------------------------------------------------------------


@on_all
def test_at_lr_zero_weights_and_moments_are_those_of_the_optimizer_alone(uniform, make, train):
    runs = []
    for rounding in ("nearest_even", "eco"):
        model = perceptron(uniform)
        optimizer = make(param_groups(model))
        store_on_grid(optimizer, rounding)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * 0.0
        train(model, optimizer, 4)
        moments = [one for state in optimizer.state.values() for one in state.values()]
        runs.append([*model.parameters(), *moments])
    assert same(*runs)


@on_all
def test_the_first_snap_touches_no_state(uniform, make):
    optimizer = make(param_groups(perceptron(uniform)))
    store_on_grid(optimizer, "eco")
    assert not optimizer.state


@on_all
def test_without_a_gradient_weights_and_moments_stay(uniform, make, train):
    model = perceptron(uniform)
    optimizer = make(param_groups(model))
    store_on_grid(optimizer, "eco")
    optimizer.step()
    assert not optimizer.state
    train(model, optimizer, 3)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.zero_grad()
    optimizer.step()
    assert same(weights, model.parameters())
    after = optimizer.state_dict()["state"]
    assert all(same(before[index].values(), after[index].values()) for index in before)


@on_all
def test_other_parameters_are_untouched_to_the_bit(uniform, make):
    runs = []
    for rounding in (None, "eco"):
        model = perceptron(uniform)
        optimizer = make(param_groups(model))
        if rounding:
            store_on_grid(optimizer, rounding)
        for step in range(5):
            for index, parameter in enumerate(model.parameters()):
                parameter.grad = torch.randn(parameter.shape, generator=generator(100 * step + index))
            optimizer.step()
        runs.append([one.detach() for one in model.parameters() if quantizer_of(one) is None])
    assert same(*runs)


def test_a_nan_is_seen_and_stays(uniform):
    weight, optimizer = stored([0.5, 0.25], uniform, lambda p: torch.optim.AdamW(p, lr=0.01))
    give(weight, optimizer, math.nan, 1.0)
    give(weight, optimizer, 1.0, 1.0)
    assert weight.isnan().tolist() == [[True, False]]
    assert optimizer.state[weight]["exp_avg"].isnan().tolist() == [[True, False]]


def test_the_scale_shrinks_only_if_a_weight_rounds_past_the_largest_value(uniform):
    weight, optimizer = stored([0.5], uniform, lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5))
    give(weight, optimizer, -0.5 + 0.875 / 128)
    assert (quantizer_of(weight).scale.item(), weight.item() * 128) == (1, 127)


class WideTop(Format):
    """A format whose last spacing is twice the gap below it, as that of an ExMy without mantissa bits."""

    def _spacing(self, x):
        return torch.where(x.abs() < self.largest, 1.0, 2.0) * super()._spacing(x)


def test_a_weight_at_the_end_is_given_back_as_much_as_its_spacing_lets_rounding_take():
    format = WideTop(name="WIDE_TOP", bits=3, values=[-2.0, -1.0, 0.0, 1.0, 2.0])
    weight, optimizer = stored(
        [2.0], format, lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5), scale_mode="initial"
    )
    give(weight, optimizer, -0.75)
    assert weight.item() == 2.0
    assert optimizer.state[weight]["momentum_buffer"].item() == -0.75 - 0.75


@pytest.mark.parametrize("options", [{"scale_mode": "initial"}, {"bound": 1.5}], ids=["scale", "bound"])
def test_against_a_wall_the_moment_does_not_wind_up(uniform, options):
    weight, optimizer = stored([0.5], uniform, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), **options)
    for _ in range(200):
        give(weight, optimizer, -1.0)
    top = weight.item()
    assert optimizer.state[weight]["momentum_buffer"].abs() < 11  # 1/(1 - 0.9), and a residual's share
    for _ in range(12):
        give(weight, optimizer, 1.0)
    assert weight.item() < top


# --- any format, resuming ----------------------------------------------------------------------------------


@on_all
def test_after_every_step_the_weights_are_on_their_grids(table, make, train, is_on_grid):
    for format in (table("E4M3"), table("E7M0"), CODEBOOK):
        model = perceptron(format)
        optimizer = make(param_groups(model))
        storage = store_on_grid(optimizer, "eco", bound=2.0)
        for step in range(5):
            assert all(map(is_on_grid, storage.weights))
            train(model, optimizer, 1, step)
        assert all(map(is_on_grid, storage.weights))


@pytest.mark.slow
def test_a_model_learns_where_nearest_rounding_stalls(uniform, train):
    final = {}
    for rounding in ("nearest_even", "eco"):
        model = perceptron(uniform)
        optimizer = torch.optim.AdamW(param_groups(model)[:1], lr=1e-3)
        store_on_grid(optimizer, rounding)
        losses = train(model, optimizer, 250)
        final[rounding] = sum(losses[-20:]) / sum(losses[:20])
    assert final["nearest_even"] > 0.95
    assert final["eco"] < 0.8


def test_e0m7_and_e1m6_train_alike_to_the_bit(table, train):
    runs = []
    for name in ("E0M7", "E1M6"):
        model = perceptron(table(name))
        optimizer = torch.optim.AdamW(param_groups(model), lr=0.03)
        storage = store_on_grid(optimizer, "eco", bound=8.0)
        runs.append([torch.tensor(train(model, optimizer, 40)), *model.parameters()])
        assert storage.scales.rescales.sum() > 0, "the scales have moved"
    assert same(*runs)


@on_all
def test_a_fresh_run_resumes_to_the_bit(uniform, make, train):
    def fresh(seed):
        model = perceptron(uniform)
        model[0].weight.data.mul_(seed)
        optimizer = make([{"params": group["params"]} for group in param_groups(model)])
        return model, optimizer, store_on_grid(optimizer, "eco", bound=4.0)

    model, optimizer, storage = fresh(seed=5)
    train(model, optimizer, 10)
    file = io.BytesIO()
    torch.save([one.state_dict() for one in (model, optimizer, storage)], file)
    losses = train(model, optimizer, 10, start=10)
    file.seek(0)
    other = fresh(seed=1)
    for part, state in zip(other, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert train(*other[:2], 10, start=10) == losses
    assert same(model.parameters(), other[0].parameters())


def test_model_optimizer_and_storage_are_copied_together(uniform, train):
    model = perceptron(uniform)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    storage = store_on_grid(optimizer, "eco")
    train(model, optimizer, 3)
    twins = copy.deepcopy((model, optimizer, storage))
    losses = train(*twins[:2], 5, start=3)
    assert train(model, optimizer, 5, start=3) == losses


# --- which optimizers --------------------------------------------------------------------------------------


class Halving(torch.optim.SGD):
    """A subclass whose step is its own."""

    @torch.no_grad()
    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            weight.mul_(0.5)


class Offering(Halving):
    """One that says what its moment does."""

    asked = ()

    def momentum_of(self, weight):
        self.asked = (*self.asked, weight.detach().clone())
        state = self.state[weight]
        buffer = state.setdefault("own", torch.zeros_like(weight))
        return Momentum(buffer=buffer, rate=0.25, beta=0.5)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "needs a momentum, and SGD's is 0"),
        (lambda p: torch.optim.AdamW(p, betas=(0.0, 0.9)), r"betas\[0\] is 0"),
        (lambda p: torch.optim.RAdam(p), "RAdam has none that is known: use Adam, AdamW"),
        (lambda p: torch.optim.NAdam(p), "NAdam has none"),
        (lambda p: torch.optim.Adagrad(p), "Adagrad has none.*or use 'error_feedback'"),
        (lambda p: Halving(p, lr=0.1, momentum=0.9), r"Halving has none.*momentum_of\(weight\)"),
    ],
)
def test_an_optimizer_without_a_moment_is_refused_and_nothing_is_snapped(uniform, make, reason):
    model = perceptron(uniform)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=reason):
        store_on_grid(make(model.parameters()), "eco")
    assert same(before, model.parameters())
    store_on_grid(torch.optim.AdamW(model.parameters()), "eco")


def test_groups_without_grid_weights_need_no_momentum(uniform):
    first, *others = param_groups(perceptron(uniform))
    groups = [{**first, "momentum": 0.9}, *others]
    assert len(store_on_grid(torch.optim.SGD(groups, lr=0.1), "eco").weights) == 2


def test_an_optimizer_may_offer_its_moment_and_is_asked_when_the_weight_is_on_its_grid(uniform):
    weight, optimizer = stored([0.5, 33 / 128], uniform, lambda p: Offering(p, lr=0.1), scale_mode="initial")
    give(weight, optimizer, 0.0, 0.0)  # 32 and 16.5, a tie
    assert (optimizer.asked[-1] * 128).tolist() == [[32, 16]]
    assert (optimizer.state[weight]["own"] * 128).tolist() == [[0, -2.0]]  # (1 - 1/0.5)*0.5/0.25
