"""What is kept of quantized weights from one step looked at to the next: their codes, or their values.

Codes take a byte a weight, and say what has flipped. Who asks what has moved as well, in every step, needs
the values: four bytes a weight, from which the codes of then follow, under the scale of then. Both are kept
where somebody wants the codes of both sides of a step, and where a weight has no single scale.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_core.kernels import flat
from altgrad_monitors import tally
from altgrad_monitors.tally import row_of, scale_then


class Kept:
    """The codes and values of every quantized weight of one run, as of the last step that was looked at.

    Attributes:
        weights: the quantized weights, as of the last look.
        both_codes: whether codes, and the scales they are under, are kept of both sides of a step.
        follows_updates: whether values are kept.
        codes, values: by parameter name, of each one or both.
        scales: under which they are: where values are kept alone 0-d, under `both_codes` 0-d or as a row.
        codes_before, scales_before: of the other side of the step, under `both_codes`.
    """

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self.both_codes = self.follows_updates = False
        self.weights: dict[str, Weight] = {}
        self.codes: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.codes_before: dict[str, Tensor] = {}
        self.scales_before: dict[str, Tensor] = {}
        self._formats: dict[str, Format | None] = {}
        self._seen: Mapping[str, Weight] | None = None
        self.follow(weights)

    def follow(self, weights: Mapping[str, Weight]) -> None:
        """Take up weights that have been quantized since, or in another format; forget those that are not."""
        if weights is self._seen:
            return
        self._seen, self.weights = weights, quantized(weights)
        for name in self._formats.keys() - self.weights.keys():
            self._forget(name)
        for name, weight in self.weights.items():
            if not self._knows(name, weight):
                self._forget(name)
                self.codes[name], self._formats[name] = codes_of(weight), weight.format

    def _knows(self, name: str, weight: Weight) -> bool:
        """Whether what is kept of a weight is of the format it has now."""
        kept = self._formats.get(name)
        return kept is weight.format or kept == weight.format  # most are the same object: sooner told

    def _forget(self, name: str) -> None:
        for kept in (self.codes, self.values, self.scales, self._formats):
            kept.pop(name, None)

    def keep_both(self) -> None:
        """Keep codes and scales of both sides of a step from here on."""
        if not self.both_codes:
            self.both_codes = True
            for name in self.weights.keys() - self.codes.keys():
                self.codes[name] = codes_of(self.weights[name], self.values[name], self.scales[name])
            self.scales = {name: scale_of(weight) for name, weight in self.weights.items()}

    def by_value(self, name: str) -> bool:
        """Whether the values of a weight are to be kept alone, with its scale."""
        scale = self.weights[name].scale
        return self.follows_updates and not self.both_codes and scale is not None and not scale.dim()

    def room(self, names: Collection[str]) -> Room:
        """Return where what is kept of these weights lies, and where that of after a step is to be left."""
        before = {name: self.codes[name] for name in names if name in self.codes}
        codes = {name: one for name, one in before.items() if not self.by_value(name)}
        if self.both_codes:
            codes = {name: torch.empty_like(one) for name, one in codes.items()}
        values = {name: self._room_for_values(name) for name in names if self.follows_updates}
        scales = {name: self._room_for_scale(name) for name in names if self.by_value(name)}
        return Room(before, codes, values, scales)

    def _room_for_values(self, name: str) -> Tensor:
        found = self.values.get(name)
        return torch.empty_like(self.weights[name].value) if found is None else found

    def _room_for_scale(self, name: str) -> Tensor:
        found, scale = self.scales.get(name), self.weights[name].scale
        assert scale is not None
        return torch.empty_like(scale) if found is None else found

    def take_up(self, room: Room, step: Step, recoded: Collection[str]) -> None:
        """Keep what has been left in the room.

        recoded: the weights whose codes before are under the scale that the step says.
        """
        self.codes |= room.codes
        self.values |= room.values
        if self.both_codes:
            self.codes_before = room.codes_before
            self.scales_before = {
                name: self._scale_before(name, step, name in recoded) for name in room.codes
            }
            self.scales |= {name: scale_of(step.weights[name]) for name in room.codes}
        else:
            self.scales |= room.scales
            for name in room.scales:
                self.codes.pop(name, None)

    def _scale_before(self, name: str, step: Step, recoded: bool) -> Tensor:
        """Return the scale under which the codes before a step are."""
        kept = None if recoded else self.scales.get(name)
        return scale_of(step.weights[name], scale_then(step, name)) if kept is None else kept


class Room(NamedTuple):
    """Where what is kept of weights lies, and where that of after a step is left: by name, what there is."""

    codes_before: dict[str, Tensor]
    """Where a weight is recoded, its codes before the step are filled in."""
    codes: dict[str, Tensor]
    """Maybe the same memory."""
    values: dict[str, Tensor]
    """The values before the step, or memory for those after it."""
    scales: dict[str, Tensor]
    """The scales of then, and of now; single numbers."""

    def joined(self, other: Room) -> Room:
        return Room(*(one | more for one, more in zip(self, other, strict=True)))

    def fill(self, codes: Mapping[str, Tensor], step: Step) -> None:
        """Leave here what weights are after a step, whose codes are given."""
        for name, one in codes.items():
            weight = step.weights[name]
            if name in self.codes:
                self.codes[name] = one
            if name in self.values:
                self.values[name].copy_(weight.value)
            if name in self.scales and weight.scale is not None:
                self.scales[name].copy_(weight.scale)


def codes_of(weight: Weight, value: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Return the codes of a weight, or of other values of it under another scale, as one row."""
    scale = weight.scale if scale is None else scale
    assert weight.format is not None and scale is not None  # noqa: PT018 - for the type checker
    return tally.codes(flat(weight.value if value is None else value), weight.format, row_of(scale))


def scale_of(weight: Weight, scale: Tensor | None = None) -> Tensor:
    """Return a weight's scale, or another one of it, 0-d or as a row that stays what it is."""
    scale = weight.scale if scale is None else scale
    assert scale is not None
    return row_of(scale).clone()


def quantized(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    return {name: weight for name, weight in weights.items() if weight.format is not None}
