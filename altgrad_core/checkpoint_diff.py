"""In what two checkpoints differ first, bit by bit: model, optimizer, storage, scales, amax histories."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from altgrad_core import shapes
from altgrad_core.checkpoint import Checkpoint

COMPARED_STATE = ("optimizer", "storage", "master_bound", "scales", "flows")
"""Parts of a checkpoint's state that follow from options and seed alone."""


def first_difference(one: Checkpoint, other: Checkpoint) -> tuple[str, str] | None:
    """Return the path of the first entry that differs, and in what; None where none does."""
    entries = _entries(one), _entries(other)
    for path in itertools.chain(entries[0], (path for path in entries[1] if path not in entries[0])):
        if path not in entries[0] or path not in entries[1]:
            return path, f"the {'second' if path in entries[0] else 'first'} run has none"
        if difference := _difference(entries[0][path], entries[1][path]):
            return path, difference
    return None


def _entries(saved: Checkpoint) -> dict[str, Any]:
    """Return all that is compared by its path: the model in its order, then the state."""
    model = {name: saved.model[name] for name in sorted(saved.model, key=_place)}
    state = {name: saved.state.get(name) for name in COMPARED_STATE}
    return {**model, **dict(_flat(state, ""))}


def _place(name: str) -> tuple[Any, ...]:
    """Return where a parameter sorts: embeddings, blocks by their number, the head."""
    module = name.rpartition(".")[0]
    rank = {shapes.TOKEN_EMBEDDING: 0, shapes.POSITION_EMBEDDING: 1, **dict.fromkeys(shapes.HEADS, 3)}.get(
        module, 2
    )
    return rank, [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        pairs: Any = value.items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(value)
    else:
        yield path, value
        return
    for key, inner in pairs:
        yield from _flat(inner, f"{path}/{key}" if path else str(key))


def _difference(one: Any, other: Any) -> str:
    """Return in what two tensors, or two plain values, differ in any bit; empty: in none."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _tensor_difference(one, other)
    return "" if repr(one) == repr(other) else f"{one!r} and {other!r}"


def _tensor_difference(one: Tensor, other: Tensor) -> str:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        kinds = [
            f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in (one, other)
        ]
        return " and ".join(kinds)
    octets = [tensor.reshape(-1, 1).contiguous().view(torch.uint8) for tensor in (one, other)]
    unequal = (octets[0] != octets[1]).any(dim=1)
    if not unequal.any():
        return ""
    place = int(unequal.nonzero()[0])
    index = [int(axis) for axis in torch.unravel_index(torch.tensor(place), one.shape)]
    values = " and ".join(repr(tensor.reshape(-1)[place].item()) for tensor in (one, other))
    largest = (one.double() - other.double()).abs().max().item()
    count = f"{int(unequal.sum()):,} of {one.numel():,} elements"
    return f"{count}, by at most {largest:.3g}; the first at {index}: {values}"
