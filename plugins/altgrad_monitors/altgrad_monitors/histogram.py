"""Counts of many elements on their device: they add up over layers, and quantiles follow from them."""

from __future__ import annotations

import torch
from torch import Tensor


def binned(index: Tensor, bins: int) -> Tensor:
    """Return how often each of 0 ... bins - 1 occurs: (bins,) int64. The host does not wait for it.

    index: 1-d int32 or int64, nothing outside of that range.
    """
    one = torch.ones((), dtype=torch.int64, device=index.device)
    return torch.zeros(bins, dtype=torch.int64, device=index.device).index_add_(
        0, index, one.expand(index.numel())
    )


def quantile_bin(counts: Tensor, share: float) -> Tensor:
    """Return the first bin up to which this share of the elements lies, 0-d int64: the inverted CDF."""
    return (counts.cumsum(0) < share * counts.sum().double()).sum().clamp(max=counts.numel() - 1)
