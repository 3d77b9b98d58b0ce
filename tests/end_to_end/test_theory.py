"""The theory's predictions against simulation on the project's own grids, with derived tolerances.

A tolerance is so many standard errors, plus the order of what the prediction neglects where it neglects
something. The generators are fixed, so that a test either always passes or always fails.
"""

import importlib
import itertools
import json
import math
import pathlib
import re
import sys

import attrs
import pytest
import torch

import altgrad_core as altgrad
from altgrad_formats.exmy import ExMy

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
ERRORS = 4.5  # standard errors: one in 150,000


@pytest.fixture(scope="module")
def benchmark():
    """Return a function that imports a module of benchmarks/, as its scripts do; forgotten afterwards."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module
    mine = {path.stem for path in FOLDER.glob("*.py")}
    for name in mine & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.fixture(scope="module")
def quadratic(benchmark):
    return benchmark("quadratic")


@pytest.fixture(scope="module")
def floors(benchmark):
    return benchmark("floors")


@pytest.fixture(scope="module")
def dead_zones(benchmark):
    return benchmark("dead_zones")


@pytest.fixture(scope="module")
def rung_walks(benchmark):
    return benchmark("rung_walks")


def within(estimate, prediction, neglected=0.0):
    """Assert that an estimate is so many errors from a prediction, whose own error is `neglected`."""
    assert estimate.error > 0
    assert abs(estimate.value - prediction) <= ERRORS * estimate.error + neglected, (estimate, prediction)


# --- the spacing over Gaussian weights ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mean", "place"),
    [
        *(("E0M7", 0.0625, 1.0), ("E1M6", 0.0625, 1.0), ("E0M7", 0.0488, 0.02), ("E2M5", 0.0274, 0.02)),
        *(("E2M5", 0.0327, 1.0), ("E3M4", 0.0361, 1.0), ("E4M3", 0.0719, 1.0), ("E5M2", 0.1439, 1.0)),
        *(("E6M1", 0.2878, 1.0), ("E7M0", 0.5756, 1.0)),
    ],
)
def test_the_mean_spacing_over_rms_is_the_known_one(benchmark, name, mean, place):
    row = benchmark("spacings").spacing_row(name)
    assert (row.mean_at_1 if place == 1 else row.mean_at_002) == pytest.approx(mean, abs=5e-5)


def test_the_mean_spacing_of_e2m5_is_that_of_its_three_binades(benchmark):
    def beyond(x):
        return math.erfc(x / math.sqrt(2))

    by_hand = (1 + beyond(2) + 2 * beyond(4)) / 32  # the largest is 7.875: 1/32 below 2, 1/16 below 4, 1/8
    assert benchmark("spacings").spacing_row("E2M5").mean_at_1 == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("name", ["E2M5", "E4M3", "E7M0"])
def test_a_sample_has_the_mean_spacing_that_the_integral_gives(benchmark, name):
    row = benchmark("spacings").spacing_row(name)
    within(row.measured_at_1, row.mean_at_1)


def test_only_uniform_grids_have_no_variation_of_the_spacing(benchmark):
    rows = {row.format: row.squared_variation for row in benchmark("spacings").spacing_rows()}
    assert all(abs(x) < 1e-12 for name in ("E0M7", "E1M6") for x in rows[name])
    assert 0.02 < rows["E2M5"][0] < rows["E2M5"][1] < 0.21
    for name in ("E3M4", "E4M3", "E5M2", "E6M1", "E7M0"):
        assert 0.61 < rows[name][0] < rows[name][1] < 0.64


# --- T1: the floor of stochastic rounding ----------------------------------------------------------------


def test_between_two_values_without_noise_a_weight_is_where_the_flows_are_equal(quadratic):
    grid = quadratic.Grid(altgrad.get_format("E0M7"), 1 / 128)  # the integers to 127
    bowl = quadratic.Bowl(*torch.tensor([[3.25], [1.0]], dtype=torch.float64), 1e-3)
    equilibrium = quadratic.stationary(grid, bowl)[0]
    # Up from 3 it is pulled by 1/4, down from 4 by 3/4: p(3) / 4 = 3 p(4) / 4.
    torch.testing.assert_close(equilibrium[127 + 3 : 127 + 5], torch.tensor([0.75, 0.25]).double())


def test_a_stiffness_reweights_the_equilibrium_by_its_inverse(quadratic):
    grid = quadratic.Grid.fitted("E5M2", 4.5)
    bowl = quadratic.gaussian_bowl(8, 0.5)
    factor = grid.spacing(grid.values)
    reweighted = quadratic.stationary(grid, bowl) / factor
    expected = reweighted / reweighted.sum(1, keepdim=True)
    torch.testing.assert_close(quadratic.stationary(grid, bowl, factor), expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(
    ("name", "arm", "lr"),
    [
        *(("E4M3", "plain", 0.025), ("E4M3", "update", 0.1), ("E4M3", "scrambled", 0.025)),
        *(("E7M0", "plain", 0.05), ("E7M0", "update", 0.1), ("E7M0", "scrambled", 0.05)),
        *(("E4M3", "rungs", 0.05), ("E7M0", "rungs", 0.05)),
        *(
            ("E2M5", "plain", 0.025),
            ("E3M4", "update", 0.05),
            ("E5M2", "update", 0.1),
            ("E6M1", "plain", 0.1),
        ),
    ],
)
@pytest.mark.slow
def test_the_floor_is_the_equilibriums(floors, name, arm, lr):
    found = floors.floor(name, arm, lr, weights=128, replicas=12)
    # A step longer than the gap leaves its weight at most lr^2 D^2 g^2 more: of the order of the long steps.
    within(found.excess.over(found.chain), 1.0, found.long_steps / 2)


def test_the_floor_is_a_quarter_of_spacing_times_force(floors):
    found = floors.floor("E0M7", "plain", 0.05, weights=128, replicas=16)
    within(found.excess.over(found.formula), 1.0, found.long_steps / 2)


@pytest.mark.slow
def test_on_coarse_grids_the_floor_knows_no_learning_rate(floors):
    slow, fast = (floors.floor("E7M0", "plain", lr, weights=128, replicas=16) for lr in (0.05, 0.2))
    error = math.hypot(slow.excess.error, fast.excess.error)
    neglected = fast.long_steps / 2 * slow.excess.value
    assert abs(fast.excess.value - slow.excess.value) <= ERRORS * error + neglected


def test_beyond_the_gap_the_floor_rises_with_the_learning_rate(floors):
    found = floors.floor("E0M7", "plain", 0.4, weights=64, replicas=8)
    assert found.long_steps > 0.5
    assert found.excess.value > 2 * found.chain


@pytest.mark.parametrize("arm", ["plain", "update", "scrambled"])
def test_e0m7_and_e1m6_have_the_same_floor_bit_for_bit(floors, arm):
    one, other = (floors.floor(name, arm, 0.2, weights=64, replicas=4) for name in ("E0M7", "E1M6"))
    assert one.excess == other.excess


def test_on_a_uniform_grid_geometry_changes_no_bit(floors):
    plain, *others = (
        floors.floor("E0M7", arm, 0.2, weights=64, replicas=4).excess
        for arm in ("plain", "update", "scrambled")
    )
    assert others == [plain, plain]


# --- T2: the dead zone of nearest rounding -----------------------------------------------------------------


def test_a_weight_stops_at_the_first_value_inside_the_dead_zone(dead_zones, quadratic):
    grid = quadratic.Grid(altgrad.get_format("E0M7"), 1 / 128)  # values are the integers to 127
    bowl = quadratic.Bowl(*torch.tensor([[0.25], [1.0]], dtype=torch.float64), 0.0)
    setting = dead_zones.Setting(grid=grid, bowl=bowl, lr=0.05, arm=dead_zones.ARMS[0])
    assert setting.zone.tolist() == [10.0]  # 1 / (2 * 0.05)
    rest, moving = setting.stopped(torch.tensor([50.0], dtype=torch.float64))
    assert (rest.tolist(), moving) == ([10.0], 0.0)  # at 11 the step is 0.5375, at 10 it is 0.4875


def test_the_loss_left_is_that_of_the_zone_less_the_last_move(dead_zones, quadratic):
    bowl, format = quadratic.gaussian_bowl(4096, noise=0.0), ExMy(0, 12)
    grid = quadratic.Grid.fitted(format, float(bowl.target.abs().max()))
    setting = dead_zones.Setting(grid=grid, bowl=bowl, lr=0.1, arm=dead_zones.ARMS[0])
    run = dead_zones.Run.of(setting, "outside")
    within(quadratic.Estimate.of(run.measured / run.predicted.mean()), 1.0)
    assert run.measured.mean() < 0.85 * run.leading.mean()


@pytest.fixture(scope="module")
def three_bits(dead_zones):
    """Every arm on E3M12, by its label."""
    return {row.arm: row for row in dead_zones.dead_zones(ExMy(3, 12), "outside", weights=2048)}


def test_the_powers_of_the_spacing_leave_what_is_predicted(three_bits):
    for arm in ("q = 1/2", "q = 1", "mean q = 2/3", "mean q = 1"):
        row = three_bits[arm]
        assert row.in_regime
        within(row.measured, row.predicted, 0.1 * row.crossing)


def test_matched_by_rms_one_half_is_best_and_one_ties_with_zero(three_bits, benchmark):
    row, spacings = three_bits["q = 1/2"], benchmark("spacings")
    variation = spacings.squared_variation(benchmark("quadratic").Grid.fitted(ExMy(3, 12), spacings.AMAX))
    # The sample's CV^2 is known to 1/sqrt(2048) of the spread of u^2, and the last moves are of the order lr.
    assert row.measured.value == pytest.approx(1 / (1 + variation), abs=0.04)
    assert three_bits["q = 1"].measured.value == pytest.approx(1, abs=0.04)


def test_matched_by_mean_one_wins_and_two_thirds_wins_more(three_bits):
    assert three_bits["mean q = 2/3"].measured.value + 0.05 < three_bits["mean q = 1"].measured.value < 0.7


def test_matched_by_max_or_scrambled_stiffness_loses(three_bits):
    assert three_bits["max q = 1"].measured.value > 5
    assert three_bits["scrambled"].measured.value > 5


@pytest.mark.parametrize("name", ["E0M7", "E1M6"])
def test_on_a_uniform_grid_no_arm_differs_from_plain(dead_zones, name):
    rows = dead_zones.dead_zones(altgrad.get_format(name), "anew", weights=512)
    assert {row.measured.value for row in rows} == {1.0}


def test_at_eight_bits_the_prediction_is_marked_as_out_of_its_regime(dead_zones):
    arms = dead_zones.ARMS[:3]
    rows = dead_zones.dead_zones(altgrad.get_format("E4M3"), "anew", arms=arms, weights=512)
    assert not any(row.in_regime for row in rows)
    assert rows[2].measured.value > 1.05 * rows[2].predicted


def test_a_descent_that_has_not_ended_is_marked_too(dead_zones, quadratic):
    bowl = quadratic.gaussian_bowl(64, noise=0.0)
    setting = dead_zones.Setting(
        grid=quadratic.Grid(ExMy(0, 12), 256.0), bowl=bowl, lr=0.1, arm=dead_zones.ARMS[0]
    )
    ended = dead_zones.Run.of(setting, "outside")
    assert ended.relative_to(ended, "").in_regime
    assert not attrs.evolve(ended, moving=0.01).relative_to(ended, "").in_regime


@pytest.mark.parametrize("arm", ["plain", "update"])
@pytest.mark.parametrize("name", ["E3M4", "E7M0"])
def test_the_optimizer_freezes_the_weights_that_are_predicted(benchmark, name, arm):
    freezing = benchmark("freezing")
    for ratio in (*freezing.RATIOS, 0.51, 0.49, 0.26, 0.24):  # the last on both sides of the two thresholds
        predicted, measured = freezing.stays(name, arm, ratio, weights=4096)
        assert torch.equal(predicted, measured), ratio


def test_plain_freezes_by_octaves_and_update_at_once_but_for_borders(benchmark):
    freezing = benchmark("freezing")
    plain, update = (
        [freezing.frozen("E3M4", arm, ratio, weights=4096).measured for ratio in (0.6, 0.3, 0.2, 0.05)]
        for arm in freezing.POWERS
    )
    assert all(0.2 < share < 0.95 for share in plain)
    assert update[0] == 0
    assert update[1] == pytest.approx(
        1 - 1 / 16 / 2, abs=0.01
    )  # 1 in 16 is a power of two, and goes inward or not
    assert update[2:] == [1, 1]


# --- T3: the walk in rungs -----------------------------------------------------------------------------


def test_on_flat_ground_e7m0_walks_as_predicted(rung_walks):
    for fact in rung_walks.flat_ground(walkers=2**15, steps=200):
        within(fact.measured, fact.predicted, 0.5 if "largest" in fact.what else 0.0)  # whole octaves


@pytest.mark.parametrize("name", [pytest.param("E5M2", marks=pytest.mark.slow), "E7M0"])
def test_in_a_bowl_rung_rounding_is_unbiased(rung_walks, name):
    fact = rung_walks.bias(name, by_value=False, weights=64, steps=900, after=300)
    assert fact.predicted == pytest.approx(0, abs=1e-12)
    within(fact.measured, 0.0)


@pytest.mark.parametrize("name", [pytest.param("E5M2", marks=pytest.mark.slow), "E7M0"])
def test_in_a_bowl_value_rounding_under_update_is_biased_toward_zero(rung_walks, name):
    fact = rung_walks.bias(name, by_value=True, weights=64, steps=900, after=300)
    assert fact.predicted < -0.02
    within(fact.measured, fact.predicted)


@pytest.mark.parametrize(("noise", "lowest", "highest"), [(3.0, -8, 0), (6.0, -math.inf, -14)])
@pytest.mark.slow
def test_value_rounding_under_update_loses_a_weight_that_is_hardly_pushed_back_at_zero(
    rung_walks, quadratic, noise, lowest, highest
):
    grid = quadratic.Grid.fitted("E7M0", 4.5)
    bowl = quadratic.Bowl(*torch.tensor([[1.1], [1.0]], dtype=torch.float64), 1.1 * noise)
    up, down = bowl.pushes(torch.zeros(1, dtype=torch.float64))
    assert bool(up > 2 * down) == (
        lowest > -math.inf
    )  # an octave nearer to zero holds 2 down / up times as much
    draws, w = torch.Generator().manual_seed(9), grid.rounded(bowl.target.repeat(64, 1), None)
    for _ in range(1000):
        rungs = 0.1 / noise * bowl.gradient(w, draws)
        scaled, _ = rung_walks.value_step(
            w * grid.scale, rungs, grid.format, torch.rand(w.shape, generator=draws)
        )
        w = scaled / grid.scale
    assert lowest < float(w.abs().log2().median()) < highest


def test_the_bias_is_the_covariance_of_spacing_and_place(rung_walks, quadratic):
    grid = quadratic.Grid.fitted("E7M0", 4.5)
    bowl = quadratic.Bowl(*torch.tensor([[1.1], [1.0]], dtype=torch.float64), 0.3)
    spacing, delta = grid.spacing(grid.values), grid.values - 1.1
    p = quadratic.stationary(grid, bowl, spacing)[0]
    mean_u, mean = p @ spacing, p @ delta
    assert float(mean) == pytest.approx(float(-(p @ (spacing * delta) - mean_u * mean) / mean_u), rel=1e-9)


@pytest.mark.parametrize(("name", "rung"), [("E0M7", 11), ("E1M6", 11), ("E2M5", 22), ("E7M0", 123)])
def test_a_weight_needs_its_rung_over_the_drift_to_come_to_zero(rung_walks, name, rung):
    fact = rung_walks.sign_lock(name, walkers=1024)
    assert fact.predicted == pytest.approx(rung / 0.15)
    within(fact.measured, fact.predicted)


# --- the command ----------------------------------------------------------------------------------------


def test_the_command_prints_json(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["theory.py", "--json", "--only", "spacing"])
    benchmark("theory").main()
    result = json.loads(capsys.readouterr().out)
    assert {"python", "torch", "date"} <= result["machine"].keys()
    assert [row["format"] for row in result["spacing"]] == list(benchmark("quadratic").EIGHT_BITS)


def test_the_command_prints_predicted_beside_measured_with_its_marks(benchmark, dead_zones, capsys):
    theory = benchmark("theory")
    row = dead_zones.DeadZone(
        format="E9M9",
        arm="q = 9",
        formula=1.0,
        predicted=0.5,
        measured=benchmark("quadratic").Estimate(0.75, math.nan),
        crossing=0.9,
        of_start=1.0,
        moving=0.0,
    )
    assert theory.as_plain(row)["measured"] == {"value": 0.75, "error": None}
    (table,) = theory.tables({"dead zones": [row]})
    table.box = None
    theory.Console(width=140).print(table)
    assert re.search(r"E9M9 +q = 9 +1 +0\.5 \* +0\.750 +0\.90", capsys.readouterr().out)


def test_a_chart_has_a_line_for_what_is_predicted_and_a_mark_for_what_is_measured(benchmark):
    line_chart = benchmark("line_chart")
    series = line_chart.Series("a & b", [(0, 0), (1, 2)], [(1, 1, 0.5)])
    svg = line_chart.chart("title", "x", "y", [series])
    assert (svg.count("<polyline"), svg.count("<circle")) == (1, 1)
    assert "a &amp; b" in svg
    (circle,) = re.findall(r"<circle cx='([\d.]+)' cy='([\d.]+)'", svg)
    ends = re.findall(r"([\d.]+),([\d.]+)", re.search(r"polyline points='([^']+)'", svg)[1])
    assert circle[0] == ends[1][0]
    assert float(circle[1]) == pytest.approx((float(ends[0][1]) + float(ends[1][1])) / 2, abs=0.1)


def test_a_logarithmic_axis_has_equal_factors_at_equal_distances(benchmark):
    axis = benchmark("line_chart").Axis.over([1.0, 100.0], 0, 100, logarithmic=True)
    assert axis(10.0) == pytest.approx(50)
    assert axis.ticks == [1, 2, 5, 10, 20, 50, 100]


def test_names_in_a_chart_do_not_overlap(benchmark):
    heights = benchmark("line_chart")._apart([100.0, 101.0, 50.0, 102.0])
    assert all(b - a >= 16 for a, b in itertools.pairwise(sorted(heights)))
