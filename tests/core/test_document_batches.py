"""Batches of labeled documents: which ones, and what stands past their ends."""

import numpy as np
import pytest
import torch

from altgrad_core import data
from altgrad_core.document_batches import LabeledDocuments
from altgrad_core.preparing import Documents
from altgrad_core.text_classifier import PADDING

PLACE = {"seed": 1337, "step": 10, "micro_batch": 0}
LENGTHS = [3, 1, 9, 4, 7]


@pytest.fixture
def split():
    """Return a function that makes five documents: tokens count up, labels are the number's bits."""

    def make(windows=2, block_size=2):
        ends = np.cumsum(LENGTHS)
        labels = np.array([[number >> bit & 1 for bit in range(3)] for number in range(5)], dtype=np.uint8)
        return LabeledDocuments(
            tokens=np.arange(1, ends[-1] + 1, dtype=np.uint8),
            documents=Documents(ends=ends, labels=labels),
            windows=windows,
            block_size=block_size,
        )

    return make


def test_a_document_is_its_first_windows_and_padding_past_its_end(split):
    tokens, labels = split().batch(np.array([0, 1, 2, 4]))
    assert tokens.dtype == torch.int64
    assert labels.dtype == torch.float32
    assert tokens.tolist() == [
        [[1, 2], [3, PADDING]],
        [[4, PADDING], [PADDING, PADDING]],
        [[5, 6], [7, 8]],  # of 9 tokens
        [[18, 19], [20, 21]],
    ]
    assert labels.tolist() == [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_the_last_document_ends_with_the_split(split):
    tokens, _ = split(windows=1, block_size=8).batch(np.array([4]))
    assert tokens.tolist() == [[[18, 19, 20, 21, 22, 23, 24, PADDING]]]


def test_training_draws_by_philox_of_seed_step_and_micro_batch(split):
    philox = np.random.Philox(counter=(10 << 192) + (2 << 128), key=(data.TRAINING_STREAM << 64) + 1337)
    expected = split().batch((philox.random_raw(6) % 5).astype(np.int64))
    found = split().training_batch(6, seed=1337, step=10, micro_batch=2)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_every_document_can_be_drawn(split):
    tokens, _ = split().training_batch(200, **PLACE)
    assert set(tokens[:, 0, 0].tolist()) == {1, 4, 5, 14, 18}


def test_zero_batches_evaluate_every_document_once(split):
    batches = list(split().evaluation_batches(2, 0))
    assert [tokens[:, 0, 0].tolist() for tokens, _ in batches] == [[1, 4], [5, 14], [18]]


def test_a_few_batches_are_spread_evenly(split):
    (batch,) = split().evaluation_batches(2, 1)
    assert batch[0][:, 0, 0].tolist() == [1, 5]


def test_the_number_of_documents_is_the_length(split):
    assert len(split()) == 5
