"""What a monitor must leave as it is: weights, gradients, scales, optimizer state, and the random streams.

A tensor that was written in place has another version. Scales are compared by their values then: an extra
pass through the model fits them anew, and gives them back.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from altgrad_core.quantizer import quantizer_of

if TYPE_CHECKING:
    from altgrad_core.run_state import Run


class Untouched:
    """What there is of a run at a moment, to be compared with what there is later."""

    def __init__(self, run: Run) -> None:
        self._places: list[tuple[str, str, Tensor]] = []  # what of which parameter
        self._quantizers = []
        for name, parameter in run.trained.items():
            self._places.append(("", name, parameter))
            if parameter.grad is not None:
                self._places.append(("the gradient of ", name, parameter.grad))
            state = run.optimizer.state.get(parameter) or {}
            for key, value in state.items():
                if isinstance(value, Tensor):
                    self._places.append((f"the optimizer's {key} of ", name, value))
            if (quantizer := quantizer_of(parameter)) is not None:
                self._quantizers.append((name, quantizer))
        self._versions = [tensor._version for _, _, tensor in self._places]
        self._scales = [(one.scale, one.scale._version) for _, one in self._quantizers]
        self._values = together([scale for scale, _ in self._scales])

    def written(self) -> str | None:
        """Return what has been written in place since, None where nothing has."""
        for version, (what, name, tensor) in zip(self._versions, self._places, strict=True):
            if tensor._version != version:
                return what + name
        for index, (name, quantizer) in enumerate(self._quantizers):
            scale, version = self._scales[index]
            if quantizer.scale is scale and scale._version == version:
                continue
            if not _same_bits(quantizer.scale, self._values[index]):
                return f"the scale of {name}"
            self._scales[index] = quantizer.scale, quantizer.scale._version
        return None


def together(scales: list[Tensor]) -> list[Tensor]:
    """Return copies of tensors, by one operation on the device where all of them are 0-d."""
    if scales and not any(scale.dim() for scale in scales):
        return list(torch.stack(scales).unbind())
    return [scale.clone() for scale in scales]


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(*(tensor.detach().reshape(-1).view(torch.uint8) for tensor in (one, other)))


@contextlib.contextmanager
def streams_kept(device: torch.device) -> Iterator[None]:
    """Give the global random streams of Python, NumPy and torch back as they were."""
    python, arrays = random.getstate(), numpy.random.get_state(legacy=True)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        numpy.random.set_state(arrays)
