"""The table of ULPs moved: the stated values, and what follows from independence alone."""

import functools
import importlib
import json
import pathlib
import sys

import pytest
import torch

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def uniformity():
    """The module of the benchmark; forgotten afterwards."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("ulp_uniformity")
    mine = {path.stem for path in FOLDER.glob("*.py")}
    for name in mine & (set(sys.modules) - before):
        del sys.modules[name]


@pytest.fixture(scope="module")
def rows(uniformity):
    return {row.arm: row for row in uniformity.measured()}


@pytest.mark.parametrize(
    ("arms", "variation", "octaves"),
    [
        (("AdamW", "gradient"), (1.78, 0.05), (128, 6)),
        (("update", "both"), (0.73, 0.03), (1.00, 0.05)),
    ],
)
def test_ulps_moved_are_even_under_update_and_both_only(rows, arms, variation, octaves):
    for arm in arms:
        assert rows[arm].variation == pytest.approx(variation[0], abs=variation[1])
        assert rows[arm].lowest_over_highest == pytest.approx(octaves[0], abs=octaves[1])


def test_the_unevenness_of_adamw_is_the_grids_times_the_directions(uniformity, rows):
    expected = uniformity.independent_variation(rows["update"].variation)
    # 40,000 weights: the sampling error of the ratio of moments is below 1 %.
    assert rows["AdamW"].variation == pytest.approx(expected, rel=0.03)


def test_equal_directions_vary_as_a_uniform_octave_does(uniformity):
    mean, square = 255 / 8, 21845 / 8  # of 1, 2, ..., 128, and of their squares
    assert uniformity.independent_variation(0.0) == pytest.approx((square / mean**2 - 1) ** 0.5)


def test_the_weights_fill_eight_octaves_equally_with_both_signs(uniformity):
    weight = uniformity.held_weights(40_000, torch.Generator().manual_seed(1))
    exponents = torch.frexp(weight).exponent
    assert sorted(set(exponents.tolist())) == list(range(-7, 1))
    assert torch.bincount(exponents + 7).tolist() == pytest.approx([5000] * 8, abs=5 * 5000**0.5)
    assert float((weight < 0).double().mean()) == pytest.approx(0.5, abs=5 * 0.5 / 200)


def test_the_command_prints_json(uniformity, monkeypatch, capsys):
    monkeypatch.setattr(uniformity, "measured", functools.partial(uniformity.measured, 1000, 2))
    monkeypatch.setattr(sys, "argv", ["ulp_uniformity.py", "--json"])
    uniformity.main()
    result = json.loads(capsys.readouterr().out)
    assert [row["arm"] for row in result["rows"]] == ["AdamW", "gradient", "update", "both"]
    assert "date" in result["machine"]
