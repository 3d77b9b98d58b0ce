"""The bound on float32 masters: the same multiple of a weight's initial rms as on a grid, for every arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from altgrad_core.grid_scales import rms_of
from altgrad_core.quantizer import quantizer_of
from altgrad_core.rows import Row, in_rows


class MasterBound:
    """Limits float32 master weights to a multiple of their initial rms, after each step.

    A weight whose initial rms is 0 has no bound. Raises ValueError for a bound of 0, which would mean none.

    Attributes:
        bounded: which of the weights are limited now; all, until somebody says otherwise.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], bound: float
    ) -> None:
        if not (math.isfinite(bound) and bound > 0):
            raise ValueError(f"bound is a multiple of the initial rms, more than 0, not {bound!r}")
        self.weights = list(weights)
        rms = rms_of(self.weights)
        self.limits = torch.where(rms > 0, bound * rms, math.inf)
        self.bounded = [True] * len(self.weights)
        self._without_format = [quantizer_of(weight) is None for weight in self.weights]
        optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        limits = zip(self.weights, self.limits.unbind(), self.bounded, strict=True)
        limited = [(weight, limit) for weight, limit, bounded in limits if bounded]
        for places in in_rows([weight for weight, _ in limited], [None] * len(limited)):
            weights = [limited[place][0] for place in places]
            row = Row(weights)
            limit = row.spread([limited[place][1] for place in places])
            row.write(torch.minimum(torch.maximum(row.of(weights), -limit), limit), weights)

    def follow_formats(self) -> None:
        """Limit the quantized masters of a format that optimizers see, and what never had a format."""
        quantizers = [quantizer_of(weight) for weight in self.weights]
        self.bounded = [
            never if one is None else one.covered and not one.on_grid
            for one, never in zip(quantizers, self._without_format, strict=True)
        ]

    def state_dict(self) -> dict[str, Tensor]:
        return {"limits": self.limits}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.limits.copy_(state["limits"])
