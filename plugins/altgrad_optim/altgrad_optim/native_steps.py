"""The loops of steps.c, called for all tensors of a group at once: an optimizer's step on a CPU in one pass.

What goes in are tables, a row for each weight, of addresses (int64) and of numbers (float64): the structs of
steps.c, whose fields are all eight bytes wide.
"""

from __future__ import annotations

import array
import ctypes
import functools
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad_core import native
from altgrad_core.grid_scales import HostScale

_SOURCE = Path(__file__).with_name("steps.c")
PIECE = 1024  # as in steps.c

POWERS = {0.0: 0, 1.0: 1, 0.5: 2, -0.5: 3, -1.0: 4}
"""Exponents of the stiffness for which there are loops, to their numbers there."""
NORMALIZERS = {"none": 0, "rms": 1, "mean": 2, "max": 3}

_LEFT, _AMAX, _PAST, _LANDING_FIELDS = 2, 3, 4, 6  # of struct Landed: columns, and how many

_ADDRESS, _WORD, _NUMBER = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class _Moments(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("beta1", "beta2")),
        *((name, _NUMBER) for name in ("first", "second", "rest", "eps")),
    ]


class _Manifold(ctypes.Structure):
    _fields_ = [
        ("moments", _Moments),
        *((name, _WORD) for name in ("gradient_power", "update_power", "normalize")),
        *((name, _NUMBER) for name in ("max_stiffness", "smallest", "lr", "decay")),
    ]


class _Grid(ctypes.Structure):
    _fields_ = [
        ("moments", _Moments),
        *((name, _NUMBER) for name in ("momentum", "clip", "lr", "decay")),
        ("adam", _WORD),
        ("state", ctypes.c_uint64),
    ]


@functools.cache
def _loops() -> ctypes.CDLL | None:
    """Return the compiled file with the types of its arguments declared; None where there is none."""
    loops = native.library(_SOURCE)
    if loops is not None:
        count = ctypes.c_int64
        loops.manifold_steps.argtypes = [count, *[_ADDRESS] * 4, count, _WORD]
        loops.grid_steps.argtypes = [count, *[_ADDRESS] * 6, count, _WORD, _ADDRESS]
        loops.grid_steps.restype = count
        loops.grid_land.argtypes = [count, *[_ADDRESS] * 4, ctypes.c_uint64, _WORD]
        loops.grid_land.restype = None
    return loops


def available() -> bool:
    """Whether the loops may be called now: they are compiled, and nobody records what is done to tensors."""
    return not native.recording() and _loops() is not None


def _moments(betas: tuple[float, float], eps: float) -> _Moments:
    first, second = betas
    return _Moments(first, second, 1 - first, second, 1 - second, eps)


class ManifoldMove(NamedTuple):
    """One weight's step of ManifoldAdamW: where everything is, in the order of steps.c."""

    weight: int
    gradient: int
    first_moment: int
    second_moment: int
    counter: int  # 0-d float32: the steps taken so far
    stiffness: int  # 0: the format's spacing at the scale
    spacings: int  # of the stiffness
    context: int
    scale: int
    position: int  # 0, or where the spacings that it has moved are counted
    ulps: int  # the format's spacings
    format: int  # and their context
    elements: int


class ManifoldTable:
    """The moves of a group's weights, as the loops read them; good as long as nothing in them has moved."""

    def __init__(self, moves: Sequence[ManifoldMove]) -> None:
        self.sizes = [move.elements for move in moves]
        self.addresses = _table(moves)

    def take_stiffness(self, row: int, place: int) -> None:
        """Have the stiffness of one weight read from this address."""
        self.addresses[row, ManifoldMove._fields.index("stiffness")] = place


def manifold_steps(
    table: ManifoldTable,
    *,
    lr: float,
    decay: float,
    betas: tuple[float, float],
    eps: float,
    powers: tuple[float, float],
    normalize: str,
    max_stiffness: float,
) -> None:
    """Take the step of each weight, which is first multiplied by `decay`.

    powers: the exponents (p, q) of the placement, of `POWERS`.
    """
    limits = torch.finfo(torch.float32)
    options = _Manifold(
        _moments(betas, eps),
        *(POWERS[power] for power in powers),
        NORMALIZERS[normalize],
        max_stiffness,
        limits.smallest_normal * limits.eps,
        lr,
        decay,
    )
    room, threads, split = _shares(table.sizes)
    rooms = _room(threads * room), _room(threads * room // PIECE, torch.float64)
    inputs = native.address(table.addresses), ctypes.byref(options)
    _in_use().manifold_steps(len(table.sizes), *inputs, *map(native.address, rooms), room, split)


class GridMove(NamedTuple):
    """One weight's step of GridOptim: where everything is, and its numbers, in the order of steps.c."""

    weight: int
    gradient: int
    first_moment: int  # the velocity without Adam
    second_moment: int
    counter: int
    intended: int  # 0, or where -r is left
    rungs: int
    values: int
    moves: int
    spacings: int
    quantize: int
    context: int
    scale: int
    number: int  # of its random stream
    least_rung: int  # of the format
    most_rung: int
    elements: int


class GridTable:
    """The moves of a group's weights, as the loops read them; good as long as nothing in them has moved."""

    def __init__(self, moves: Sequence[GridMove]) -> None:
        self.sizes = [move.elements for move in moves]
        self.addresses = _table(moves)
        self._intended: list[int] = []

    def leave_intended(self, places: list[int]) -> None:
        """Have -r left at these addresses, one a weight; none: nowhere."""
        if places != self._intended:
            self._intended = places
            column = self.addresses[:, GridMove._fields.index("intended")]
            column.copy_(torch.tensor(places or 0, device="cpu"))


def ranges_table(scales: Iterable[HostScale]) -> array.array[float]:
    """Return what limits the steps of weights with these scales, as the loops read it."""
    return _numbers(number for scale in scales for pair in scale for number in pair)


class Left(NamedTuple):
    """A weight that has not landed, because its scale may have to change."""

    place: int
    """Among the moves."""
    amax: float
    """The largest magnitude it would have without a bound, in scaled units; NaN where an element is."""
    past_end: bool
    """Whether an element would go past the last rung."""


class Rescaled(NamedTuple):
    """How a weight lands whose scale has been looked at."""

    place: int
    ratio: float  # of its scale to the one before
    low: float  # limits of the values, in scaled units
    high: float


class GridSteps:
    """One step of GridOptim's weights, taken when this is made; what is `left` waits for `land`.

    ranges: `ranges_table` of the same weights. state: of the random streams of the step
    (`random_bits.stream_state`).
    """

    def __init__(
        self,
        table: GridTable,
        ranges: array.array[float],
        *,
        state: int,
        lr: float,
        decay: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        clip: float,
        adam: bool,
    ) -> None:
        options = _Grid(_moments(betas, eps), momentum, clip, lr, decay, adam, state)
        self._table, self._state = table, state
        room, threads, split = _shares(table.sizes)
        each = threads * room
        rooms = _room(each * 5, torch.int8)  # of two bytes, two, and one
        first = rooms.data_ptr()
        self._landings = torch.zeros((len(table.sizes), _LANDING_FIELDS), dtype=torch.int64, device="cpu")
        self._waiting = _in_use().grid_steps(
            len(table.sizes),
            table.addresses.data_ptr(),
            ranges.buffer_info()[0],
            ctypes.byref(options),
            *(first, first + 2 * each, first + 4 * each),
            room,
            split,
            self._landings.data_ptr(),
        )
        if self._waiting < 0:
            raise MemoryError("no memory for the values of a weight whose scale changes")

    @property
    def counts(self) -> Tensor:
        """(n, 2) int64: of each weight how many elements changed, 0 where it has not landed, and how many
        have a non-zero gradient.
        """
        return self._landings[:, :2]

    def left(self) -> list[Left]:
        """Return the weights that have not landed."""
        if not self._waiting:
            return []
        rows, amax = self._landings.tolist(), self._landings.view(torch.float64)[:, _AMAX].tolist()
        return [
            Left(place, one, bool(row[_PAST]))
            for place, (row, one) in enumerate(zip(rows, amax, strict=True))
            if row[_LEFT]
        ]

    def land(self, rescaled: Sequence[Rescaled], first: int | None) -> None:
        """Land what is left, by the scales as they are now.

        first: the number of the first random stream; None: to nearest even.
        """
        state = None if first is None else ctypes.byref(ctypes.c_uint64(self._state))
        rows = _numbers(itertools.chain.from_iterable(rescaled))
        _in_use().grid_land(
            len(rescaled),
            rows.buffer_info()[0],
            native.address(self._table.addresses),
            native.address(self._landings),
            state,
            first or 0,
            native.too_few_for_threads([self._table.sizes[one.place] for one in rescaled]),
        )


def _shares(sizes: Sequence[int]) -> tuple[int, int, bool]:
    """Return how threads share the work: room for each, a multiple of PIECE, how many rooms, and whether all
    work on one weight at a time, because there are too few of them for one each.
    """
    threads, split = torch.get_num_threads(), native.too_few_for_threads(sizes)
    return -(-max(sizes) // PIECE) * PIECE, 1 if split else threads, split


def _room(elements: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(elements, dtype=dtype, device="cpu")  # whatever torch's defaults are


def _table(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def _numbers(each: Iterable[float]) -> array.array[float]:
    return array.array("d", each)  # a list of floats takes a tensor five times as long


def _in_use() -> ctypes.CDLL:
    loops = _loops()
    if loops is None:
        raise RuntimeError("there is no compiled loop; ask `available` first")
    return loops
