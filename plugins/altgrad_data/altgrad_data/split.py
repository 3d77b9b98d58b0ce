"""Which of many units (families of texts, files) are held out for validation.

Each unit goes to one split whole. Drawing each by a hash with probability 0.1 can miss the share by far
where units differ in size: the license families' hash alone gives 6 %. So units are taken in the order of
their hashes until the share is reached, and a unit so large that it would be most of the validation text
is never taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

LARGEST_UNIT = 0.2
"""A held-out unit is at most this share of the text to be held out: validation is at least five units."""


def held_out(sizes: Mapping[str, int], amount: float) -> frozenset[str]:
    """Return the units, named by the keys of `sizes`, that make up `amount` or up to a fifth more.

    They make up less where all the units that are small enough do not suffice. The choice depends on names
    and sizes alone: no random state, no order of the mapping.
    """
    taken: set[str] = set()
    total = 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if total >= amount:
            break
        if sizes[name] <= LARGEST_UNIT * amount:
            taken.add(name)
            total += sizes[name]
    return frozenset(taken)


def drawn_split(text: str, fraction: float) -> str:
    """Return the split that a hash of the text draws: `validation` for `fraction` of all texts."""
    drawn = int.from_bytes(hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:8]) / 2**64
    return "validation" if drawn < fraction else "train"
