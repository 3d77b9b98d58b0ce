import math
from itertools import product

import numpy as np
import pytest

from altgrad_core.hookspecs import TokenSource
from altgrad_data import MarkovOptions
from altgrad_data.markov import Markov, entropy_rate, stationary, walk


@pytest.fixture(scope="module")
def source():
    return Markov(MarkovOptions())


@pytest.fixture(scope="module")
def tokens(source):
    return source.tokens("train")


def counts(tokens, order, vocab_size):
    """Count (context, next token) pairs, shape (V^k, V), the context's latest token last."""
    context = np.zeros(len(tokens) - order, dtype=np.int64)
    for back in range(order):
        context = context * vocab_size + tokens[back : len(tokens) - order + back]
    pairs = np.bincount(context * vocab_size + tokens[order:], minlength=vocab_size ** (order + 1))
    return pairs.reshape(-1, vocab_size)


def test_a_coin_that_sticks_has_the_entropy_of_its_flips():
    # P(change) = 1/4 from 0, 1/2 from 1: stationary (2/3, 1/3).
    probabilities = np.array([[0.75, 0.25], [0.5, 0.5]])
    weights = stationary(probabilities)
    assert weights == pytest.approx([2 / 3, 1 / 3], abs=1e-14)
    by_hand = 2 / 3 * (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) + 1 / 3 * math.log(2)
    assert entropy_rate(probabilities, weights) == pytest.approx(by_hand, abs=1e-14)


def test_equal_probabilities_have_the_entropy_of_the_vocabulary():
    probabilities = np.full((25, 5), 0.2)
    assert entropy_rate(probabilities, stationary(probabilities)) == pytest.approx(math.log(5), abs=1e-13)


@pytest.mark.parametrize(("order", "vocab_size"), [(1, 7), (2, 5), (3, 3)])
def test_the_entropy_equals_a_dense_eigenvector_computation(order, vocab_size):
    source = Markov(MarkovOptions(order=order, vocab_size=vocab_size, seed=5))
    contexts = list(product(range(vocab_size), repeat=order))
    chain = np.zeros((len(contexts), len(contexts)))
    for row, context in enumerate(contexts):
        for token in range(vocab_size):
            chain[row, contexts.index((*context[1:], token))] += source.probabilities[row, token]
    system = np.vstack([chain.T - np.eye(len(contexts)), np.ones(len(contexts))])
    weights = np.linalg.lstsq(system, np.array([0.0] * len(contexts) + [1.0]))[0]
    expected = sum(
        -weight * p * math.log(p)
        for weight, row in zip(weights, source.probabilities, strict=True)
        for p in row
    )
    assert source.loss_floor == pytest.approx(expected, abs=1e-12)


def test_a_model_that_knows_the_probabilities_ends_at_the_floor(source, tokens):
    surprise = -np.log(source.probabilities)
    seen = counts(tokens, 2, 16)
    loss = (seen * surprise).sum() / seen.sum()
    spread = math.sqrt((seen * (surprise - loss) ** 2).sum() / seen.sum())
    # Successive surprises are correlated through the contexts: three times the independent error, 3 sigma.
    assert abs(loss - source.loss_floor) < 9 * spread / math.sqrt(len(tokens))


def test_the_empirical_conditional_entropy_is_the_floor(source, tokens):
    seen = counts(tokens, 2, 16)
    rates = seen / seen.sum(axis=1, keepdims=True)
    entropy = -(seen * np.log(np.where(seen > 0, rates, 1.0))).sum() / seen.sum()
    bias = 256 * 15 / (2 * len(tokens))  # of the plug-in estimate (Miller 1955)
    assert entropy + bias == pytest.approx(source.loss_floor, abs=0.01)
    assert source.loss_floor < 0.8 * math.log(16)


def test_every_context_is_left_as_its_row_of_probabilities_says(source, tokens):
    seen = counts(tokens, 2, 16)
    visits = seen.sum(axis=1, keepdims=True)
    error = np.abs(seen - visits * source.probabilities)
    spread = np.sqrt(visits * source.probabilities * (1 - source.probabilities))
    assert (error <= 6 * spread + 6).all()


def test_a_context_is_visited_as_often_as_its_stationary_weight_says(source, tokens):
    visits = counts(tokens, 2, 16).sum(axis=1) / (len(tokens) - 2)
    assert np.abs(visits - stationary(source.probabilities)).sum() < 0.03


def test_a_walk_follows_certain_rows():
    # Order 2 over {0, 1}: the next token is the exclusive or of the last two.
    probabilities = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert walk(probabilities, 0b01, np.full(6, 0.5)).tolist() == [1, 0, 1, 1, 0, 1]


def test_a_draw_on_the_limit_gives_the_next_token():
    probabilities = np.array([[0.25, 0.75], [0.25, 0.75]])
    assert walk(probabilities, 0, np.array([0.0, 0.2499, 0.25, 0.9999])).tolist() == [0, 0, 1, 1]


def test_the_same_options_give_the_same_tokens_and_another_seed_others(tokens):
    assert np.array_equal(Markov(MarkovOptions()).tokens("train"), tokens)
    other = Markov(MarkovOptions(seed=1, tokens=1000))
    assert other.fingerprint() != Markov(MarkovOptions(tokens=1000)).fingerprint()
    assert not np.array_equal(other.tokens("train"), tokens[:1000])


def test_validation_is_another_stream_of_the_same_source(source, tokens):
    validation = source.tokens("validation")
    assert len(validation) == 100_000
    assert not np.array_equal(validation, tokens[:100_000])
    seen = counts(validation, 2, 16)
    assert (seen * -np.log(source.probabilities)).sum() / seen.sum() == pytest.approx(
        source.loss_floor, abs=0.02
    )


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, np.uint8), (257, np.uint16)])
def test_tokens_are_of_the_smallest_type(vocab_size, dtype):
    source = Markov(MarkovOptions(order=1, vocab_size=vocab_size, tokens=5000))
    assert isinstance(source, TokenSource)
    assert source.tokens("train").dtype == dtype
    assert source.tokens("train").max() < vocab_size


def test_a_smaller_concentration_has_a_lower_entropy():
    floors = [Markov(MarkovOptions(concentration=value)).loss_floor for value in (0.01, 0.3, 1000.0)]
    assert floors == sorted(floors)
    assert floors[0] > 0.0
    assert floors[2] == pytest.approx(math.log(16), abs=1e-3)
