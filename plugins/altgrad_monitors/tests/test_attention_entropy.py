"""Attention entropy: by hand, against a softmax written out in float64, and in a small model."""

import math

import pytest
import torch

from altgrad_core.extra_pass import extra_passes, micro_batches
from altgrad_monitors import AttentionEntropyOptions
from altgrad_monitors.attention_entropy import AttentionEntropy, mean_entropy

ATTENTION = "transformer.h.{}.attn.c_attn"


def uniform(length):
    """Return the mean entropy of queries that look at all they see alike."""
    return sum(math.log(i + 1) for i in range(length)) / length


def explicit(qkv, heads):
    """Return the mean entropy in float64, one query at a time."""
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k = (
        part.double().reshape(batch, length, heads, width // heads) for part in qkv.split(width, dim=2)[:2]
    )
    entropies = []
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                logits = k[b, : i + 1, h] @ q[b, i, h] / math.sqrt(width // heads)
                p = torch.exp(logits - logits.max())
                p = p / p.sum()
                entropies.append(-sum(float(one) * math.log(one) for one in p if one > 0))
    return sum(entropies) / len(entropies)


@pytest.mark.parametrize("length", [1, 2, 16])
def test_uniform_attention_has_the_mean_of_the_logarithms_of_what_each_query_sees(length):
    qkv = torch.zeros(2, length, 3 * 4)
    assert float(mean_entropy(qkv, 2)) == pytest.approx(uniform(length), rel=1e-6)


def test_attention_to_one_position_has_none():
    qkv = torch.zeros(1, 6, 3 * 2)
    qkv[:, :, 0] = 1.0
    qkv[:, :, 2] = -1e4 * torch.arange(6.0)  # all look at the first
    assert float(mean_entropy(qkv, 1)) == 0.0


def test_two_positions_at_odds_of_three_to_one():
    qkv = torch.zeros(1, 2, 3)  # one head, one wide: logits are q*k
    qkv[0, 1, 0], qkv[0, 0, 1] = 1.0, math.log(3)
    entropy = 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
    assert float(mean_entropy(qkv, 1)) == pytest.approx(entropy / 2, rel=1e-6)  # the first query has none


def test_values_do_not_count():
    qkv = torch.zeros(1, 5, 3 * 4)
    qkv[..., 8:] = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    assert float(mean_entropy(qkv, 2)) == pytest.approx(uniform(5), rel=1e-6)


@pytest.mark.parametrize("size", [0.1, 3.0, 30.0])
def test_it_agrees_with_a_softmax_written_out(size):
    qkv = size * torch.randn(3, 7, 3 * 12, generator=torch.Generator().manual_seed(0))
    assert float(mean_entropy(qkv, 3)) == pytest.approx(explicit(qkv, 3), rel=1e-4)


def test_queries_that_are_not_there_do_not_count():
    qkv = torch.randn(2, 7, 3 * 12, generator=torch.Generator().manual_seed(0))
    there = torch.arange(7) < torch.tensor([[4], [0]])
    assert float(mean_entropy(qkv, 3, there)) == pytest.approx(explicit(qkv[:1, :4], 3), rel=1e-4)


def test_small_initial_weights_attend_nearly_uniformly(run_of, observed):
    seen = observed(AttentionEntropy(AttentionEntropyOptions()), run_of("E4M3"))
    assert len(seen) == 6
    assert all(
        0.99 * uniform(8) < seen[f"attention_entropy/entropy/{ATTENTION.format(i)}"] < uniform(8)
        for i in (0, 1)
    )


def test_the_total_is_the_mean_of_the_layers(run_of, observed):
    run = run_of()
    with torch.no_grad():
        run.model.transformer.h[1].attn.c_attn.weight[:32] *= 100
    seen = observed(AttentionEntropy(AttentionEntropyOptions()), run)
    first, second = (seen[f"attention_entropy/entropy/{ATTENTION.format(i)}"] for i in (0, 1))
    assert second < 0.9 * first
    assert seen["attention_entropy/entropy/total"] == pytest.approx((first + second) / 2)


def test_what_attends_is_the_coming_steps_first_micro_batch(run_of, observed):
    run = run_of()
    seen = observed(AttentionEntropy(AttentionEntropyOptions()), run, index=4)
    model = run.model.transformer
    with extra_passes(run), torch.no_grad():
        x = model.wte(next(micro_batches(run, 4))[0]) + model.wpe.weight
        qkv = model.h[0].attn.c_attn(model.h[0].ln_1(x))
    name = f"attention_entropy/entropy/{ATTENTION.format(0)}"
    assert seen[name] == pytest.approx(explicit(qkv, 2), rel=1e-6)


@pytest.mark.parametrize(("limit", "alert"), [(1.2, 0.0), (1.4, 1.0)])
def test_an_alert_is_an_entropy_below_the_limit(run_of, observed, limit, alert):
    seen = observed(AttentionEntropy(AttentionEntropyOptions(alert=limit)), run_of())
    assert {value for name, value in seen.items() if "/alert/" in name} == {alert}


def test_a_layer_that_has_collapsed_raises_its_own_alert_and_the_total(run_of, observed):
    run = run_of()
    with torch.no_grad():
        run.model.transformer.h[1].attn.c_attn.weight[:32] *= 1e4
    seen = observed(AttentionEntropy(AttentionEntropyOptions()), run)
    alerts = {name for name, value in seen.items() if "/alert/" in name and value == 1}
    assert alerts == {f"attention_entropy/alert/{ATTENTION.format(1)}", "attention_entropy/alert/total"}


def test_attention_that_is_nan_is_no_health(run_of, observed):
    run = run_of()
    with torch.no_grad():
        run.model.transformer.h[1].attn.c_attn.weight[0, 0] = math.nan
    seen = observed(AttentionEntropy(AttentionEntropyOptions()), run)
    assert math.isnan(seen["attention_entropy/entropy/total"])
    assert seen["attention_entropy/alert/total"] == 1


def test_layers_and_types_can_be_chosen(run_of, observed):
    one = observed(AttentionEntropy(AttentionEntropyOptions(layers=r".*\.1\..*", per="type")), run_of())
    assert {name.rpartition("/")[2] for name in one} == {"attention", "total"}
    assert observed(AttentionEntropy(AttentionEntropyOptions(layers=r".*mlp.*")), run_of()) == {}


def test_no_hook_stays(run_of, observed):
    run = run_of()
    observed(AttentionEntropy(AttentionEntropyOptions()), run)
    assert not any(module._forward_hooks for module in run.model.modules())
