import attrs
import pytest
import torch
from torch import nn

import altgrad_optim
from altgrad_core.groups import param_groups
from altgrad_core.hookspecs import OptimizerInputs
from altgrad_core.options import StiffnessChoice
from altgrad_core.registry import discover
from altgrad_core.storage import store_on_grid
from altgrad_core.surgery import quantize_model
from altgrad_core.testing.optimizers import check_optimizer
from altgrad_optim import AdamWOptions, GridOptim, GridOptimOptions, ManifoldAdamW, ManifoldAdamWOptions
from altgrad_optim.adamw import build as build_adamw
from altgrad_optim.grid import build as build_grid
from altgrad_optim.manifold import build as build_manifold


def inputs(groups, **options):
    return OptimizerInputs(
        groups=groups, generator=torch.Generator().manual_seed(0), registry=discover(), **options
    )


def grid(**options):
    given = {"step_scale": 1.0, "normalize": "adam", "other_lr": 0.05, "bound": 8.0} | options
    return lambda groups: GridOptim(groups, generator=torch.Generator().manual_seed(0), **given)


def manifold(**options):
    return lambda groups: ManifoldAdamW(groups, **{"lr": 0.05, "other_lr": 0.05} | options)


CONFORMING = {
    "AdamW": lambda groups: build_adamw(AdamWOptions(lr=0.05), inputs(groups)),
    "ManifoldAdamW": manifold(),
    "ManifoldAdamW gradient": manifold(placement="gradient"),
    "ManifoldAdamW both": manifold(placement="both", normalize="max"),
    "ManifoldAdamW in ULPs": manifold(lr=2.0, normalize="none"),
    "GridOptim": grid(),
    "GridOptim founding": grid(normalize="none", step_scale=6.0),
    "GridOptim value": grid(rounding="value"),
    "GridOptim master": grid(storage="master"),
    "GridOptim stochastic storage": grid(storage_rounding="stochastic", scale_mode="adaptive"),
}


@pytest.mark.parametrize("make", CONFORMING.values(), ids=CONFORMING)
def test_the_optimizers_keep_the_contract(make):
    check_optimizer(make)


# --- from an experiment's options -----------------------------------------------------------------------


@pytest.fixture
def groups(table):
    model = quantize_model(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8)), table("E4M3"))
    return param_groups(model)


def values(optimizer, key):
    return [group[key] for group in optimizer.param_groups]


def test_adamw_is_torchs_own_fused(groups):
    optimizer = build_adamw(AdamWOptions(lr=0.1), inputs(groups))
    assert type(optimizer) is torch.optim.AdamW
    assert values(optimizer, "fused") == [True, True]
    assert values(optimizer, "betas") == [(0.9, 0.95)] * 2
    assert values(optimizer, "weight_decay") == [0.1, 0.0], "vectors do not decay"


def test_adamw_trains_parameters_without_a_format_at_other_lr(groups):
    assert values(build_adamw(AdamWOptions(lr=0.1), inputs(groups)), "lr") == [0.1, 0.1]
    optimizer = build_adamw(AdamWOptions(lr=0.1, other_lr=0.02), inputs(groups))
    assert values(optimizer, "lr") == [0.1, 0.02]


def test_adamw_trains_covered_weights_at_lr_with_a_format_or_without():
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 8, bias=False))
    groups = param_groups(model, [model[1].weight])
    optimizer = build_adamw(AdamWOptions(lr=0.1, other_lr=0.02), inputs(groups))
    assert values(optimizer, "lr") == [0.1, 0.02]


@pytest.mark.parametrize(("covers", "lr"), [(True, 0.02), (False, 0.1)], ids=["frozen", "unquantized"])
def test_adamw_trains_what_is_not_covered_at_lr_only_where_nothing_could_be(covers, lr):
    model = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 8, bias=False))
    given = attrs.evolve(inputs(param_groups(model)), covers=covers)
    assert values(build_adamw(AdamWOptions(lr=0.1, other_lr=0.02), given), "lr") == [lr]


def test_tuning_the_lr_of_adamw_leaves_other_lr_as_it_was():
    tuned = attrs.evolve(AdamWOptions(lr=0.1), lr=0.4)
    assert (tuned.lr, tuned.other_lr) == (0.4, 0.1)


def test_every_option_of_manifold_adamw_arrives(groups):
    options = ManifoldAdamWOptions(
        lr=0.1,
        other_lr=0.2,
        placement=altgrad_optim.Placement(p=0.25, q=0.5),
        stiffness=StiffnessChoice("uniform"),
        normalize="max",
        max_stiffness=7.0,
        betas=(0.5, 0.6),
        eps=1e-3,
        weight_decay=0.3,
        decay_lr=0.4,
    )
    optimizer = build_manifold(options, inputs(groups))
    given = attrs.asdict(options, recurse=False) | {"p": 0.25, "q": 0.5}
    for key in set(given) - {"placement", "stiffness"}:
        assert optimizer.param_groups[0][key] == given[key], key
    assert values(optimizer, "lr") == [0.1, 0.2]
    assert optimizer.stiffness(torch.tensor([3.0]), None, 1.0).tolist() == [1]


def test_every_option_of_grid_optim_arrives(groups):
    options = GridOptimOptions(
        step_scale=0.1,
        other_lr=0.2,
        normalize="adam",
        rounding="value",
        momentum=0.3,
        betas=(0.5, 0.6),
        eps=1e-3,
        weight_decay=0.4,
        decay_lr=0.7,
        rung_clip=3.0,
    )
    how = {"storage": "grid", "storage_rounding": "stochastic", "bound": 5.0, "scale_mode": "initial"}
    optimizer = build_grid(options, inputs(groups, **how))
    given = attrs.asdict(options) | {"lr": 0.1}
    for key in set(given) - {"step_scale"}:
        assert optimizer.param_groups[0][key] == given[key], key
    for key, value in how.items():
        assert getattr(optimizer, key) == value, key
    assert values(optimizer, "lr") == [0.1, 0.2]


def test_the_defaults_of_files_and_of_python_are_the_same():
    weight = [nn.Parameter(torch.ones(2))]
    pairs = (
        (ManifoldAdamWOptions(), ManifoldAdamW(weight, weight_decay=0.1)),  # files: nanoGPT's decay
        (GridOptimOptions(), GridOptim(weight)),
    )
    for options, optimizer in pairs:
        for key, value in attrs.asdict(options, recurse=False).items():
            if key in optimizer.defaults:
                assert optimizer.defaults[key] == value, key
    assert (optimizer.defaults["lr"], optimizer.defaults["rung_clip"]) == (6.0, 10)


def test_a_placement_is_read_by_name_or_as_a_table():
    read = altgrad_optim.Placement.from_plain
    assert read("gradient") == altgrad_optim.Placement(p=1.0, q=0.0)
    assert read({"p": 0.0, "q": 0.5}) == {"p": 0.0, "q": 0.5}
    with pytest.raises(ValueError, match="expected one of gradient, update, both or a table"):
        read("before")


def test_the_optimizers_and_the_mathematics_in_them_are_found_by_name(table):
    assert altgrad_optim.AdamW is torch.optim.AdamW
    values, past = altgrad_optim.grid_step(
        torch.ones(2), torch.tensor([1.0, -1.0]), table("E4M3"), torch.zeros(2)
    )
    assert (values.tolist(), past.tolist()) == ([0.9375, 1.125], [False, False])
    m, v = torch.zeros(1), torch.zeros(1)
    direction = altgrad_optim.adamw_direction(torch.tensor([-3.0]), m, v, 1, (0.9, 0.95), 0.0)
    assert (direction.item(), m.item(), v.item()) == pytest.approx((-1, -0.3, 0.45))


def test_the_shop_window_knows_its_optimizers():
    names = [component.name for component in altgrad_optim.altgrad_optimizers()]
    assert names == ["AdamW", "ManifoldAdamW", "GridOptim", "Madam", "RiemannianAdam"]
    assert altgrad_optim.GridOptim is GridOptim
    with pytest.raises(AttributeError, match="has no attribute 'Lion'"):
        _ = altgrad_optim.Lion


# --- which storage roundings go with an optimizer ---------------------------------------------------------


ROUNDED = {
    "AdamW": AdamWOptions(),
    "AdamW without a first moment": AdamWOptions(betas=(0.0, 0.9)),
    "ManifoldAdamW": ManifoldAdamWOptions(),
    "ManifoldAdamW without a first moment": ManifoldAdamWOptions(betas=(0.0, 0.9)),
    "Madam": altgrad_optim.MadamOptions(),
    "RiemannianAdam": altgrad_optim.RiemannianAdamOptions(),
}


@pytest.mark.parametrize("name", ROUNDED)
@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic", "error_feedback", "eco"])
def test_options_name_the_storage_roundings_that_storage_takes(name, rounding, groups):
    options, found = ROUNDED[name], discover().find("optimizer", name.partition(" ")[0])
    if found.name == "RiemannianAdam":
        pytest.importorskip("geoopt")
    optimizer = found.build(options, inputs(groups, storage="grid", storage_rounding=rounding))
    if rounding in options.storage_roundings:
        assert len(store_on_grid(optimizer, rounding).weights) == 1
    else:
        with pytest.raises(ValueError, match=f"storage rounding '{rounding}'"):
            store_on_grid(optimizer, rounding)


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic", "error_feedback", "eco"])
def test_the_options_of_grid_optim_name_the_roundings_that_it_takes(rounding, groups):
    if rounding in GridOptimOptions.storage_roundings:
        assert GridOptim(groups, storage="grid", storage_rounding=rounding).stores_on_grid
    else:
        with pytest.raises(ValueError, match="storage_rounding"):
            GridOptim(groups, storage="grid", storage_rounding=rounding)
    assert GridOptimOptions.stores_on_grid == GridOptim.stores_on_grid


def test_a_notebook_is_offered_what_is_imported_only_when_it_is_asked_for():
    assert {"AdamW", "GridOptim", "ManifoldAdamW", "adamw_direction"} <= set(dir(altgrad_optim))


@pytest.mark.parametrize("clip", [0.0, altgrad_optim.MOST_RUNGS + 1.0])
def test_a_file_may_not_have_a_rung_clip_that_grid_optim_refuses(clip, groups):
    for make in (lambda: GridOptimOptions(rung_clip=clip), lambda: GridOptim(groups, rung_clip=clip)):
        with pytest.raises(ValueError, match=r"rung_clip|expected"):
            make()
