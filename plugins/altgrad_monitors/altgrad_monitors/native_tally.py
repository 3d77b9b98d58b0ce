"""The loop of tally.c, called for all weights of a step at once.

What goes in is a table of integers, a row for each weight: the struct Weight of tally.c, whose fields are all
eight bytes wide. A row is made anew in each step: gradients may lie elsewhere.
"""

from __future__ import annotations

import array
import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from altgrad_core import native
from altgrad_core.hookspecs import Step
from altgrad_monitors.tally import COUNTS, SUMS, Asked, Tally, recorded, scale_then

_SOURCE = Path(__file__).with_name("tally.c")
CHUNK = 61440  # as in tally.c
_WORDS, _RECODE, _STALL, _DESCENT, _IN_RUNGS = 1, 2, 4, 8, 16


@functools.cache
def _loops() -> ctypes.CDLL | None:
    """Return the compiled file with the types of its arguments declared; None where there is none."""
    loops = native.library(_SOURCE)
    if loops is not None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        loops.tally.argtypes = [count, pointer, count, pointer, pointer, pointer]
        loops.tally.restype = None
    return loops


def tallied(
    asked: Mapping[str, Asked],
    step: Step,
    before: Mapping[str, Tensor],
    now: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
) -> Tally | None:
    """Tally those of the weights that the loop can take; leave their codes in `now`, their values in `kept`.

    before, now: codes by parameter name, which may be the same memory. Of a weight that is recoded, the codes
    before the step are filled in. kept: of some weights; may be the memory of `step.before`. None where the
    loop takes none.
    """
    loops = None if native.recording() else _loops()
    blocks, names, rows, chunks = native.Blocks(), [], [], 0
    for name, ask in asked.items() if loops is not None else ():
        row = _row(name, step, ask, (before[name], now[name], kept.get(name)), blocks)
        if row is not None:
            names.append(name)
            rows += [*row, chunks]
            chunks += -(-now[name].numel() // CHUNK)
    if loops is None or not names:
        return None
    table = array.array("q", rows)  # the soonest made of what has the memory that C reads
    counts = torch.empty((len(names), len(COUNTS)), dtype=torch.int64, device="cpu")
    sums = torch.empty((len(names), len(SUMS)), dtype=torch.float64, device="cpu")
    founds = torch.empty((chunks, len(COUNTS) + len(SUMS)), dtype=torch.int64, device="cpu")
    loops.tally(len(names), table.buffer_info()[0], chunks, *map(native.address, (founds, counts, sums)))
    return Tally(names=names, counts=counts, sums=sums)


def _row(
    name: str, step: Step, ask: Asked, codes: tuple[Tensor, Tensor, Tensor | None], blocks: native.Blocks
) -> list[int] | None:
    """Return a row of the table, less the number of its first chunk; None where the loop cannot take it.

    codes: before the step and after it, and where its values are kept.
    """
    weight, gradient, (before, now, kept) = step.weights[name], step.gradients[name], codes
    value, scale = weight.value, _scale(weight.scale, weight.value)
    scale_before = _scale(scale_then(step, name), value) if ask.recode else scale
    more = ask.stall or ask.descent
    old = step.before[name] if more or ask.recode else None
    intended = recorded(step, name) if more else None
    read = value, gradient, old, intended, kept
    readable = native.readable(*[x for x in read if x is not None])
    loops = blocks.of(weight.format) if scale is not None and readable else None
    if loops is None or scale is None or scale_before is None or scale_before[1] != scale[1]:
        return None
    flags = _WORDS * (now.dtype == torch.int16) + _RECODE * ask.recode
    flags += _STALL * ask.stall + _DESCENT * ask.descent + _IN_RUNGS * ask.in_rungs
    return [
        *[0 if x is None else x.data_ptr() for x in read],
        *(before.data_ptr(), now.data_ptr(), loops.rungs, loops.spacings, loops.context),
        *(*scale, scale_before[0], *scale_before[2:], flags, now.numel()),
    ]


def _scale(scale: Tensor | None, weight: Tensor) -> tuple[int, int, int, int] | None:
    """Return a scale's address, the length of its rows (0: it is one number), and its two strides."""
    if scale is None or scale.dtype != torch.float32 or not scale.is_cpu:
        return None
    if not scale.dim():
        return scale.data_ptr(), 0, 0, 0
    if scale.dim() != 2 or scale.shape != weight.shape:
        return None
    return scale.data_ptr(), scale.shape[1], *scale.stride()
