"""The empirical Fisher and its rank correlation: by hand, against scipy, NNGeometry, and in a small model."""

import math

import pytest
import torch

from altgrad_core.extra_pass import extra_passes, micro_batches
from altgrad_core.options import GeometryOptions, StiffnessChoice
from altgrad_monitors import FisherOptions
from altgrad_monitors.fisher import Fisher, diagonal, rank_correlation, ranks

LAYER = "transformer.h.0.mlp.c_fc"


def row(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([30.0, 10.0, 20.0], [3, 1, 2]),
        ([5.0, 5.0, 1.0], [2.5, 2.5, 1]),
        ([2.0, 2.0, 2.0, 2.0], [2.5] * 4),
        ([1.0, 3.0, 3.0, 3.0, 2.0, 2.0], [1, 5, 5, 5, 2.5, 2.5]),
        ([0.0, -0.0, -1.0], [2.5, 2.5, 1]),
        ([math.inf, -math.inf, 0.0], [3, 1, 2]),
        ([7.0], [1]),
    ],
)
def test_equal_values_share_their_average_rank(values, expected):
    assert ranks(row(*values)).tolist() == expected


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1.0, 2.0, 3.0], [10.0, 100.0, 1000.0], 1.0),
        ([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0], -1.0),
        ([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0], 0.6),  # 1 - 6*4/(4*15)
        ([1.0, 1.0, 2.0], [1.0, 2.0, 2.0], 0.5),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], math.nan),
        ([1.0, math.nan, 3.0], [1.0, 2.0, 3.0], math.nan),
        ([1.0, 2.0, 3.0], [1.0, 2.0, math.nan], math.nan),
    ],
)
def test_rank_correlation_by_hand(x, y, expected):
    assert float(rank_correlation(row(*x), row(*y))) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("kinds", [2, 5, 40, 10**6])
def test_rank_correlation_agrees_with_scipy_ties_included(kinds):
    stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle")
    generator = torch.Generator().manual_seed(kinds)
    x, y = (torch.randint(kinds, (500,), generator=generator).double() for _ in range(2))
    y = y + x / 2
    assert ranks(x).tolist() == stats.rankdata(x).tolist()
    assert float(rank_correlation(x, y)) == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)


def squares(run, name, step, batches):
    """Return the mean square of the gradients of several micro-batches, by `.backward` on a plain model."""
    found = []
    for tokens, targets in micro_batches(run, step, batches):
        run.model.zero_grad()
        run.model(tokens, targets)[1].backward()
        found.append(run.model.get_parameter(name).grad.double().square())
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("batches", [1, 3])
def test_the_diagonal_is_the_mean_square_of_the_micro_batches_gradients(run_of, batches):
    run, name = run_of(), f"{LAYER}.weight"
    (found,) = diagonal(run, [run.model.get_parameter(name)], 5, batches)
    torch.testing.assert_close(found, squares(run, name, 5, batches), rtol=1e-12, atol=0)


def test_small_gradients_do_not_underflow(run_of):
    run = run_of()
    with torch.no_grad():
        run.model.lm_head.weight.mul_(1e-24)
    (found,) = diagonal(run, [run.model.get_parameter(f"{LAYER}.weight")], 0, 1)
    assert 0 < float(found.max()) < 1e-46  # below float32


def test_it_correlates_the_diagonal_with_the_inverse_square_of_the_spacing(run_of, observed, formats):
    stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle")
    run, name = run_of("E4M3"), f"{LAYER}.weight"
    weight = run.weights()[name]
    (fisher,) = diagonal(run, [run.model.get_parameter(name)], 5, 4)
    spacing = formats["E4M3"].spacing(weight.value * weight.scale).double() / weight.scale
    seen = observed(Fisher(FisherOptions(batches=4)), run, index=5)
    expected = stats.spearmanr(fisher.flatten(), (1 / spacing**2).flatten()).statistic
    assert seen[f"fisher/correlation/{LAYER}"] == pytest.approx(expected, rel=1e-12)
    assert seen[f"fisher/trace/{LAYER}"] == pytest.approx(float(fisher.sum()), rel=1e-12)


def test_a_loss_most_sensitive_where_the_format_is_finest_has_a_correlation_of_one(formats):
    weight = torch.randn(400, generator=torch.Generator().manual_seed(0))
    spacing = formats["E4M3"].spacing(weight)
    assert float(rank_correlation(spacing.double() ** -2, -spacing)) == 1.0
    assert float(rank_correlation(spacing.double() ** 2, -spacing)) == -1.0


def test_the_total_ranks_all_layers_together_and_adds_their_traces_up(run_of, observed, formats):
    stats = pytest.importorskip("scipy.stats", reason="scipy is the oracle")
    run = run_of("E4M3")
    weights = {name: weight for name, weight in run.weights().items() if weight.format is not None}
    fisher = diagonal(run, [run.model.get_parameter(name) for name in weights], 1, 2)
    spacings = [
        formats["E4M3"].spacing(weight.value * weight.scale).double() / weight.scale
        for weight in weights.values()
    ]
    metric = torch.cat([spacing.flatten() ** -2 for spacing in spacings])
    seen = observed(Fisher(FisherOptions(batches=2)), run)
    together = torch.cat([one.flatten() for one in fisher])
    assert seen["fisher/correlation/total"] == pytest.approx(
        stats.spearmanr(together, metric).statistic, rel=1e-12
    )
    assert seen["fisher/trace/total"] == pytest.approx(float(together.sum()), rel=1e-12)


def test_where_the_spacing_is_the_same_everywhere_there_is_no_correlation(run_of, observed):
    for run, formula in ((run_of("UNIFORM"), "grid"), (run_of("E4M3"), "uniform")):
        seen = observed(Fisher(FisherOptions(layers=LAYER, formula=StiffnessChoice(formula))), run)
        assert math.isnan(seen["fisher/correlation/total"])
        assert seen["fisher/trace/total"] > 0
    assert Fisher.undefined_is_nan


def test_a_formula_that_stays_is_refused():
    with pytest.raises(ValueError, match="leave out refresh"):
        FisherOptions(formula=StiffnessChoice("grid", None, GeometryOptions(refresh="never")))


def test_unquantized_layers_have_no_metric_of_a_format(run_of, observed):
    assert observed(Fisher(FisherOptions()), run_of()) == {}
    assert observed(Fisher(FisherOptions(layers=".*wpe")), run_of("E4M3")) == {}


@pytest.mark.parametrize("granularity", ["tensor", "channel", "block"])
def test_every_granularity_has_a_spacing_at_each_weight(run_of, observed, granularity):
    seen = observed(Fisher(FisherOptions(layers=LAYER)), run_of("E4M3", granularity=granularity))
    assert -1 <= seen[f"fisher/correlation/{LAYER}"] <= 1


def test_the_diagonal_is_that_of_nngeometry(run_of):
    """NNGeometry squares each sample's gradient; where a micro-batch is one token, so does the monitor."""
    backends = pytest.importorskip("nngeometry.backend", reason="NNGeometry is the oracle")
    objects = pytest.importorskip("nngeometry.object")
    run = run_of(model={"block_size": 1}, train={"batch_size": 1})
    head = torch.nn.Linear(16, 24, bias=False)
    head.weight.data.copy_(run.model.lm_head.weight.data)
    tokens, targets = (torch.cat(both).flatten() for both in zip(*micro_batches(run, 0, 6), strict=True))
    with extra_passes(run), torch.no_grad():
        hidden = run.model.transformer(tokens[:, None])[:, 0]  # (6, 16)

    def log_likelihood(x, y):
        return -torch.nn.functional.cross_entropy(head(x), y, reduction="none")[:, None]

    samples = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(hidden, targets), batch_size=6)
    backend = backends.TorchHooksJacobianBackend(model=head, function=log_likelihood)
    found = objects.PMatDiag(generator=backend, examples=samples).get_diag().reshape(24, 16)
    (own,) = diagonal(run, [run.model.lm_head.weight], 0, 6)
    torch.testing.assert_close(own.float(), found, rtol=1e-5, atol=0)
