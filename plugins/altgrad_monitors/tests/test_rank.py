"""Ranks of matrices whose singular values are known, against numpy's, and the warning step by step."""

import io
import json
import types

import numpy as np
import pytest
import torch

from altgrad_core.hookspecs import Step, Weight
from altgrad_core.registry import UsageError
from altgrad_monitors import RankOptions
from altgrad_monitors.rank import Rank, spectra

PLAIN, CRITICAL = "h.0.mlp.c_fc", "h.0.mlp.c_proj"


def step(index, *matrices, layers=(PLAIN, CRITICAL)):
    weights = {
        f"{layer}.weight": Weight(value=torch.as_tensor(one), layer=layer)
        for one, layer in zip(matrices, layers, strict=False)
    }
    return Step(
        index=index, loss=torch.tensor(1.0), weights=weights, gradients={}, before={}, intended={}
    )  # fmt: skip


def observed(monitor, *arguments, **keywords):
    return {name: float(value) for name, value in monitor.observe(step(*arguments, **keywords)).items()}


def ranks(matrix):
    return {name: float(value) for name, value in spectra({"w": torch.as_tensor(matrix)})["w"].items()}


def diagonal(*values, size=10):
    """A matrix with these singular values, filled up with zeros."""
    return torch.diag(torch.tensor([*values, *[0.0] * (size - len(values))]))


def of_rank(count):
    return diagonal(*[1.0] * count)


@pytest.mark.parametrize(
    ("matrix", "stable", "effective", "of_energy", "norm"),
    [
        (torch.eye(10), 10.0, 10.0, 10, 1.0),
        (torch.diag(torch.tensor([4.0, 3.0])), 1.5625, 1.9796, 2, 4.0),
        (torch.diag(torch.tensor([2.0, 1.0, 1.0])), 1.5, 2.8284, 3, 2.0),
        (torch.tensor([[-3.0]]), 1.0, 1.0, 1, 3.0),
        (torch.ones(4, 9), 1.0, 1.0, 1, 6.0),
        (torch.zeros(3, 5), 0.0, 0.0, 0, 0.0),
    ],
)
def test_ranks_of_matrices_worked_out_by_hand(matrix, stable, effective, of_energy, norm):
    seen = ranks(matrix)
    assert seen["stable_rank"] == pytest.approx(stable, abs=1e-12)
    assert seen["effective_rank"] == pytest.approx(effective, abs=5e-5)
    assert seen["rank_99"] == of_energy
    assert seen["spectral_norm"] == pytest.approx(norm, abs=1e-12)


@pytest.mark.parametrize(
    ("values", "count"), [((10.0, 1.0), 1), ((10.0, 1.01), 2), ((1.0,) * 100, 99), ((1.0, 0.0), 1)]
)
def test_rank_99_is_the_fewest_singular_values_with_99_percent_of_the_energy(values, count):
    assert ranks(torch.diag(torch.tensor(values)))["rank_99"] == count


@pytest.mark.parametrize("shape", [(5, 7), (64, 16), (40, 40), (1, 9), (9, 1), (20_000, 3)])
@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_the_ranks_are_those_of_numpys_singular_values(shape, size):
    matrix = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * size
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    shares, energy = values / values.sum(), np.cumsum(values**2) / (values**2).sum()
    seen = ranks(matrix)
    assert seen["stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-12)
    assert seen["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-9)
    assert seen["rank_99"] == 1 + (energy < 0.99).sum()
    assert seen["spectral_norm"] == pytest.approx(values[0], rel=1e-12)


def test_small_singular_values_are_told_from_none():
    """The second is 1e-6 of the first: float32 products would lose it."""
    turned, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)).double())
    tiny = ranks(turned @ diagonal(1.0, 1e-6, size=8).double() @ turned.mT)
    p = 1e-6 / (1 + 1e-6)
    assert tiny["effective_rank"] - 1 == pytest.approx(np.exp(-p * np.log(p)) - 1, rel=0.1)


def test_a_low_rank_is_not_raised_by_rounding():
    column = torch.randn(300, 1, generator=torch.Generator().manual_seed(1)).double()
    assert ranks(column @ column.mT)["effective_rank"] == pytest.approx(1, abs=1e-12)


def test_matrices_are_told_apart_whatever_their_shapes():
    made = torch.Generator().manual_seed(1)
    shapes = [(6, 4), (4, 6), (4, 4), (9, 6), (4, 30)]
    several = {str(at): torch.randn(*shape, generator=made) for at, shape in enumerate(shapes)}
    together = spectra(several)
    for name, matrix in several.items():
        assert {key: float(one) for key, one in together[name].items()} == pytest.approx(ranks(matrix))


def test_half_precision_weights_are_worked_out_in_float64():
    matrix = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert ranks(matrix) == pytest.approx(ranks(matrix.float()), rel=1e-12)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_makes_everything_nan_its_warning_too(wrong):
    rank = Rank(RankOptions(warmup=0))
    rank.observe(step(100, of_rank(5)))
    broken = of_rank(5)
    broken[0, 3] = wrong
    seen = observed(rank, 200, broken, of_rank(5))
    for quantity in rank.provides:
        assert np.isnan(seen[f"rank/{quantity}/{PLAIN}"])
        assert np.isnan(seen[f"rank/{quantity}/total"])
        assert not np.isnan(seen[f"rank/{quantity}/{CRITICAL}"])


def test_what_was_not_finite_once_is_never_healthy_again():
    rank = Rank(RankOptions(warmup=0))
    rank.observe(step(100, torch.full((3, 3), float("nan"))))
    seen = observed(rank, 200, torch.eye(3))
    assert seen[f"rank/stable_rank/{PLAIN}"] == pytest.approx(3)
    assert np.isnan(seen[f"rank/warning/{PLAIN}"])


def test_the_moving_average_gives_a_tenth_to_the_newest_check():
    rank = Rank(RankOptions())
    assert observed(rank, 100, of_rank(10))[f"rank/stable_rank_ema/{PLAIN}"] == pytest.approx(10)
    assert observed(rank, 200, of_rank(5))[f"rank/stable_rank_ema/{PLAIN}"] == pytest.approx(9.5)
    assert observed(rank, 300, of_rank(5))[f"rank/stable_rank_ema/{PLAIN}"] == pytest.approx(9.05)


def test_a_fall_of_three_tenths_warns_and_of_fifteen_hundredths_where_it_is_critical():
    """From rank 10 to 1 the average is 1 + 9*0.9^k: 9.1, 8.29, 7.561, 6.905; the limits are 7 and 8.5."""
    rank = Rank(RankOptions(warmup=0))
    rank.observe(step(0, of_rank(10), of_rank(10)))
    seen = [observed(rank, 100 * k, of_rank(1), of_rank(1)) for k in range(1, 5)]
    assert [one[f"rank/warning/{PLAIN}"] for one in seen] == [0, 0, 0, 1]
    assert [one[f"rank/warning/{CRITICAL}"] for one in seen] == [0, 1, 1, 1]
    assert [one["rank/warning/total"] for one in seen] == [0, 1, 1, 1]


@pytest.mark.parametrize("layer", ["lm_head", "transformer.h.3.attn.c_proj", "c_proj"])
def test_heads_and_projections_are_critical(layer):
    rank = Rank(RankOptions(warmup=0))
    rank.observe(step(0, of_rank(10), layers=[layer]))
    seen = [observed(rank, k, of_rank(1), layers=[layer])[f"rank/warning/{layer}"] for k in (1, 2)]
    assert seen == [0, 1]


def test_a_tied_head_counts_as_the_head():
    """The parameter goes by the embedding's name, its layer is `lm_head`."""
    rank = Rank(RankOptions(warmup=0, per="type"))
    tied = {"transformer.wte.weight": Weight(value=of_rank(10), layer="lm_head")}
    seen = step(0, of_rank(10))
    seen = Step(index=0, loss=seen.loss, weights=tied, gradients={}, before={}, intended={})
    assert "rank/warning/classifier" in rank.observe(seen)


def test_ranks_that_rise_do_not_warn():
    rank = Rank(RankOptions(warmup=0))
    rank.observe(step(0, of_rank(1)))
    assert observed(rank, 1, of_rank(10))[f"rank/warning/{PLAIN}"] == 0


def test_a_matrix_that_begins_as_zero_does_not_warn_and_one_that_becomes_zero_does():
    rank = Rank(RankOptions(warmup=0))
    rank.observe(step(0, of_rank(0), of_rank(4)))
    seen = [observed(rank, k, of_rank(2), of_rank(0)) for k in range(1, 5)][-1]
    assert seen[f"rank/warning/{PLAIN}"] == 0
    assert seen[f"rank/warning/{CRITICAL}"] == 1


def test_there_is_no_warning_before_the_warm_up_is_over_and_then_that_value_is_the_reference():
    rank = Rank(RankOptions(warmup=20))
    assert not any("warning" in name for name in rank.observe(step(10, of_rank(10))))
    assert observed(rank, 20, of_rank(1))[f"rank/warning/{PLAIN}"] == 0
    assert rank.state_dict()["reference"][PLAIN] == pytest.approx(9.1)


def test_over_layers_ranks_are_averaged_and_norms_are_the_largest():
    seen = observed(Rank(RankOptions()), 1, 3 * of_rank(2), of_rank(6))
    assert seen["rank/stable_rank/total"] == pytest.approx(4)
    assert seen["rank/effective_rank/total"] == pytest.approx(4)
    assert seen["rank/rank_99/total"] == 4
    assert seen["rank/spectral_norm/total"] == pytest.approx(3)


def test_types_of_layers_are_summed_up_like_all_of_them():
    rank = Rank(RankOptions(per="type"))
    seen = observed(rank, 1, of_rank(2), of_rank(6), of_rank(3), layers=[PLAIN, CRITICAL, "lm_head"])
    assert seen["rank/stable_rank/mlp"] == pytest.approx(4)
    assert seen["rank/stable_rank/classifier"] == pytest.approx(3)


def test_vectors_and_layers_outside_of_the_pattern_are_left_out():
    rank = Rank(RankOptions(layers=".*c_fc"))
    assert rank.observe(step(1, torch.ones(4), torch.eye(4))) == {}
    assert f"rank/stable_rank/{PLAIN}" in rank.observe(step(1, torch.eye(4), torch.eye(4)))


def test_a_resumed_monitor_goes_on_bit_for_bit():
    made = torch.Generator().manual_seed(1)
    steps = [step(100 * at, torch.randn(8, 5, generator=made)) for at in range(1, 7)]
    whole, first, second = (Rank(RankOptions(warmup=200)) for _ in range(3))
    expected = [whole.observe(one) for one in steps]
    for one in steps[:3]:
        first.observe(one)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    second.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
    assert [second.observe(one) for one in steps[3:]] == expected[3:]


@pytest.fixture
def baseline(tmp_path):
    """Write a run's metrics: lines of (step, average), for one layer."""

    def write(*lines, layer=PLAIN, metric="rank/stable_rank_ema"):
        text = "".join(json.dumps({"step": at, f"{metric}/{layer}": value}) + "\n" for at, value in lines)
        (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "train/loss": 2.0}) + "\n" + text)
        return str(tmp_path)

    return write


def run_of(*layers):
    weights = {f"{layer}.weight": Weight(value=torch.eye(2), layer=layer) for layer in layers}
    return types.SimpleNamespace(weights=lambda: weights)


def test_a_baseline_is_asked_for_the_same_step(baseline):
    rank = Rank(RankOptions(baseline=baseline((100, 10.0), (200, 15.0), (300, 5.0))))
    rank.start(run_of(PLAIN))
    assert observed(rank, 100, of_rank(10))[f"rank/warning/{PLAIN}"] == 0
    assert observed(rank, 200, of_rank(10))[f"rank/warning/{PLAIN}"] == 1
    assert observed(rank, 299, of_rank(10))[f"rank/warning/{PLAIN}"] == 1
    assert observed(rank, 300, of_rank(10))[f"rank/warning/{PLAIN}"] == 0


def test_before_the_baselines_first_value_there_is_no_warning(baseline):
    rank = Rank(RankOptions(baseline=baseline((100, 10.0)), warmup=0))
    assert f"rank/warning/{PLAIN}" not in rank.observe(step(99, of_rank(1)))


def test_a_baseline_that_was_nan_makes_no_run_healthy(baseline):
    rank = Rank(RankOptions(baseline=baseline((100, float("nan")))))
    assert np.isnan(observed(rank, 100, of_rank(1))[f"rank/warning/{PLAIN}"])


def test_a_baseline_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"is no run: it has no metrics.jsonl; name the folder"):
        Rank(RankOptions(baseline=str(tmp_path / "nowhere")))


def test_a_baseline_without_ranks_is_refused(baseline):
    with pytest.raises(UsageError, match=r"logged no rank/stable_rank_ema; run it with .*'rank'"):
        Rank(RankOptions(baseline=baseline((100, 1.0), metric="flip/flip_count")))


def test_a_baseline_of_another_model_is_refused(baseline):
    rank = Rank(RankOptions(baseline=baseline((100, 10.0))))
    with pytest.raises(UsageError, match=r"logged no .*/other; it has h.0.mlp.c_fc"):
        rank.start(run_of(PLAIN, "other"))
