"""ideal, smooth and scrambled: by hand, by an integer oracle, and the facts that comparisons rest on."""

import copy
import math
import pickle
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from altgrad_core.format import Format
from altgrad_core.lookup import get_stiffness
from altgrad_core.registry import UsageError
from altgrad_core.scaling import UNSCALED
from altgrad_core.stiffness import fit_scale, grid_stiffness
from altgrad_core.testing import check_stiffness
from altgrad_formats import E0M7, E1M6, E2M5, E3M4, E4M3, E5M2, E7M0, ExMy, catalog
from altgrad_formats.layout import NAMED
from altgrad_formats.stiffness import ideal_stiffness, scrambled_stiffness, smooth_stiffness

FORMATS = [getattr(catalog, name) for name in NAMED]
EIGHT_BITS = [format for format in FORMATS if format.bits == 8]
TABLE = Format(name="TABLE", bits=3, values=[-2.0, -1.0, 0.0, 1.0, 3.0])


def names(formats):
    return [format.name for format in formats]


def gaussian(count=100_000, size=0.02, seed=0):
    return size * torch.randn(count, generator=torch.Generator().manual_seed(seed))


def just_below(x):
    return torch.nextafter(torch.tensor(x), torch.tensor(0.0))


# --- ideal ----------------------------------------------------------------------------------------------


def test_ideal_by_hand():
    weights = torch.tensor([1.0, 1.5, -2.0, 3.999, 0.02, -0.3])
    expected = [2.0**-3, 2.0**-3, 2.0**-2, 2.0**-2, 2.0**-9, 2.0**-5]
    assert ideal_stiffness(weights, E4M3, 1.0).tolist() == expected
    assert ideal_stiffness(weights, E7M0, 1.0).tolist() == [8 * one for one in expected]


def test_ideal_is_one_at_zero_of_either_sign():
    assert ideal_stiffness(torch.tensor([0.0, -0.0]), E4M3, 64.0).tolist() == [1.0, 1.0]


def test_ideal_ignores_the_scale():
    weights = gaussian(100)
    assert torch.equal(ideal_stiffness(weights, E4M3, 1.0), ideal_stiffness(weights, E4M3, 2.0**9))


def test_one_ulp_below_every_power_of_two_ideal_is_that_of_the_binade_below():
    exponents = range(-125, 128)  # log2 in float32 rounds up to the exponent for most of them
    below = torch.stack([just_below(2.0**e) for e in exponents])
    rounded_up = torch.log2(below).floor() == torch.tensor(list(exponents))
    assert rounded_up.float().mean() > 0.5, "the trap is there"
    for sign in (1, -1):
        expected = torch.tensor([2.0 ** (e - 1) for e in exponents])
        assert torch.equal(ideal_stiffness(sign * below, E7M0, 1.0), expected)
        assert torch.equal(grid_stiffness(sign * below, E7M0, 1.0)[64:190], expected[64:190])


def test_ideal_at_subnormal_weights():
    weights = torch.tensor([2.0**-149, 3 * 2.0**-149, 2.0**-127])
    assert ideal_stiffness(weights, E7M0, 1.0).tolist() == [2.0**-149, 2.0**-148, 2.0**-127]
    assert ideal_stiffness(weights, E4M3, 1.0).tolist() == [2.0**-149, 2.0**-149, 2.0**-130], "not zero"


def test_ideal_is_the_power_of_two_that_integers_say():
    words = np.random.default_rng(0).integers(1, 0x7F800000, 20_000, dtype=np.int32)
    weights = torch.from_numpy(words.view(np.float32))
    exponents = [math.frexp(weight)[1] - 1 for weight in weights.tolist()]
    expected = torch.tensor([2.0 ** (e - 2) for e in exponents], dtype=torch.float64)
    assert torch.equal(ideal_stiffness(weights.double(), E5M2, 1.0), expected)
    assert torch.equal(ideal_stiffness(weights, E5M2, 1.0).double(), expected.clamp(min=2.0**-149))


@pytest.mark.parametrize("format", [E0M7, E1M6, E2M5, E3M4], ids=names([E0M7, E1M6, E2M5, E3M4]))
def test_ideal_is_wrong_for_every_weight_of_a_gpt_in_formats_with_few_exponents(format):
    weights = gaussian()
    assert (ideal_stiffness(weights, format, 1.0) != grid_stiffness(weights, format, 1.0)).all()


def test_ideal_is_wrong_for_57_percent_of_the_weights_in_e4m3():
    weights = gaussian()
    wrong = (ideal_stiffness(weights, E4M3, 1.0) != grid_stiffness(weights, E4M3, 1.0)).double().mean()
    subnormal = math.erf(2.0**-6 / 0.02 / math.sqrt(2))  # below the smallest normal
    assert round(subnormal, 2) == 0.57
    assert float(wrong) == pytest.approx(subnormal, abs=4 * math.sqrt(0.25 / len(weights)))


@pytest.mark.parametrize("format", EIGHT_BITS, ids=names(EIGHT_BITS))
def test_ideal_is_the_spacing_of_normals_at_scale_one(format):
    layout = format.layout
    normal = 2.0**layout.lowest_exponent
    values = format.values[format.values.abs() >= normal]
    assert len(values) == 0 or layout.exponent_bits > 0
    assert torch.equal(ideal_stiffness(values, format, 1.0), grid_stiffness(values, format, 1.0))


# --- smooth ---------------------------------------------------------------------------------------------


def test_smooth_by_hand():
    seen = smooth_stiffness(torch.tensor([1.0, -4.0, 0.0, 2.0**-9]), E4M3, 1.0)
    slope = math.log(2) / 8
    torch.testing.assert_close(seen, torch.tensor([slope, 4 * slope, 2.0**-9, 2.0**-9]), rtol=1e-7, atol=0)


def test_the_floor_of_smooth_is_the_subnormal_spacing_in_weight_units():
    zero = torch.zeros(2)
    for format in FORMATS:
        for scale in (0.25, 1.0, torch.tensor(8.0)):
            seen = smooth_stiffness(zero, format, scale)
            assert torch.equal(seen, grid_stiffness(zero, format, scale)), format.name
            assert seen[0] == format.smallest / scale


def test_in_smooth_the_floor_ends_where_the_slope_reaches_it():
    knee = 2.0**-6 / math.log(2)  # of E4M3, whose smallest normal is 2^-6
    inside, outside = smooth_stiffness(torch.tensor([0.99 * knee, 1.01 * knee]) / 16, E4M3, 16.0).tolist()
    assert inside == 2.0**-9 / 16
    assert outside == pytest.approx(1.01 * 2.0**-9 / 16)


def test_smooth_is_the_spacing_on_average_over_an_octave():
    octave = torch.exp2(torch.arange(2**12) / 2**12).double()  # log-uniform in [1, 2)
    ratio = smooth_stiffness(octave, E4M3, 1.0) / grid_stiffness(octave, E4M3, 1.0)
    assert ratio[0] == pytest.approx(math.log(2))
    assert ratio[-1] == pytest.approx(2 * math.log(2), rel=1e-3)
    rungs = (1 / smooth_stiffness(octave, E4M3, 1.0) * octave * math.log(2) / 2**12).sum()
    assert float(rungs) == pytest.approx(8), "du = dw/S counts the rungs of an octave"


def test_smooth_has_no_jumps():
    weights = torch.linspace(2.0**-8, 8.0, 100_000, dtype=torch.float64)
    steps = smooth_stiffness(weights, E4M3, 4.0).diff()
    assert (steps >= 0).all()
    assert steps.max() <= 1.001 * math.log(2) / 8 * (weights[1] - weights[0])


def test_smooth_on_e1m6_is_not_constant_but_on_e0m7_it_is():
    values = E1M6.values
    ratio = smooth_stiffness(values / 8, E1M6, 8.0) / grid_stiffness(values / 8, E1M6, 8.0)
    assert float(ratio.max()) == pytest.approx(127 / 64 * math.log(2))  # 1.3755
    assert ratio.min() == 1
    assert smooth_stiffness(E0M7.values, E0M7, 1.0).unique().tolist() == [2.0**-7]


# --- what both need ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", ["ideal", "smooth"])
def test_a_table_of_values_has_no_mantissa_and_is_refused_with_the_ways_out(formula):
    with pytest.raises(
        ValueError, match=rf"'{formula}' needs a mantissa width, and TABLE .*'grid', 'scrambled'"
    ):
        get_stiffness(formula)(torch.ones(2), TABLE, 1.0)
    through_another = get_stiffness({"plugin": formula, "of_format": "E4M3"})
    assert (through_another(torch.ones(2), TABLE, 1.0) > 0).all()


def test_a_format_without_a_name_will_do():
    E4M5 = ExMy(4, 5)
    assert ideal_stiffness(torch.tensor([1.0]), E4M5, 1.0).item() == 2.0**-5
    assert smooth_stiffness(torch.tensor([0.0]), E4M5, 1.0).item() == E4M5.smallest


# --- grid on these formats --------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [E0M7, E1M6], ids=names([E0M7, E1M6]))
def test_grid_and_scrambled_are_constant_on_the_uniform_formats(format):
    weights, scale = gaussian(1000), torch.tensor(32.0)
    unit = format.smallest / 32
    assert grid_stiffness(weights, format, scale).unique().tolist() == [unit]
    assert scrambled_stiffness(weights, format, scale, seed=5).unique().tolist() == [unit]


@pytest.mark.parametrize("format", EIGHT_BITS, ids=names(EIGHT_BITS))
def test_grid_is_the_gap_that_exact_fractions_say(format):
    weights, scale = gaussian(300, size=0.3), 4.0
    values = [Fraction(value) for value in format.values.tolist()]
    for weight, seen in zip(weights.tolist(), grid_stiffness(weights, format, scale).tolist(), strict=True):
        x = min(abs(Fraction(weight)) * 4, values[-2])
        above = next(index for index, value in enumerate(values) if value > x)
        assert Fraction(seen) == (values[above] - values[above - 1]) / 4


def test_grid_is_positive_where_the_quotient_by_the_scale_is_no_float32():
    weights = torch.tensor([0.0, 1e-12])
    scale = fit_scale(weights, E7M0)
    assert float(scale) == 2.0**103
    assert grid_stiffness(weights, E7M0, scale).tolist() == [2.0**-149, 2.0**-40]
    assert grid_stiffness(weights.double(), E7M0, scale).tolist() == [2.0**-165, 2.0**-40]


# --- scrambled --------------------------------------------------------------------------------------------


def test_scrambled_by_hand():
    weights = torch.tensor([1.0, 2.0, 4.0, 8.0])
    order = torch.randperm(4, generator=torch.Generator().manual_seed(3))
    assert scrambled_stiffness(weights, E7M0, 1.0, seed=3).tolist() == weights[order].tolist()


@pytest.mark.parametrize("format", EIGHT_BITS, ids=names(EIGHT_BITS))
def test_scrambled_has_the_stiffnesses_of_grid_at_other_weights(format):
    weights = gaussian(4096, size=0.5).reshape(64, 64)
    grid, scrambled = grid_stiffness(weights, format, 2.0), scrambled_stiffness(weights, format, 2.0, seed=1)
    assert torch.equal(scrambled.flatten().sort().values, grid.flatten().sort().values)
    if len(grid.unique()) > 3:
        assert 0.05 < (scrambled == grid).double().mean() < 0.9
        together = torch.corrcoef(torch.stack((grid.flatten(), scrambled.flatten())))[0, 1]
        assert abs(together) < 4 / 64, "no correlation is left"


def test_scrambled_moves_with_the_weights_while_the_permutation_stays():
    weights = gaussian(500, size=1.0)
    before = scrambled_stiffness(weights, E5M2, 1.0, seed=2)
    after = scrambled_stiffness(4 * weights, E5M2, 1.0, seed=2)
    large = before > 2.0**-13  # normal before, so four times as far apart after
    assert torch.equal(after[large], 4 * before[large])
    assert large.sum() > 450


def test_scrambled_permutes_by_the_seed_and_by_nothing_else():
    weights = gaussian(500, size=1.0)
    first = scrambled_stiffness(weights, E5M2, 1.0, seed=1)
    scrambled_stiffness(weights[:100], E5M2, 1.0, seed=7)
    torch.rand(3)
    assert torch.equal(scrambled_stiffness(weights, E5M2, 1.0, seed=1), first)
    assert torch.equal(scrambled_stiffness(weights.reshape(50, 10), E5M2, 1.0, seed=1), first.reshape(50, 10))
    assert not torch.equal(scrambled_stiffness(weights, E5M2, 1.0, seed=2), first)


def test_scrambled_is_built_from_its_seed_and_survives_copies():
    weights = gaussian(50, size=1.0)
    assert torch.equal(
        get_stiffness("scrambled")(weights, E5M2, 1.0), scrambled_stiffness(weights, E5M2, 1.0, seed=0)
    )
    formula = get_stiffness({"plugin": "scrambled", "seed": 9})
    expected = scrambled_stiffness(weights, E5M2, 1.0, seed=9)
    for twin in (formula, copy.deepcopy(formula), pickle.loads(pickle.dumps(formula))):
        assert torch.equal(twin(weights, E5M2, 1.0), expected)


@pytest.mark.parametrize(
    ("seed", "message"), [(-1, "seed: expected 0 or more, got -1"), (1.0, "whole number")]
)
def test_a_bad_seed_is_refused(seed, message):
    with pytest.raises(UsageError, match=message):
        get_stiffness({"plugin": "scrambled", "seed": seed})


# --- of another format ------------------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", ["grid", "ideal", "smooth", "scrambled"])
def test_a_formula_of_another_format_has_that_formats_geometry_at_its_own_fit_scale(plugin):
    weights = gaussian(1000)
    amax = float(weights.abs().max())
    own_scale = 2.0 ** math.floor(math.log2(E5M2.largest / amax))
    expected = get_stiffness(plugin)(weights, E5M2, own_scale)
    seen = get_stiffness({"plugin": plugin, "of_format": "E5M2"})(weights, E3M4, 3.0)
    assert torch.equal(seen, expected)
    if plugin in ("grid", "smooth"):
        own = get_stiffness(plugin)(weights, E3M4, fit_scale(weights, E3M4))
        assert (seen != own).double().mean() > 0.5


# --- conformance ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=names(FORMATS))
def test_the_formulas_conform(format):
    check_stiffness(ideal_stiffness, [format], weight_units="off zero")
    check_stiffness(smooth_stiffness, [format])
    check_stiffness(get_stiffness("scrambled"), [format])
    check_stiffness(grid_stiffness, [format])


@pytest.mark.parametrize("format", FORMATS, ids=names(FORMATS))
def test_in_another_geometry_they_conform(format):
    units = "nowhere" if format.name in UNSCALED else "everywhere"  # those have no fit scale
    check_stiffness(get_stiffness({"plugin": "smooth", "of_format": format}), [E4M3], weight_units=units)


def test_scrambled_conforms_on_tables_too():
    check_stiffness(get_stiffness("scrambled"))


# --- what the README says ---------------------------------------------------------------------------------


def test_the_readmes_example_of_stiffness_runs():
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = (
        code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "stiffness" in code
    )
    exec(compile(example, "README.md", "exec"), {})
