"""Codes of the quantised weights, kept from step to step: one byte a weight, shared by the monitors of a run.

A weight's code is its rung under the quantiser's scale. A change of scale re-codes a whole tensor, and its
elements then count as flipped, as they do in the stored bytes.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

import attrs
import torch
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_core.kernels import flat, kernel

_BYTE_NAN, _WORD_NAN = -128, -32768


@kernel
def codes(value: Tensor, format: Format, scale: Tensor) -> Tensor:
    """Return the rungs of value*scale as int8 (formats to 8 bits) or int16; NaN gets the lowest integer."""
    rungs = format.rung(value * scale)
    if format.bits <= 8:
        return rungs.clamp_(min=_BYTE_NAN).to(torch.int8)
    return rungs.clamp_(min=_WORD_NAN).to(torch.int16)


def row_of(scale: Tensor) -> Tensor:
    """Return a weight's scale for `flat` values: 0-d as it is, or one for each element."""
    return flat(scale) if scale.dim() else scale


@kernel
def _compared(before: Tensor, now: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how many codes changed, how many elements have a gradient, and how many both: 0-d int64."""
    flipped, updated = now != before, gradient != 0
    return flipped.sum(), updated.sum(), (flipped & updated).sum()


@attrs.frozen(kw_only=True)
class Flips:
    """One weight in one step; 0-d int64 device tensors."""

    flips: Tensor
    """Codes that changed."""
    updates: Tensor
    """Elements with a non-zero gradient."""
    flips_of_updated: Tensor
    """Codes that changed among those."""
    before: Tensor
    """The codes before the step, as one row."""
    now: Tensor
    """The codes after it."""


class CodeBook:
    """The codes of every quantised weight of one run, as of the last step that was looked at."""

    def __init__(self, run: Any) -> None:
        self._codes: dict[str, Tensor] = {}
        self._index = run.step
        self._found: dict[str, Flips] = {}
        for name, weight in run.weights().items():
            if weight.format is not None and weight.scale is not None:
                self._codes[name] = codes(flat(weight.value), weight.format, row_of(weight.scale))

    def flips(self, step: Step) -> dict[str, Flips]:
        """Return the flips of this step by parameter name; computed once however many monitors ask.

        Where steps were left out in between, the codes before come from `step.before`.
        """
        if step.index != self._index:
            consecutive = step.index == self._index + 1
            self._found = {
                name: self._compare(name, weight, step, consecutive)
                for name, weight in step.weights.items()
                if weight.format is not None and name in step.gradients
            }
            self._index = step.index
        return self._found

    def _compare(self, name: str, weight: Weight, step: Step, consecutive: bool) -> Flips:
        assert weight.format is not None and weight.scale is not None  # noqa: PT018 - for the type checker
        now = codes(flat(weight.value), weight.format, row_of(weight.scale))
        if consecutive or name not in step.before:
            before = self._codes.get(name, now)
        else:
            before = codes(flat(step.before[name]), weight.format, row_of(weight.scale))
        self._codes[name] = now
        flips, updates, both = _compared(before, now, flat(step.gradients[name]))
        return Flips(flips=flips, updates=updates, flips_of_updated=both, before=before, now=now)


_BOOKS: weakref.WeakKeyDictionary[Any, CodeBook] = weakref.WeakKeyDictionary()


def book_of(run: Any) -> CodeBook:
    """Return the run's code book, made at the first asking."""
    if run not in _BOOKS:
        _BOOKS[run] = CodeBook(run)
    return _BOOKS[run]


def chosen(pattern: str, step: Step) -> dict[str, Weight]:
    """Return the quantised weights of the step whose layer the pattern matches, by parameter name."""
    return {
        name: weight
        for name, weight in step.weights.items()
        if weight.format is not None and re.fullmatch(pattern, weight.layer)
    }
