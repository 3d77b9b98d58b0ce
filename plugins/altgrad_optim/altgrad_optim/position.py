"""Bit positions: how far each weight has moved since tracking began, counted in spacings of its own grid.

In every step a weight adds to its position

    dw * s / spacing(w*s),

dw being what the optimizer's step leaves less what it finds, w the weight that it finds, s the scale and
`spacing` the format's, in its own units. A weight that climbs through many octaves adds ULPs of every size it
had, as an odometer does, so that the position is no difference of two places. The rung is the place.

What is counted is the optimizer's own movement, decay included, before anything behind it: rounding to the
grid, a bound. Where float32 masters are stored that is the whole movement. On a grid it is the movement that
was asked for, and its difference from the rungs that a weight has climbed is what rounding took. A residual
that error feedback gives back before a step is no part of it.

A position is float32: a movement below 2^-25 of it is lost. NaN stays NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from altgrad_core.elementwise import wide
from altgrad_core.format import Format
from altgrad_core.kernels import kernel
from altgrad_core.rows import Row, in_rows
from altgrad_optim.base import Gridded

NAME = "position"
"""Of the buffer in an optimizer's state."""


@attrs.frozen(kw_only=True, eq=False)
class Position:
    """Where one weight stands, in the weight's shape.

    An optimizer with a method `position_of(weight: Tensor) -> Position | None` can be watched by the monitor
    `position`; None: this weight is not tracked, or has taken no step.
    """

    moved: Tensor
    """float32: the signed movements of all steps, in ULPs."""
    rung: Tensor
    """int32: the rung now, of the nearest grid value where the weight is none."""


def begun(states: Mapping[Any, Any], weights: Sequence[Gridded]) -> list[Tensor]:
    """Return the positions in the weights' states; they begin at 0."""
    for weight, *_ in weights:
        if NAME not in states[weight]:
            states[weight][NAME] = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    return [states[weight][NAME] for weight, *_ in weights]


def starts(weights: Sequence[Gridded]) -> list[Tensor]:
    """Return copies of the weights, as a step finds them."""
    found = [weight.detach() for weight, *_ in weights]
    copies = [torch.empty_like(weight) for weight in found]
    if found:
        torch._foreach_copy_(copies, found)
    return copies


def advance(states: Mapping[Any, Any], weights: Sequence[Gridded], before: Sequence[Tensor]) -> None:
    """Add the movement of a step to the positions in the weights' states, as the loops in C do to theirs."""
    for places in in_rows(before, [id(format) for _, format, _ in weights]):
        found, format = [weights[place][0] for place in places], weights[places[0]][1]
        row, positions = Row(found), [states[weight][NAME] for weight in found]
        scale = row.spread([weights[place][2] for place in places])
        starts = wide(row.of(before[place] for place in places))
        moved = row.of(positions)
        moved.add_(ulps_moved(starts, wide(row.of(found)), scale, format))
        row.write_back(moved, positions)


@kernel
def ulps_moved(before: Tensor, after: Tensor, scale: Tensor, format: Format) -> Tensor:
    """Return after - before in spacings of the grid at `before`, elementwise, in their dtype."""
    return (after - before) * scale / format.spacing(before * scale)
