import copy
import pickle
import subprocess
import sys

import attrs
import pytest
import torch

from altgrad_core import component_page, describe, stiffness
from altgrad_core.experiment_file import ExperimentError, load_experiment
from altgrad_core.format import Format
from altgrad_core.hookspecs import NoOptions
from altgrad_core.lookup import get_format, get_stiffness
from altgrad_core.options import StiffnessChoice
from altgrad_core.registry import Registry, UsageError, discover
from altgrad_core.structuring import structure

FORMATS = ("E0M7", "E1M6", "E4M3", "E5M2", "E7M0")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", [1.0, 0.25, 64.0])
def test_grid_is_the_gap_of_the_table_in_weight_units(table, name, scale):
    format = table(name)
    values = format.values.double()
    lower, upper = values[:-1], values[1:]
    inside = lower + (upper - lower) / 4
    seen = stiffness.grid_stiffness(inside / scale, format, scale)
    torch.testing.assert_close(seen, (upper - lower) / scale, rtol=0, atol=0)


@pytest.mark.parametrize("name", FORMATS)
def test_grid_is_finite_and_positive_everywhere(table, name):
    format = table(name)
    weights = torch.tensor([0.0, -0.0, format.smallest / 8, format.largest, -4 * format.largest])
    seen = stiffness.grid_stiffness(weights, format, torch.tensor(0.5))
    assert (seen > 0).all()
    assert seen.isfinite().all()
    assert seen[0] == format.smallest / 0.5


def test_on_uniform_formats_grid_is_constant(table):
    weights = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for name, unit in (("E0M7", 2.0**-7), ("E1M6", 2.0**-5)):
        assert stiffness.grid_stiffness(weights, table(name), 4.0).unique().tolist() == [unit / 4]


def test_grid_keeps_shape_and_dtype(table):
    for dtype in (torch.float32, torch.float64):
        weights = torch.zeros(2, 3, dtype=dtype)
        for formula in (stiffness.grid_stiffness, stiffness.uniform_stiffness):
            seen = formula(weights, table("E4M3"), torch.tensor(2.0))
            assert (seen.shape, seen.dtype) == (weights.shape, dtype)


def test_uniform_is_one(table):
    weights = torch.tensor([0.0, 3.0, -1e9])
    assert stiffness.uniform_stiffness(weights, table("E4M3"), 2.0).tolist() == [1, 1, 1]


def test_both_are_built_from_options():
    assert stiffness.grid(NoOptions()) is stiffness.grid_stiffness
    assert stiffness.uniform(NoOptions()) is stiffness.uniform_stiffness


def test_grid_is_positive_and_finite_where_the_quotient_is_no_number_of_the_dtype(table):
    e7m0, weights = table("E7M0"), torch.tensor([0.0, 1.0])
    assert stiffness.grid_stiffness(weights, e7m0, 2.0**100).tolist() == [2.0**-149, 2.0**-37]
    assert stiffness.grid_stiffness(weights.double(), e7m0, 2.0**100)[0] == 2.0**-162
    assert stiffness.grid_stiffness(weights.half(), e7m0, 1.0)[0] == 2.0**-24
    assert stiffness.grid_stiffness(weights.half(), table("E0M7"), 2.0**-24)[0] == 65504


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_measured_as_the_float32_numbers_that_they_are(table, dtype):
    weights = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(dtype)
    for name, scale in (("E0M15", 0.25), ("E5M2", 2.0**20), ("E4M3", torch.tensor(2.0**-12))):
        seen = stiffness.grid_stiffness(weights, table(name), scale)
        expected = stiffness.grid_stiffness(weights.float(), table(name), scale)
        assert torch.equal(seen, expected.to(dtype).clamp(2.0**-24)) or dtype == torch.bfloat16
        assert torch.equal(seen.float(), expected) or dtype == torch.float16


def test_a_nan_weight_has_no_stiffness(table):
    weights = torch.tensor([torch.nan, 1.0])
    assert stiffness.grid_stiffness(weights, table("E4M3"), 1.0).isnan().tolist() == [True, False]


def test_no_gradient_flows_through_a_stiffness(table):
    weights = torch.ones(3, requires_grad=True)
    for formula in (stiffness.grid_stiffness, stiffness.uniform_stiffness):
        assert not formula(weights, table("E4M3"), 1.0).requires_grad


# --- of another format --------------------------------------------------------------------------------


def test_the_fit_scale_is_the_largest_power_of_two_that_does_not_saturate(table):
    weights = torch.tensor([0.3, -0.6])
    assert float(stiffness.fit_scale(weights, table("E5M2"))) == 2.0**16  # 57344/0.6 = 95573
    assert float(stiffness.fit_scale(weights, table("E0M7"))) == 1.0
    assert float(stiffness.fit_scale(weights, table("BF16"))) == 1.0, "BF16 is never scaled"
    assert float(stiffness.fit_scale(weights[:0], table("E5M2"))) == 2.0**15, "as if amax were 1"
    assert float(stiffness.fit_scale(weights[0], table("E5M2"))) == 2.0**17


def test_of_format_is_that_formats_geometry_whatever_the_weights_own(table):
    weights = torch.tensor([0.0, 0.001, 0.6])
    geometry = stiffness.Geometry(stiffness.grid_stiffness, of_format=table("E5M2"))
    expected = [2.0**-16 / 2**16, 2.0**-12, 2.0**-3]
    for own, scale in ((table("E3M4"), 128.0), (table("E0M7"), 1.0)):
        assert geometry(weights, own, scale).tolist() == expected


def test_of_format_follows_the_current_weights(table):
    geometry = stiffness.Geometry(stiffness.grid_stiffness, of_format=table("E4M3"))
    weights = torch.tensor([0.0, 1.0])
    before, after = (geometry(factor * weights, table("E4M3"), 1.0) for factor in (1, 16))
    assert before.tolist() == [2.0**-9 / 2**8, 2.0**-3]
    assert torch.equal(after, 16 * before)


def test_without_of_format_a_geometry_is_its_formula(table):
    geometry = stiffness.Geometry(stiffness.grid_stiffness, refresh="never")
    weights = torch.tensor([0.0, 1.0])
    seen = geometry(weights, table("E4M3"), 4.0)
    assert torch.equal(seen, stiffness.grid_stiffness(weights, table("E4M3"), 4.0))
    assert (geometry.of_format, geometry.refresh) == (None, "never")


def test_a_geometry_survives_copies(table):
    geometry = stiffness.Geometry(stiffness.grid_stiffness, of_format=table("E5M2"), refresh="never")
    for twin in (copy.deepcopy(geometry), pickle.loads(pickle.dumps(geometry))):
        assert twin == geometry


# --- the core's options beside those of a third party's formula -----------------------------------------

PLUGIN = """
from altgrad_core.options import StiffnessChoice, option

@attrs.frozen(kw_only=True)
class TimesOptions:
    factor: float = option("multiplies the weight", default=2.0)

@attrs.frozen(kw_only=True)
class AdamOptions:
    stiffness: StiffnessChoice = option("a formula", default=StiffnessChoice("grid"))

@hookimpl
def altgrad_formats():
    return [Component(name="STEPS", summary="", target=f"{__name__}:steps", bits=3)]

@hookimpl
def altgrad_stiffness():
    return [Component(name="times", summary="", options=TimesOptions, target=f"{__name__}:times")]

@hookimpl
def altgrad_optimizers():
    return [Component(name="AdamW", summary="", options=AdamOptions, target="nowhere:adam")]

@hookimpl
def altgrad_datasets():
    return [Component(name="licenses", summary="", target="nowhere:licenses")]

def steps(options):
    from altgrad_core.format import Format
    return Format(name="STEPS", bits=3, values=range(4))

def times(options):
    return lambda weight, format, scale: options.factor * format.largest * weight / scale
"""

OTHER = Format(name="OTHER", bits=3, values=[-16.0, 0.0, 16.0])


@pytest.fixture
def plugins(install):
    install("times", PLUGIN)
    return discover()


def test_every_formula_has_of_format_and_refresh(plugins):
    weights = torch.tensor([1.0, 2.0])
    plain = get_stiffness({"plugin": "times", "factor": 3}, plugins)
    assert plain(weights, OTHER, 1.0).tolist() == [48, 96]
    made = get_stiffness({"plugin": "times", "factor": 3, "of_format": "STEPS"}, plugins)
    assert made(weights, OTHER, 8.0).tolist() == [9, 18], "largest 3, fit scale 1"
    assert (made.of_format.name, made.refresh) == ("STEPS", "step")
    frozen = get_stiffness({"plugin": "times", "refresh": "never"}, plugins)
    assert (frozen.of_format, frozen.refresh) == (None, "never")
    assert frozen(weights, OTHER, 8.0).tolist() == [4, 8]


def test_of_format_is_a_name_a_table_or_a_format(plugins):
    for given in ("STEPS", {"plugin": "STEPS"}, get_format("STEPS", plugins), OTHER):
        made = get_stiffness({"plugin": "grid", "of_format": given, "refresh": "never"}, plugins)
        assert made.formula is stiffness.grid_stiffness
        assert (made.of_format, made.refresh) == (get_format(given, plugins), "never")


def test_without_the_options_a_formula_is_handed_over_as_it_is(plugins):
    for given in ("grid", {"plugin": "grid", "refresh": "step"}):
        assert get_stiffness(given, plugins) is stiffness.grid_stiffness


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"of_format": "STEP"}, "of_format: no format named 'STEP' is installed; did you mean 'STEPS'?"),
        ({"of_format": 3}, "of_format: expected a name, or a table with plugin = ..., got 3"),
        ({"of_format": "FP32"}, "of_format: FP32 has no grid to take a geometry from; name a format of"),
        ({"of_format": {"plugin": "STEPS", "a": 1}}, "of_format.a: unknown key 'a'; no keys are expected"),
        ({"refresh": "nevr"}, "refresh: expected one of 'step', 'never'; got 'nevr'; did you mean 'never'?"),
        ({"refresh": False}, "refresh: expected one of 'step', 'never'; got false"),
        ({"refesh": "never"}, "refesh: unknown key 'refesh'; did you mean 'refresh'?"),
        ({"offormat": "STEPS"}, "offormat: unknown key 'offormat'; did you mean 'of_format'?"),
        ({"factro": 1}, "factro: unknown key 'factro'; did you mean 'factor'?"),
        ({"x": 1}, "x: unknown key 'x'; the keys are: factor, of_format, refresh"),
    ],
)
def test_a_wrong_option_is_told_with_its_place(plugins, table, message):
    with pytest.raises(UsageError) as caught:
        get_stiffness({"plugin": "times", **table}, plugins)
    assert str(caught.value).startswith(message)


def test_all_mistakes_of_a_formulas_table_are_told_at_once(plugins):
    table = {"plugin": "times", "factor": "3", "refresh": "no", "of_format": 1, "y": 0}
    _, problems = structure(table, StiffnessChoice, plugins)
    assert sorted(problem.path for problem in problems) == [("factor",), ("of_format",), ("refresh",), ("y",)]


def test_a_formula_may_not_have_an_option_of_that_name_of_its_own(registered):
    @attrs.frozen(kw_only=True)
    class Shadowing:
        refresh: int = 3

    registry = Registry(registered=(registered("stiffness", "mine", Shadowing),))
    with pytest.raises(UsageError, match=r"'mine' has an option 'refresh' of its own, .* mend its plugin"):
        get_stiffness({"plugin": "mine", "refresh": "never"}, registry)


def test_in_a_file_a_mistake_has_its_line(plugins, tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(
        'name = "e"\n[optimizer.stiffness]\nplugin = "times"\nof_format = "STEP"\nrefresh = 1\nfactr = 1\n'
    )
    with pytest.raises(ExperimentError) as caught:
        load_experiment(path, registry=plugins)
    places = [line.removeprefix(f"{path}:").split(": ")[:2] for line in caught.value.lines]
    assert places == [
        ["4", "optimizer.stiffness.of_format"],
        ["5", "optimizer.stiffness.refresh"],
        ["6", "optimizer.stiffness.factr"],
    ]


def test_the_options_are_in_what_is_resolved_and_in_the_header(plugins, tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(
        'name = "e"\noptimizer.stiffness = {plugin = "times", of_format = "STEPS", refresh = "never"}'
    )
    (cell,) = load_experiment(path, registry=plugins).cells_on["cpu"]
    chosen = cell.experiment.plain()["optimizer"]["stiffness"]
    assert chosen == {"plugin": "times", "factor": 2.0, "of_format": "STEPS", "refresh": "never"}
    assert describe.shown(cell.experiment.optimizer) == (
        "AdamW (stiffness times factor 2.0 of_format STEPS refresh never)"
    )


def test_defaults_are_resolved_and_what_is_left_out_is_not_written(plugins):
    for given in ("grid", {"plugin": "grid"}):
        choice, _ = structure(given, StiffnessChoice, plugins)
        assert choice.plain() == {"plugin": "grid", "refresh": "step"} == StiffnessChoice("grid").plain()


def test_resolved_options_give_the_same_choice_again(plugins):
    given = {"plugin": "times", "of_format": "STEPS", "refresh": "never"}
    first, _ = structure(given, StiffnessChoice, plugins)
    assert structure(first.plain(), StiffnessChoice, plugins) == (first, [])


def test_the_page_of_a_formula_shows_the_cores_options_below_its_own(plugins):
    page = list(component_page.lines(plugins.find("stiffness", "times"), plugins))
    options = page[page.index("options") + 1 : page.index("in an experiment file") - 1]
    assert [line.split()[0] for line in options if line[2] != " "] == ["factor", "of_format", "refresh"]
    assert page[-1] == 'stiffness = {plugin = "times", factor = 2.0}'


def test_a_formula_is_chosen_and_refused_without_torch():
    code = """
import sys
from altgrad_core.options import StiffnessChoice
from altgrad_core.registry import discover
from altgrad_core.structuring import structure
choice, problems = structure({"plugin": "grid", "refresh": "never"}, StiffnessChoice, discover())
assert choice.geometry.refresh == "never" and not problems
choice, problems = structure({"plugin": "grid", "of_format": "E9M9"}, StiffnessChoice, discover())
assert problems[0].path == ("of_format",)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
