"""The loops of steps.c, called for all tensors of a group at once: an optimizer's step on a CPU in one pass.

What goes in are tables, a row for each weight, of addresses (int64) and of numbers (float64): the structs of
steps.c, whose fields are all eight bytes wide.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad_core import native
from altgrad_core.format import Format

_SOURCE = Path(__file__).with_name("steps.c")
PIECE = 1024  # as in steps.c

POWERS = {0.0: 0, 1.0: 1, 0.5: 2, -0.5: 3, -1.0: 4}
"""Exponents of the stiffness for which there are loops, to their numbers there."""
NORMALIZERS = {"none": 0, "rms": 1, "mean": 2, "max": 3}

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
        loops.manifold_steps.argtypes = [count, *[_ADDRESS] * 5]
        loops.grid_steps.argtypes = [count, count, *[_ADDRESS] * 5]
        loops.grid_steps.restype = count
    return loops


def available() -> bool:
    """Whether the loops may be called now: they are compiled, and nobody records what is done to tensors."""
    return not native.recording() and _loops() is not None


def reads(*tensors: Tensor) -> bool:
    """Whether the loops can read such tensors: float32, contiguous, on a CPU."""
    return all(
        x.dtype == torch.float32 and x.is_cpu and x.is_contiguous() and not x.is_neg() and x.numel()
        for x in tensors
    )


class Blocks:
    """The loops of formats over blocks, by the format, looked up once each."""

    def __init__(self) -> None:
        self._found: dict[int, native.BlockLoops | None] = {}

    def of(self, format: Format) -> native.BlockLoops | None:
        """Return the loops of a format that lives as long as this; None where it has none."""
        if id(format) not in self._found:
            self._found[id(format)] = format.block_loops()
        return self._found[id(format)]


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
    largest = max(one.weight.numel() for one in moves)
    tables = _table(addresses, torch.int64), _table(numbers, torch.float64)
    rooms = torch.empty(largest), torch.empty(1 + largest // PIECE, dtype=torch.float64)
    outputs = map(native.address, rooms)
    _in_use().manifold_steps(len(moves), *map(native.address, tables), ctypes.byref(options), *outputs)


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
    """The steps of GridOptim's weights, landed one after the other, with a stop where a scale may move."""

    def __init__(
        self,
        moves: Sequence[GridMove],
        *,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        clip: float,
        adam: bool,
    ) -> None:
        self.moves = list(moves)
        self._options = _Grid(_moments(betas, eps), momentum, clip, adam)
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
        self._tables = _table(addresses, torch.int64), _table(numbers, torch.float64)
        self._target = torch.empty(max(one.weight.numel() for one in self.moves), device="cpu")
        self._landings = torch.zeros((len(self.moves), 4), dtype=torch.int64, device="cpu")

    def land(self, first: int) -> int:
        """Step and land from the first'th weight on; return the number of the one that has not, or of all."""
        inputs = [*map(native.address, self._tables), ctypes.byref(self._options)]
        outputs = map(native.address, (self._target, self._landings))
        return int(_in_use().grid_steps(first, len(self.moves), *inputs, *outputs))

    def target(self, index: int) -> Tensor:
        """Return the unrounded values, in scaled units, of the weight that stopped `land`: its own copy."""
        weight = self.moves[index].weight
        return self._target[: weight.numel()].clone().view_as(weight)

    @property
    def flips(self) -> Tensor:
        """How many elements of each weight changed, (n,) int64; nonsense for one that has not landed."""
        return self._landings[:, 0]

    @property
    def updates(self) -> Tensor:
        """How many elements of each weight have a non-zero gradient, (n,) int64."""
        return self._landings[:, 1]

    def past_end(self, index: int) -> bool:
        """Whether an element of that weight was pushed past the last rung."""
        return bool(self._landings[index, 3])


def _table(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, dtype=dtype, device="cpu")


def _in_use() -> ctypes.CDLL:
    loops = _loops()
    if loops is None:
        raise RuntimeError("there is no compiled loop; ask `serves` first")
    return loops
