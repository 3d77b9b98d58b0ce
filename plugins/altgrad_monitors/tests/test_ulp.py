"""Steps counted in spacings: by hand on E4M3, and against numpy on random steps."""

import math

import attrs
import numpy as np
import pytest
import torch

from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_monitors import UlpOptions
from altgrad_monitors.ulp import QUANTITIES, Ulp, median, sorted_median, stride

LAYER = "h.0.mlp.c_fc"
ULP = 0.125
"""Of E4M3 at 1."""


def floating(name, exponent_bits, mantissa_bits, bias, reserved):
    """Return a floating-point format as a table of its values."""
    e, m = np.divmod(np.arange(2 ** (exponent_bits + mantissa_bits) - reserved), 2**mantissa_bits)
    values = np.where(e > 0, 1 + m / 2**mantissa_bits, m / 2**mantissa_bits) * 2.0 ** (
        np.maximum(e, 1) - bias
    )
    return Format(name=name, bits=8, values=np.concatenate((-values[:0:-1], values)))


E4M3 = floating("E4M3", 4, 3, 7, 1)
E7M0 = floating("E7M0", 7, 0, 63, 0)
CODEBOOK = Format(name="CODEBOOK", bits=4, values=[-3.0, -1.25, -0.5, 0.0, 0.25, 0.75, 1.5, 3.0])


def step(moves, scale=1.0, format=E4M3, **more):
    """Return a step: layer to (before, after, intended; None: as it went), in scaled units."""
    tensors = {
        f"{layer}.weight": [torch.as_tensor(one) / scale for one in (before, after, asked)]
        for layer, (before, after, asked) in {
            layer: (
                before,
                after,
                torch.as_tensor(after) - torch.as_tensor(before) if asked is None else asked,
            )
            for layer, (before, after, asked) in moves.items()
        }.items()
    }
    return Step(
        index=1,
        loss=torch.tensor(1.0),
        weights={
            name: Weight(
                value=after, layer=name.removesuffix(".weight"), format=format, scale=torch.tensor(scale)
            )
            for name, (_, after, _) in tensors.items()
        },
        gradients={name: torch.ones_like(after) for name, (_, after, _) in tensors.items()},
        before={name: before for name, (before, _, _) in tensors.items()},
        intended={name: asked for name, (_, _, asked) in tensors.items()},
        **more,
    )


def seen(given, layer="total", **options):
    metrics = Ulp(UlpOptions(**options)).observe(given)
    names = (name.split("/", 2) for name in metrics)
    return {quantity: float(metrics[f"ulp/{quantity}/{one}"]) for _, quantity, one in names if one == layer}


def of_one(before, after, intended=None, scale=1.0, **more):
    return seen(step({LAYER: (before, after, intended)}, scale, **more))


@pytest.mark.parametrize("scale", [1.0, 256.0])
def test_a_step_by_hand(scale):
    found = of_one([1.0, 0.9375, 0.0, 2.0**-9], [1.125, 0.9375, 2.0**-9, -(2.0**-9)], scale=scale)
    moved = [1, 0, 1, 2]
    assert found.pop("variation") == pytest.approx(math.sqrt(6 / 4 / 1.0 - 1))
    assert found.pop("rms") == pytest.approx(math.sqrt((0.125**2 + 2.0**-18 + 2.0**-16) / 4) / scale)
    assert found == {
        "mean": sum(moved) / 4,
        "median": 1.0,
        "max": 2.0,
        "zero_fraction": 0.25,
        "rounding_noise": 0.0,  # whole spacings need no rounding
        "sign_changes": 250.0,
        "median_rung": 1.0,  # of 57, 55, 1 and 1, the lower of the two in the middle
    }


def test_at_a_power_of_two_the_spacing_is_that_above_it():
    assert of_one([1.0], [0.9375])["mean"] == 0.5
    assert of_one([0.9375], [1.0])["mean"] == 1.0
    assert of_one([-1.0], [-0.9375])["mean"] == 0.5


def test_ulps_are_counted_from_where_the_weight_was():
    assert of_one([1.0], [2.0])["mean"] == 8.0
    assert of_one([2.0], [1.0])["mean"] == 4.0


def test_to_or_from_zero_is_no_change_of_sign():
    assert of_one([1.0, 0.0, -0.0, 0.0], [0.0, 1.0, -1.0, -0.0])["sign_changes"] == 0
    assert of_one([1.0, -1.0], [-1.0, 1.0])["sign_changes"] == 1000


def test_the_signs_of_the_tiniest_weights_are_seen():
    assert of_one([1e-30], [-1e-30])["sign_changes"] == 1000


@pytest.mark.parametrize(
    ("ulps", "noise"), [(0.25, 3.0), (0.5, 1.0), (0.75, 1 / 3), (1.0, 0.0), (1.5, 1 / 9), (2.0, 0.0)]
)
def test_the_noise_of_rounding_by_hand(ulps, noise):
    assert of_one([1.0], [1.0], [ulps * ULP])["rounding_noise"] == pytest.approx(noise)
    assert of_one([1.0], [1.0], [-ulps * ULP], scale=256.0)["rounding_noise"] == pytest.approx(noise)


def test_the_noise_of_larger_spacings_weighs_more():
    found = of_one([1.0, 4.0], [1.0, 4.0], [0.5 * ULP, 0.25 * 4 * ULP])
    expected = (1 / 4 + 16 * 3 / 16) / (1 / 4 + 16 / 16)
    assert found["rounding_noise"] == pytest.approx(expected)


def test_the_noise_is_the_variance_that_stochastic_rounding_adds():
    before, asked, count = 1.25, 0.3 * ULP, 200_000
    draws = torch.Generator().manual_seed(0)
    rounded = E4M3.quantize(torch.full((count,), before + asked), "stochastic", draws).double() - before
    squared_errors = (rounded - asked).square() / asked**2
    found = of_one([before], [before], [asked])["rounding_noise"]
    error = float(squared_errors.std()) / math.sqrt(count)
    assert abs(float(squared_errors.mean()) - found) < 4 * error < 0.1


def test_the_size_is_that_of_the_actual_update_and_the_noise_that_of_the_intended_one():
    found = of_one([1.0], [1.125], [0.25 * ULP])
    assert (found["mean"], found["rms"], found["rounding_noise"]) == (1.0, 0.125, pytest.approx(3.0))


def test_under_whole_rung_updates_the_intended_update_is_in_rungs():
    counts = {f"{LAYER}.weight": (torch.tensor(1), torch.tensor(1))}
    given = step({LAYER: ([1.0], [1.125], [0.25])}, intended_in_rungs=True, counts=counts)
    assert seen(given)["rounding_noise"] == pytest.approx(3.0)


def test_without_any_movement_the_ratios_are_undefined():
    found = of_one([1.0, 2.0], [1.0, 2.0])
    assert Ulp.undefined_is_nan
    assert {name for name, value in found.items() if math.isnan(value)} == {"variation", "rounding_noise"}
    assert (found["mean"], found["zero_fraction"]) == (0.0, 1.0)


def test_equal_moves_do_not_vary():
    assert of_one([1.0, 2.0, 0.5], [1.125, 2.25, 0.5625])["variation"] == 0.0


def test_nan_is_never_a_number():
    found = of_one([1.0, 1.0, 1.0], [1.125, torch.nan, 1.125])
    assert all(math.isnan(found[name]) for name in ("mean", "median", "max", "variation", "median_rung"))


def test_the_total_is_that_of_all_weights_and_not_of_the_layers():
    moves = {"a": ([1.0], [1.375], None), "b": ([1.0] * 3, [1.0, 1.0, 1.125], None)}
    total = seen(step(moves))
    assert (total["mean"], total["median"], total["max"], total["zero_fraction"]) == (1.0, 0.0, 3.0, 0.5)
    assert total["rms"] == pytest.approx(ULP * math.sqrt(10 / 4))
    assert total["variation"] == pytest.approx(math.sqrt(10 / 4 - 1))
    assert seen(step(moves), "b")["mean"] == pytest.approx(1 / 3)


def test_layers_and_types_of_layers_are_chosen_as_everywhere():
    moves = {"h.0.attn.c_attn": ([1.0], [1.125], None), "h.1.attn.c_attn": ([1.0], [1.375], None)}
    assert seen(step(moves), "attention", per="type")["mean"] == 2.0
    assert seen(step(moves), layers=r"h\.0\..*")["mean"] == 1.0
    assert Ulp(UlpOptions(layers="lm_head")).observe(step(moves)) == {}


def test_a_weight_without_an_intended_update_is_left_out():
    given = step({LAYER: ([1.0], [1.125], None)})
    assert Ulp(UlpOptions()).observe(attrs.evolve(given, intended={})) == {}


def test_every_quantity_is_announced():
    monitor = Ulp(UlpOptions())
    found = monitor.observe(step({LAYER: ([1.0], [1.125], None)}))
    assert {name.split("/")[1] for name in found} == monitor.provides.keys() == QUANTITIES.keys()
    assert monitor.every == 100


def by_numpy(format, before, after, asked):
    """Return all quantities, in float64, with spacings looked up in the sorted table."""
    values = format.values.double().numpy()

    def gap(x):
        side = values[values >= 0] if x >= 0 else -values[values <= 0][::-1]
        place = min(np.searchsorted(side, abs(x), side="right") - 1, len(side) - 2)
        return side[place + 1] - side[place]

    u, change = np.array([gap(x) for x in before]), after - before
    moved, part = abs(change) / u, np.modf(abs(asked) / u)[0]
    rungs = np.abs([np.argmin(abs(values - x)) - np.searchsorted(values, 0.0) for x in after])
    lower = (len(before) - 1) // 2
    return {
        "mean": moved.mean(),
        "median": np.sort(moved)[lower],
        "max": moved.max(),
        "zero_fraction": (moved == 0).mean(),
        "variation": moved.std() / moved.mean(),
        "rms": np.sqrt(np.mean(change**2)),
        "rounding_noise": (u**2 * part * (1 - part)).sum() / (asked**2).sum(),
        "sign_changes": 1000 * (np.sign(before) * np.sign(after) < 0).mean(),
        "median_rung": np.sort(rungs)[lower],
    }


@pytest.mark.parametrize("format", [E4M3, E7M0, CODEBOOK], ids=lambda format: format.name)
@pytest.mark.parametrize("count", [301, 302])
def test_random_steps_are_as_numpy_has_them(format, count):
    draws = torch.Generator().manual_seed(count)
    before = format.quantize(torch.randn(count, generator=draws))
    asked = 0.7 * torch.randn(count, generator=draws) * format.spacing(before)
    after = format.quantize(before + asked, "stochastic", draws)
    found = seen(
        step(
            {"a": (before[:100], after[:100], asked[:100]), "b": (before[100:], after[100:], asked[100:])},
            format=format,
        )
    )
    expected = by_numpy(format, *(one.double().numpy() for one in (before, after, asked)))
    assert found == {name: pytest.approx(value, rel=1e-5, abs=1e-12) for name, value in expected.items()}


@pytest.mark.parametrize("count", [1, 2, 7, 100])
@pytest.mark.parametrize("nan", [False, True])
def test_the_median_by_sorting_is_the_median_by_selection(count, nan):
    row = torch.randn(count, generator=torch.Generator().manual_seed(0))
    row[count // 2] = torch.nan if nan else 0.0
    torch.testing.assert_close(sorted_median(row), row.median(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(median([row[:1], row[1:]]), row.median(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("count", "every"), [(1, 1), (2**20, 1), (2**20 + 1, 11), (10**7, 11), (30 * 2**20, 31), (31 * 2**20, 31)]
)
def test_medians_of_many_weights_are_of_every_prime_th(count, every):
    assert stride(count) == every


def test_the_median_of_many_weights_is_that_of_all_to_a_part_of_a_percent_of_rank():
    columns, rows = 1024, 1100
    moved = torch.arange(columns).float().expand(rows, columns) / 1024  # every row alike
    found = seen(step({LAYER: (torch.ones(rows, columns), 1 + moved * ULP, None)}))
    assert found["median"] == pytest.approx(0.5, abs=0.005)
    assert found["max"] == 1023 / 1024


def test_a_scale_for_each_channel_counts_in_its_spacings():
    given = step({LAYER: ([[1.0, 1.0], [1.0, 1.0]], [[1.125, 1.0], [1.125, 1.0]], None)})
    weight = given.weights[f"{LAYER}.weight"]
    scales = torch.tensor([[1.0], [2.0**-7]]).expand(2, 2)  # 2^-7 is subnormal: the spacing is 2^-9 there
    found = seen(attrs.evolve(given, weights={f"{LAYER}.weight": attrs.evolve(weight, scale=scales)}))
    assert found["mean"] == (1 + 2.0**-10 / 2.0**-9) / 4


def test_it_reads_and_writes_nothing():
    given = step({LAYER: ([1.0, -1.0], [1.125, 1.0], [0.01, 0.3])})
    tensors = [
        *given.before.values(),
        *given.intended.values(),
        *(one.value for one in given.weights.values()),
    ]
    kept = [tensor.clone() for tensor in tensors]
    Ulp(UlpOptions()).observe(given)
    assert all(map(torch.equal, tensors, kept))
