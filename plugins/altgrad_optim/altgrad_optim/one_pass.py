"""GridOptim's weights that the loops in C move: what goes in, and what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from altgrad_core import native
from altgrad_core.random_bits import stream_key_table
from altgrad_optim import native_steps
from altgrad_optim.members import Member

if TYPE_CHECKING:
    from altgrad_optim.grid import GridOptim


class Borrowed(NamedTuple):
    """What the loops need of a weight."""

    member: Member
    loops: native.BlockLoops  # of its format
    moments: Sequence[Tensor]  # or its velocity


class Taken(NamedTuple):
    """A step of some of a group's weights that has been taken."""

    members: Sequence[Member]
    steps: native_steps.GridSteps

    @property
    def counts(self) -> Tensor:
        """(n, 2) int64: the flips and updates of each weight, 0 where it has not landed."""
        return self.steps.counts

    def left(self) -> Iterator[tuple[Member, Tensor, bool]]:
        """Yield the weights that have not landed; see `GridSteps.left`."""
        for place, values, past_end in self.steps.left():
            member = self.members[place]
            yield member, values.view_as(member.weight), past_end


def taken(optimizer: GridOptim, group: dict[str, Any], members: Sequence[Member]) -> Taken | None:
    """Take the step of those of a group's weights that there are loops for; None: of none."""
    if group["rounding"] != "rung" or not native_steps.available():
        return None
    blocks, found = native.Blocks(), []
    for member in members:
        loops = None if member.master else blocks.of(member.format)
        if loops is not None:
            moments = optimizer.started(group, member.weight)
            if native.readable(member.weight, member.weight.grad, *moments):
                found.append(Borrowed(member, loops, moments))
    if not found:
        return None
    keys = stream_key_table(optimizer.seed, optimizer.counter, [one.member.index for one in found])
    steps = native_steps.GridSteps(
        [_move(optimizer, one, keys.data_ptr() + 8 * row) for row, one in enumerate(found)],
        lr=optimizer.grid_lr(group),
        decay=optimizer.decay(group),
        betas=group["betas"],
        eps=group["eps"],
        momentum=group["momentum"],
        clip=group["rung_clip"],
        adam=group["normalize"] == "adam",
    )
    return Taken([one.member for one in found], steps)


def _move(optimizer: GridOptim, borrowed: Borrowed, keys: int) -> native_steps.GridMove:
    """Return a weight's step for the loops; keys: the address of its random keys."""
    (member, loops, (first, *second)), scales = borrowed, optimizer.scales_in_use()
    weight, on_host = member.weight, scales.on_host()[member.index]
    intended = 0
    if optimizer.watch:
        optimizer.intended[weight] = torch.empty_like(weight)
        intended = optimizer.intended[weight].data_ptr()
    return native_steps.GridMove(
        weight.data_ptr(),
        weight.grad.data_ptr(),
        first.data_ptr(),
        second[0].data_ptr() if second else 0,
        optimizer.state[weight]["step"].data_ptr(),
        intended,
        loops.rungs,
        loops.values,
        loops.spacings,
        loops.context,
        scales.scales[member.index].data_ptr(),
        keys,
        weight.numel(),
        (*on_host.limits, *member.rungs, *on_host.quiet),
    )
