"""Quantisation that gradients pass: forward Q(x) with dx = dy, and identity with a quantised gradient.

The straight-through estimator (Bengio, Leonard and Courville, arXiv 1308.3432) takes the derivative of
rounding, zero almost everywhere, for 1. With `clip_gradient`, elements that saturated get a zero gradient:
there the forward pass does not depend on them at all. Scales get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from altgrad_core.random_bits import draw_seed, stream_key_tensor
from altgrad_core.recipe import Recipe


def quantize_ste(
    x: Tensor, format: Any, *, generator: torch.Generator | None = None, **options: Any
) -> Tensor:
    """Return Q(x), and pass the gradient through unchanged (with `clip_gradient`, not where x saturated).

    format: a Recipe, or a format and the fields of a Recipe as options. generator: for rounding =
    "stochastic"; one seed is drawn from it. Raises ValueError for a scale mode that needs a memory of
    earlier tensors ("delayed", "initial"): those are for `quantize_model`.
    """
    recipe = _memoryless(format, options)
    scale = recipe.scale_of(x)
    quantized = recipe.quantize(x, scale, _keys(recipe, generator, x.device))
    return straight_through(x, quantized, recipe.passes(x, scale))


def quantize_gradient(
    y: Tensor, format: Any = "E5M2", *, generator: torch.Generator | None = None, **options: Any
) -> Tensor:
    """Return y, and quantise the gradient that comes back to it; options as `quantize_ste` takes them.

    Raises ValueError for `clip_gradient` too: a gradient has no gradient to clip.
    """
    recipe = _memoryless(format, options)
    if recipe.clip_gradient:
        raise ValueError(
            "clip_gradient clips the gradient of what is quantised, and a gradient has none; leave it out"
        )
    keys = _keys(recipe, generator, y.device)

    def quantized(gradient: Tensor) -> Tensor:
        return recipe.quantize(gradient, recipe.scale_of(gradient), keys)

    return gradient_through(y, quantized)


def _memoryless(format: Any, options: dict[str, Any]) -> Recipe:
    if isinstance(format, Recipe) and options:
        raise ValueError(f"a Recipe says everything; put {', '.join(options)} into it")
    recipe = format if isinstance(format, Recipe) else Recipe(format=format, **options)
    if recipe.scale_mode in ("delayed", "initial"):
        raise ValueError(
            f"scale_mode={recipe.scale_mode!r} remembers earlier tensors, a function cannot; "
            "use 'current' or 'static', or quantize_model"
        )
    return recipe


def _keys(recipe: Recipe, generator: torch.Generator | None, device: torch.device) -> Tensor | None:
    if (recipe.rounding == "stochastic") != (generator is not None):
        raise ValueError(
            "rounding='stochastic' needs a torch.Generator: generator=..."
            if generator is None
            else f"a generator is for rounding='stochastic', not {recipe.rounding!r}"
        )
    return None if generator is None else stream_key_tensor((draw_seed(generator), 0, 0), device)


def straight_through(x: Tensor, quantized: Tensor, passes: Tensor | None = None) -> Tensor:
    """Return `quantized`, with the gradient going to x: unchanged, or 0 where `passes` is False."""
    return _StraightThrough.apply(x, quantized, passes)  # type: ignore[no-any-return, no-untyped-call]


def gradient_through(y: Tensor, quantized: Callable[[Tensor], Tensor]) -> Tensor:
    """Return y, with `quantized` applied to the gradient that comes back; its own derivative is 1."""
    return _GradientThrough.apply(y, quantized)  # type: ignore[no-any-return, no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, passes: Tensor | None) -> Tensor:
        ctx.save_for_backward(passes)
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (passes,) = ctx.saved_tensors
        passed = gradients[0] if passes is None else torch.where(passes, gradients[0], 0.0)
        return passed, None, None


class _GradientThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, quantized: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.quantized = quantized
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return straight_through(gradients[0], ctx.quantized(gradients[0].detach())), None
