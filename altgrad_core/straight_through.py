"""Quantization that gradients pass: forward Q(x) with dx = dy, and identity with a quantized gradient.

The straight-through estimator (Bengio, Leonard and Courville, arXiv 1308.3432) takes the derivative of
rounding, zero almost everywhere, for 1. With `clip_gradient`, elements that saturated get a zero gradient:
there the forward pass does not depend on them at all. Scales get no gradient.

Under torch.func the quantization sees plain tensors below `grad`, and one sample at a time below `vmap`: a
scale is then each sample's own. What remembers (a delayed scale, a weight's scale where the weight itself is
mapped over) cannot be written from within `vmap`; torch says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from altgrad_core.random_bits import draw_seed, stream_key_tensor
from altgrad_core.recipe import Recipe, recipe_of


def quantize_ste(
    x: Tensor, format: Any, *, generator: torch.Generator | None = None, **options: Any
) -> Tensor:
    """Return Q(x), and pass the gradient through unchanged (with `clip_gradient`, not where x saturated).

    format: a Recipe, or a format and the fields of a Recipe as options. generator: for rounding =
    "stochastic"; one seed is drawn from it. Raises ValueError for a scale mode that needs a memory of
    earlier tensors ("delayed", "initial"): those are for `quantize_model`.
    """
    recipe = _memoryless(format, options)
    keys = _keys(recipe, generator, x.device)
    return straight_through(x, functools.partial(_quantized, recipe=recipe, keys=keys))


def quantize_gradient(
    y: Tensor, format: Any = "E5M2", *, generator: torch.Generator | None = None, **options: Any
) -> Tensor:
    """Return y, and quantize the gradient that comes back to it; options as `quantize_ste` takes them.

    y is no copy, so that torch refuses to change what comes out in place. Raises ValueError for
    `clip_gradient` too: a gradient has no gradient to clip.
    """
    recipe = _memoryless(format, options)
    if recipe.clip_gradient:
        raise ValueError(
            "clip_gradient clips the gradient of what is quantized, and a gradient has none; leave it out"
        )
    keys = _keys(recipe, generator, y.device)

    def quantized(gradient: Tensor) -> Tensor:
        return recipe.quantize(gradient, recipe.scale_of(gradient), keys)

    return gradient_through(y, quantized)


def _memoryless(format: Any, options: dict[str, Any]) -> Recipe:
    if isinstance(format, Recipe) and options:
        raise ValueError(f"a Recipe says everything; put {', '.join(options)} into it")
    recipe = format if isinstance(format, Recipe) else recipe_of(format, options)
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


Quantization = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""From x to Q(x), a tensor of its own, and where a gradient passes (None: everywhere)."""


def _quantized(x: Tensor, recipe: Recipe, keys: Tensor | None) -> tuple[Tensor, Tensor | None]:
    scale = recipe.scale_of(x)
    return recipe.quantize(x, scale, keys), recipe.passes(x, scale, keys)


def straight_through(x: Tensor, quantization: Quantization) -> Tensor:
    """Return Q(x), with the gradient going to x: unchanged, or 0 where it does not pass."""
    if torch.compiler.is_compiling():  # what is quantized within a Function may not fill the formats' caches
        with torch.no_grad():
            quantized, passes = quantization(x.detach())
        return _StraightThrough.apply(x, lambda _: (quantized.clone(), passes))[0]  # type: ignore[no-any-return, no-untyped-call]
    function = _TransformedStraightThrough if _transformed() else _StraightThrough
    return function.apply(x, quantization)[0]  # type: ignore[no-any-return, no-untyped-call]


def gradient_through(y: Tensor, quantized: Callable[[Tensor], Tensor], owned: bool = False) -> Tensor:
    """Return y, with `quantized` applied to the gradient that comes back; its own derivative is 1.

    owned: whether nobody else needs y's values, its own derivative included: what comes out may then be
        changed in place, and y with it.
    """
    function = _TransformedGradientThrough if _transformed() else _GradientThrough
    return function.apply(y, quantized, owned)  # type: ignore[no-any-return, no-untyped-call]


def _transformed() -> bool:
    """Whether a transform of torch.func is at work: it needs `setup_context`, at 80 us a call."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor | None]:
        quantized, passes = quantization(x)
        ctx.save_for_backward(passes)
        return quantized, None

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (passes,) = ctx.saved_tensors
        return gradients[0] if passes is None else torch.where(passes, gradients[0], 0.0), None


class _TransformedStraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, quantization: Quantization) -> tuple[Tensor, Tensor | None]:
        return quantization(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(output[1])
        if output[1] is not None:
            ctx.mark_non_differentiable(output[1])

    backward = _StraightThrough.backward


class _GradientThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, quantized: Callable[[Tensor], Tensor], owned: bool) -> Tensor:
        ctx.quantized = quantized
        if not owned:
            return y.view_as(y)
        return y.clone() if torch.compiler.is_compiling() else y.data  # no view, for those are refused

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return straight_through(gradients[0], lambda one: (ctx.quantized(one), None)), None, None


class _TransformedGradientThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, quantized: Callable[[Tensor], Tensor], owned: bool) -> Tensor:
        return y.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.quantized = inputs[1]

    backward = _GradientThrough.backward
