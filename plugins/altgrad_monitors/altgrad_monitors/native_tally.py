"""The loops of tally.c: called for all weights of a step, or told of weights that land on their grids.

What goes in is a table of integers, a row for each weight: the struct Weight of tally.c, whose fields are all
eight bytes wide. As long as the weights, and what is asked of them, stay what they are, so does the table;
only the addresses of what may lie elsewhere in each step, such as gradients, are written anew.
"""

from __future__ import annotations

import array
import ctypes
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from altgrad_core import native
from altgrad_core.hookspecs import Step, Weight
from altgrad_monitors.kept import Room
from altgrad_monitors.tally import COUNTS, SUMS, Asked, Tally, recorded, scale_then

_SOURCE = Path(__file__).with_name("tally.c")
CHUNK = 15360  # as in altgrad_core/loops.h
_WORDS, _RECODE, _STALL, _DESCENT, _IN_RUNGS = 1, 2, 4, 8, 16
_FIELDS = 23  # of the struct Weight, of which the first nine are addresses that are written anew
_CODES_BEFORE = 5  # column
_FOUND = 8 * (len(COUNTS) + len(SUMS))  # bytes of the struct Found


@functools.cache
def _loops() -> ctypes.CDLL | None:
    """Return the compiled file with the types of its arguments declared; None where there is none."""
    loops = native.library(_SOURCE)
    if loops is not None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        loops.tally.argtypes = [count, pointer, count, pointer, pointer]
        loops.gather.argtypes = [count, pointer, pointer, pointer]
        loops.tally.restype = loops.gather.restype = None
    return loops


class Table:
    """The rows of some weights, kept from step to step."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._weights: Mapping[str, Weight] = {}
        self._asked: Mapping[str, Asked] = {}
        self._rows = array.array("q")
        self._blocks = native.Blocks()  # whose loops the rows have the addresses of
        self._founds = torch.empty(0)
        self._chunks = 0

    def tallied(self, asked: Mapping[str, Asked], step: Step, room: Room) -> Tally | None:
        """Tally those of the weights that the loop can take, and leave what is kept of them.

        None where the loop takes none.
        """
        loops = None if native.recording() else _loops()
        if loops is None:
            return None
        given = {name: _given(name, ask, step, room) for name, ask in asked.items()}
        asked = _readable(asked, given)
        self._take(asked, step.weights, _scales_then(asked, step))
        if not self._names:
            return None
        values = [step.weights[name].value for name in self._names]
        self._move(values, *zip(*(given[name] for name in self._names), strict=True))
        self._move_kept(room, [scale_then(step, name) for name in self._names])
        counts, sums = self._results()
        loops.tally(len(values), self._address, self._chunks, native.address(counts), native.address(sums))
        return Tally(names=self._names, counts=counts, sums=sums)

    def onlookers(
        self,
        asked: Mapping[str, Asked],
        weights: Mapping[str, Weight],
        gradients: Mapping[str, Tensor],
        room: Room,
    ) -> dict[str, tuple[int, int]]:
        """Return what tallies weights on a grid as they land, for those that the loop can take.

        room: there are values before the step in it, of all. Its memory, and that of the gradients, must
        stay until the weights have landed; `told` returns what was found.
        """
        loops = None if native.recording() else _loops()
        if loops is None:
            return {}
        asked = _readable(asked, {name: (gradients[name], room.values[name]) for name in asked})
        self._take(asked, weights, {name: room.scales[name] for name, ask in asked.items() if ask.recode})
        names, nothing = self._names, [None] * len(self._names)
        values = [room.values[name] for name in names]
        self._move(nothing, [gradients[name] for name in names], values, nothing, values)
        self._move_kept(room._replace(scales={}), [room.scales.get(name) for name in names])  # which stay
        look, row = native.entry(loops, "tally_landing"), 8 * _FIELDS
        return {name: (look, self._address + row * place) for place, name in enumerate(names)}

    def told(self) -> Tally:
        """Return the tally of the weights of which `onlookers` was told; rows of others mean nothing."""
        loops, (counts, sums) = _loops(), self._results()
        assert loops is not None  # there were onlookers
        loops.gather(len(self._names), self._address, native.address(counts), native.address(sums))
        return Tally(names=self._names, counts=counts, sums=sums)

    @property
    def _address(self) -> int:
        return self._rows.buffer_info()[0]

    def _results(self) -> tuple[Tensor, Tensor]:
        shape = len(self._names)
        counts = torch.empty((shape, len(COUNTS)), dtype=torch.int64, device="cpu")
        return counts, torch.empty((shape, len(SUMS)), dtype=torch.float64, device="cpu")

    def _move_kept(self, room: Room, scales_before: Sequence[Tensor | None]) -> None:
        codes_before, codes, scales = (
            [one.get(name) for name in self._names] for one in (room.codes_before, room.codes, room.scales)
        )
        self._move(codes_before, codes, scales_before, scales, first=_CODES_BEFORE)

    def _move(self, *columns: Sequence[Tensor | None], first: int = 0) -> None:
        """Write addresses into columns from the first one."""
        for column, tensors in enumerate(columns, start=first):
            addresses = [0 if one is None else one.data_ptr() for one in tensors]
            self._rows[column::_FIELDS] = array.array("q", addresses)

    def _take(
        self, asked: Mapping[str, Asked], weights: Mapping[str, Weight], scales_then: Mapping[str, Tensor]
    ) -> None:
        """Make the rows of those of the weights that the loop can take, less their moving addresses.

        scales_then: of the weights that are recoded.
        """
        single = not any([scale.dim() for scale in scales_then.values()])  # noqa: C419 - sooner
        if weights is self._weights and asked == self._asked and single:
            return
        self._blocks, rows = native.Blocks(), {}
        for name, ask in asked.items():
            row = _row(weights[name], ask, scales_then.get(name), self._blocks)
            if row is not None:
                rows[name] = row
        chunks = [-(-row[-1] // CHUNK) for row in rows.values()]
        self._names, self._asked, self._chunks = list(rows), asked, sum(chunks)
        self._weights = weights if single else {}  # rows of scales may lie otherwise in the next step
        self._founds = torch.empty(_FOUND * self._chunks, dtype=torch.uint8, device="cpu")
        self._rows, first = array.array("q"), 0
        for row, size in zip(rows.values(), chunks, strict=True):
            self._rows.extend([*row, first, self._founds.data_ptr() + _FOUND * first])
            first += size


def _readable(
    asked: Mapping[str, Asked], given: Mapping[str, Sequence[Tensor | None]]
) -> Mapping[str, Asked]:
    """Return those of the weights of which all that is given can be read."""
    found = {id(x): x for each in given.values() for x in each if x is not None}
    if native.readable(*found.values()):
        return asked
    return {
        name: ask
        for name, ask in asked.items()
        if native.readable(*(x for x in given[name] if x is not None))
    }


def _given(name: str, ask: Asked, step: Step, room: Room) -> tuple[Tensor | None, ...]:
    """Return the gradient, the weight before, the intended update, and the memory for values."""
    aim = ask.stall or ask.descent
    before = step.before[name] if aim or ask.recode else None
    return step.gradients[name], before, recorded(step, name) if aim else None, room.values.get(name)


def _scales_then(asked: Mapping[str, Asked], step: Step) -> dict[str, Tensor]:
    """Return the scales before the step of weights that are recoded."""
    found = {name: scale_then(step, name) for name, ask in asked.items() if ask.recode}
    return {name: scale for name, scale in found.items() if scale is not None}


def _row(weight: Weight, ask: Asked, scale_then: Tensor | None, blocks: native.Blocks) -> list[int] | None:
    """Return a row, less what `Table` adds to it; None where the loop cannot take the weight.

    scale_then: of before the step, where it is recoded.
    """
    scale = _scale(weight.scale, weight.value)
    before = _scale(scale_then, weight.value) if ask.recode else scale
    loops = blocks.of(weight.format) if weight.format is not None and native.readable(weight.value) else None
    if loops is None or scale is None or before is None or before[1] != scale[1]:
        return None
    flags = _WORDS * (weight.format.bits > 8) + _RECODE * ask.recode
    flags += _STALL * ask.stall + _DESCENT * ask.descent + _IN_RUNGS * ask.in_rungs
    return [
        *(0, 0, 0, 0, 0, 0, 0, 0, 0),
        *(loops.rungs, loops.spacings, loops.steps, loops.context),
        *(*scale, *before[2:], flags, weight.value.numel()),
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
