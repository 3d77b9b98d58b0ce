"""The loops of tally.c: called for all weights of a step, or told of weights that land on their grids.

What goes in is a table of integers, a row for each weight: the struct Weight of tally.c, whose fields are all
eight bytes wide. As long as the weights, and what is asked of them, stay what they are, so does the table;
only the addresses of what may lie elsewhere in each step, such as gradients, are written anew.
"""

from __future__ import annotations

import array
import ctypes
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from altgrad_core import native
from altgrad_core.hookspecs import Step, Weight
from altgrad_monitors.tally import COUNTS, SUMS, Asked, Tally, recorded, scale_then

_SOURCE = Path(__file__).with_name("tally.c")
CHUNK = 15360  # as in altgrad_core/loops.h
_WORDS, _RECODE, _STALL, _DESCENT, _IN_RUNGS = 1, 2, 4, 8, 16
_FIELDS = 22  # of the struct Weight, of which the first seven are addresses that are written anew
_GRADIENT, _CODES_BEFORE, _CODES = 1, 5, 6
_FOUND = 8 * (len(COUNTS) + len(SUMS))  # bytes of the struct Found

Codes = Mapping[str, Tensor]


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


def tallied(
    asked: Mapping[str, Asked], step: Step, before: Codes, now: Codes, kept: Mapping[str, Tensor]
) -> Tally | None:
    """Tally those of the weights that the loop can take; leave their codes in `now`, their values in `kept`.

    before, now: codes by parameter name, which may be the same memory. Of a weight that is recoded, the codes
    before the step are filled in. kept: of some weights; may be the memory of `step.before`. None where the
    loop takes none.
    """
    return Table().tallied(asked, step, before, now, kept)


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

    def tallied(
        self, asked: Mapping[str, Asked], step: Step, before: Codes, now: Codes, kept: Mapping[str, Tensor]
    ) -> Tally | None:
        """As the function of this module."""
        loops = None if native.recording() else _loops()
        if loops is None:
            return None
        asked = _readable(asked, lambda names: _given(names, asked, step, kept))
        self._take(
            asked, step.weights, {name: scale_then(step, name) for name, ask in asked.items() if ask.recode}
        )
        if not self._names:
            return None
        names = self._names
        values = [step.weights[name].value for name in names]
        codes = ([one[name] for name in names] for one in (before, now))
        self._move(0, values, *_given(names, asked, step, kept), *codes)
        counts, sums = self._results()
        loops.tally(len(names), self._address, self._chunks, native.address(counts), native.address(sums))
        return Tally(names=names, counts=counts, sums=sums)

    def onlookers(
        self,
        asked: Mapping[str, Asked],
        weights: Mapping[str, Weight],
        gradients: Mapping[str, Tensor],
        before: Codes,
        now: Codes,
    ) -> dict[str, tuple[int, int]]:
        """Return what tallies weights on a grid as they land, for those that the loop can take.

        The memory of gradients and codes must stay until they have landed; `told` returns what was found.
        """
        loops = None if native.recording() else _loops()
        if loops is None:
            return {}
        self._take(_readable(asked, lambda names: [[gradients[name] for name in names]]), weights, {})
        names = self._names
        self._move(_GRADIENT, [gradients[name] for name in names])
        self._move(_CODES_BEFORE, [before[name] for name in names], [now[name] for name in names])
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

    def _move(self, first: int, *columns: Sequence[Tensor | None]) -> None:
        """Write addresses into columns from the first one."""
        for column, tensors in enumerate(columns, start=first):
            addresses = [0 if one is None else one.data_ptr() for one in tensors]
            self._rows[column::_FIELDS] = array.array("q", addresses)

    def _take(
        self,
        asked: Mapping[str, Asked],
        weights: Mapping[str, Weight],
        scales_then: Mapping[str, Tensor | None],
    ) -> None:
        """Make the rows of those of the weights that the loop can take, less their moving addresses.

        scales_then: of the weights that are recoded.
        """
        if weights is self._weights and asked == self._asked and not scales_then:
            return
        self._blocks, rows = native.Blocks(), {}
        for name, ask in asked.items():
            row = _row(weights[name], ask, scales_then.get(name), self._blocks)
            if row is not None:
                rows[name] = row
        chunks = [-(-row[-1] // CHUNK) for row in rows.values()]
        self._names, self._weights, self._asked, self._chunks = list(rows), weights, asked, sum(chunks)
        self._founds = torch.empty(_FOUND * self._chunks, dtype=torch.uint8, device="cpu")
        self._rows, first = array.array("q"), 0
        for row, size in zip(rows.values(), chunks, strict=True):
            self._rows.extend([*row, first, self._founds.data_ptr() + _FOUND * first])
            first += size


def _readable(
    asked: Mapping[str, Asked], read: Callable[[Collection[str]], Iterable[Sequence[Tensor | None]]]
) -> Mapping[str, Asked]:
    """Return those of the weights of which all that is to be read can be: columns of what `read` returns."""
    if native.readable(*(x for column in read(asked) for x in column if x is not None)):
        return asked
    return {
        name: ask
        for name, ask in asked.items()
        if native.readable(*(x for column in read([name]) for x in column if x is not None))
    }


def _given(
    names: Collection[str], asked: Mapping[str, Asked], step: Step, kept: Mapping[str, Tensor]
) -> list[list[Tensor | None]]:
    """Return the gradients, the weights before, the intended updates and the memory for values: columns."""
    aims = [(name, ask.stall or ask.descent, ask.recode) for name in names for ask in [asked[name]]]
    return [
        [step.gradients[name] for name in names],
        [step.before[name] if aim or recode else None for name, aim, recode in aims],
        [recorded(step, name) if aim else None for name, aim, _ in aims],
        [kept.get(name) for name in names],
    ]


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
        *(0, 0, 0, 0, 0, 0, 0),
        *(loops.rungs, loops.values, loops.spacings, loops.context),
        *(*scale, before[0], *before[2:], flags, weight.value.numel()),
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
