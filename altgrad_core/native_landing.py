"""The loop of landing.c: grid-stored weights, after a step, back to their grids in one call on a CPU."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from altgrad_core import native
from altgrad_core.format import Format
from altgrad_core.grid_scales import GridScales
from altgrad_core.random_bits import stream_key_table

_SOURCE = Path(__file__).with_name("landing.c")


@functools.cache
def _loops() -> ctypes.CDLL | None:
    """Return the compiled file with the types of its arguments declared; None where there is none."""
    loops = native.library(_SOURCE)
    if loops is not None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        loops.land.argtypes = [count, pointer, pointer, ctypes.c_int32, pointer]
        loops.land.restype = None
    return loops


def land(
    weights: Sequence[Tensor],
    formats: Sequence[Format],
    scales: GridScales,
    stream: tuple[int, int] | None,
    watched: Mapping[Tensor, Tensor],
) -> tuple[set[int], dict[Tensor, Tensor]]:
    """Round the weights in place where their scales surely stay.

    stream: (seed, step) of stochastic rounding, whose third part is a weight's place; None: to nearest even.
    watched: weights to what they were before the step.
    Returns the places of those rounded, and of those watched among them the updates before rounding.
    """
    loops = None if native.recording() else _loops()
    found = {} if loops is None else _borrowed(weights, formats, watched)
    if loops is None or not found:
        return set(), {}
    intended = {
        weights[place]: torch.empty_like(weights[place]) for place in found if weights[place] in watched
    }
    keys = None if stream is None else stream_key_table(*stream, list(found))
    rows = [
        [
            weights[place].data_ptr(),
            *_addresses(watched.get(weights[place]), intended.get(weights[place])),
            borrowed.quantize,
            borrowed.context,
            scales.scales[place].data_ptr(),
            0 if keys is None else keys.data_ptr() + 8 * row,
            weights[place].numel(),
        ]
        for row, (place, borrowed) in enumerate(found.items())
    ]
    on_host = [scales.on_host(place) for place in found]
    addresses = torch.tensor(rows, dtype=torch.int64, device="cpu")
    ranges = torch.tensor([[*one.limits, *one.quiet] for one in on_host], dtype=torch.float64, device="cpu")
    done = torch.zeros(len(rows), dtype=torch.int64, device="cpu")
    split = native.too_few_for_threads([row[-1] for row in rows])
    tables = native.address(addresses), native.address(ranges)
    loops.land(len(rows), *tables, split, native.address(done))
    landed = {place for place, one in zip(found, done.tolist(), strict=True) if one}
    return landed, {
        weights[place]: intended[weights[place]] for place in landed if weights[place] in intended
    }


def _borrowed(
    weights: Sequence[Tensor], formats: Sequence[Format], watched: Mapping[Tensor, Tensor]
) -> dict[int, native.BlockLoops]:
    """Return the loops of the weights that the loop in C can take, by their places."""
    blocks, found = native.Blocks(), {}
    for place, (weight, format) in enumerate(zip(weights, formats, strict=True)):
        loops = blocks.of(format) if native.readable(weight, watched.get(weight, weight)) else None
        if loops is not None:
            found[place] = loops
    return found


def _addresses(*tensors: Tensor | None) -> Iterator[int]:
    return (0 if one is None else one.data_ptr() for one in tensors)
