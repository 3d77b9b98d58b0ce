import math
import sys

import attrs
import pytest
import torch
from torch import nn

import altgrad_core as altgrad
from altgrad_core.groups import param_groups
from altgrad_core.hookspecs import OptimizerInputs
from altgrad_core.options import StiffnessChoice
from altgrad_core.quantizer import quantizer_of
from altgrad_core.registry import UsageError, discover
from altgrad_core.stiffness import Geometry, grid_stiffness
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import quantize_model
from altgrad_core.testing import check_optimizer
from altgrad_optim import ManifoldAdamW, RiemannianAdamOptions

SCALE = 16.0
NAMES = ["E0M7", "E4M3", "E5M2", "E6M1", "E7M0", "CODEBOOK"]

EXPERIMENT = """
name = "riemannian"
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
storage = "STORAGE"
[optimizer]
plugin = "RiemannianAdam"
lr = 0.5
retraction = "RETRACTION"
"""


@pytest.fixture
def geoopt():
    """geoopt, an extra; without it there is nothing to hold against."""
    return pytest.importorskip(
        "geoopt", reason="geoopt is not installed: pip install 'altgrad-optim[geoopt]'"
    )


@pytest.fixture
def grid_manifold(geoopt):
    from altgrad_optim import grid_manifold

    return grid_manifold


@pytest.fixture
def make(geoopt):
    from altgrad_optim import RiemannianAdam

    return RiemannianAdam


@pytest.fixture
def named(formats):
    return {format.name: format for format in formats}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_weight(count=500):
    return nn.Parameter(torch.randn(count, generator=generator(), dtype=torch.float64) / 10)


def stepped(weights, optimizer, steps=40):
    """Step with the same random gradients for everyone; returns the first weight."""
    for step in range(steps):
        for index, weight in enumerate(weights):
            draws = torch.randn(weight.shape, generator=generator(1000 * step + index), dtype=torch.float64)
            weight.grad = draws.to(weight.dtype)
        optimizer.step()
    return weights[0].detach()


def both(format, weight, **options):
    """ManifoldAdamW under `both` on a weight that no quantizer knows, lr in ULPs."""
    given = {"lr": 1.0, "placement": "both", "normalize": "none", "scale": SCALE} | options
    group = {"params": [weight], "format": format, "scale": given.pop("scale")}
    return ManifoldAdamW([group], **given)


# --- ManifoldAdamW's `both` is geoopt's RiemannianAdam --------------------------------------------------


def hand_made(geoopt, format, transported):
    """The manifold written from its definition, its spacing read from the sorted table of values."""
    values = format.values.double() / SCALE
    positive, negative = values[values >= 0], -values[values <= 0].flip(0)

    def gap(side, magnitude):
        return side.diff()[(torch.searchsorted(side, magnitude, right=True) - 1).clamp(0, len(side) - 2)]

    class HandMade(geoopt.Manifold):
        name, ndim, reversible = "hand-made", 0, False

        def spacing(self, x):
            x = x.detach().as_subclass(torch.Tensor)
            return torch.where(x < 0, gap(negative, x.abs()), gap(positive, x.abs()))

        def inner(self, x, u, v=None, *, keepdim=False):
            return u * (u if v is None else v) / self.spacing(x) ** 2

        def egrad2rgrad(self, x, u):
            return self.spacing(x) ** 2 * u

        def retr(self, x, u):
            return x + u

        expmap = retr

        def transp(self, x, y, v):
            return v * self.spacing(y) / self.spacing(x) if transported else v

        def proju(self, x, u):
            return u

        def projx(self, x):
            return x

        def _check_point_on_manifold(self, x, *, atol=1e-5, rtol=1e-5):
            return True, None

        def _check_vector_on_tangent(self, x, u, *, atol=1e-5, rtol=1e-5):
            return True, None

    return HandMade()


def geoopts(geoopt, manifold, **options):
    """Return what geoopt makes of the weight on a manifold."""
    weight = geoopt.ManifoldParameter(random_weight().data.clone(), manifold=manifold)
    given = {"lr": 1.0, "betas": (0.9, 0.95), "eps": 1e-8} | options
    return stepped([weight], geoopt.optim.RiemannianAdam([weight], **given))


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize("name", NAMES)
def test_both_is_geoopts_riemannian_adam_to_twelve_digits(geoopt, named, name, eps):
    weight = random_weight()
    mine = stepped([weight], both(named[name], weight, eps=eps))
    theirs = geoopts(geoopt, hand_made(geoopt, named[name], transported=True), eps=eps)
    assert (mine - theirs).abs().max() < 1e-12
    assert (mine - random_weight().detach()).abs().median() > 1e-4


@pytest.mark.parametrize("name", ["E4M3", "E5M2", "E6M1", "E7M0"])
def test_with_the_identity_for_transport_it_differs_in_most_weights(geoopt, named, name):
    weight = random_weight()
    mine = stepped([weight], both(named[name], weight))
    theirs = geoopts(geoopt, hand_made(geoopt, named[name], transported=False))
    assert ((mine - theirs).abs() > 1e-6).float().mean() > 0.5


@pytest.mark.parametrize("placement", ["gradient", "update"])
def test_the_other_placements_are_not_riemannian_adam(geoopt, named, placement):
    weight = random_weight()
    mine = stepped([weight], both(named["E4M3"], weight, placement=placement))
    theirs = geoopts(geoopt, hand_made(geoopt, named["E4M3"], transported=True))
    assert ((mine - theirs).abs() > 1e-6).float().mean() > 0.5


# --- GridManifold ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_grid_manifold_is_the_hand_made_one(geoopt, grid_manifold, named, name):
    theirs = geoopts(geoopt, hand_made(geoopt, named[name], transported=True))
    mine = geoopts(geoopt, grid_manifold.GridManifold(named[name], SCALE))
    assert (mine - theirs).abs().max() < 1e-12


def test_the_geometry_by_hand(grid_manifold, table):
    manifold = grid_manifold.GridManifold(table("E7M0"), 4.0)  # values in weight units: 2^k
    x, u, v = torch.tensor([1.0, -3.0]), torch.tensor([2.0, 2.0]), torch.tensor([5.0, 1.0])  # S: 1, 2
    assert manifold.inner(x, u, v).tolist() == [10, 0.5]
    assert manifold.inner(x, u).tolist() == [4, 1]
    assert manifold.component_inner(x, u).tolist() == [4, 1]
    assert manifold.egrad2rgrad(x, v).tolist() == [5, 4]
    assert manifold.retr(x, u).tolist() == [3, -1]
    assert manifold.transp(x, torch.tensor([-3.0, 8.0]), v).tolist() == [10, 4]
    assert manifold.proju(x, u) is u


def test_transport_keeps_inner_products_and_comes_back(grid_manifold, formats):
    draws = generator(4)
    x, y, u, v = (torch.randn(200, generator=draws, dtype=torch.float64) for _ in range(4))
    for format in formats:
        manifold = grid_manifold.GridManifold(format, 2.0)
        there = [manifold.transp(x, y, one) for one in (u, v)]
        torch.testing.assert_close(
            manifold.inner(y, *there), manifold.inner(x, u, v), rtol=1e-14, atol=0, msg=format.name
        )
        torch.testing.assert_close(manifold.transp(y, x, there[0]), u, rtol=1e-14, atol=0)


def test_the_riemannian_gradient_stands_for_the_differential(grid_manifold, formats):
    draws = generator(5)
    x, g, u = (torch.randn(200, generator=draws, dtype=torch.float64) for _ in range(3))
    for format in formats:
        manifold = grid_manifold.GridManifold(format, 2.0)
        torch.testing.assert_close(
            manifold.inner(x, manifold.egrad2rgrad(x, g), u), g * u, rtol=1e-14, atol=0
        )


def test_a_retraction_on_the_grid_ends_on_it_and_leaves_its_point_where_it_is(grid_manifold, formats):
    draws = generator(6)
    x, u = (torch.randn(200, generator=draws) for _ in range(2))
    for format in formats:
        manifold = grid_manifold.GridManifold(format, 2.0, retraction="grid")
        ended = manifold.retr(x, u)
        assert torch.isin(2 * ended, format.values).all()
        assert torch.equal(ended, format.quantize(2 * (x + u)) / 2)
        assert torch.equal(manifold.retr(x, torch.zeros(200)), x)
        assert manifold.check_point_on_manifold(ended)
        assert not manifold.check_point_on_manifold(x)


def test_points_and_vectors_that_are_not_finite_are_not_on_it(grid_manifold, table):
    manifold = grid_manifold.GridManifold(table("E4M3"))
    sound, bad = torch.ones(2), torch.tensor([1.0, torch.nan])
    assert manifold.check_point_on_manifold(sound)
    assert manifold.check_vector_on_tangent(sound, sound)
    assert not manifold.check_point_on_manifold(bad)
    assert not manifold.check_vector_on_tangent(sound, bad)


def test_the_stiffness_is_any_formula_and_clamped(grid_manifold, table):
    formulas = {"grid": 16.0, "uniform": 1.0}
    for name, expected in formulas.items():
        manifold = grid_manifold.GridManifold(table("E7M0"), 1.0, name)
        assert manifold.stiffness_at(torch.tensor([17.0])).item() == expected
    own = grid_manifold.GridManifold(
        table("E7M0"), 2.0, lambda w, format, scale: w.abs() * scale, max_stiffness=9.0
    )
    assert own.stiffness_at(torch.tensor([3.0, -17.0])).tolist() == [6, 9]


def test_an_unknown_retraction_is_refused(grid_manifold, make, table):
    with pytest.raises(ValueError, match="Invalid retraction: 'exp'; use one of add, grid"):
        grid_manifold.GridManifold(table("E4M3"), retraction="exp")
    with pytest.raises(ValueError, match="Invalid retraction value: 'exp'; use one of add, grid"):
        make([nn.Parameter(torch.ones(2))], retraction="exp")


# --- its invariants -------------------------------------------------------------------------------------


def test_a_sound_manifold_breaks_nothing_at_any_value_of_any_format(grid_manifold, formats):
    for format in formats:
        found = grid_manifold.invariants(grid_manifold.GridManifold(format, 4.0), format.values.double() / 4)
        assert {name: int(count) for name, count in found.items()} == {
            "metric_violations": 0,
            "out_of_range": 0,
        }


def test_a_metric_that_float32_does_not_hold_is_counted_and_float64_holds_it(grid_manifold, table):
    manifold = grid_manifold.GridManifold(table("E7M0"), 2.0**30)
    x = torch.tensor([0.0, 1.0, -1e-30, 2.0**-40])  # S^2 at zero and at 1e-30 is 2^-184
    assert int(grid_manifold.invariants(manifold, x)["metric_violations"]) == 2
    assert int(grid_manifold.invariants(manifold, x.double())["metric_violations"]) == 0


@pytest.mark.parametrize("bad", [0.0, -1.0, 1e-25, 1e25, math.inf, math.nan])
def test_a_stiffness_that_gives_no_metric_is_counted(grid_manifold, table, bad):
    manifold = grid_manifold.GridManifold(
        table("E4M3"), 1.0, lambda w, *_: torch.where(w > 0, bad, 1.0).to(w.dtype), max_stiffness=math.inf
    )
    assert int(grid_manifold.invariants(manifold, torch.tensor([1.0, -1.0, 2.0]))["metric_violations"]) == 2


def test_weights_beyond_the_ends_of_the_grid_are_counted(grid_manifold, named):
    manifold = grid_manifold.GridManifold(named["CODEBOOK"], 2.0)  # ends at -3/2 and 3/2
    x = torch.tensor([1.5, -1.5, 1.5001, -1.5001, 0.0, torch.nan, torch.inf])
    assert int(grid_manifold.invariants(manifold, x)["out_of_range"]) == 4


def test_the_optimizer_reports_the_counts_of_all_its_weights_on_a_grid(make, table):
    weights = [nn.Parameter(torch.tensor(one)) for one in ([0.5, 2.0], [-3.0, 4.0], [100.0])]
    groups = [{"params": weights[:2], "format": table("E0M7")}, {"params": weights[2:]}]
    found = make(groups).invariants()
    assert {name: int(count) for name, count in found.items()} == {"metric_violations": 0, "out_of_range": 3}
    assert make(weights[2:]).invariants() == {}


# --- the optimizer --------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_manifold_adamws_both_in_ulps_decay_included(make, named, name, decay):
    given = {"lr": 1.0, "weight_decay": decay, "decay_lr": 0.02}
    weights = [random_weight(), random_weight()]
    mine = make([{"params": weights[:1], "format": named[name], "scale": SCALE}], **given)
    arms = [mine, both(named[name], weights[1], **given)]
    for weight, optimizer in zip(weights, arms, strict=True):
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for part in range(3):
            stepped([weight], optimizer, 10 + part)
            schedule.step()
    assert (weights[0] - weights[1]).abs().max() < 1e-12
    undecayed = random_weight()
    assert not torch.allclose(stepped([undecayed], both(named[name], undecayed), 33), weights[0])


def test_the_stiffness_it_is_given_is_used(make, table):
    weight, twin = random_weight(), random_weight()
    group = {"params": [weight], "format": table("E4M3"), "scale": SCALE}
    stepped([weight], make([group], lr=1e-2, stiffness="uniform"))
    adam = torch.optim.Adam([twin], lr=1e-2, betas=(0.9, 0.95), foreach=False)
    assert (weight - stepped([twin], adam)).abs().max() < 1e-12, "on the flat manifold it is Adam"


def test_the_stiffness_is_clamped_where_the_groups_option_says(make, table):
    weight = nn.Parameter(torch.tensor([8.0]).double())
    group = {"params": [weight], "format": table("E7M0"), "max_stiffness": 2.0}
    optimizer = make([group], lr=0.25, eps=0.0)
    weight.grad = torch.ones(1).double()
    optimizer.step()
    assert weight.item() == 7.5


def test_gradients_are_not_written_to_not_even_the_sign_of_a_zero(make, table):
    weight = nn.Parameter(torch.tensor([1.0, 1.0]))
    optimizer = make([{"params": [weight], "format": table("E4M3"), "weight_decay": 0.1}])
    weight.grad = torch.tensor([-0.0, 1.0])
    optimizer.step()
    assert weight.grad.signbit().tolist() == [True, False]
    assert weight.grad.tolist() == [0, 1]


def test_with_a_retraction_on_the_grid_every_weight_is_on_its_grid_after_every_step(make, table):
    weight = nn.Parameter(table("E4M3").quantize(torch.randn(300, generator=generator())) / 2)
    group = {"params": [weight], "format": table("E4M3"), "scale": 2.0, "weight_decay": 0.1}
    start, optimizer = weight.detach().clone(), make([group], lr=4.0, decay_lr=1.0, retraction="grid")
    for _ in range(10):
        stepped([weight], optimizer, 1)
        assert torch.isin(2 * weight.detach(), table("E4M3").values).all()
    assert (weight != start).float().mean() > 0.9


def test_a_step_below_half_a_spacing_is_lost_in_a_retraction_on_the_grid(make, table):
    for lr, moved in ((0.49, False), (0.51, True)):
        weight = nn.Parameter(torch.tensor([1.0, 1.25]))
        group = {"params": [weight], "format": table("E4M3")}
        optimizer = make([group], lr=lr, retraction="grid", eps=0.0)
        weight.grad = -torch.ones(2)
        optimizer.step()
        assert weight.tolist() == ([1.125, 1.375] if moved else [1.0, 1.25])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"retraction": "grid"},
        {"stiffness": "uniform", "lr": 0.05},
        {"stiffness": {"plugin": "grid", "refresh": "never"}},
    ],
)
def test_it_keeps_the_contract(make, options):
    check_optimizer(lambda groups: make(groups, **({"lr": 2.0, "other_lr": 0.05} | options)))


@pytest.mark.parametrize("options", [{"refresh": "never"}, {"of_format": True}, {"of_format": None}])
@pytest.mark.parametrize("format", ["E4M3", None])
def test_under_the_options_of_every_formula_it_is_manifold_adamws_both(make, table, format, options):
    if options == {"of_format": True}:
        options = {"of_format": table("E5M2")}
    stiffness, weights = Geometry(grid_stiffness, **options), (random_weight(), random_weight())
    own = {} if format is None else {"format": table(format), "scale": SCALE}
    groups = [{"params": [weight], "weight_decay": 0.1, **own} for weight in weights]
    optimizer = make(groups[:1], lr=1.0, stiffness=stiffness)
    other = ManifoldAdamW(groups[1:], lr=1.0, stiffness=stiffness, placement="both", normalize="none")
    stepped(weights[:1], optimizer), stepped(weights[1:], other)
    assert (weights[0] - weights[1]).abs().max() < 1e-12


def test_a_weight_that_borrows_its_geometry_has_no_grid_to_land_on(make, table):
    weight = random_weight()
    stiffness = Geometry(grid_stiffness, of_format=table("E5M2"))
    optimizer = make([weight], lr=0.25, retraction="grid", stiffness=stiffness)
    stepped([weight], optimizer, 3)
    scale = 2.0 ** math.floor(math.log2(57344 / weight.detach().abs().max()))
    assert not torch.isin(weight.detach() * scale, table("E5M2").values).any()


def test_half_precision_weights_take_steps_under_the_largest_stiffness_there_is(make, table):
    weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
    weight.grad = torch.ones_like(weight)
    make([{"params": [weight], "format": table("E4M3")}], lr=1.0).step()  # max_stiffness 1e6 is past float16
    assert weight.tolist() == [0.875, 0.875]


def test_behind_grid_storage_every_weight_is_on_its_grid(make, table):
    model = quantize_model(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 4)), table("E5M2"))
    optimizer = make(param_groups(model), lr=0.5)
    store_on_grid(optimizer, "stochastic", generator())
    weights = [model[0].weight, model[1].weight]
    start = [weight.detach().clone() for weight in weights]
    stepped(list(model.parameters()), optimizer, 10)
    for weight, before in zip(weights, start, strict=True):
        assert torch.isin(weight.detach() * quantizer_of(weight).scale, table("E5M2").values).all()
        assert (weight != before).float().mean() > 0.5


# --- in an experiment, and without geoopt ---------------------------------------------------------------


def test_every_option_arrives(make, table):
    from altgrad_optim.riemannian_adam import build

    options = RiemannianAdamOptions(
        lr=0.1,
        other_lr=0.2,
        stiffness=StiffnessChoice("uniform"),
        max_stiffness=7.0,
        retraction="grid",
        betas=(0.5, 0.6),
        eps=1e-3,
        weight_decay=0.3,
        decay_lr=0.4,
    )
    model = quantize_model(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), table("E4M3"))
    inputs = OptimizerInputs(groups=param_groups(model), generator=generator(), registry=discover())
    optimizer = build(options, inputs)
    given = attrs.asdict(options, recurse=False)
    for key in set(given) - {"stiffness"}:
        assert optimizer.param_groups[0][key] == given[key], key
    assert optimizer.param_groups[1]["lr"] == 0.2
    assert optimizer.stiffness(torch.tensor([3.0]), None, 1.0).tolist() == [1]


def test_the_defaults_of_files_and_of_python_are_the_same(make):
    defaults = make([nn.Parameter(torch.ones(2))], weight_decay=0.1).defaults  # files: nanoGPT's decay
    given = attrs.asdict(RiemannianAdamOptions(), recurse=False)
    del given["stiffness"]
    assert {key: defaults[key] for key in given} == given


@pytest.mark.parametrize("storage", ["master", "grid"])
@pytest.mark.parametrize("retraction", ["add", "grid"])
def test_an_experiment_runs(geoopt, storage, retraction, tmp_path, monkeypatch):
    installed = {(entry.kind, entry.name) for entry in discover().registered}
    if not {("dataset", "markov"), ("format", "E4M3")} <= installed:
        pytest.skip("the data and formats plugins are not installed")
    monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "experiment.toml"
    path.write_text(EXPERIMENT.replace("STORAGE", storage).replace("RETRACTION", retraction))
    result = altgrad.run(altgrad.load_experiment(path), out=tmp_path / "runs", quiet=True)
    assert result.outcome == "finished"


@pytest.fixture
def without_geoopt(monkeypatch):
    """As if geoopt were not installed."""
    monkeypatch.setitem(sys.modules, "geoopt", None)
    monkeypatch.delitem(sys.modules, "altgrad_optim.grid_manifold", raising=False)


def test_without_geoopt_the_error_names_the_extra(without_geoopt):
    import altgrad_optim

    message = r"geoopt, which is not installed: pip install 'altgrad-optim\[geoopt\]'"
    with pytest.raises(UsageError, match=message):
        altgrad_optim.RiemannianAdam([nn.Parameter(torch.ones(2))])
    with pytest.raises(UsageError, match=message):
        _ = altgrad_optim.GridManifold


def test_without_geoopt_it_is_registered_and_building_it_is_a_users_mistake(without_geoopt):
    registry = discover()
    inputs = OptimizerInputs(groups=[], generator=generator(), registry=registry)
    with pytest.raises(UsageError, match=r"altgrad-optim\[geoopt\]"):
        registry.find("optimizer", "RiemannianAdam").build(RiemannianAdamOptions(), inputs)
