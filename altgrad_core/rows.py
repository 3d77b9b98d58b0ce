"""Many tensors as one row, so that an operation is launched once for all of them.

A call costs microseconds of the host, on a GPU as many as a million elements cost the device. An update of 40
operations on 50 weights, one weight at a time, is 2,000 launches for what a fused optimizer does in four. So
weights that are treated alike are laid end to end, the arithmetic runs on the row, and what changed goes
back: as many operations for fifty weights as for one. `in_rows` says which weights share a row; it bounds its
length, so that no large model needs a second copy of everything.

What belongs to a whole tensor, a scale or the keys of its random stream, is spread over its elements; what a
tensor's elements are summed up to is one number for each (`amax`, `counts`, `norms`). A row of one tensor is
that tensor's own memory, and its numbers stay 0-d: nothing is copied or spread.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from altgrad_core import scaling
from altgrad_core.kernels import flat

LONGEST = 2**22
"""Elements that share a row on a device: a pass over them takes a GPU longer than its launch."""
LONGEST_ON_CPU = 2**14
"""On a CPU: a call costs what some thousand elements do, and the row stays in the cache."""


def in_rows(tensors: Sequence[Tensor], kinds: Sequence[Hashable]) -> Iterator[list[int]]:
    """Yield the places of the tensors that share a row: of one kind, dtype and device.

    Half precision stays alone: beside a float32 number it is another sum than beside a row of them.
    """
    shared: dict[Hashable, list[int]] = {}
    elements: dict[Hashable, int] = {}
    for place, (tensor, kind) in enumerate(zip(tensors, kinds, strict=True)):
        size, longest = tensor.numel(), LONGEST_ON_CPU if tensor.is_cpu else LONGEST
        if size >= longest or tensor.dtype not in (torch.float32, torch.float64):
            yield [place]
            continue
        row = kind, tensor.dtype, tensor.device
        if elements.get(row, 0) + size > longest:
            yield shared.pop(row)
            elements[row] = 0
        shared.setdefault(row, []).append(place)
        elements[row] = elements.get(row, 0) + size
    yield from shared.values()


class Row:
    """Tensors of one dtype and device, laid end to end in the order given, each in row-major order."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._tensors = list(tensors)
        self.sizes = [tensor.numel() for tensor in self._tensors]
        self.alone = len(self._tensors) == 1

    def of(self, tensors: Iterable[Tensor]) -> Tensor:
        """Return tensors of these shapes as one row; where it is one contiguous tensor, its own memory."""
        rows = [flat(tensor) for tensor in tensors]
        return rows[0] if self.alone else torch.cat(rows)

    def spread(self, values: Sequence[Tensor]) -> Tensor:
        """Return for each element what its tensor has: numbers, or what broadcasts against the tensors."""
        if self.alone and not values[0].dim():
            return values[0]
        return self.of(value.expand_as(tensor) for value, tensor in zip(values, self._tensors, strict=True))

    def pairs(self, values: Sequence[Tensor]) -> Tensor:
        """Return for each element the pair that its tensor has, (elements, 2); alone: the pair, (2,)."""
        if self.alone:
            return values[0]
        return torch.cat([pair.expand(size, 2) for pair, size in zip(values, self.sizes, strict=True)])

    def keys(self, streams: Sequence[Tensor]) -> Tensor:
        """Return the keys by which `uniform_like` gives each element its number in its tensor's own stream.

        The first key is added to an element's index, so it is less by where the tensor begins.
        """
        if self.alone:
            return streams[0]
        *begins, elements = itertools.accumulate(self.sizes, initial=0)
        places = torch.arange(elements + 1, dtype=torch.int32, device=streams[0].device)
        keys = torch.stack(list(streams))
        keys[:, 0] -= torch.stack([places[begin] for begin in begins])  # nothing is copied from the host
        return self.pairs(keys.unbind())

    def parts(self, row: Tensor) -> list[Tensor]:
        """Return a row's tensors, in their shapes: views."""
        parts = row.split_with_sizes(self.sizes)
        return [part.view(tensor.shape) for part, tensor in zip(parts, self._tensors, strict=True)]

    def write(self, row: Tensor, tensors: Sequence[Tensor]) -> None:
        """Copy a row into tensors of these shapes."""
        torch._foreach_copy_(list(tensors), self.parts(row))

    def write_back(self, row: Tensor, tensors: Sequence[Tensor]) -> None:
        """Copy what `of` returned for these tensors, changed in place since, into them, if it is a copy."""
        if not (self.alone and tensors[0].is_contiguous()):
            self.write(row, tensors)

    def amax(self, row: Tensor) -> Tensor:
        """Return the largest magnitude of each tensor: (n,) float64, NaN where it holds NaN."""
        return scaling.amax(self.parts(row))

    def counts(self, mask: Tensor) -> Tensor:
        """Return how many elements of each tensor are True: (n,) int64."""
        parts = self.parts(mask if mask.is_cpu else mask.float())
        return torch.stack([one.count_nonzero() for one in parts]) if mask.is_cpu else norms(parts, 1).long()


def norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    """Return the 1-, 2- or infinity-norm of each tensor, accumulated in float64: (n,) float64.

    0 for one without elements; NaN where one holds NaN. In one launch on a device; on a CPU, where launches
    cost little, other reductions are faster.
    """
    filled = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    return torch.stack(torch._foreach_norm(filled, order, dtype=torch.float64))


def among(count: int, values: dict[int, Tensor]) -> Tensor:
    """Return 0-d values at their places among so many, zeros elsewhere: (count,), made on their device."""
    zero = next(iter(values.values())).new_zeros(())
    return torch.stack([values.get(place, zero) for place in range(count)])
