"""The loop of landing.c: grid-stored weights, after a step, back to their grids in one call on a CPU."""

from __future__ import annotations

import array
import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs
import torch
from torch import Tensor

from altgrad_core import native
from altgrad_core.format import Format
from altgrad_core.grid_scales import GridScales
from altgrad_core.random_bits import stream_state

_SOURCE = Path(__file__).with_name("landing.c")

_BEFORE, _INTENDED, _ELEMENTS, _ONLOOKERS = 1, 2, 7, 8  # columns of a row, the struct Weight

Onlooker = tuple[int, int]
"""Addresses of a C function of the type Look in loops.h, and of its context, for one weight."""


@functools.cache
def _loops() -> ctypes.CDLL | None:
    """Return the compiled file with the types of its arguments declared; None where there is none."""
    loops = native.library(_SOURCE)
    if loops is not None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        loops.land.argtypes = [count, pointer, pointer, pointer, count, ctypes.c_int32, pointer]
        loops.land.restype = None
    return loops


@attrs.define(eq=False)
class _Tables:
    """Weights as the loop wants them."""

    places: list[int]
    """Of the weights that the loop can take; the others are not in the tables."""
    rows: Tensor  # (n, 9) int64, the struct Weight
    ranges: Tensor  # (n, 4) float64, the struct Range
    done: Tensor  # (n,) int64
    split: bool
    owners: list[native.BlockLoops]
    updates: dict[int, Tensor] = attrs.field(factory=dict)
    """Where the loop leaves updates before rounding, by place: fresh pages cost more than it does."""
    onlookers: list[dict[Tensor, Onlooker | None]] = attrs.field(factory=list)
    """Who was told last of weights."""
    told: array.array[int] = attrs.field(factory=lambda: array.array("q"))
    """Their addresses, which the rows refer to."""


_kept: native.KeptTables[_Tables] = native.KeptTables()


def land(
    weights: Sequence[Tensor],
    formats: Sequence[Format],
    scales: GridScales,
    stream: tuple[int, int] | None,
    watched: Mapping[Tensor, Tensor],
    onlookers: Sequence[Mapping[Tensor, Onlooker | None]] = (),
) -> tuple[set[int], dict[Tensor, Tensor]]:
    """Round the weights in place where their scales surely stay.

    stream: (seed, step) of stochastic rounding, whose third part is a weight's place; None: to nearest even.
    watched: weights to what they were before the step. onlookers: who is told of weights, while they are in
    the cache, what they were before their rounding and what they are.
    Returns the places of those rounded, and of those watched among them the updates before rounding.
    """
    loops = None if native.recording() else _loops()
    on_cpu = all(weight.is_cpu for weight in weights)  # else the numbers below would be waited for
    tables = _tables_of(weights, formats, scales) if loops is not None and on_cpu else None
    if loops is None or tables is None:
        return set(), {}
    intended = _watch(tables, weights, watched)
    inputs = native.address(tables.rows), native.address(tables.ranges)
    state = None if stream is None else ctypes.byref(ctypes.c_uint64(stream_state(*stream)))
    _tell(tables, weights, onlookers)
    how = state, len(onlookers), tables.split, native.address(tables.done)
    loops.land(len(tables.places), *inputs, *how)
    landed = {place for place, one in zip(tables.places, tables.done.tolist(), strict=True) if one}
    return landed, {weights[place]: one for place, one in intended.items() if place in landed}


def agreed(
    onlookers: Sequence[Mapping[Tensor, Onlooker | None]],
) -> tuple[Sequence[Mapping[Tensor, Onlooker | None]], set[Tensor]]:
    """Return who is told of weights as they land, and those of which nobody is.

    Of one weight all who want it are told, or nobody.
    """
    untold = {weight for one in onlookers for weight, found in one.items() if found is None}
    if not untold:
        return onlookers, untold
    return [
        {weight: found for weight, found in one.items() if weight not in untold} for one in onlookers
    ], untold


def _watch(tables: _Tables, weights: Sequence[Tensor], watched: Mapping[Tensor, Tensor]) -> dict[int, Tensor]:
    """Return where the loop leaves the updates before rounding of the weights that are watched, by place."""
    tables.rows[:, _BEFORE : _INTENDED + 1] = 0
    intended: dict[int, Tensor] = {}
    if not watched:
        return intended
    pairs = []
    for place in tables.places:
        before, pair = watched.get(weights[place]), (0, 0)
        if before is not None and native.readable(before):
            if place not in tables.updates:
                tables.updates[place] = torch.empty_like(before)
            intended[place] = tables.updates[place]
            pair = before.data_ptr(), intended[place].data_ptr()
        pairs.append(pair)
    tables.rows[:, _BEFORE : _INTENDED + 1] = torch.tensor(pairs, dtype=torch.int64, device="cpu")
    return intended


def _tell(
    tables: _Tables, weights: Sequence[Tensor], onlookers: Sequence[Mapping[Tensor, Onlooker | None]]
) -> None:
    """Have the onlookers of each weight among the tables, where they are not those of the step before."""
    if tables.onlookers == [*onlookers]:
        return
    nobody = 0, 0
    pairs = [one.get(weights[place]) or nobody for place in tables.places for one in onlookers]
    tables.onlookers = [dict(one) for one in onlookers]
    tables.told = array.array("q", [address for pair in pairs for address in pair])
    if pairs:
        size = tables.told.itemsize * 2 * len(onlookers)
        first = tables.told.buffer_info()[0]
        tables.rows[:, _ONLOOKERS] = torch.arange(len(tables.places), device="cpu") * size + first


def _tables_of(weights: Sequence[Tensor], formats: Sequence[Format], scales: GridScales) -> _Tables | None:
    """Return the tables, made anew when something has changed or moved; None: no weight is for the loop."""
    where = native.whereabouts(weights), native.whereabouts(scales.scales)
    made_of = *where, list(formats), scales.on_host(), torch.get_num_threads()
    tables = _kept.get(scales, None, made_of, lambda: _made(weights, formats, scales))
    return tables if tables.places else None


def _made(weights: Sequence[Tensor], formats: Sequence[Format], scales: GridScales) -> _Tables:
    blocks, rows, ranges, owners = native.Blocks(), {}, [], []
    for place, (weight, format) in enumerate(zip(weights, formats, strict=True)):
        loops = blocks.of(format) if native.readable(weight) else None
        if loops is not None:
            scale, on_host = scales.scales[place].data_ptr(), scales.on_host()[place]
            where = [weight.data_ptr(), 0, 0, loops.quantize, loops.context, scale, place, weight.numel(), 0]
            rows[place] = where
            ranges.append([*on_host.limits, *on_host.quiet])
            owners.append(loops)
    return _Tables(
        places=list(rows),
        rows=torch.tensor(list(rows.values()), dtype=torch.int64, device="cpu"),
        ranges=torch.tensor(ranges, dtype=torch.float64, device="cpu"),
        done=torch.zeros(len(rows), dtype=torch.int64, device="cpu"),
        split=bool(rows) and native.too_few_for_threads([row[_ELEMENTS] for row in rows.values()]),
        owners=owners,
    )
