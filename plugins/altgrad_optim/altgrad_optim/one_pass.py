"""GridOptim's weights that the loops in C move: what goes in, and what comes out."""

from __future__ import annotations

import array
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from altgrad_core import native
from altgrad_core.random_bits import stream_state
from altgrad_optim import native_steps
from altgrad_optim.adamw import states_of
from altgrad_optim.grid_state import moment_names
from altgrad_optim.members import Member, Taken

if TYPE_CHECKING:
    from altgrad_optim.grid import GridOptim


class _Kept(NamedTuple):
    """What the loops need of a group's weights."""

    members: list[Member]
    """Those that there are loops for."""
    left: list[Member]
    table: native_steps.GridTable
    owners: list[native.BlockLoops]


_kept: native.KeptTables[_Kept] = native.KeptTables()
_ranges: native.KeptTables[array.array[float]] = native.KeptTables()


def take(
    optimizer: GridOptim, group: dict[str, Any], members: Sequence[Member]
) -> tuple[list[Taken], Sequence[Member]]:
    """Take the step of those of a group's weights that there are loops for, and return the others too."""
    on_cpu = any(member.weight.is_cpu and not member.master for member in members)
    if group["rounding"] != "rung" or not on_cpu or not native_steps.available():
        return [], members
    kept = _table_of(optimizer, group, members)
    if not kept.members:
        return [], members
    intended = {one.weight: torch.empty_like(one.weight) for one in kept.members} if optimizer.watch else {}
    optimizer.intended |= intended
    kept.table.leave_intended([one.data_ptr() for one in intended.values()])
    steps = native_steps.GridSteps(
        kept.table,
        _ranges_of(optimizer, group, kept.members),
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
    return [Taken(kept.members, steps.counts)], kept.left


def _land_left(optimizer: GridOptim, members: Sequence[Member], steps: native_steps.GridSteps) -> None:
    """Adapt the scales of the weights that have not landed, and land them."""
    left = steps.left()
    if not left:
        return
    scales = optimizer.scales_in_use()
    places = [members[one.place].index for one in left]
    before = [float(scales.scales[place]) for place in places]
    needed = {}
    for one, place, scale in zip(left, places, before, strict=True):
        most = 2 * members[one.place].format.largest if one.past_end else one.amax
        needed[place] = most / scale
    scales.adapt_some(needed)
    rescaled = [
        native_steps.Rescaled(one.place, float(scales.scales[place]) / scale, *scales.on_host()[place].limits)
        for one, place, scale in zip(left, places, before, strict=True)
    ]
    stochastic = optimizer.storage_rounding == "stochastic"
    steps.land(rescaled, first=len(scales.scales) if stochastic else None)


def _ranges_of(optimizer: GridOptim, group: dict[str, Any], members: Sequence[Member]) -> array.array[float]:
    """Return what limits the weights' steps, made anew only when a scale has moved."""
    host = optimizer.scales_in_use().on_host()
    made_of = members, host
    return _ranges.get(
        optimizer, group, made_of, lambda: native_steps.ranges_table(host[one.index] for one in members)
    )


def _table_of(optimizer: GridOptim, group: dict[str, Any], members: Sequence[Member]) -> _Kept:
    """Return the table of the weights' moves, made anew only when something in it has changed or moved."""
    scales = optimizer.scales_in_use()
    weights = [member.weight for member in members]
    names = moment_names(group)
    states = states_of(optimizer.state, weights, *names)
    made_of = (
        list(members),
        native.whereabouts(weights),
        native.whereabouts([weight.grad for weight in weights]),
        [state[name].data_ptr() for state in states for name in (*names, "step")],
        [one.data_ptr() for one in scales.scales],
    )
    moments = ([state[name] for name in names] for state in states)
    return _kept.get(optimizer, group, made_of, lambda: _made(optimizer, zip(members, moments, strict=True)))


def _made(optimizer: GridOptim, found: Iterable[tuple[Member, Sequence[Tensor]]]) -> _Kept:
    blocks, moving, left, moves, owners = native.Blocks(), [], [], [], []
    for member, moments in found:
        loops = None if member.master else blocks.of(member.format)
        if loops is None or not native.readable(member.weight, member.weight.grad, *moments):
            left.append(member)
            continue
        moving.append(member)
        moves.append(_move(optimizer, member, loops, moments))
        owners.append(loops)
    return _Kept(moving, left, native_steps.GridTable(moves), owners)


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
        *member.rungs,
        weight.numel(),
    )
