"""Weights that share a row take the steps they take alone, bit for bit, under every optimizer and storage."""

import math

import pytest
import torch
from torch import nn

from altgrad_core import native_landing, rows
from altgrad_core.error_feedback import ErrorFeedback
from altgrad_core.groups import param_groups
from altgrad_core.master_bound import MasterBound
from altgrad_core.rules import Rule
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import quantize_model
from altgrad_optim import GridOptim, ManifoldAdamW, native_steps
from altgrad_optim.powers import NORMALIZERS, as_norms

SHAPES = ((20, 30), (1, 300), (7, 1), (65, 33), (3, 5), (1, 1), (12, 12))


@pytest.fixture(autouse=True)
def in_torch(monkeypatch):
    monkeypatch.setattr(native_steps, "available", lambda: False)
    monkeypatch.setattr(native_landing, "land", lambda *_: (set(), {}))


@pytest.fixture
def alone(monkeypatch):
    """Return a function that calls another while no two tensors share a row."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(rows, "LONGEST_ON_CPU", 0)
            return function()

    return call


def manifold(**options):
    return lambda groups: ManifoldAdamW(groups, lr=1e-2, weight_decay=0.1, **options)


def grid(**options):
    given = {"weight_decay": 0.3, "bound": 3.0, "step_scale": 6.0, "storage_rounding": "stochastic"} | options
    return lambda groups: GridOptim(groups, **given, generator=torch.Generator().manual_seed(3))


def stored(rounding, make=lambda groups: torch.optim.Adam(groups, lr=0.05), **options):
    def made(groups):
        optimizer = make(groups)
        optimizer.held = store_on_grid(
            optimizer, rounding, torch.Generator().manual_seed(4), bound=3.0, **options
        )
        return optimizer

    return made


def bounded(groups):
    optimizer = torch.optim.SGD(groups, lr=0.5)
    MasterBound(optimizer, [weight for group in groups for weight in group["params"]], 1.5)
    return optimizer


ARMS = {
    "update": manifold(),
    "both": manifold(placement="both", normalize="max"),
    "half": manifold(placement=(-1.0, 0.5), normalize="mean"),
    "gradient": manifold(placement="gradient", normalize="none"),
    "frozen": manifold(stiffness={"plugin": "grid", "refresh": "never"}),
    "of another format": manifold(stiffness=lambda w, format, scale: w.abs() + w.abs().amax() + 1e-3),
    "positions": manifold(track_position=True),
    "rungs": grid(),
    "rungs of Adam": grid(normalize="adam"),
    "values": grid(rounding="value", bound=0.0),
    "masters": grid(storage="master", scale_mode="initial"),
    "masters without a bound": grid(storage="master", scale_mode="initial", bound=0.0, normalize="adam"),
    "nearest": stored("nearest_even"),
    "stochastic": stored("stochastic"),
    "stochastic behind the geometry": stored("stochastic", manifold()),
    "error feedback": stored("error_feedback"),
    "error feedback in float32": stored("error_feedback", residual_format="FP32"),
    "eco": stored("eco"),
    "bounded masters": bounded,
}


def model_of(table, dtype):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.ModuleList(nn.Linear(columns, rows, bias=False) for rows, columns in SHAPES).to(dtype)
    nn.init.zeros_(model[4].weight)
    model[6].weight = nn.Parameter(model[6].weight.detach().t())  # does not lie in one piece
    return quantize_model(model, rules=[Rule("[0-3]", table("E4M3")), Rule("[4-6]", table("E5M2"))])


def trained(make, table, dtype=torch.float32):
    """Return weights, states and counts of six steps, some gradients missing, one of them not a number."""
    model, seen = model_of(table, dtype), []
    optimizer = make(param_groups(model))
    if isinstance(optimizer, GridOptim):
        optimizer.watch = True
    for step in range(6):
        draws = torch.Generator().manual_seed(step)
        for place, weight in enumerate(model.parameters()):
            gradient = (30 if step == 2 else 3) * torch.randn(weight.shape, generator=draws).to(dtype)
            gradient[0, 0] = math.nan if (step, place) == (3, 1) else 0.0
            weight.grad = None if (step + place) % 4 == 0 else gradient
        optimizer.step()
        states = [optimizer.state[weight] for weight in model.parameters()]
        seen += [weight.detach().clone() for weight in model.parameters()]
        seen += [one.clone() for state in states for _, one in sorted(state.items())]
        if isinstance(optimizer, GridOptim):
            seen += [optimizer.flips, optimizer.updates, *optimizer.scales.state_dict().values()]
            moved = [weight for weight in model.parameters() if weight.grad is not None]
            seen += [
                one for weight in moved for one in (optimizer.intended[weight], *optimizer.counts[weight])
            ]
        elif held := getattr(optimizer, "held", None):
            seen += [one.clone() for one in held.scales.state_dict().values()]
            seen += [one.clone() for one in held.feedback.stored] if held.feedback else []
    return [one.double().nan_to_num(9e9) for one in seen]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("arm", ARMS)
def test_weights_that_share_a_row_take_the_steps_they_take_alone(arm, dtype, table, alone):
    together = trained(ARMS[arm], table, dtype)
    apart = alone(lambda: trained(ARMS[arm], table, dtype))
    assert all(map(torch.equal, together, apart))
    assert len(together) == len(apart)


def test_scales_move_in_this_test_file(table):
    optimizer = ARMS["rungs"](param_groups(model_of(table, torch.float32)))
    for _ in range(6):
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = -weight.detach().sign()
        optimizer.step()
    assert int(optimizer.scales.rescales.sum()) > 0


@pytest.mark.parametrize("normalize", NORMALIZERS)
def test_norms_of_many_are_the_normalizers_of_each(normalize):
    generator = torch.Generator().manual_seed(1)
    parts = [0.01 + torch.rand(size, generator=generator) for size in (1, 7, 3000)]
    found = torch.stack(list(as_norms(parts, normalize)))
    expected = torch.stack([NORMALIZERS[normalize](one) for one in parts])
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


def test_residuals_of_a_row_are_those_of_each_weight(table):
    generator, format = torch.Generator().manual_seed(2), table("E4M3")
    exact = [torch.randn(size, generator=generator) for size in (5, 40)]
    weights, scales = [format.quantize(x) for x in exact], [torch.ones(()), torch.ones(())]
    feedback = ErrorFeedback(weights, [format, format], "same")
    row = rows.Row(weights)
    scale = row.spread(scales)
    feedback.keep([0, 1], row, row.of(weights), scale, row.of(exact) - row.of(weights))
    together = row.parts(feedback.residuals([0, 1], row, row.of(weights), scale))
    apart = [feedback.residual(place, weights[place], scales[place]) for place in range(2)]
    assert all(map(torch.equal, together, apart))
    assert all(bool(one.any()) for one in apart)
