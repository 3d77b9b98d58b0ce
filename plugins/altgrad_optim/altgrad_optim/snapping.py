"""GridOptim's weights put on their grids between two steps: when they are new, or their grids are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from altgrad_core.elementwise import bounded
from altgrad_core.rows import Row
from altgrad_optim.grid_state import RUNG_COORDINATE
from altgrad_optim.members import Member
from altgrad_optim.row_steps import master_ends
from altgrad_optim.rungs import master_values, rung_coordinate

if TYPE_CHECKING:
    from altgrad_optim.grid import GridOptim


@torch.no_grad()
def snap(optimizer: GridOptim, members: Iterable[Member]) -> None:
    """Round weights to their grids, within their bounds; masters get their rung coordinate."""
    scales = optimizer.scales_in_use()
    limits = scales.limits()
    for member in members:
        scale = scales.scales[member.index]
        scaled = member.weight.detach() * scale
        if member.master:
            values = _master(optimizer, member, scaled, limits)
        else:
            limit = None if limits is None else limits[member.index]
            values = bounded(member.format.quantize(scaled), limit)
        member.weight.copy_(values / scale)


def _master(optimizer: GridOptim, member: Member, scaled: Tensor, limits: Tensor | None) -> Tensor:
    """Begin a weight's rung coordinate, and return the grid values that it stands for."""
    u = optimizer.state[member.weight][RUNG_COORDINATE] = rung_coordinate(scaled, member.format)
    return master_values(u, member.format, *master_ends([member], Row([member.weight]), limits))


def claim(members: Iterable[Member]) -> None:
    """Have the forward pass use the weights as they are; a copy of a model alone does not."""
    for member in members:
        if member.quantizer is not None:
            member.quantizer.on_grid = True
