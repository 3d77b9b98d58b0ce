"""GridOptim's weights that the loops in C move: what goes in, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from altgrad_core import native
from altgrad_core.random_bits import stream_state
from altgrad_optim import native_steps
from altgrad_optim.grid_state import started
from altgrad_optim.members import Member

if TYPE_CHECKING:
    from altgrad_optim.grid import GridOptim


class Taken(NamedTuple):
    """A step of some of a group's weights that has been taken."""

    members: Sequence[Member]
    steps: native_steps.GridSteps

    @property
    def counts(self) -> Tensor:
        """(n, 2) int64: the flips and updates of each weight."""
        return self.steps.counts


class _Kept(NamedTuple):
    """What the loops need of a group's weights."""

    members: list[Member]
    """Those that there are loops for."""
    table: native_steps.GridTable
    owners: list[native.BlockLoops]


_kept: native.KeptTables[_Kept] = native.KeptTables()
_numbers: native.KeptTables[Tensor] = native.KeptTables()


def taken(optimizer: GridOptim, group: dict[str, Any], members: Sequence[Member]) -> Taken | None:
    """Take the step of those of a group's weights that there are loops for; None: of none."""
    if group["rounding"] != "rung" or not native_steps.available():
        return None
    in_c = [member for member in members if not member.master and member.weight.is_cpu]
    if not in_c:
        return None
    kept = _table_of(optimizer, group, in_c)
    if not kept.members:
        return None
    intended = {one.weight: torch.empty_like(one.weight) for one in kept.members if optimizer.watch}
    optimizer.intended |= intended
    kept.table.leave_intended([one.data_ptr() for one in intended.values()] or [0] * len(kept.members))
    steps = native_steps.GridSteps(
        kept.table,
        _numbers_of(optimizer, group, kept.members),
        state=stream_state(optimizer.seed, optimizer.counter),
        lr=optimizer.grid_lr(group),
        decay=optimizer.decay(group),
        betas=group["betas"],
        eps=group["eps"],
        momentum=group["momentum"],
        clip=group["rung_clip"],
        adam=group["normalize"] == "adam",
    )
    _land_left(optimizer, kept.members, steps)
    return Taken(kept.members, steps)


def _land_left(optimizer: GridOptim, members: Sequence[Member], steps: native_steps.GridSteps) -> None:
    """Adapt the scales of the weights that have not landed, and land them."""
    left = steps.left()
    if not left:
        return
    scales = optimizer.scales_in_use()
    places = [members[one.place].index for one in left]
    before = [float(scales.scales[place]) for place in places]
    needed = torch.zeros(len(scales.scales), dtype=torch.float64, device="cpu")
    for one, place, scale in zip(left, places, before, strict=True):
        most = 2 * members[one.place].format.largest if one.past_end else one.amax
        needed[place] = most / scale
    scales.adapt(needed)
    rescaled = [
        native_steps.Rescaled(one.place, float(scales.scales[place]) / scale, *scales.on_host()[place].limits)
        for one, place, scale in zip(left, places, before, strict=True)
    ]
    stochastic = optimizer.storage_rounding == "stochastic"
    steps.land(rescaled, first=len(scales.scales) if stochastic else None)


def _numbers_of(optimizer: GridOptim, group: dict[str, Any], members: Sequence[Member]) -> Tensor:
    """Return the table of the weights' numbers, made anew only when a scale has moved."""
    host = optimizer.scales_in_use().on_host()

    def made() -> Tensor:
        found = [host[member.index] for member in members]
        rows = [
            native_steps.GridNumbers(one.limits, member.rungs, one.quiet)
            for one, member in zip(found, members, strict=True)
        ]
        return native_steps.numbers_table(rows)

    return _numbers.get(optimizer, group, (members, host), made)


def _table_of(optimizer: GridOptim, group: dict[str, Any], in_c: Sequence[Member]) -> _Kept:
    """Return the table of the weights' moves, made anew only when something in it has changed or moved."""
    scales = optimizer.scales_in_use()
    weights = [member.weight for member in in_c]
    states = [optimizer.state[weight] for weight in weights]
    moments = [started(state, group, weight) for state, weight in zip(states, weights, strict=True)]
    made_of = (
        list(in_c),
        native.whereabouts(weights),
        native.whereabouts([weight.grad for weight in weights]),
        [one.data_ptr() for both in moments for one in both],
        [state["step"].data_ptr() for state in states],
        [one.data_ptr() for one in scales.scales],
    )
    return _kept.get(
        optimizer, group, made_of, lambda: _made(optimizer, list(zip(in_c, moments, strict=True)))
    )


def _made(optimizer: GridOptim, found: Sequence[tuple[Member, Sequence[Tensor]]]) -> _Kept:
    blocks, moving, moves, owners = native.Blocks(), [], [], []
    for member, moments in found:
        loops = blocks.of(member.format)
        if loops is not None and native.readable(member.weight, member.weight.grad, *moments):
            moving.append(member)
            moves.append(_move(optimizer, member, loops, moments))
            owners.append(loops)
    return _Kept(moving, native_steps.GridTable(moves), owners)


def _move(
    optimizer: GridOptim, member: Member, loops: native.BlockLoops, moments: Sequence[Tensor]
) -> native_steps.GridMove:
    """Return a weight's step for the loops."""
    weight, scales = member.weight, optimizer.scales_in_use()
    first, *second = (one.data_ptr() for one in moments)
    return native_steps.GridMove(
        weight.data_ptr(),
        weight.grad.data_ptr(),
        first,
        second[0] if second else 0,
        optimizer.state[weight]["step"].data_ptr(),
        0,
        loops.rungs,
        loops.values,
        loops.moves,
        loops.spacings,
        loops.quantize,
        loops.context,
        scales.scales[member.index].data_ptr(),
        member.index,
        weight.numel(),
    )
