"""What one step did to each quantized weight: the counts and sums that flip, stall and descent are made of.

Here is what they mean, in torch, for any device. On a CPU a loop in C takes them all in one pass over a
weight (`native_tally`): the same counts, and the same sums but for their order; `lost` to one in 10^6 of the
updates, for it is summed in float32 over some hundred elements at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import attrs
import torch
from torch import Tensor

from altgrad_core.format import NAN_RUNG, Format
from altgrad_core.kernels import flat, kernel
from altgrad_core.observed import MetricTable
from altgrad_monitors.plan import Plan
from altgrad_monitors.reporting import layer_type

COLUMNS = ("flips", "updates", "flips_of_updated", "stayed", "moved", "lost", "product", "square")
"""Of `Tally.table`. Counts: codes that changed; elements with a non-zero gradient; both; elements that moved
without changing their code; elements that moved. Sums: updated elements whose code is expected to stay;
<intended, actual>; |intended|^2."""


@attrs.frozen(kw_only=True)
class Tally:
    """One step of some weights: a row each, on their device. What was not asked for is zero."""

    names: tuple[str, ...]
    table: Tensor  # (n, 8) float64, columns COLUMNS; counts are exact up to 2^53

    def of(self, names: tuple[str, ...]) -> Tally:
        """Return the rows of some names, in that order."""
        if names == self.names:
            return self
        rows = dict(zip(self.names, self.table.unbind(), strict=True))
        table = torch.stack([rows[name] for name in names]) if names else self.table[:0]
        return Tally(names=names, table=table)


def columns_of(table: Tensor) -> dict[str, Tensor]:
    """Return each of COLUMNS, (n,)."""
    return dict(zip(COLUMNS, table.unbind(dim=1), strict=True))


def joined(tallies: Sequence[Tally], names: tuple[str, ...]) -> Tally:
    """Return several tallies as one, with its rows in the order of these names; without any, an empty one."""
    if not tallies:
        return Tally(names=(), table=torch.empty((0, len(COLUMNS)), dtype=torch.float64))
    first, *others = tallies
    if others:
        together = tuple(name for tally in tallies for name in tally.names)
        first = Tally(names=together, table=torch.cat([tally.table for tally in tallies]))
    return first.of(names)


# --- in torch ----------------------------------------------------------------------------------------


def row_of(scale: Tensor) -> Tensor:
    """Return a weight's scale for `flat` values: 0-d as it is, or one for each element."""
    return flat(scale) if scale.dim() else scale


@kernel
def codes(value: Tensor, format: Format, scale: Tensor) -> Tensor:
    """Return the rungs of value*scale as int8 (formats to 8 bits) or int16; NaN gets the lowest integer.

    A one-sided table may have rungs beyond the integers: they wrap around, and stay distinct.
    """
    rungs = format.rung(value * scale)
    dtype, half = (torch.int8, 2**7) if format.bits <= 8 else (torch.int16, 2**15)
    wrapped = ((rungs + half) & (2 * half - 1)) - half
    return torch.where(rungs == NAN_RUNG, -half, wrapped).to(dtype)


def tallied(
    plan: Plan,
    names: Sequence[str],
    gradients: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    now: Mapping[str, Tensor],
) -> Tally:
    """Return the tally of these weights; before, now: their codes, one row each."""
    rows = [_row(name, plan, gradients[name], before[name], now[name]) for name in names]
    counts, sums = (torch.stack([one for row in part for one in row]) for part in zip(*rows, strict=True))
    table = torch.cat((counts.view(len(rows), -1).double(), sums.view(len(rows), -1)), dim=1)
    return Tally(names=tuple(names), table=table)


def _row(
    name: str, plan: Plan, gradient: Tensor, before: Tensor, now: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the counts, 0-d int64, and the sums, 0-d float64, of a weight's row."""
    ask, gradient = plan.asked[name], flat(gradient)
    counts = _compared(before, now, gradient)
    none = torch.zeros_like(counts[0])
    nothing = none.double()
    *moves, lost = _moves(name, plan, gradient, before, now) if ask.stall else (none, none, nothing)
    products = _products(name, plan) if ask.descent else (nothing, nothing)
    return [*counts, *moves], [lost, *products]


@kernel
def _compared(before: Tensor, now: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how many codes changed, how many elements have a gradient, and how many both: 0-d int64."""
    flipped, updated = now != before, gradient != 0
    return flipped.sum(), updated.sum(), (flipped & updated).sum()


@kernel
def _stayed(now: Tensor, before: Tensor, code: Tensor, code_before: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many elements moved without changing their code, and how many moved: 0-d int64."""
    moved = now != before
    return (moved & (code == code_before)).sum(), moved.sum()


def _moves(
    name: str, plan: Plan, gradient: Tensor, before: Tensor, now: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return how many elements stayed, how many moved, and how many are expected to be lost."""
    weight, values = plan.weights[name], flat(plan.before[name])
    assert weight.format is not None and weight.scale is not None  # noqa: PT018 - for the type checker
    intended, units = flat(plan.intended[name]), None if plan.asked[name].in_rungs else values
    lost = _lost(intended, gradient, units, row_of(weight.scale), weight.format)
    return *_stayed(flat(weight.value), values, now, before), lost


@kernel
def _lost(intended: Tensor, gradient: Tensor, before: Tensor | None, scale: Tensor, format: Format) -> Tensor:
    """Return the expected number of updated elements whose code stays, 0-d float64.

    intended: in rungs where `before` is None, else in weight units.
    """
    size = intended.abs()
    if before is not None:
        size = size / (format.spacing(before * scale) / scale)
    updated = gradient != 0
    return updated.sum() - (size.clamp(max=1) * updated).sum(dtype=torch.float64)


def _products(name: str, plan: Plan) -> tuple[Tensor, Tensor]:
    """Return <intended, actual> and |intended|^2, 0-d float64."""
    weight, intended = plan.weights[name], plan.intended[name].double()
    assert weight.format is not None
    after, before = weight.value, plan.before[name]
    if plan.asked[name].in_rungs:  # of the grid before the step
        scale = plan.scale_then(name)
        after, before = (_rungs(value * scale, weight.format) for value in (after, before))
    actual = after.double() - before.double()
    return (intended * actual).sum(), intended.square().sum()


def _rungs(x: Tensor, format: Format) -> Tensor:
    """Return the rungs in float64; NaN for NaN."""
    return torch.where(x.isnan(), torch.nan, format.rung(x).double())


# --- to metrics --------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Summed:
    """What was tallied of layers, or of types of layer, and in total: sums over their weights."""

    tally: Tally
    layers: tuple[str, ...]
    """Of its weights."""
    per: str
    """`layer` or `type`."""
    groups: tuple[str, ...]
    """What there is a sum of: the last is `total`. None without a weight."""
    columns: Mapping[str, Tensor]
    """By COLUMNS, (groups,) float64."""

    def of(self, column: Tensor) -> Tensor:
        """Return the sums of another column of the weights: (weights,) to (groups,)."""
        return _sums(self.layers, column.unsqueeze(1), self.per).squeeze(1)

    def metrics(self, columns: Mapping[str, Tensor]) -> MetricTable:
        """Return columns, (groups,), as metrics; the keys are `<monitor>/<quantity>`."""
        values = torch.stack([*columns.values()], dim=1).flatten()
        return MetricTable(_places(tuple(columns), self.groups), values)


def summed(tally: Tally, layers: tuple[str, ...], per: str) -> Summed:
    """Return the sums of a tally. layers: of its weights."""
    names = layers if per == "layer" else tuple(dict.fromkeys(map(layer_type, layers)))
    groups = (*names, "total") if names else ()
    columns = columns_of(_sums(layers, tally.table, per))
    return Summed(tally=tally, layers=layers, per=per, groups=groups, columns=columns)


def _sums(layers: Sequence[str], rows: Tensor, per: str) -> Tensor:
    """Return the sums of the rows of each group, and of all of them; no rows without layers."""
    if not layers:
        return rows
    each = rows
    if per == "type":
        members: dict[str, list[Tensor]] = {}
        for layer, row in zip(layers, rows.unbind(), strict=True):
            members.setdefault(layer_type(layer), []).append(row)
        each = torch.stack([torch.stack(own).sum(dim=0) for own in members.values()])
    return torch.cat((each, rows.sum(dim=0, keepdim=True)))


@functools.lru_cache(maxsize=64)
def _places(metrics: tuple[str, ...], groups: tuple[str, ...]) -> dict[str, int]:
    """Return the places of the metrics of all groups, group by group: always alike."""
    names = [f"{metric}/{group}" for group in groups for metric in metrics]
    return {name: place for place, name in enumerate(names)}
