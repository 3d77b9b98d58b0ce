"""Weights on their grids as torch rounds them: a row of them at a time, with what is kept of the rounding."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import attrs
import torch
from torch import Tensor, nn

from altgrad_core import landing
from altgrad_core.error_compensation import ErrorCompensation
from altgrad_core.error_feedback import ErrorFeedback
from altgrad_core.format import Format
from altgrad_core.grid_scales import GridScales
from altgrad_core.rows import Row, in_rows


@attrs.frozen(eq=False)
class OnGrids:
    """Weights with their formats and scales; what its methods call places are their numbers."""

    weights: Sequence[nn.Parameter]
    formats: Sequence[Format]
    scales: GridScales

    def give_back(self, feedback: ErrorFeedback, places: Collection[int]) -> None:
        """Add the residuals to weights that are on their grids."""
        for chosen, weights, row, scale in self._rows(places):
            values = row.of(weights)
            values.add_(feedback.residuals(chosen, row, values, scale))
            row.write_back(values, weights)

    def round(
        self,
        places: Collection[int],
        streams: Mapping[int, Tensor] | None,
        keeper: ErrorFeedback | ErrorCompensation | None,
    ) -> None:
        """Round weights to their grids and limit them there, and give their residuals to the keeper.

        streams: the keys of the weights' random streams, (2,), by place; None: to nearest even.
        """
        if not places:
            return
        limits = self.scales.limits_at(places)
        bounds = None if keeper is None else self.scales.bounds()
        for chosen, weights, row, scale in self._rows(places):
            unrounded = row.of(weights)
            keys = None if streams is None else row.keys([streams[place] for place in chosen])
            limit = None if limits is None else row.pairs([limits[place] for place in chosen])
            rounded = _rounded(unrounded, row, scale, limit, keys, self.formats[chosen[0]])
            if keeper is None:
                row.write(rounded, weights)
                continue
            bound = None if bounds is None else row.spread([bounds[place] for place in chosen])
            residual = _within(unrounded, bound) - rounded
            row.write(rounded, weights)
            keeper.keep(chosen, row, rounded, scale, residual)

    def _rows(self, places: Collection[int]) -> Iterator[tuple[list[int], list[nn.Parameter], Row, Tensor]]:
        """Yield weights that are treated at once: their places, themselves, their row, and its scale."""
        order = list(places)
        kinds = [id(self.formats[place]) for place in order]
        for shared in in_rows([self.weights[place] for place in order], kinds):
            chosen = [order[one] for one in shared]
            weights = [self.weights[place] for place in chosen]
            row = Row(weights)
            yield chosen, weights, row, row.spread([self.scales.scales[place] for place in chosen])


def _rounded(
    unrounded: Tensor, row: Row, scale: Tensor, limit: Tensor | None, keys: Tensor | None, format: Format
) -> Tensor:
    if row.alone:  # in one pass, where the format has a loop for it
        rounding = "nearest_even" if keys is None else "stochastic"
        return format.fake_quantize(unrounded, scale, rounding, keys=keys, limit=limit)
    return landing.landed(unrounded, scale, scale, limit, keys, format)


def _within(weights: Tensor, bound: Tensor | None) -> Tensor:
    """Return weights limited to their bounds, as float32 masters are: no residual lies beyond."""
    return weights if bound is None else torch.minimum(torch.maximum(weights, -bound), bound)
