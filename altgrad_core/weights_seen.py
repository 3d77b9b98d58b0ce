"""The parameters that train as monitors see them, by name: one mapping as long as all of them are the same.

It is asked for in every step that is looked at, and most of it never changes. So who makes something of the
weights needs only look whether it is handed the same mapping.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import Tensor, nn

from altgrad_core.hookspecs import Weight
from altgrad_core.quantizer import WeightQuantizer, quantizer_of
from altgrad_core.recipe import Recipe


class _MadeOf(NamedTuple):
    """What a `Weight` follows from, compared by identity but for the numbers."""

    address: int
    quantizer: WeightQuantizer | None
    recipe: Recipe | None
    scale: Tensor | None
    stored: bool


class WeightsSeen:
    """Keeps what it returned last."""

    def __init__(self) -> None:
        self._made_of: dict[str, _MadeOf] = {}
        self._weights: Mapping[str, Weight] = {}

    def of(self, trained: Mapping[str, nn.Parameter], layers: Mapping[str, str]) -> Mapping[str, Weight]:
        """Return the parameters as monitors see them. layers: module paths by parameter name."""
        changed = {
            name: parameter
            for name, parameter in trained.items()
            if not _same(parameter, self._made_of.get(name))
        }
        if changed or not self._weights:
            made = {name: _weight(parameter, layers[name]) for name, parameter in changed.items()}
            weights = {name: made.get(name) or self._weights[name] for name in trained}
            self._weights = MappingProxyType(weights)
            self._made_of |= {name: _made_of(parameter) for name, parameter in changed.items()}
        return self._weights


def _made_of(parameter: nn.Parameter) -> _MadeOf:
    quantizer = quantizer_of(parameter)
    if quantizer is None:
        return _MadeOf(parameter.data_ptr(), None, None, None, False)
    return _MadeOf(parameter.data_ptr(), quantizer, quantizer.recipe, quantizer.scale, quantizer.stored)


def _same(parameter: nn.Parameter, kept: _MadeOf | None) -> bool:
    if kept is None or kept[0] != parameter.data_ptr():
        return False
    _, quantizer, recipe, scale, stored = kept
    if quantizer is None or quantizer_of(parameter) is not quantizer:
        return quantizer_of(parameter) is quantizer
    return quantizer.recipe is recipe and quantizer.scale is scale and quantizer.stored == stored


def _weight(parameter: nn.Parameter, layer: str) -> Weight:
    quantizer = quantizer_of(parameter)
    return Weight(
        value=parameter.detach(),
        layer=layer,
        format=quantizer.format if quantizer else None,
        scale=scale_seen(quantizer.scale, parameter) if quantizer else None,
        storage="grid" if quantizer and quantizer.stored else "master",
    )


def scale_seen(scale: Tensor, parameter: Tensor) -> Tensor:
    """Return a weight's scale as monitors see it: 0-d, or for channels and blocks of the weight's shape."""
    return scale.expand_as(parameter) if scale.dim() else scale
