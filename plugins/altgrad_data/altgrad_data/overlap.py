"""How much of a text is copied from others: shared runs of words, the near-duplicate measure of corpora.

A run is 13 consecutive words, lower-cased, punctuation dropped: long enough that two texts share one only
by copying (GPT-3 found its benchmark contamination with 13-grams too: Brown et al. 2020, appendix C).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RUN = 13
"""Words in a run; a shorter text is one run."""

_WORD = re.compile(r"\w+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd: a bijection modulo 2^64


def copied_share(texts: Sequence[str], owners: Sequence[str]) -> NDArray[np.float64]:
    """Return, for each text, the share of its distinct runs that occur in a text of another owner."""
    numbers: dict[str, int] = {}
    runs = [_runs(text, numbers) for text in texts]
    text_of_run = np.repeat(np.arange(len(texts)), [len(one) for one in runs])
    owner_of_text = np.unique(owners, return_inverse=True)[1]
    owner_of_run = owner_of_text[text_of_run]
    distinct, run = np.unique(np.concatenate(runs), return_inverse=True)
    first = np.full(len(distinct), len(owners))
    last = np.full(len(distinct), -1)
    np.minimum.at(first, run, owner_of_run)
    np.maximum.at(last, run, owner_of_run)
    shared = (first != last)[run]
    return np.bincount(text_of_run, weights=shared) / np.bincount(text_of_run)


def _runs(text: str, numbers: dict[str, int]) -> NDArray[np.uint64]:
    """Return the distinct 64-bit hashes of a text's runs; `numbers` collects the words."""
    found = [numbers.setdefault(word, len(numbers) + 1) for word in _WORD.findall(text.lower())]
    words = np.array(found, dtype=np.uint64)
    width = min(RUN, len(words))
    hashes = np.zeros(len(words) - width + 1, dtype=np.uint64)
    for place in range(width):  # Horner's rule modulo 2^64, every run at once
        hashes = hashes * _MULTIPLIER + words[place : len(words) - width + 1 + place]
    return np.unique(hashes)
