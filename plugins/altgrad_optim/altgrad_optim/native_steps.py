"""The loops of steps.c, called for all tensors of a group at once: an optimizer's step on a CPU in one pass.

What goes in are tables, a row for each weight, of addresses (int64) and of numbers (float64): the structs of
steps.c, whose fields are all eight bytes wide.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad_core import native

_SOURCE = Path(__file__).with_name("steps.c")
PIECE = 1024  # as in steps.c

POWERS = {0.0: 0, 1.0: 1, 0.5: 2, -0.5: 3, -1.0: 4}
"""Exponents of the stiffness for which there are loops, to their numbers there."""
NORMALIZERS = {"none": 0, "rms": 1, "mean": 2, "max": 3}

_LANDING_FIELDS = 5

_ADDRESS, _WORD, _NUMBER = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class _Moments(ctypes.Structure):
    _fields_ = [(name, _NUMBER) for name in ("first", "second", "rest", "eps")]


class _Manifold(ctypes.Structure):
    _fields_ = [
        ("moments", _Moments),
        *((name, _WORD) for name in ("gradient_power", "update_power", "normalize")),
        *((name, _NUMBER) for name in ("max_stiffness", "smallest")),
    ]


class _Grid(ctypes.Structure):
    _fields_ = [("moments", _Moments), ("momentum", _NUMBER), ("clip", _NUMBER), ("adam", _WORD)]


@functools.cache
def _loops() -> ctypes.CDLL | None:
    """Return the compiled file with the types of its arguments declared; None where there is none."""
    loops = native.library(_SOURCE)
    if loops is not None:
        count = ctypes.c_int64
        loops.manifold_steps.argtypes = [count, *[_ADDRESS] * 5, count, _WORD]
        loops.grid_steps.argtypes = [count, *[_ADDRESS] * 4, count, _WORD, _ADDRESS]
        loops.take.argtypes = [_ADDRESS, _ADDRESS, count]
    return loops


def available() -> bool:
    """Whether the loops may be called now: they are compiled, and nobody records what is done to tensors."""
    return not native.recording() and _loops() is not None


def _moments(betas: tuple[float, float], eps: float) -> _Moments:
    first, second = betas
    return _Moments(1 - first, second, 1 - second, eps)


class ManifoldMove(NamedTuple):
    """One weight's step of ManifoldAdamW: where everything is, and its numbers."""

    weight: Tensor
    gradient: Tensor
    first_moment: Tensor
    second_moment: Tensor
    stiffness: Tensor | None  # None: the spacing of `format` at `scale`
    format: native.BlockLoops
    scale: Tensor
    corrections: tuple[float, float]
    lr: float
    decay: float  # w is multiplied by it


def manifold_steps(
    moves: Sequence[ManifoldMove],
    *,
    betas: tuple[float, float],
    eps: float,
    powers: tuple[float, float],
    normalize: str,
    max_stiffness: float,
) -> None:
    """Take the step of each weight; `powers` are the exponents (p, q) of the placement, of `POWERS`."""
    limits = torch.finfo(torch.float32)
    options = _Manifold(
        _moments(betas, eps),
        *(POWERS[power] for power in powers),
        NORMALIZERS[normalize],
        max_stiffness,
        limits.smallest_normal * limits.eps,
    )
    addresses = [
        [
            *(x.data_ptr() for x in (one.weight, one.gradient, one.first_moment, one.second_moment)),
            0 if one.stiffness is None else one.stiffness.data_ptr(),
            one.format.spacings,
            one.format.context,
            one.scale.data_ptr(),
            one.weight.numel(),
        ]
        for one in moves
    ]
    numbers = [[*one.corrections, one.lr, one.decay] for one in moves]
    room, threads, split = _shares([one.weight for one in moves])
    tables = _table(addresses, torch.int64), _table(numbers, torch.float64)
    rooms = torch.empty(threads * room), torch.empty(threads * room // PIECE, dtype=torch.float64)
    inputs = [*map(native.address, tables), ctypes.byref(options)]
    _in_use().manifold_steps(len(moves), *inputs, *map(native.address, rooms), room, split)


class GridMove(NamedTuple):
    """One weight's step of GridOptim: where everything is, and its numbers."""

    weight: Tensor
    gradient: Tensor
    first_moment: Tensor  # the velocity without Adam
    second_moment: Tensor | None
    intended: Tensor | None  # -r is left in it
    format: native.BlockLoops
    scale: Tensor
    keys: Tensor
    corrections: tuple[float, float]
    lr: float
    decay: float
    limits: tuple[float, float]  # of the values, in scaled units
    rungs: tuple[int, int]  # of the format
    quiet: tuple[float, float]  # the scale stays where low < amax <= high


class GridSteps:
    """One step of GridOptim's weights, taken when this is made."""

    def __init__(
        self,
        moves: Iterable[GridMove],
        *,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        clip: float,
        adam: bool,
    ) -> None:
        self.moves = list(moves)
        options = _Grid(_moments(betas, eps), momentum, clip, adam)
        addresses = [
            [
                *(x.data_ptr() for x in (one.weight, one.gradient, one.first_moment)),
                *(0 if x is None else x.data_ptr() for x in (one.second_moment, one.intended)),
                *(one.format.rungs, one.format.values, one.format.spacings, one.format.context),
                *(one.scale.data_ptr(), one.keys.data_ptr(), one.weight.numel()),
            ]
            for one in self.moves
        ]
        numbers = [
            [*one.corrections, one.lr, one.decay, *one.limits, *one.rungs, *one.quiet] for one in self.moves
        ]
        tables = _table(addresses, torch.int64), _table(numbers, torch.float64)
        room, threads, split = _shares([one.weight for one in self.moves])
        targets = torch.empty(threads * room)
        self._landings = torch.zeros((len(self.moves), _LANDING_FIELDS), dtype=torch.int64)
        failed = _in_use().grid_steps(
            len(self.moves),
            *map(native.address, tables),
            ctypes.byref(options),
            native.address(targets),
            room,
            split,
            native.address(self._landings),
        )
        if failed:
            raise MemoryError("no memory for the values of a weight whose scale changes")

    def left(self) -> list[tuple[int, Tensor, bool]]:
        """Return of the weights that have not landed, whose scale may have to change: the place among the
        moves, the values in scaled units, and whether one was pushed past the last rung. Once.
        """
        places = self._landings[:, 3].nonzero().flatten().tolist()
        return [(place, self._take(place), bool(self._landings[place, 2])) for place in places]

    def _take(self, place: int) -> Tensor:
        values = torch.empty_like(self.moves[place].weight)
        _in_use().take(native.address(self._landings[place]), native.address(values), values.numel())
        return values

    @property
    def counts(self) -> list[tuple[Tensor, Tensor]]:
        """How many elements of each weight changed, nonsense where it has not landed, and how many have a
        non-zero gradient: 0-d int64.
        """
        return list(zip(self._landings[:, 0].unbind(), self._landings[:, 1].unbind(), strict=True))


def _shares(weights: Sequence[Tensor]) -> tuple[int, int, bool]:
    """Return how threads share the work: room for each, a multiple of PIECE, how many rooms, and whether all
    work on one weight at a time, because there are too few of them for one each.
    """
    sizes, threads = [weight.numel() for weight in weights], torch.get_num_threads()
    split = native.too_few_for_threads(sizes)
    return -(-max(sizes) // PIECE) * PIECE, 1 if split else threads, split


def _table(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, dtype=dtype, device="cpu")


def _in_use() -> ctypes.CDLL:
    loops = _loops()
    if loops is None:
        raise RuntimeError("there is no compiled loop; ask `serves` first")
    return loops
