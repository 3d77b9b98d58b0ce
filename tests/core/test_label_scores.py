"""F1 of labels, by hand, and as scikit-learn counts it."""

import pytest
import torch

from altgrad_core.label_scores import LabelCounts, macro_f1, micro_f1


def scores(predicted, true):
    """Return micro and macro F1 of rows of 0 and 1."""
    counts = LabelCounts()
    counts.add(torch.tensor(predicted) * 2.0 - 1, torch.tensor(true, dtype=torch.float32))
    return micro_f1(counts.total()).item(), macro_f1(counts.total()).item()


def test_counts_are_true_positives_false_positives_and_false_negatives_of_each_label():
    counts = LabelCounts()
    counts.add(torch.tensor([[3.0, -1.0, 0.5], [1.0, -2.0, -0.1]]), torch.tensor([[1.0, 0, 0], [0, 1, 1]]))
    assert counts.total().tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 1]]


def test_micro_pools_the_counts_and_macro_averages_the_labels():
    # Label 0: TP 2, FP 1, FN 0: 4/5. Label 1: TP 0, FP 0, FN 1: 0. Label 2: TP 1, FN 1: 2/3.
    predicted = [[1, 0, 1], [1, 0, 0], [1, 0, 0]]
    true = [[1, 1, 1], [1, 0, 0], [0, 0, 1]]
    micro, macro = scores(predicted, true)
    assert micro == pytest.approx(2 * 3 / (2 * 3 + 1 + 2))
    assert macro == pytest.approx((4 / 5 + 0 + 2 / 3) / 3)


def test_a_label_that_is_nowhere_counts_as_zero_in_the_macro_average():
    assert scores([[1, 0]], [[1, 0]]) == (1.0, 0.5)


def test_where_no_document_has_a_label_and_none_is_predicted_both_are_zero():
    assert scores([[0, 0]], [[0, 0]]) == (0.0, 0.0)


def test_a_probability_of_exactly_one_half_predicts_nothing():
    counts = LabelCounts()
    counts.add(torch.tensor([[0.0, -0.0]]), torch.ones(1, 2))
    assert counts.total().tolist() == [[0, 0], [0, 0], [1, 1]]


def test_batches_add_up():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 4, generator=generator)
    targets = torch.randint(2, (7, 4), generator=generator).float()
    whole, parts = LabelCounts(), LabelCounts()
    whole.add(logits, targets)
    for rows in (slice(0, 3), slice(3, 7)):
        parts.add(logits[rows], targets[rows])
    assert torch.equal(whole.total(), parts.total())


@pytest.mark.parametrize("seed", range(5))
def test_scikit_learn_finds_the_same(seed):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    generator = torch.Generator().manual_seed(seed)
    predicted = (torch.rand(30, 6, generator=generator) < 0.2).int()
    true = (torch.rand(30, 6, generator=generator) < 0.2).int()
    true[:, 0] = predicted[:, 0] = 0
    expected = [
        metrics.f1_score(true.numpy(), predicted.numpy(), average=how, zero_division=0)
        for how in ("micro", "macro")
    ]
    assert scores(predicted.tolist(), true.tolist()) == pytest.approx(expected)
