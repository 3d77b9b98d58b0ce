"""What one step did to each quantized weight: the counts and sums that flip, stall and descent are made of.

Here is what they mean, in torch, for any device. On a CPU a loop in C takes them all in one pass over a
weight (`native_tally`): the same counts, and the same sums but for their order; `lost` to one in 10^6 of the
updates, for it is summed in float32 over some hundred elements at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import attrs
import torch
from torch import Tensor

from altgrad_core.format import NAN_RUNG, Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_core.kernels import flat, kernel
from altgrad_core.observed import MetricTable
from altgrad_monitors.reporting import layer_type

COUNTS = ("flips", "updates", "flips_of_updated", "stayed", "moved")
"""Columns of `Tally.counts`: codes that changed; elements with a non-zero gradient; both; elements that moved
without changing their code; elements that moved."""
SUMS = ("lost", "product", "square")
"""Columns of `Tally.sums`: updated elements whose code is expected to stay; <intended, actual>;
|intended|^2."""


class Asked(NamedTuple):
    """What of a weight is tallied beside its flips, and how."""

    stall: bool
    """`stayed`, `moved` and `lost`."""
    descent: bool
    """`product` and `square`."""
    in_rungs: bool
    """Whether the intended update is in rungs."""
    recode: bool
    """Whether the codes before the step come from `step.before`, under the scale of then."""


@attrs.frozen(kw_only=True)
class Tally:
    """One step of some weights: a row each, on their device. What was not asked for is zero."""

    names: Sequence[str]
    counts: Tensor  # (n, 5) int64, columns COUNTS
    sums: Tensor  # (n, 3) float64, columns SUMS

    def of(self, names: Sequence[str]) -> Tally:
        """Return the rows of some names, in that order."""
        if tuple(names) == tuple(self.names):
            return self
        places = [self.names.index(name) for name in names]
        counts, sums = self.counts.unbind(), self.sums.unbind()
        return Tally(
            names=names,
            counts=torch.stack([counts[place] for place in places]) if places else self.counts[:0],
            sums=torch.stack([sums[place] for place in places]) if places else self.sums[:0],
        )

    def column(self, name: str) -> Tensor:
        """Return a column of COUNTS or SUMS, (n,)."""
        if name in COUNTS:
            return self.counts[:, COUNTS.index(name)]
        return self.sums[:, SUMS.index(name)]


def joined(tallies: Sequence[Tally], names: Sequence[str]) -> Tally:
    """Return several tallies as one, with its rows in the order of these names; without any, an empty one."""
    if not tallies:
        counts, sums = torch.empty((0, len(COUNTS)), dtype=torch.int64), torch.empty((0, len(SUMS)))
        return Tally(names=names, counts=counts, sums=sums.double())
    together = Tally(
        names=[name for tally in tallies for name in tally.names],
        counts=torch.cat([tally.counts for tally in tallies]),
        sums=torch.cat([tally.sums for tally in tallies]),
    )
    return together.of(names)


def asked(step: Step, name: str, wanted: Collection[str], recode: bool) -> Asked:
    """Return what can be tallied of a weight in this step, of what is wanted."""
    before = name in step.before
    known = before and name in step.intended
    in_rungs = step.intended_in_rungs and name in step.counts
    return Asked(known and "stall" in wanted, known and "descent" in wanted, in_rungs, before and recode)


def recorded(step: Step, name: str) -> Tensor | None:
    """Return the intended update; None where it is the actual one and nobody has made a tensor of it."""
    found: Tensor | None = getattr(step.intended, "recorded", step.intended.get)(name)
    return found


def scale_then(step: Step, name: str) -> Tensor | None:
    """Return a weight's scale before the step; without one, that of now."""
    return step.scales_before.get(name, step.weights[name].scale)


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
    asked: Mapping[str, Asked], step: Step, before: Mapping[str, Tensor], now: Mapping[str, Tensor]
) -> Tally:
    """Return the tally of these weights; before, now: their codes, one row each."""
    rows = [_row(name, step, before[name], now[name], ask) for name, ask in asked.items()]
    counts, sums = zip(*rows, strict=True)
    return Tally(names=list(asked), counts=torch.stack(counts), sums=torch.stack(sums))


def _row(name: str, step: Step, before: Tensor, now: Tensor, ask: Asked) -> tuple[Tensor, Tensor]:
    weight, gradient = step.weights[name], flat(step.gradients[name])
    counts = list(_compared(before, now, gradient))
    none = counts[0].new_zeros(())
    counts += _stayed(flat(weight.value), flat(step.before[name]), now, before) if ask.stall else (none, none)
    nothing = none.double()
    lost = _expected_loss(name, weight, step, gradient, ask) if ask.stall else nothing
    products = _products(name, weight, step, ask) if ask.descent else (nothing, nothing)
    return torch.stack(counts), torch.stack((lost, *products))


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


def _expected_loss(name: str, weight: Weight, step: Step, gradient: Tensor, ask: Asked) -> Tensor:
    assert weight.format is not None and weight.scale is not None  # noqa: PT018 - for the type checker
    before = None if ask.in_rungs else flat(step.before[name])
    return _lost(flat(step.intended[name]), gradient, before, row_of(weight.scale), weight.format)


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


def _products(name: str, weight: Weight, step: Step, ask: Asked) -> tuple[Tensor, Tensor]:
    """Return <intended, actual> and |intended|^2, 0-d float64."""
    assert weight.format is not None and weight.scale is not None  # noqa: PT018 - for the type checker
    intended = step.intended[name].double()
    after, before = weight.value, step.before[name]
    if ask.in_rungs:
        after, before = (_rungs(value * weight.scale, weight.format) for value in (after, before))
    actual = after.double() - before.double()
    return (intended * actual).sum(), intended.square().sum()


def _rungs(x: Tensor, format: Format) -> Tensor:
    """Return the rungs in float64; NaN for NaN."""
    return torch.where(x.isnan(), torch.nan, format.rung(x).double())


# --- to metrics --------------------------------------------------------------------------------------


def added_up(columns: Mapping[str, Tensor], layers: Sequence[str], per: str) -> MetricTable:
    """Return metrics of each layer, or type of layer, and in total: the sums of the rows of their columns."""
    groups, sums = _grouped(layers, torch.stack([*columns.values()], dim=1), per)
    return _named(tuple(columns), groups, sums)


def shares(ratios: Mapping[str, tuple[Tensor, Tensor]], layers: Sequence[str], per: str) -> MetricTable:
    """Return metrics of each layer, or type of layer, and in total: sum of parts over sum of wholes.

    ratios: parts and wholes by metric, a row for each layer, (n,) float64. NaN for 0/0: not defined.
    """
    parts, wholes = zip(*ratios.values(), strict=True)
    groups, sums = _grouped(layers, torch.stack((*parts, *wholes), dim=1), per)
    return _named(tuple(ratios), groups, sums[:, : len(parts)] / sums[:, len(parts) :])


def _grouped(layers: Sequence[str], rows: Tensor, per: str) -> tuple[tuple[str, ...], Tensor]:
    """Return the groups, the last of which is `total`, and the sums of their rows; no layers: no groups."""
    if not layers:
        return (), rows
    names, each = tuple(layers), rows
    if per == "type":
        members: dict[str, list[Tensor]] = {}
        for layer, row in zip(layers, rows.unbind(), strict=True):
            members.setdefault(layer_type(layer), []).append(row)
        names, each = tuple(members), torch.stack([torch.stack(own).sum(dim=0) for own in members.values()])
    return (*names, "total"), torch.cat((each, rows.sum(dim=0, keepdim=True)))


def _named(metrics: tuple[str, ...], groups: tuple[str, ...], values: Tensor) -> MetricTable:
    """Return the numbers of a table by name. values: a row for each group, a column for each metric."""
    return MetricTable(_places(metrics, groups), values.flatten())


@functools.lru_cache(maxsize=64)
def _places(metrics: tuple[str, ...], groups: tuple[str, ...]) -> dict[str, int]:
    """Return the places of the metrics of all groups, group by group: always alike."""
    names = [f"{metric}/{group}" for group in groups for metric in metrics]
    return {name: place for place, name in enumerate(names)}
