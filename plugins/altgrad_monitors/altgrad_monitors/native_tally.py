"""The loops of tally.c: called for all weights of a step, or told of weights that land on their grids.

What goes in is a table of integers, a row for each weight: the struct Weight of tally.c, whose fields are all
eight bytes wide. It is made of a plan and stands as long as that; only the addresses of gradients, which may
lie elsewhere in each step, are written anew.
"""

from __future__ import annotations

import array
import ctypes
import functools
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from altgrad_core import native
from altgrad_monitors.plan import Asked, Plan, recorded
from altgrad_monitors.tally import COLUMNS, Tally

_SOURCE = Path(__file__).with_name("tally.c")
CHUNK = 15360  # as in altgrad_core/loops.h
_WORDS, _RECODE, _STALL, _DESCENT, _IN_RUNGS = 1, 2, 4, 8, 16
_FIELDS = 23  # of the struct Weight
_GRADIENT = 1  # column
_FOUND = 8 * len(COLUMNS)  # bytes of the struct Found


@functools.cache
def _loops() -> ctypes.CDLL | None:
    """Return the compiled file with the types of its arguments declared; None where there is none."""
    loops = native.library(_SOURCE)
    if loops is not None:
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        loops.tally.argtypes = [count, pointer, count, pointer]
        loops.gather.argtypes = [count, pointer, pointer]
        loops.tally.restype = loops.gather.restype = None
    return loops


class Table:
    """The rows of the weights of a plan that the loop can take, kept as long as it is the same plan."""

    def __init__(self) -> None:
        self._plan: weakref.ref[Plan] | None = None  # who has it may let it go, and its memory
        self._left_out: tuple[str, ...] = ()
        self._names: tuple[str, ...] = ()
        self._rows = array.array("q")
        self._blocks = native.Blocks()  # whose loops the rows have the addresses of
        self._founds = torch.empty(0)
        self._chunks = 0
        self._told: dict[str, tuple[int, int]] = {}

    def tallied(self, plan: Plan, gradients: Mapping[str, Tensor]) -> Tally | None:
        """Tally those of the weights that the loop can take, and leave what is kept of them.

        None where the loop takes none.
        """
        loops = self._take(plan, gradients)
        if loops is None:
            return None
        table = self._result()
        loops.tally(len(self._names), self._address, self._chunks, native.address(table))
        return Tally(names=self._names, table=table)

    def onlookers(self, plan: Plan, gradients: Mapping[str, Tensor]) -> Mapping[str, tuple[int, int]]:
        """Return what tallies weights on a grid as they land, for those that the loop can take.

        The memory of the plan, and that of the gradients, must stay until the weights have landed; `told`
        returns what was found.
        """
        loops = self._take(plan, gradients)
        if loops is None:
            return {}
        if not self._told:
            look, row = native.entry(loops, "tally_landing"), 8 * _FIELDS
            self._told = {name: (look, self._address + row * at) for at, name in enumerate(self._names)}
        return self._told

    def told(self) -> Tally:
        """Return the tally of the weights of which `onlookers` was told; rows of others mean nothing."""
        loops, table = _loops(), self._result()
        assert loops is not None  # there were onlookers
        loops.gather(len(self._names), self._address, native.address(table))
        return Tally(names=self._names, table=table)

    @property
    def _address(self) -> int:
        return self._rows.buffer_info()[0]

    def _result(self) -> Tensor:
        return torch.empty((len(self._names), len(COLUMNS)), dtype=torch.float64, device="cpu")

    def _take(self, plan: Plan, gradients: Mapping[str, Tensor]) -> ctypes.CDLL | None:
        """Have the rows of a plan, with these gradients; return the loops, None where they take nothing."""
        loops = None if native.recording() or not plan.asked else _loops()
        if loops is None:
            return None
        given = [gradients[name] for name in plan.asked]
        alike = native.readable(*given)
        left_out = () if alike else tuple(name for name in plan.asked if not native.readable(gradients[name]))
        if self._plan is None or self._plan() is not plan or self._left_out != left_out:
            self._make(plan, left_out)
            self._plan, self._left_out = weakref.ref(plan), left_out
        addresses = [gradients[name].data_ptr() for name in self._names]
        self._rows[_GRADIENT::_FIELDS] = array.array("q", addresses)
        return loops if self._names else None

    def _make(self, plan: Plan, left_out: Collection[str]) -> None:
        """Make the rows of those of the plan's weights that the loop can take, less their gradients."""
        self._blocks = native.Blocks()
        rows = {
            name: row
            for name, ask in plan.asked.items()
            if name not in left_out and (row := _row(plan, name, ask, self._blocks)) is not None
        }
        chunks = [-(-row[-1] // CHUNK) for row in rows.values()]
        self._names, self._chunks, self._told = tuple(rows), sum(chunks), {}
        self._founds = torch.empty(_FOUND * self._chunks, dtype=torch.uint8, device="cpu")
        self._rows, first = array.array("q"), 0
        for row, size in zip(rows.values(), chunks, strict=True):
            self._rows.extend([*row, first, self._founds.data_ptr() + _FOUND * first])
            first += size


def _row(plan: Plan, name: str, ask: Asked, blocks: native.Blocks) -> list[int] | None:
    """Return a row, less what `Table` adds to it; None where the loop cannot take the weight."""
    weight, room, aim = plan.weights[name], plan.room, ask.stall or ask.descent
    floats = [
        weight.value,
        plan.before[name] if aim or ask.recode else None,
        recorded(plan.intended, name) if aim else None,
        room.values.get(name),
    ]
    scale = _scale(weight.scale, weight.value)
    of_then = ask.recode or (ask.descent and ask.in_rungs)
    before = _scale(plan.scale_then(name), weight.value) if of_then else scale
    if weight.format is None or not native.readable(*(one for one in floats if one is not None)):
        return None
    loops = blocks.of(weight.format)
    if loops is None or scale is None or before is None or before[1] != scale[1]:
        return None
    now, *others = map(_address_of, [*floats, room.codes_before.get(name), room.codes.get(name)])
    flags = _WORDS * (weight.format.bits > 8) + _RECODE * ask.recode
    flags += _STALL * ask.stall + _DESCENT * ask.descent + _IN_RUNGS * ask.in_rungs
    return [
        *(now, 0, *others, before[0], _address_of(room.scales.get(name))),
        *(loops.rungs, loops.spacings, loops.steps, loops.context),
        *(*scale, *before[2:], flags, weight.value.numel()),
    ]


def _address_of(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _scale(scale: Tensor | None, weight: Tensor) -> tuple[int, int, int, int] | None:
    """Return a scale's address, the length of its rows (0: it is one number), and its two strides."""
    if scale is None or scale.dtype != torch.float32 or not scale.is_cpu:
        return None
    if not scale.dim():
        return scale.data_ptr(), 0, 0, 0
    if scale.dim() != 2 or scale.shape != weight.shape:
        return None
    return scale.data_ptr(), scale.shape[1], *scale.stride()
