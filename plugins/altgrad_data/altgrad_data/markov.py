r"""A random Markov source of known entropy: no model can get below it, and a perfect one reaches it.

The next token depends on the last k: P(t | c), one row for each of the V^k contexts c. Each row is drawn
from a symmetric Dirichlet distribution and mixed with a little of the uniform one, so every token can
follow every context and the chain of contexts has one stationary distribution \pi, the fixed point of

    \pi'(c_2 ... c_k t) = sum over c_1 of \pi(c_1 ... c_k) P(t | c_1 ... c_k)

reached by iteration in float64. The entropy rate, in nats per token, is (Shannon 1948, section 7)

    H = - sum over c of \pi(c) sum over t of P(t | c) ln P(t | c)

H is the loss of a model that sees the k tokens before each target. The first k - 1 targets of a window have
fewer, so a model's floor on windows of B tokens lies above H, by less than (k - 1) (ln V - H) / B.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property

import attrs
import numpy as np
from numpy.typing import NDArray

from altgrad_data import MarkovOptions

LAYOUT = 1
"""Part of the fingerprint: raise it when the same options give other tokens."""

UNIFORM_SHARE = 0.01
"""Of every row: no probability is below UNIFORM_SHARE / V, so no logarithm is infinite."""

STREAMS = {"probabilities": 0, "train": 1, "validation": 2}
"""Second word of Philox's key: draws that never meet."""

MOST_ITERATIONS = 100_000
CONVERGED = 1e-14
"""Change in one iteration, summed over contexts: 90 times the rounding unit of float64, 2^-53."""

Matrix = NDArray[np.float64]


class Markov:
    """The `markov` data set: a `TokenSource`."""

    def __init__(self, options: MarkovOptions = MarkovOptions()) -> None:  # noqa: B008 - it is frozen
        self._options = options
        self._lengths = {"train": options.tokens, "validation": options.validation_tokens}

    @property
    def vocab_size(self) -> int:
        return self._options.vocab_size

    @cached_property
    def loss_floor(self) -> float:
        """The entropy rate in nats per token."""
        return entropy_rate(self.probabilities, self._stationary)

    def fingerprint(self) -> str:
        return f"markov, layout {LAYOUT}, {sorted(attrs.asdict(self._options).items())}"

    def tokens(self, split: str) -> NDArray[np.unsignedinteger]:
        draws = self._generator(split).random(self._lengths[split] + 1)
        context = int(np.searchsorted(np.cumsum(self._stationary)[:-1], draws[0], side="right"))
        tokens = walk(self.probabilities, context, draws[1:])
        return tokens.astype(np.min_scalar_type(self.vocab_size - 1))

    @cached_property
    def probabilities(self) -> Matrix:
        """P(t | c), shape (V^k, V). The number of a context is its tokens as digits, the latest last."""
        shape = (self.vocab_size**self._options.order, self.vocab_size)
        # A row of gammas divided by its sum is Dirichlet distributed; the tiny term saves a row of zeros.
        gammas = self._generator("probabilities").standard_gamma(self._options.concentration, shape) + 1e-300
        rows: Matrix = gammas / gammas.sum(axis=1, keepdims=True)
        return (1.0 - UNIFORM_SHARE) * rows + UNIFORM_SHARE / self.vocab_size

    @cached_property
    def _stationary(self) -> NDArray[np.float64]:
        return stationary(self.probabilities)

    def _generator(self, stream: str) -> np.random.Generator:
        key = np.array([self._options.seed, STREAMS[stream]], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


def stationary(probabilities: Matrix) -> NDArray[np.float64]:
    """Return the stationary distribution of contexts, (V^k,) float64, summing to 1."""
    contexts, vocab_size = probabilities.shape
    weights = np.full(contexts, 1.0 / contexts)
    for _ in range(MOST_ITERATIONS):
        after: NDArray[np.float64] = (
            (weights[:, None] * probabilities).reshape(vocab_size, contexts).sum(axis=0)
        )
        after /= after.sum()
        if np.abs(after - weights).sum() <= CONVERGED:
            return after
        weights = after
    raise ArithmeticError(
        f"the stationary distribution did not settle in {MOST_ITERATIONS} steps; use a larger concentration"
    )


def entropy_rate(probabilities: Matrix, weights: NDArray[np.float64]) -> float:
    """Return the entropy of the next token given its context, averaged over contexts, in nats."""
    return float(-(weights[:, None] * probabilities * np.log(probabilities)).sum())


def walk(probabilities: Matrix, context: int, draws: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the tokens that uniform `draws` in [0, 1) produce, starting after `context`.

    Each token depends on the one before, so this is a loop; on lists with a bisection each it makes some
    two million tokens a second.
    """
    contexts, vocab_size = probabilities.shape
    limits = np.cumsum(probabilities, axis=1)[:, :-1].tolist()
    tokens = []
    for draw in draws.tolist():
        token = bisect_right(limits[context], draw)
        tokens.append(token)
        context = (context * vocab_size + token) % contexts
    return np.array(tokens)
