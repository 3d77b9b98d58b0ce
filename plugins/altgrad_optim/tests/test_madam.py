import math

import attrs
import pytest
import torch
from torch import nn

import altgrad_core as altgrad
from altgrad_core import checkpoint
from altgrad_core.groups import param_groups
from altgrad_core.hookspecs import OptimizerInputs
from altgrad_core.quantizer import quantizer_of
from altgrad_core.registry import discover
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import quantize_model
from altgrad_core.testing import check_optimizer
from altgrad_optim import Madam, MadamOptions
from altgrad_optim.madam import build, limit_of, madam_directions

EXPERIMENT = """
name = "madam"
steps = 6
[data]
plugin = "markov"
tokens = 3000
[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
[train]
batch_size = 2
device = "cpu"
warmup_steps = 1
eval_batches = 1
[quantize]
format = "E4M3"
bound = 1.0
storage = "STORAGE"
storage_rounding = "stochastic"
[optimizer]
plugin = "Madam"
lr = 0.05
"""


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def optimizer_of(weights, format, **options):
    """An optimizer of weights that no quantizer knows."""
    return Madam([{"params": weights, "format": format}], **{"eps": 0.0, "bound": 0.0} | options)


def stepped(start, gradients, format, dtype=torch.float64, **options):
    """Return a weight after one step for each of the gradients."""
    weight = nn.Parameter(torch.tensor(start, dtype=dtype))
    optimizer = optimizer_of([weight], format, **options)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
    return weight.detach()


# --- the rule -------------------------------------------------------------------------------------------


def test_a_first_step_multiplies_by_e_to_the_lr_away_from_the_gradient(table):
    seen = stepped([2.0, -2.0, 2.0, -2.0], [[3.0, 3.0, -0.1, -0.1]], table("E4M3"), lr=0.25)
    grown, shrunk = 2 * math.exp(0.25), 2 * math.exp(-0.25)
    torch.testing.assert_close(seen, torch.tensor([shrunk, -grown, grown, -shrunk]).double())


def test_it_follows_the_published_rule_over_many_steps(table):
    draws, lr, beta = generator(1), 0.02, 0.99
    start, gradients = torch.randn(20, generator=draws), torch.randn(60, 20, generator=draws)
    seen = stepped(start.tolist(), gradients.tolist(), table("E4M3"), lr=lr, beta=beta, clip=1.5)
    for index in range(20):
        w, v = float(start[index]), 0.0
        for step, g in enumerate(gradients[:, index].tolist(), 1):
            v = beta * v + (1 - beta) * g * g
            direction = max(-1.5, min(1.5, g / math.sqrt(v / (1 - beta**step))))
            w *= math.exp(-lr * math.copysign(1, w) * direction)
        assert float(seen[index]) == pytest.approx(w, rel=1e-12)


def test_the_direction_is_clipped_to_ten():
    (seen,) = madam_directions(
        [torch.tensor([5.0, -5.0, 0.5])], [torch.tensor([0.0, 0.0, 1.0])], [10**6], 0.999, 0.0, 10.0
    )  # g/sqrt(0.001*g^2) = 31.6
    assert seen[:2].tolist() == [10, -10]
    assert float(seen[2]) == pytest.approx(0.5 / math.sqrt(0.999 + 0.001 * 0.25))


def test_eps_is_added_to_the_root(table):
    assert stepped(1.0, [0.5], table("E4M3"), lr=1.0, eps=0.5) == pytest.approx(math.exp(-0.5))


def test_a_weight_at_zero_stays_there_and_none_changes_its_sign(table):
    start = [0.0, -0.0, 1e-6, -1e-6, 1.0, -1.0]
    for sign in (1.0, -1.0):
        seen = stepped(start, [[sign] * 6] * 100, table("E4M3"), torch.float32, lr=0.5)
        assert torch.equal(seen.sign(), torch.tensor(start).sign())
        assert (seen[2:] != torch.tensor(start[2:])).all()


def test_a_zero_gradient_moves_nothing_without_eps_either(table):
    assert stepped([1.5, 0.0], [[0.0, 0.0]] * 3, table("E4M3"), lr=0.5).tolist() == [1.5, 0.0]


def test_a_gradient_whose_square_vanishes_is_clipped_and_not_nan(table):
    seen = stepped([1.0, -1.0], [[1e-30, 1e-30]], table("E4M3"), torch.float32, lr=0.01)
    torch.testing.assert_close(seen, torch.tensor([math.exp(-0.1), -math.exp(0.1)]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_is_seen_in_every_weight(table, bad):
    assert stepped([1.0, 0.0], [[bad, bad]], table("E4M3"), lr=0.01, bound=3.0).isnan().all()


def test_every_finite_float32_gradient_gives_a_finite_weight(table):
    gradients = [0.0, 1e-45, 1e-38, 1e-20, 1.0, 1e18, 1e19, 3e38]
    for start in (0.0, 1e-45, 1.0, -1e30):
        seen = stepped([start] * 8, [gradients, gradients], table("E4M3"), torch.float32, lr=0.1, eps=1e-8)
        assert seen.isfinite().all()


def test_many_tensors_at_once_are_each_as_if_alone(table):
    shapes, alone, together = ((3, 4), (5,), ()), [], []
    for index, shape in enumerate(shapes):
        draws = generator(index)
        start = torch.randn(shape, generator=draws)
        weights = [nn.Parameter(start.clone()) for _ in range(2)]
        for weight in weights:
            weight.grad = torch.ones(shape)
        optimizer_of(weights[:1], table("E4M3"), lr=0.1, bound=1.0).step()
        alone.append(weights[0])
        together.append(weights[1])
    optimizer_of(together, table("E4M3"), lr=0.1, bound=1.0).step()
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))


# --- the bound, the decay, the other parameters ---------------------------------------------------------


def test_the_bound_is_a_multiple_of_the_rms_before_the_first_step(table):
    seen = stepped([3.0, -4.0, 0.5], [[-1.0, 1.0, -1.0]] * 200, table("E4M3"), lr=0.1, bound=3.0)
    limit = 3 * math.sqrt((9 + 16 + 0.25) / 3)
    torch.testing.assert_close(seen, torch.tensor([limit, -limit, limit]).double())
    assert stepped(3.0, [-1.0] * 200, table("E4M3"), lr=0.1) > 1e8, "0 is no bound"


def test_the_bound_resumes(table):
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = optimizer_of([weight], table("E4M3"), lr=0.5, bound=1.0)
    weight.grad = torch.tensor([-1.0, -1.0])
    optimizer.step()
    resumed = nn.Parameter(100 * weight.detach())
    other = optimizer_of([resumed], table("E4M3"), lr=0.5, bound=1.0)
    other.load_state_dict(optimizer.state_dict())
    resumed.grad = torch.tensor([-1.0, -1.0])
    other.step()
    assert resumed.tolist() == pytest.approx([math.sqrt(2.5)] * 2)


def test_a_tensor_of_zeros_has_no_bound_and_stays(table):
    assert stepped([0.0, 0.0], [[1.0, -1.0]] * 3, table("E4M3"), bound=3.0).tolist() == [0, 0]
    assert limit_of(torch.zeros(2), 3.0) == math.inf


def test_decay_goes_by_decay_lr_on_the_schedule_and_not_by_lr(table):
    weight = nn.Parameter(torch.tensor([4.0]).double())
    optimizer = optimizer_of([weight], table("E4M3"), lr=0.5, weight_decay=0.5, decay_lr=0.25)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    weight.grad = torch.zeros(1).double()
    optimizer.step()
    assert weight.item() == 4 * (1 - 0.5 * 0.25 * 0.5)


def test_parameters_without_a_format_are_torchs_adamw_at_other_lr():
    weights = [nn.Parameter(torch.randn(30, generator=generator(2))) for _ in range(2)]
    arms = [
        Madam(weights[:1], lr=7.0, other_lr=0.02, weight_decay=0.1, beta=0.5, clip=0.1, bound=0.01),
        torch.optim.AdamW(weights[1:], lr=0.02, betas=(0.9, 0.95), weight_decay=0.1, fused=True),
    ]
    for step in range(10):
        for weight, optimizer in zip(weights, arms, strict=True):
            weight.grad = torch.randn(30, generator=generator(10 + step))
            optimizer.step()
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"lr": -0.1}, "Invalid learning rate: -0.1"),
        ({"beta": 1.0}, "Invalid beta value: 1.0"),
        ({"clip": 0.0}, "Invalid clip value: 0.0"),
        ({"bound": math.inf}, "Invalid bound value: inf"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"other_lr": -1.0}, "Invalid other_lr value: -1.0"),
    ],
)
def test_options_out_of_range_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        Madam([nn.Parameter(torch.ones(2))], **option)


@pytest.mark.parametrize("options", [{}, {"eps": 0.0, "bound": 0.0, "weight_decay": 0.1}])
def test_it_keeps_the_contract(options):
    check_optimizer(lambda groups: Madam(groups, lr=0.05, other_lr=0.05, **options))


# --- on the grid, and in an experiment ------------------------------------------------------------------


def model_of(format):
    model = nn.Sequential(nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 8))
    for index, parameter in enumerate(model.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator(index)) / 4
    return quantize_model(model, format)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_behind_grid_storage_every_weight_is_on_its_grid_and_within_the_storages_bound(table, rounding):
    model = model_of(table("E4M3"))
    weights = [model[0].weight, model[2].weight]
    optimizer = Madam(param_groups(model), lr=0.2, bound=0.0)
    storage = store_on_grid(optimizer, rounding, generator(), bound=2.0)
    start, rms = [weight.detach().clone() for weight in weights], storage.scales.rms.clone()
    for step in range(30):
        for index, parameter in enumerate(model.parameters()):
            parameter.grad = 1 + torch.randn(parameter.shape, generator=generator(100 * step + index))
        optimizer.step()
        for weight, limit in zip(weights, 2 * rms, strict=True):
            scaled = weight.detach() * quantizer_of(weight).scale
            assert torch.isin(scaled, table("E4M3").values).all()
            assert weight.abs().max() <= limit
    for weight, before in zip(weights, start, strict=True):
        assert (weight[before == 0] == 0).all()
        assert (weight != before)[before != 0].float().mean() > 0.9


def test_zeros_of_the_first_snap_are_dead_on_the_grid_and_alive_as_masters(table):
    weight = nn.Parameter(torch.tensor([[1.0, 2.0**-10]]))
    for on_grid in (False, True):
        model = nn.Linear(2, 1, bias=False)
        model.weight = nn.Parameter(weight.detach().clone())
        quantize_model(model, table("E0M7"))
        optimizer = Madam(param_groups(model), lr=0.5)
        if on_grid:
            store_on_grid(optimizer, "stochastic", generator())
        for _ in range(20):
            model.weight.grad = -torch.ones(1, 2)
            optimizer.step()
        assert (float(model.weight.detach()[0, 1]) == 0) == on_grid


def inputs(groups, **options):
    return OptimizerInputs(groups=groups, generator=generator(), registry=discover(), **options)


def test_every_option_arrives_and_the_bound_is_left_to_the_quantizer(table):
    options = MadamOptions(
        lr=0.1, other_lr=0.2, beta=0.3, clip=4.0, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.7, decay_lr=0.8
    )
    optimizer = build(options, inputs(param_groups(model_of(table("E4M3"))), bound=5.0))
    first, *others = optimizer.param_groups
    for key, value in attrs.asdict(options).items():
        assert first[key] == value, key
    assert [group["lr"] for group in others] == [0.2]
    assert first["bound"] == 0


def test_the_defaults_of_files_and_of_python_are_the_same():
    defaults = Madam([nn.Parameter(torch.ones(2))]).defaults
    assert attrs.asdict(MadamOptions()) == {key: defaults[key] for key in attrs.asdict(MadamOptions())}
    assert (defaults["bound"], defaults["clip"]) == (3.0, 10.0)


@pytest.mark.parametrize("storage", ["master", "grid"])
def test_an_experiment_runs_and_the_quantizers_bound_holds(storage, tmp_path, monkeypatch):
    installed = {(entry.kind, entry.name) for entry in discover().registered}
    if not {("dataset", "markov"), ("format", "E4M3")} <= installed:
        pytest.skip("the data and formats plugins are not installed")
    monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "experiment.toml"
    path.write_text(EXPERIMENT.replace("STORAGE", storage))
    result = altgrad.run(altgrad.load_experiment(path), out=tmp_path / "runs", quiet=True)
    assert result.outcome == "finished"
    saved, _ = checkpoint.newest(result.folder / "checkpoints")
    weights = {name: one for name, one in saved.model.items() if ".h." in name and one.dim() == 2}
    assert len(weights) == 4
    for (
        weight
    ) in weights.values():  # drawn with a standard deviation of 0.02 or less, so 0.06 at least without
        assert 0 < weight.abs().max() < 0.025
