"""How one weight is quantized: its recipe, its scale, and the straight-through gradient.

A quantizer belongs to a Parameter, not to a module: Linears that share a Parameter share its quantizer, and
optimizers find it from the Parameter alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.range_counts import RangeCounts
from altgrad_core.recipe import Recipe
from altgrad_core.scaling import LARGEST_EXPONENT
from altgrad_core.straight_through import straight_through

_ATTRIBUTE = "_altgrad_quantizer"
_RANGES = "_altgrad_ranges"
_STORAGES = ("master", "grid", None)


class WeightQuantizer:
    """How one weight is quantized, and the scale of its grid.

    Attributes:
        recipe: format, granularity, rounding and the rest. Its scale follows the weight ("current"), stays
            as it was fitted first ("initial") or is given ("static").
        scale: float32 on the weight's device, 0-d or of a shape that broadcasts against the weight, always
            the same tensor, written in place; the grid in weight units is `format.values / scale`.
        storage: "master", "grid", or None: as whoever stores the weights decides.
        on_grid: True while something keeps the weight itself on the grid; the forward pass uses it as is.
        covered: False where optimizers must treat the weight as an unquantized one (a tied head, or a wide
            format that a rule names): it is quantized in the forward pass alone.
        unfitted: True where the scale has come from `meta`, without a value: the next use fits it.
        transposed: whether the weight is (in, out): channels and blocks run along the inputs in any case.
        adjustment: a power of two that multiplies whatever scale the recipe's rule finds; see `adjust`.

    Raises ValueError on a storage that is none, and on recipes that are not for weights: a forward pass
    draws no random numbers, since it must be repeatable, and a delayed scale is for what is not known yet.
    """

    def __init__(
        self, recipe: Recipe, *, storage: str | None = None, covered: bool = True, transposed: bool = False
    ) -> None:
        if storage not in _STORAGES:
            raise ValueError(f"storage={storage!r} is not one of {', '.join(map(repr, _STORAGES))}")
        if recipe.scale_mode == "delayed":
            raise ValueError(
                "scale_mode='delayed' is not one of 'current', 'initial', 'static': a weight is here"
            )
        if recipe.rounding == "stochastic":
            raise ValueError(
                "rounding='stochastic' is for gradients and for storage: a forward pass must be repeatable; "
                "use 'nearest_even'"
            )
        self.recipe = recipe
        self.storage = storage
        self.covered = covered
        self.transposed = transposed
        self.on_grid = False
        self.scale = torch.ones((), dtype=torch.float32, device="cpu")
        self.held: Tensor | None = None
        self.unfitted = False
        self.adjustment = 1.0

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a copy: off the grid, until what keeps the weights there is copied too."""
        return {**self.__dict__, "on_grid": False}

    @property
    def format(self) -> Format:
        return self.recipe.format

    @property
    def granularity(self) -> str:
        return self.recipe.granularity

    @property
    def margin(self) -> float:
        return self.recipe.margin

    @property
    def fitted(self) -> bool:
        """Whether the scale follows from the weight; otherwise it is 1, or given."""
        return self.recipe.scaled and self.recipe.scale_mode != "static"

    @property
    def stored(self) -> bool:
        """Whether the weight itself lives on the grid, without a master."""
        return self.on_grid and self.storage != "master"

    @property
    def follows(self) -> bool:
        """Whether the scale is to be fitted to the weight at its next use."""
        return self.recipe.scale_mode == "current" or self.unfitted

    def attach(self, weight: Tensor) -> None:
        """Make the weight known as quantized by this quantizer."""
        setattr(weight, _ATTRIBUTE, self)

    def detach(self, weight: Tensor) -> None:
        """Make the weight an unquantized one again."""
        if hasattr(weight, _ATTRIBUTE):
            delattr(weight, _ATTRIBUTE)

    def fit(self, weight: Tensor) -> None:
        """Set the scale from the weight as it is."""
        self.scale = self._fitted(weight.detach())

    def adjust(self, factor: float) -> None:
        """Multiply the scale by a power of two, now and whenever it is fitted again."""
        self.adjustment = within_normal(self.adjustment * factor)
        self.scale.copy_(adjusted(self.scale, factor))
        self.held = None

    def switch(self, recipe: Recipe, *, storage: str | None, covered: bool, weight: Tensor) -> None:
        """Quantize the weight by another recipe from here on, under a scale fitted to it now, unadjusted.

        Off the grid, until what keeps weights there takes it up again.
        """
        self.recipe, self.storage, self.covered = recipe, storage, covered
        self.on_grid, self.held, self.adjustment = False, None, 1.0
        fitted = self._fitted(weight.detach())
        if fitted.shape == self.scale.shape:
            self.scale.copy_(fitted)
        else:
            self.scale = fitted

    def quantized(self, weight: Tensor) -> Tensor:
        """Return what the forward pass uses: Q(weight), the gradient passing straight through."""
        if self.on_grid:
            return weight

        def quantization(weight: Tensor) -> tuple[Tensor, Tensor | None]:
            found = self.quantize(weight) if self.held is None else self.held.detach()
            return found, self.recipe.passes(weight, self.scale)

        return straight_through(weight, quantization)

    @torch.no_grad()
    def quantize(self, weight: Tensor) -> Tensor:
        """Return Q(weight), detached; under `current` scaling the scale follows the weight first."""
        if self.follows:
            self.refit(weight)
        return self.recipe.quantize(weight, self.scale)

    @torch.no_grad()
    def hold(self, weight: Tensor, counts: bool = False) -> None:
        """Compute Q(weight) under the scale as it is, for all passes until `held` is None again.

        counts: whether they are a step's, whose overflow is counted where somebody asks for it.
        """
        self.held = self.recipe.quantize(weight, self.scale)
        ranges = ranges_of(weight) if counts else None
        if ranges is not None:
            ranges.begin(self.format, self.recipe.rounding)
            ranges.add(weight, self.held, self.scale)

    def refit(self, weight: Tensor) -> None:
        """Let the scale follow the weight."""
        self.scale.copy_(self._fitted(weight))
        if self.unfitted:
            self.unfitted = False

    def to(self, device: torch.device) -> None:
        """Move the scale, when its weight has moved; from `meta`, where it has no value, it starts as 1."""
        if self.scale.is_meta and device.type != "meta":
            self.scale, self.unfitted = torch.ones_like(self.scale, device=device), True
        self.scale = self.scale.to(device)

    def _fitted(self, weight: Tensor) -> Tensor:
        scale = self.recipe.scale_of(weight.mT if self.transposed else weight)
        if self.adjustment != 1:
            scale = adjusted(scale, self.adjustment)
        return (scale.mT if self.transposed and scale.dim() else scale).contiguous()


def adjusted(scale: Tensor, factor: Tensor | float) -> Tensor:
    """Return scale times a power of two, where that and its inverse are normal float32; else the nearest."""
    return (scale * factor).clamp(2.0**-LARGEST_EXPONENT, 2.0**LARGEST_EXPONENT)


def within_normal(factor: float) -> float:
    """Return an adjustment that is normal float32, as its inverse is."""
    return min(max(factor, 2.0**-LARGEST_EXPONENT), 2.0**LARGEST_EXPONENT)


@torch.no_grad()
def refit(pairs: Sequence[tuple[WeightQuantizer, Tensor]]) -> None:
    """Let every `current` scale follow its weight: those that are one number each, all together."""
    alike: dict[Recipe, list[tuple[WeightQuantizer, Tensor]]] = {}
    for quantizer, weight in pairs:
        recipe = quantizer.recipe
        if not quantizer.follows:
            continue
        alone = recipe.scale_mode != "current"  # fitted once: a weight that had no values before
        if not alone and recipe.granularity == "tensor" and recipe.scaled and weight.numel():
            alike.setdefault(recipe, []).append((quantizer, weight))
        else:
            quantizer.refit(weight)
    for recipe, group in alike.items():
        found = recipe.scales_of([weight for _, weight in group])
        torch._foreach_copy_([quantizer.scale for quantizer, _ in group], list(found.unbind()))
        for quantizer, _ in group:
            if quantizer.adjustment != 1:
                quantizer.scale.copy_(adjusted(quantizer.scale, quantizer.adjustment))


def quantizer_of(weight: Tensor) -> WeightQuantizer | None:
    """Return the quantizer of a Parameter, None where it is not quantized."""
    return getattr(weight, _ATTRIBUTE, None)


def ranges_of(weight: Tensor) -> RangeCounts | None:
    """Return what counts a Parameter's overflow in forward passes; None: nobody, as of a copy."""
    return getattr(weight, _RANGES, None)


def count_ranges(weight: Tensor, counts: RangeCounts | None) -> None:
    """Have a Parameter's overflow in forward passes counted there, whatever quantizes it; None: no more."""
    setattr(weight, _RANGES, counts)
