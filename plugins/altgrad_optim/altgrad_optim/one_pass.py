"""GridOptim's weights that the loops in C move: what goes in, and what comes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from altgrad_core import native
from altgrad_core.random_bits import stream_key_table
from altgrad_optim import native_steps
from altgrad_optim.adamw import corrections
from altgrad_optim.members import Member

if TYPE_CHECKING:
    from altgrad_optim.grid import GridOptim


class Borrowed(NamedTuple):
    """What the loops need of a weight."""

    member: Member
    loops: native.BlockLoops  # of its format
    moments: Sequence[Tensor]  # or its velocity


class Taken(NamedTuple):
    """A step of a group's weights that has been taken."""

    members: Sequence[Member]
    steps: native_steps.GridSteps

    @property
    def counts(self) -> list[tuple[Tensor, Tensor]]:
        return self.steps.counts

    def left(self) -> Iterator[tuple[Member, Tensor, bool]]:
        """Yield the weights that have not landed; see `GridSteps.left`."""
        for place, values, past_end in self.steps.left():
            yield self.members[place], values, past_end


def borrowed(
    group: dict[str, Any], members: Sequence[Member], states: Mapping[int, Sequence[Tensor]]
) -> list[Borrowed]:
    """Return the weights that there are loops for; `states` has their moments, by their places."""
    if group["rounding"] != "rung" or not native_steps.available():
        return []
    blocks, found = native.Blocks(), []
    for member in members:
        loops, moments = None if member.master else blocks.of(member.format), states[member.index]
        if loops is not None and native.readable(member.weight, member.weight.grad, *moments):
            found.append(Borrowed(member, loops, moments))
    return found


def taken(optimizer: GridOptim, group: dict[str, Any], weights: Sequence[Borrowed]) -> Taken:
    """Take the step of a group's weights."""
    steps = native_steps.GridSteps(
        moves(optimizer, group, weights),
        betas=group["betas"],
        eps=group["eps"],
        momentum=group["momentum"],
        clip=group["rung_clip"],
        adam=group["normalize"] == "adam",
    )
    return Taken([one.member for one in weights], steps)


def moves(
    optimizer: GridOptim, group: dict[str, Any], weights: Sequence[Borrowed]
) -> Iterator[native_steps.GridMove]:
    """Yield each weight's step for the loops, and count it."""
    scales, lr, decay = optimizer.scales_in_use(), optimizer.grid_lr(group), optimizer.decay(group)
    keys = stream_key_table(optimizer.seed, optimizer.counter, [one.member.index for one in weights])
    for (member, loops, (first, *second)), own in zip(weights, keys, strict=True):
        weight, state = member.weight, optimizer.state[member.weight]
        state["step"] += 1
        if optimizer.watch:
            optimizer.intended[weight] = torch.empty_like(weight)
        on_host = scales.on_host(member.index)
        yield native_steps.GridMove(
            weight=weight,
            gradient=weight.grad,
            first_moment=first,
            second_moment=second[0] if second else None,
            intended=optimizer.intended.get(weight),
            format=loops,
            scale=scales.scales[member.index],
            keys=own,
            corrections=corrections(int(state["step"]), group["betas"]),
            lr=lr,
            decay=decay,
            limits=on_host.limits,
            rungs=member.rungs,
            quiet=on_host.quiet,
        )
