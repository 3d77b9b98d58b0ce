"""From a quantity of each layer to metrics: one for each layer or type of layer, and one for the whole model.

How several layers become one number is the quantity's own: counts add up, shares add up their numerators and
their denominators, extremes keep the largest, and what cannot be added is averaged over the layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

Found = TypeVar("Found")
"""What is known of one layer: a 0-d tensor, or a tuple of them."""

Share = tuple[Tensor, Tensor]
"""A numerator and a denominator, 0-d."""

LAYER_TYPES = {
    "attention": r".*attn\.c_attn",
    "attention_output": r".*attn\.c_proj",
    "mlp": r".*mlp\..*",
    "classifier": r"(.*\.)?(lm_head|classifier)",
    "embedding": r".*\.(wte|wpe)",
}
"""Type of layer to a regex over nanoGPT's module paths; the first that matches is the layer's."""


def layer_type(layer: str) -> str:
    """Return a key of LAYER_TYPES, or `other`."""
    return next((name for name, pattern in LAYER_TYPES.items() if re.fullmatch(pattern, layer)), "other")


def reported(
    metric: str, found: Mapping[str, Found], combine: Callable[[list[Found]], Tensor], per: str
) -> dict[str, Tensor | float]:
    """Return `<metric>/<layer>` (per = layer) or `<metric>/<type>` (per = type), and `<metric>/total`.

    found: by layer; empty gives no metric at all.
    combine: makes one number of what was found in several layers.
    """
    groups: dict[str, list[Found]] = {}
    for layer, one in found.items():
        groups.setdefault(layer if per == "layer" else layer_type(layer), []).append(one)
    if found:
        groups["total"] = list(found.values())
    return {f"{metric}/{group}": combine(values) for group, values in groups.items()}


def summed(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).sum()


def averaged(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).mean()


def largest(values: list[Tensor]) -> Tensor:
    """Return the largest; NaN where one of them is."""
    return values[0] if len(values) == 1 else torch.stack(values).max()


def smallest(values: list[Tensor]) -> Tensor:
    """Return the smallest; NaN where one of them is."""
    return values[0] if len(values) == 1 else torch.stack(values).min()


def pooled(shares: Iterable[Share]) -> Tensor:
    """Return the sum of the numerators over the sum of the denominators; NaN for 0/0: not defined."""
    parts, wholes = zip(*shares, strict=True)
    return summed(list(parts)) / summed(list(wholes))
