"""GridOptim's weights that torch moves, and lands on their grids: a row of them at a time.

What `one_pass` does in C, with the same bits; also for what has no loop there: value rounding, masters, other
dtypes and devices. Weights of one format and age share a row (`altgrad_core.rows`), so that no more
operations are launched for many weights than for one. Rows wait for each other before they land, so that the
scales are looked at once; only so many that a large model needs no second copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs
import torch
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.landing import landed
from altgrad_core.random_bits import stream_key_table
from altgrad_core.rows import Row, among, in_rows
from altgrad_optim.adamw import adamw_direction, states_of
from altgrad_optim.grid_state import RUNG_COORDINATE, moment_names
from altgrad_optim.members import Member, Taken
from altgrad_optim.rungs import master_values, taken_step

if TYPE_CHECKING:
    from altgrad_optim.grid import GridOptim


MOST_WAITING = 2**24
"""Elements that wait for their scales: 64 MiB of float32 values."""


@attrs.frozen(eq=False)
class MemberRow:
    """Members of a GridOptim, of one format, that share a row."""

    optimizer: GridOptim
    members: Sequence[Member]
    row: Row
    values: Tensor  # of the weights, as the step finds them
    gradients: Tensor

    @classmethod
    def of(cls, optimizer: GridOptim, members: Sequence[Member]) -> MemberRow:
        weights = [member.weight for member in members]
        row = Row(weights)
        return cls(optimizer, members, row, row.of(weights), row.of(weight.grad for weight in weights))

    @property
    def format(self) -> Format:
        return self.members[0].format

    def of_each(self, table: Sequence[Tensor] | Tensor) -> list[Tensor]:
        """Return the members' own of what there is for every member of the optimizer."""
        return [table[member.index] for member in self.members]

    def states(self, name: str) -> list[Tensor]:
        return [self.optimizer.state[member.weight][name] for member in self.members]

    def scales(self) -> Tensor:
        """Return the scales as they are now, (n,)."""
        return torch.stack(self.of_each(self.optimizer.scales_in_use().scales))

    def needed(self, values: Tensor, past_end: Tensor) -> Tensor:
        """Return the magnitudes that the scales must serve, (n,) float64: twice the largest past the end.

        values: where the weights go, in scaled units. past_end: (n,) bool, whether some element was pushed
        past the last rung.
        """
        largest = torch.where(past_end, 2 * self.format.largest, self.row.amax(values))
        return largest / self.scales()


class Moved(NamedTuple):
    """Weights that have moved, before scale and bound."""

    these: MemberRow
    values: Tensor
    """On the grid, in scaled units."""
    needed: Tensor


def take(optimizer: GridOptim, group: dict[str, Any], members: Sequence[Member]) -> list[Taken]:
    """Take the step of a group's weights."""
    if not members:
        return []
    states = states_of(optimizer.state, [member.weight for member in members], *moment_names(group))
    kinds = [
        (id(member.format), member.master, int(state["step"]), member.weight.grad.dtype)
        for member, state in zip(members, states, strict=True)
    ]
    limits, keys = optimizer.scales_in_use().limits(), _streams(optimizer, 0, members)
    found: list[Taken] = []
    moved: list[Moved] = []
    room = MOST_WAITING
    for places in in_rows([member.weight for member in members], kinds):
        these = MemberRow.of(optimizer, [members[place] for place in places])
        if these.members[0].master:
            found.append(_master_step(these, group, limits))
            continue
        moved.append(_grid_step(these, group, keys))
        room -= these.values.numel()
        if room <= 0:
            found += land(optimizer, moved)
            moved, room = [], MOST_WAITING
    return [*found, *land(optimizer, moved)]


def _streams(optimizer: GridOptim, first: int, members: Sequence[Member]) -> Tensor:
    """Return the keys of the random streams in this step, one for each member, numbered from `first`."""
    numbers, device = len(optimizer.scales_in_use().scales), members[0].weight.device
    return stream_key_table(optimizer.seed, optimizer.counter, range(first, first + numbers), device)


def _grid_step(these: MemberRow, group: dict[str, Any], keys: Tensor) -> Moved:
    """Move weights that are on their grids."""
    scale = these.row.spread(these.scales().unbind())
    rungs, own_keys = _rungs(these, group, scale), these.row.keys(these.of_each(keys))
    how = math.ceil(group["rung_clip"]), group["rounding"] == "value"
    values, past = taken_step(these.values, rungs, scale, own_keys, these.format, *how)
    return Moved(these, values, these.needed(values, these.row.counts(past) > 0))


def _master_step(these: MemberRow, group: dict[str, Any], limits: Tensor | None) -> Taken:
    """Move rung coordinates, and have the weights follow them; their scales stay."""
    scale = these.row.spread(these.scales().unbind())
    masters = these.states(RUNG_COORDINATE)
    u = these.row.of(masters).sub_(_rungs(these, group, scale))
    values = master_values(u, these.format, *master_ends(these.members, these.row, limits)) / scale
    these.row.write_back(u, masters)
    return _written(these, values)


def _rungs(these: MemberRow, group: dict[str, Any], scale: Tensor) -> Tensor:
    """Return r, the rungs to go down, after the clip; NaN where the gradient is."""
    optimizer, row = these.optimizer, these.row
    decay, lr = optimizer.decay(group), optimizer.grid_lr(group)
    moments = [these.states(name) for name in moment_names(group)]
    first, *second = map(row.of, moments)
    steps = these.states("step")
    torch._foreach_add_(steps, 1)
    if not second:
        gradients = these.gradients + these.values * decay if decay else these.gradients
        direction = first.mul_(group["momentum"]).add_(gradients) * lr
    else:
        how = int(steps[0]), group["betas"], group["eps"]
        direction = adamw_direction(these.gradients, first, *second, *how) * lr
        if decay:
            scaled = these.values * scale
            direction.add_(scaled.div_(these.format.spacing(scaled)).mul_(decay))
    for moment, tensors in zip((first, *second), moments, strict=True):
        row.write_back(moment, tensors)
    rungs = direction.clamp_(-group["rung_clip"], group["rung_clip"])
    if optimizer.watch:
        weights = (member.weight for member in these.members)
        optimizer.intended |= dict(zip(weights, row.parts(-rungs), strict=True))
    return rungs


def land(optimizer: GridOptim, moved: Sequence[Moved]) -> Iterator[Taken]:
    """Scale, round and limit weights that have moved, and write them."""
    if not moved:
        return
    scales = optimizer.scales_in_use()
    before = torch.stack(scales.scales)
    if scales.may_move:
        needed = {
            member.index: one
            for these, _, needed in moved
            for member, one in zip(these.members, needed.unbind(), strict=True)
        }
        scales.adapt(among(len(before), needed))
    limits, ratios = scales.limits(), torch.stack(scales.scales) / before
    keys = None
    if optimizer.storage_rounding == "stochastic":
        keys = _streams(optimizer, len(before), moved[0].these.members)
    for these, values, _ in moved:
        row = these.row
        factor, scale = (row.spread(these.of_each(one)) for one in (ratios, scales.scales))
        limit = None if limits is None else row.pairs(these.of_each(limits))
        own_keys = None if keys is None else row.keys(these.of_each(keys))
        yield _written(these, landed(values, factor, scale, limit, own_keys, these.format))


def master_ends(members: Sequence[Member], row: Row, limits: Tensor | None) -> tuple[Any, Any]:
    """Return the lowest and the largest rung that master weights may have: their bound's, or the format's.

    limits: of every member of the optimizer, (n, 2).
    """
    if limits is None:
        return members[0].rungs
    ends = members[0].format.rung(torch.stack([limits[member.index] for member in members]))
    low, high = (row.spread(column.unbind()) for column in ends.unbind(1))
    return low, high


def _written(these: MemberRow, values: Tensor) -> Taken:
    """Write new values into the weights, and count."""
    changed, asked = values != these.values, these.gradients != 0
    counts = torch.stack((these.row.counts(changed), these.row.counts(asked)), dim=1)
    these.row.write(values, [member.weight for member in these.members])
    return Taken(these.members, counts)
