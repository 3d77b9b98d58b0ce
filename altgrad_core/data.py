"""Batches from a row of tokens, as nanoGPT draws them.

Windows of `block_size` tokens at random offsets, the targets one token further on. The offsets are a pure
function of (seed, step, micro-batch), computed by the counter-based Philox generator: nothing has to be
saved to resume, and no global random state is read or written. Evaluation always reads the same windows,
whatever the seed, so that its numbers can be compared between runs.

How a data set's documents become tokens is `altgrad_core.preparing`'s business.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from altgrad_core.preparing import Tokens

TRAINING_STREAM = 0x64617461
"""Second word of Philox's key ("data"): keeps these draws apart from others made with the same seed."""


def training_batch(
    tokens: Tokens, *, block_size: int, batch_size: int, seed: int, step: int, micro_batch: int
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, both (batch_size, block_size) int64: windows at random offsets.

    The same (seed, step, micro_batch) gives the same windows on every machine; any two that differ draw
    from streams of Philox that do not meet.
    """
    _check_block(tokens, block_size, "training")
    starts = drawn(batch_size, len(tokens) - block_size, seed=seed, step=step, micro_batch=micro_batch)
    return _windows(tokens, starts, block_size)


def drawn(count: int, below: int, *, seed: int, step: int, micro_batch: int) -> NDArray[np.int64]:
    """Return `count` random numbers from 0 to `below` - 1, those of this place in the training."""
    philox = np.random.Philox(
        key=np.array([seed % 2**64, TRAINING_STREAM], dtype=np.uint64),
        counter=np.array([0, 0, micro_batch, step], dtype=np.uint64),  # the first two count the draws
    )
    # The bias of the remainder is below `below` / 2^64.
    return (philox.random_raw(count) % np.uint64(below)).astype(np.int64)


def evaluation_batches(
    tokens: Tokens, *, block_size: int, batch_size: int, batches: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an iterator over inputs and targets of windows that do not overlap, spread evenly.

    `batches = 0`, or more than there are: the whole split. The last batch may then be smaller, so weight
    the batches by their number of targets. The fewer than `block_size` targets after the last full window
    are left out.
    """
    _check_block(tokens, block_size, "evaluated")
    available = (len(tokens) - 1) // block_size
    return (
        _windows(tokens, chosen * block_size, block_size)
        for chosen in spread(available, batch_size=batch_size, batches=batches)
    )


def spread(available: int, *, batch_size: int, batches: int) -> Iterator[NDArray[np.int64]]:
    """Yield batches of indices below `available`, each once, spread evenly; `batches = 0`: all of them."""
    wanted = min(batches * batch_size, available) or available
    chosen = np.arange(wanted) * available // wanted
    return (chosen[first : first + batch_size] for first in range(0, wanted, batch_size))


def _windows(tokens: Tokens, starts: NDArray[np.int64], block_size: int) -> tuple[Tensor, Tensor]:
    window = np.asarray(tokens)[starts[:, None] + np.arange(block_size + 1)]  # (batch, block + 1)
    return torch.from_numpy(window[:, :-1].astype(np.int64)), torch.from_numpy(window[:, 1:].astype(np.int64))


def _check_block(tokens: Tokens, block_size: int, split: str) -> None:
    if len(tokens) < block_size + 1:
        raise ValueError(
            f"the {split} split has {len(tokens)} tokens, fewer than the {block_size + 1} of one window "
            f"(model.block_size = {block_size} and its last target); "
            f"set model.block_size to {max(len(tokens) - 1, 1)} or less, or give the split more text"
        )
