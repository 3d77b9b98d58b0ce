"""Batches of labeled documents, each as windows of its first tokens.

What `altgrad_core.data` does for a row of tokens: training draws documents with replacement, by the same
numbers of (seed, step, micro-batch); evaluation reads the same documents whatever the seed, each once.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from altgrad_core.data import drawn, spread
from altgrad_core.preparing import Documents, Tokens
from altgrad_core.text_classifier import PADDING


@attrs.frozen(kw_only=True, eq=False)
class LabeledDocuments:
    """The documents of a split, as a classifier reads them."""

    tokens: Tokens
    documents: Documents
    windows: int
    block_size: int

    def __len__(self) -> int:
        return len(self.documents.ends)

    def training_batch(
        self, batch_size: int, *, seed: int, step: int, micro_batch: int
    ) -> tuple[Tensor, Tensor]:
        """Return tokens (batch_size, windows, block_size) int64 and labels (batch_size, labels) float32."""
        return self.batch(drawn(batch_size, len(self), seed=seed, step=step, micro_batch=micro_batch))

    def evaluation_batches(self, batch_size: int, batches: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield documents spread evenly over the split; `batches = 0`, or more than there are: all of them.

        The last batch may be smaller.
        """
        return map(self.batch, spread(len(self), batch_size=batch_size, batches=batches))

    def batch(self, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return the tokens and labels of these documents; PADDING stands past a document's end."""
        ends = np.asarray(self.documents.ends)
        begins = np.where(chosen > 0, ends[chosen - 1], 0)
        places = begins[:, None] + np.arange(self.windows * self.block_size)
        there = places < ends[chosen, None]
        tokens = np.asarray(self.tokens)[np.where(there, places, 0)].astype(np.int64)
        rows = np.where(there, tokens, PADDING).reshape(-1, self.windows, self.block_size)
        labels = np.asarray(self.documents.labels)[chosen].astype(np.float32)
        return torch.from_numpy(rows), torch.from_numpy(labels)
