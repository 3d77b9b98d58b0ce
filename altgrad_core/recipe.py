"""A recipe: everything that says how one tensor is quantized, and nothing that changes.

Weights, activations and gradients are quantized alike, Q(x) = quantize(x*s)/s. What differs is the format,
what shares a scale, where amax comes from and how it is rounded: a `Recipe`. State (a weight's scale, an
activation's amax history) is kept by `WeightQuantizer` and `FlowQuantizer`.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from altgrad_core import scaling
from altgrad_core.elementwise import wide
from altgrad_core.format import OVERFLOWS, ROUNDINGS, Format
from altgrad_core.lookup import format_or_none, get_format
from altgrad_core.options import FormatChoice
from altgrad_core.quantize_options import ActivationOptions, GradientOptions, QuantizeOptions, conflicts
from altgrad_core.registry import Registry
from altgrad_core.wording import suggestion

_INWARD = ("toward_zero", "up", "down")
"""Roundings under which some finite numbers beyond an end do not overflow."""

SCALE_MODES = ("current", "initial", "delayed", "static")


def _one_of(*choices: Any) -> Any:
    def validate(_: Any, field: Any, value: Any) -> None:
        if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):
            listed = ", ".join(map(repr, choices))
            raise ValueError(f"{field.name}={value!r} is not one of {listed}")

    return validate


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_magnitude(_: Any, field: Any, value: float) -> None:
    if not (_is_number(value, numbers.Real) and 0 <= value < math.inf):
        raise ValueError(f"amax is a magnitude, 0 (none) or more, not {value!r}")


def _is_head_room(_: Any, field: Any, value: float) -> None:
    if not (_is_number(value, numbers.Real) and 0 < value < math.inf):
        raise ValueError(f"margin is head room, a positive number that multiplies amax, not {value!r}")


def _is_length(_: Any, field: Any, value: int) -> None:
    if not _is_number(value, int) or value < 1:
        raise ValueError(f"amax_history is how many steps the delayed scale looks back on, not {value!r}")


@attrs.frozen(kw_only=True)
class Recipe:
    """How a tensor is quantized.

    format: a Format, or what `get_format` takes.
    granularity: what shares a scale: "tensor", "channel" (a row along the last dimension), "block" (16 or 32
        consecutive elements of the last dimension; a shorter last one has its own); "none": scale 1.
    block, block_scale: the blocks' length; the format of their scales, as in NVFP4 (None: powers of two).
    scale_rule: "fit", "ocp" or "exact": see `altgrad_core.scaling`.
    scale_mode: where amax comes from: "current" (this tensor, now), "initial" (a weight as it was first
        seen), "delayed" (the last `amax_history` steps; activations and gradients), "static" (`amax`).
    margin: head room; amax is multiplied by it.
    clip_gradient: what rounds past the largest value gets zero gradient; what rounds to it does not, nor NaN.

    BF16, FP16 and FP32 are never scaled. Raises ValueError, with the way out, on a value that is no choice
    and on options that contradict one another.
    """

    format: Format = attrs.field(converter=get_format)
    granularity: str = attrs.field(default="tensor", validator=_one_of(*scaling.GRANULARITIES))
    block: int = attrs.field(default=32, validator=_one_of(*scaling.BLOCKS))
    block_scale: Format | None = attrs.field(default=None, converter=format_or_none)
    scale_rule: str = attrs.field(default="fit", validator=_one_of(*scaling.RULES))
    scale_mode: str = attrs.field(default="current", validator=_one_of(*SCALE_MODES))
    amax: float = attrs.field(default=0.0, validator=_is_magnitude)
    amax_history: int = attrs.field(default=16, validator=_is_length)
    margin: float = attrs.field(default=1.0, validator=_is_head_room)
    rounding: str = attrs.field(default="nearest_even", validator=_one_of(*ROUNDINGS))
    overflow: str = attrs.field(default="saturate", validator=_one_of(*OVERFLOWS))
    clip_gradient: bool = attrs.field(default=False, validator=_one_of(True, False))
    scaled: bool = attrs.field(init=False, repr=False, eq=False)
    """Whether there is a scale other than 1."""

    @scaled.default
    def _(self) -> bool:
        return scaling.scaled(self.format, self.granularity)

    beyond: tuple[float, float] = attrs.field(init=False, repr=False, eq=False)
    """The values that would come next at both ends of the format."""

    @beyond.default
    def _(self) -> tuple[float, float]:
        ends = self.format.values[[0, -1]].double()
        gaps = self.format.spacing(ends)
        return float(ends[0] - gaps[0]), float(ends[1] + gaps[1])

    def __attrs_post_init__(self) -> None:
        for problem in conflicts(
            granularity=self.granularity,
            block_scale=None if self.block_scale is None else self.block_scale.name,
            scale_rule=self.scale_rule,
            scale_mode=self.scale_mode,
            amax=self.amax,
            margin=self.margin,
        ):
            raise ValueError(f"{problem.path[0]}: {problem}")

    @property
    def power_of_two(self) -> bool:
        """Whether every scale is a power of two, so that scaling is exact."""
        return not self.scaled or (self.scale_rule != "exact" and self.block_scale is None)

    @torch.no_grad()
    def scale_of(self, x: Tensor, amax: Tensor | None = None) -> Tensor:
        """Return the scale of x: float32, 0-d, or of a shape that broadcasts to x's.

        amax: 0-d, in place of x's own; "tensor" granularity only.
        """
        if not self.scaled or not x.numel():
            return torch.ones((), dtype=torch.float32, device=x.device)
        if not x.dim():  # one channel of one block
            return self.scale_of(x.reshape(1), amax).reshape(())
        if self.scale_mode == "static":
            amax = torch.full((), self.amax, dtype=torch.float64, device=x.device)
        if amax is None:
            amax = scaling.amax_per(x, self.granularity, self.block)
        if self.block_scale is not None:
            scale = scaling.two_level(amax, self.format, self.block_scale)
        else:
            scale = scaling.scale(amax, self.format, self.scale_rule, self.margin)
        return scaling.spread(scale, x.shape[-1], self.block) if self.granularity == "block" else scale

    def scales_of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the scale of each tensor, (n,), for the granularity "tensor" and the mode "current"."""
        return scaling.scale(scaling.amax(tensors), self.format, self.scale_rule, self.margin)

    @torch.no_grad()
    def quantize(self, x: Tensor, scale: Tensor, keys: Tensor | None = None) -> Tensor:
        """Return Q(x), detached, in x's dtype; `keys` as `Format.fake_quantize` takes them."""
        return self.format.fake_quantize(x.detach(), scale, self.rounding, self.overflow, keys=keys)

    @torch.no_grad()
    def passes(self, x: Tensor, scale: Tensor, keys: Tensor | None = None) -> Tensor | None:
        """Return where a gradient passes: where x does not saturate; None: everywhere, unless clipped.

        x saturates if it rounds past an end with the values going on beyond, each a last gap from the next.
        NaN does not.
        """
        if not self.clip_gradient:
            return None
        x = wide(x)
        rounded = self.format.fake_quantize(x, scale, self.rounding, "ieee", keys=keys)
        if self.rounding not in _INWARD:
            return torch.isfinite(rounded) | x.isnan()
        below, above = self.beyond  # what is cut off toward zero never overflows
        scaled = x * scale
        return torch.isfinite(rounded) & (scaled > below) & (scaled < above) | x.isnan()


def recipe_of(format: Any, options: Mapping[str, Any]) -> Recipe:
    """Return the Recipe of a format and further options. Raises ValueError for an option it does not have."""
    known = [field.name for field in attrs.fields(Recipe) if field.init]
    for name in options:
        if name not in known:
            hint = suggestion(name, known) or f"; there are {', '.join(known)}"
            raise ValueError(f"{name!r} is no option of a quantized tensor{hint}")
    return Recipe(**{**options, "format": format})


def refuse_off_grid(recipe: Recipe) -> None:
    """Raise ValueError where a weight of this recipe cannot live on a grid."""
    if recipe.granularity not in ("none", "tensor"):
        raise ValueError(
            f"a weight on the grid has one scale, not one per {recipe.granularity}: quantize_model(..., "
            'granularity="tensor")'
        )
    if recipe.scale_rule != "fit":
        raise ValueError(
            f"a weight on the grid has a fitted scale, a power of two at which nothing saturates, not one by "
            f'the rule {recipe.scale_rule!r}: quantize_model(..., scale_rule="fit")'
        )


def flow_recipe(spec: Any, default: Recipe | None = None) -> Recipe | None:
    """Return the recipe of activations or gradients; None for None, "FP32" and "none": leave alone.

    spec: a Recipe; a table with the key `format` and other fields of a Recipe; or a format by itself, which
    takes its other options from `default`. The scale is delayed unless said otherwise, and current where
    the granularity is not "tensor".
    """
    if spec is None or isinstance(spec, Recipe):
        return spec
    options = {**spec} if isinstance(spec, Mapping) and "format" in spec else {"format": spec}
    format = format_or_none(options.pop("format"))
    if format is None:
        return None
    if default is not None and not options:
        return attrs.evolve(default, format=format)
    delayed = options.get("granularity", "tensor") == "tensor"
    return recipe_of(format, {"scale_mode": "delayed" if delayed else "current", **options})


def recipe_from(
    options: QuantizeOptions | ActivationOptions | GradientOptions, choice: FormatChoice, registry: Registry
) -> Recipe | None:
    """Return the recipe of a `[quantize]` table for a format; None where that means "leave alone"."""
    format = format_or_none(choice, registry)
    if format is None:
        return None
    known = {field.name for field in attrs.fields(Recipe) if field.init}
    fields = {name: value for name, value in attrs.asdict(options, recurse=False).items() if name in known}
    own = {
        "format": format,
        "block_scale": format_or_none(options.block_scale, registry),
        "scale_mode": "current" if options.scale_mode == "adaptive" else options.scale_mode,
    }
    return Recipe(**{**fields, **own})
