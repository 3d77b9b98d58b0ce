"""`oscillation`: the share of weights that go back and forth between grid values.

A weight reverses in a step where its code changes in the direction opposite to its last change. With m = 0.01
each weight has an average of how often it does,

    f <- (1 - m) f + m [reversed],

and `fraction` is the share of weights with f > 0.02: of those that turn round more often than once in fifty
steps. Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", arXiv 2203.11086, (4).

A change of scale, or of format, re-codes a whole tensor and is nobody's movement: in such a step no weight
reverses, and directions stay what they were. With `every` above 1 the average is over the observed steps.

It costs five bytes a weight: f in float32, and the direction of the last change. On a CPU one loop in C goes
over all weights, with the bits of `advance`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from altgrad_core.hookspecs import Step, Weight
from altgrad_core.kernels import kernel
from altgrad_monitors import MonitorOptions, native_oscillation
from altgrad_monitors.codes import CodeBook, Flips, book_of, chosen, row_of
from altgrad_monitors.reporting import Share, pooled, reported

MOMENTUM = 0.01
"""Share of this step in the average; the paper's."""

THRESHOLD = 0.02
"""Average from which a weight oscillates."""


@attrs.define(eq=False)
class History:
    """What is kept of one weight, as rows."""

    frequency: Tensor
    """float32: f, see the module's text."""
    direction: Tensor
    """int8: of the last change of code; 0: none yet."""
    format: str
    """The name of the format in the last observed step."""

    @classmethod
    def of(cls, weight: Weight) -> History:
        """Return the history of a weight before its first step."""
        none = torch.zeros(weight.value.numel(), dtype=torch.float32, device=weight.value.device)
        return cls(none, none.to(torch.int8), _format(weight))

    def to(self, device: torch.device) -> History:
        return History(self.frequency.to(device), self.direction.to(device), self.format)

    def follow(self, weight: Weight, scale_before: Tensor) -> Tensor:
        """Return where scale and format are those before the step, bool, and take up the new format."""
        assert weight.scale is not None  # for the type checker
        known, self.format = _format(weight) == self.format, _format(weight)
        return (row_of(weight.scale) == scale_before) & known


class Oscillation:
    """Reports the share of oscillating weights; see the module's text."""

    provides: Mapping[str, str] = {"fraction": "mean"}

    def __init__(self, options: MonitorOptions) -> None:
        self.every = options.every
        self._options, self.layers = options, options.layers
        self._book: CodeBook | None = None
        self._histories: dict[str, History] = {}

    @property
    def needs(self) -> Collection[str]:
        """`before` in steps whose codes before are not kept: after others that were left out."""
        return () if self._book is None else self._book.needs()

    @property
    def landing(self) -> CodeBook | None:
        """Who is told of weights while they land on their grids."""
        return self._book

    def start(self, run: Any) -> None:
        self._book = book_of(run)

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return `oscillation/fraction/<layer>`."""
        assert self._book is not None
        found = self._book.flips(step)
        weights = {name: weight for name, weight in chosen(self.layers, step).items() if name in found}
        counts = self._counts(weights, found)
        shares = {weight.layer: _share(counts[name], weight) for name, weight in weights.items()}
        return reported("oscillation/fraction", shares, pooled, self._options.per)

    def _counts(self, weights: Mapping[str, Weight], found: Mapping[str, Flips]) -> dict[str, Tensor]:
        """Take the step into the weights' histories; return how many elements of each oscillate."""
        counts, fast = {}, {}
        for name, weight in weights.items():
            codes, history = (found[name].before, found[name].now), self._history(name, weight)
            steady = history.follow(weight, found[name].scale_before)
            rows = (*codes, history.frequency, history.direction)
            if native_oscillation.serves(rows) and bool(steady.all()):
                fast[name] = rows
                continue
            history.frequency, history.direction = advance(*rows, steady)
            counts[name] = (history.frequency > THRESHOLD).sum()
        if fast:
            counts |= zip(
                fast, native_oscillation.advanced([*fast.values()], MOMENTUM, THRESHOLD), strict=True
            )
        return counts

    def _history(self, name: str, weight: Weight) -> History:
        """Return a weight's history, where the weight is."""
        if name not in self._histories:
            self._histories[name] = History.of(weight)
        elif self._histories[name].frequency.device != weight.value.device:
            self._histories[name] = self._histories[name].to(weight.value.device)
        return self._histories[name]

    def state_dict(self) -> dict[str, Any]:
        return {name: attrs.asdict(history, recurse=False) for name, history in self._histories.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._histories = {
            name: History(
                **{key: one.clone() if isinstance(one, Tensor) else one for key, one in kept.items()}
            )
            for name, kept in state.items()
        }


def _format(weight: Weight) -> str:
    """Return the name of a quantized weight's format."""
    assert weight.format is not None  # for the type checker
    return weight.format.name


def _share(count: Tensor, weight: Weight) -> Share:
    whole = count.double()
    return whole, torch.full_like(whole, weight.value.numel())


@kernel
def advance(
    before: Tensor, now: Tensor, frequency: Tensor, direction: Tensor, steady: Tensor
) -> tuple[Tensor, Tensor]:
    """Return f and the direction of the last change after a step from some codes to others.

    steady: where scale and format are those of the step before; only there a change of code is a movement.
    """
    went = ((now > before).to(torch.int8) - (now < before).to(torch.int8)) * steady
    reversed_ = (went * direction) < 0
    averaged = (1 - MOMENTUM) * frequency + MOMENTUM * reversed_
    return averaged, torch.where(went == 0, direction, went)
