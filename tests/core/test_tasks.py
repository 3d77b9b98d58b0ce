"""What evaluations make of batches, and what data a task refuses."""

import math
import types

import numpy as np
import pytest
import torch

from altgrad_core.experiment import DataOptions, Experiment
from altgrad_core.model_options import ModelOptions
from altgrad_core.options import DatasetChoice
from altgrad_core.preparing import Documents
from altgrad_core.registry import UsageError
from altgrad_core.tasks import Classification, LabelScores, LanguageModelling, TokenScores, task_for
from altgrad_core.text_classifier import PADDING

NOTHING = torch.zeros(0)
TOKENS = np.zeros(12, dtype=np.uint8)


def scored(scores, *batches):
    for targets, logits, loss in batches:
        scores.add(targets, logits, torch.tensor(loss))
    return scores.metrics()


def data_set(labels, split="train"):
    """Return an experiment on documents of 3 labels, and data of so many of them."""
    source = DatasetChoice("acts", types.SimpleNamespace(label_count=3))
    experiment = Experiment(name="e", task="classification", data=DataOptions(source=source))
    documents = labels and Documents(ends=np.array([5, 12]), labels=np.zeros((2, labels), dtype=np.uint8))
    parts = {"train": TOKENS, "validation": TOKENS}
    return experiment, types.SimpleNamespace(
        **parts, train_documents=documents, validation_documents=documents
    )


def test_a_loss_is_weighted_by_the_number_of_targets():
    batches = [(torch.zeros(3, 4), NOTHING, 1.0), (torch.zeros(1, 4), NOTHING, 5.0)]
    assert scored(TokenScores(None), *batches) == {
        "validation/loss": 2.0,
        "validation/perplexity": math.exp(2.0),
    }


def test_bits_per_byte_are_told_of_text_and_perplexity_ends_at_infinity():
    found = scored(TokenScores(2.0), (torch.zeros(1), NOTHING, 1024.0))
    assert found["validation/perplexity"] == math.inf
    assert found["validation/bits_per_byte"] == pytest.approx(512 / math.log(2))


def test_positions_of_a_document_are_there_up_to_its_end_and_its_windows_where_they_have_a_token():
    task = Classification(*data_set(3))
    inputs = torch.tensor(
        [[[1, 2], [3, PADDING]], [[4, 5], [PADDING, PADDING]]]
    )  # 2 documents, 2 windows of 2
    there = [[True, True], [True, False], [True, True], [False, False]]
    assert task.there(inputs, torch.Size([4, 2])).tolist() == there
    assert task.there(inputs, torch.Size([2, 2])).tolist() == [[True, True], [True, False]]


def test_labels_are_scored_over_all_batches_together():
    one = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 2.0]]), 0.25
    other = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[2.0, -2.0], [-2.0, -2.0]]), 1.0
    assert scored(LabelScores(), one, other) == {
        "validation/loss": 0.75,
        "validation/micro_f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 2)),
        "validation/macro_f1": pytest.approx((2 * 2 / (2 * 2 + 1)) / 2),
    }


def test_logits_that_are_nan_have_no_f1():
    nan = torch.full((1, 2), math.nan)
    assert all(map(math.isnan, scored(LabelScores(), (torch.zeros(1, 2), nan, math.nan)).values()))


def test_an_epoch_counts_what_the_task_reads():
    experiment, tokens = data_set(3)
    task = task_for(experiment, tokens)
    assert isinstance(task, Classification)
    assert (task.read, task.epoch, task.per_step) == ("documents", 2, 32)
    plain = Experiment(name="e", model=ModelOptions(block_size=8))
    task = task_for(plain, tokens)
    assert isinstance(task, LanguageModelling)
    assert (task.read, task.epoch, task.per_step) == ("tokens", 12, 32 * 8)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(None, "no document of the data set 'acts' has a label"), (4, "has 4 labels, its options say 3")],
)
def test_documents_that_do_not_serve_are_refused(labels, message):
    with pytest.raises(UsageError, match=message):
        task_for(*data_set(labels))


def test_a_split_shorter_than_a_window_is_refused():
    with pytest.raises(UsageError, match="the train split of 'licenses' has 12 tokens, a window needs 17"):
        task_for(Experiment(name="e", model=ModelOptions(block_size=16)), data_set(3)[1])
