"""How one weight is quantised: its format, its scale, and the straight-through gradient.

A quantiser belongs to a Parameter, not to a module: Linears that share a Parameter share its quantiser, and
optimizers find it from the Parameter alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from altgrad_core import scaling
from altgrad_core.format import OVERFLOWS, ROUNDINGS, Format

_ATTRIBUTE = "_altgrad_quantizer"

_OPTIONS = {
    "storage": ("master", "grid", None),
    "rounding": tuple(mode for mode in ROUNDINGS if mode != "stochastic"),
    "overflow": OVERFLOWS,
    "granularity": ("none", "tensor"),
    "scale_mode": ("current", "initial"),
}
"""What WeightQuantizer's options may be. A forward pass draws no random numbers: it must be repeatable."""


class WeightQuantizer:
    """How one weight is quantised, and the scale of its grid.

    Attributes:
        format: the number format.
        scale: 0-d float32 on the weight's device; the grid in weight units is `format.values / scale`.
        storage: "master", "grid", or None: as whoever stores the weights decides.
        on_grid: True while something keeps the weight itself on the grid; the forward pass uses it as is.
        geometry: False where optimizers must treat the weight as an unquantised one (a tied head, or a wide
            format that a rule names): it is quantised in the forward pass alone.

    Raises ValueError on an option that is not one of its choices.
    """

    def __init__(
        self,
        format: Format,
        *,
        storage: str | None = None,
        geometry: bool = True,
        rounding: str = "nearest_even",
        overflow: str = "saturate",
        granularity: str = "tensor",
        margin: float = 1.0,
        scale_mode: str = "current",
    ) -> None:
        given = {
            "storage": storage,
            "rounding": rounding,
            "overflow": overflow,
            "granularity": granularity,
            "scale_mode": scale_mode,
        }
        for name, value in given.items():
            if value not in _OPTIONS[name]:
                choices = ", ".join(map(repr, _OPTIONS[name]))
                raise ValueError(f"{name}={value!r} is not one of {choices}")
        if not 0 < margin < math.inf:
            raise ValueError(f"margin is head room, a positive number that multiplies amax, not {margin!r}")
        self.format = format
        self.storage = storage
        self.geometry = geometry
        self.rounding = rounding
        self.overflow = overflow
        self.granularity = granularity
        self.margin = margin
        self.scale_mode = scale_mode
        self.on_grid = False
        self.scale = torch.ones(())
        self.held: Tensor | None = None

    def attach(self, weight: Tensor) -> None:
        """Make the weight known as quantised by this quantiser."""
        setattr(weight, _ATTRIBUTE, self)

    def detach(self, weight: Tensor) -> None:
        """Make the weight an unquantised one again."""
        if hasattr(weight, _ATTRIBUTE):
            delattr(weight, _ATTRIBUTE)

    def fit(self, weight: Tensor) -> None:
        """Set the scale from the weight as it is."""
        self.scale = self._fitted(weight.detach())

    def quantized(self, weight: Tensor) -> Tensor:
        """Return what the forward pass uses: Q(weight), with the gradient passed through unchanged."""
        if self.on_grid:
            return weight
        held = self.quantize(weight) if self.held is None else self.held
        return _StraightThrough.apply(weight, held)  # type: ignore[no-any-return, no-untyped-call]

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> Tensor:
        """Return Q(weight), detached; under `current` scaling the scale follows the weight first."""
        if self.scale_mode == "current":
            self.scale.copy_(self._fitted(weight))
        rounded = self.format.quantize(weight * self.scale, rounding=self.rounding, overflow=self.overflow)
        return rounded / self.scale

    def to(self, device: torch.device) -> None:
        """Move the scale, when its weight has moved."""
        self.scale = self.scale.to(device)

    def _fitted(self, weight: Tensor) -> Tensor:
        if not scaling.scaled(self.format, self.granularity):
            return torch.ones((), device=weight.device)
        exponent = scaling.fitted_exponent(scaling.amax([weight]), self.format, self.margin)
        return scaling.power_of_two(exponent)[0]


class _StraightThrough(torch.autograd.Function):
    """Forward: the quantised weight. Backward: the gradient as it is, to the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, quantized: Tensor) -> Tensor:
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def quantizer_of(weight: Tensor) -> WeightQuantizer | None:
    """Return the quantiser of a Parameter, None where it is not quantised."""
    return getattr(weight, _ATTRIBUTE, None)
