"""What a monitor must leave as it is: weights, gradients, scales, optimizer state, modes, settings, streams.

A tensor that was written in place has another version. Scales are compared by their values then: an extra
pass through the model fits them anew, and gives them back.
"""

from __future__ import annotations

import contextlib
import ctypes
import operator
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor, nn

from altgrad_core.quantizer import quantizer_of

if TYPE_CHECKING:
    from altgrad_core.hookspecs import Step
    from altgrad_core.run_state import Run

_NUMPY_BYTES = 4 * (624 + 1)
"""Of the state of a Mersenne Twister: its numbers, and the place of the next one."""


class Untouched:
    """What there is of a run at a moment, to be compared with what there is later.

    It is made in every step that is looked at; names are found when something was written.

    step: what monitors are shown; of it the loss and the weights before the step are looked at, too.
    """

    def __init__(self, run: Run, step: Step | None = None) -> None:
        self._run, self._step = run, step
        shown = () if step is None else (step.loss, *step.before.values())
        self._tensors = [*_all_of(run), *shown]
        self._versions = [tensor._version for tensor in self._tensors]
        self._quantizers = {
            name: quantizer
            for name, parameter in run.trained.items()
            if (quantizer := quantizer_of(parameter)) is not None
        }
        self._scales = [quantizer.scale for quantizer in self._quantizers.values()]
        self._scale_versions = [scale._version for scale in self._scales]
        self._values = together(self._scales)
        self._modes = [module.training for module in run.modules]
        self._settings = settings(run.device)

    def changed(self) -> str | None:
        """Return what somebody has done to the run since, and what to do instead; None: nothing."""
        if (what := self._written()) is not None:
            return f"wrote to {what} in place; a monitor may only read: clone first"
        if [module.training for module in self._run.modules] != self._modes:
            return "changed the training mode of the model; a monitor may only read: give it back"
        if (left := setting_changed(self._settings, self._run.device)) is not None:
            return f"{left}; a monitor may only read: give it back"
        return None

    def _written(self) -> str | None:
        """Return what has been written in place since, None where nothing has."""
        if [tensor._version for tensor in self._tensors] != self._versions:
            return self._first_written()
        scales = [quantizer.scale for quantizer in self._quantizers.values()]
        versions = [scale._version for scale in scales]
        if versions == self._scale_versions and all(map(operator.is_, scales, self._scales)):
            return None
        if not _same_bits(scales, self._values):  # of all at once: another device is waited for
            pairs = zip(self._quantizers, scales, self._values, strict=True)
            return next(f"the scale of {name}" for name, now, then in pairs if not _same_bits([now], [then]))
        self._scales, self._scale_versions = scales, versions
        return None

    def _first_written(self) -> str:
        versions = {
            id(tensor): version for tensor, version in zip(self._tensors, self._versions, strict=True)
        }
        for name, parameter in self._run.trained.items():
            for tensor in _of(self._run, parameter):
                if versions.get(id(tensor)) != tensor._version:
                    return _called(self._run, name, parameter, tensor)
        for name, tensor in self._step.before.items() if self._step is not None else ():
            if versions.get(id(tensor)) != tensor._version:
                return f"{name} as it was before the step"
        return "the loss"


def settings(device: torch.device) -> Mapping[str, object]:
    """Return what the arithmetic of this process hangs on, beside the tensors, by name."""
    return {
        "autocast": torch.is_autocast_enabled(device.type),
        "inference mode": torch.is_inference_mode_enabled(),
        "grad mode": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "thread count": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
    }


def setting_changed(before: Mapping[str, object], device: torch.device) -> str | None:
    """Return what somebody has done to a setting since, None where they are as they were."""
    now = settings(device)
    changed = (name for name, value in now.items() if value != before[name])
    return next((f"left torch's {name} at {now[name]}, it was {before[name]}" for name in changed), None)


def _all_of(run: Run) -> list[Tensor]:
    """Return the parameters, their gradients, and what the optimizer keeps of any."""
    parameters = run.trained.values()
    gradients = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
    states = run.optimizer.state.values()
    kept = [value for state in states for value in state.values() if isinstance(value, Tensor)]
    return [*parameters, *gradients, *kept]


def _of(run: Run, parameter: nn.Parameter) -> Iterator[Tensor]:
    """Yield a parameter, its gradient, and what the optimizer keeps of it."""
    yield parameter
    if parameter.grad is not None:
        yield parameter.grad
    for value in (run.optimizer.state.get(parameter) or {}).values():
        if isinstance(value, Tensor):
            yield value


def _called(run: Run, name: str, parameter: nn.Parameter, tensor: Tensor) -> str:
    state = run.optimizer.state.get(parameter) or {}
    key = next((key for key, value in state.items() if value is tensor), None)
    if key is not None:
        return f"the optimizer's {key} of {name}"
    return name if tensor is parameter else f"the gradient of {name}"


def together(scales: list[Tensor]) -> Iterable[Tensor]:
    """Return copies of tensors, by one operation on the device where all of them are 0-d."""
    if scales and not any([scale.dim() for scale in scales]):  # noqa: C419 - sooner than one by one
        return torch.stack(scales)
    return [scale.clone() for scale in scales]


def _same_bits(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """Whether two lots of tensors are equal bit for bit, as a NaN is to itself, in shape and dtype too."""
    both = [*some], [*others]
    kinds, other_kinds = ([(one.shape, one.dtype) for one in lot] for lot in both)
    rows = (torch.cat([one.detach().reshape(-1) for one in lot]).view(torch.uint8) for lot in both)
    return kinds == other_kinds and torch.equal(*rows)


class _NumpyStream:
    """NumPy's global random stream, which is asked for its state, and given one, only where that is needed.

    Either takes longer than all else here: 624 numbers, one after the other. As memory they are compared at
    once; only a second normal number, which is kept aside with the first, is drawn without a trace there.
    """

    def __init__(self) -> None:
        self._memory: bytes | None = None
        self._state: dict[str, Any] = {}

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Give the stream back as it was."""
        memory = _memory_of_numpy()
        if self._may_differ(memory):
            self._memory, self._state = memory, numpy.random.get_state(legacy=False)
        state = self._state
        try:
            yield
        finally:
            if self._state is not state or self._may_differ(_memory_of_numpy()):
                numpy.random.set_state(state)

    def _may_differ(self, memory: bytes | None) -> bool:
        return memory is None or memory != self._memory or bool(self._state["has_gauss"])


def _memory_of_numpy() -> bytes | None:
    """Return the memory of NumPy's global generator; None where it is not the one that NumPy starts with."""
    generator = numpy.random.get_bit_generator()  # type: ignore[attr-defined]  # the stubs do not export it
    if not isinstance(generator, numpy.random.MT19937):
        return None
    return ctypes.string_at(generator.ctypes.state_address, _NUMPY_BYTES)


_NUMPY_STREAM = _NumpyStream()


@contextlib.contextmanager
def streams_kept(device: torch.device) -> Iterator[None]:
    """Give the global random streams of Python, NumPy and torch back as they were."""
    python = random.getstate()
    devices = [device] if device.type == "cuda" else []
    try:
        with _NUMPY_STREAM.kept(), torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
