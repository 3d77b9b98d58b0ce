"""Parameter groups, and what an optimizer may know of a weight's grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from altgrad_core.format import Format
from altgrad_core.lookup import format_or_none
from altgrad_core.quantizer import WeightQuantizer, quantizer_of

GEOMETRY_KEYS = ("format", "scale")
"""Keys of a group that describe its grid; they are no part of an optimizer's saved state."""


def param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Split the trainable parameters of a (possibly quantised) model into groups for any torch optimizer.

    One group per number format, one of unquantised matrices, one of vectors. Every group has `format` (a
    Format or None) and `scale` (the quantisers' own 0-d tensors, one per parameter, or None); vectors have
    `weight_decay` 0.0, the others leave it to the optimizer.
    """
    quantized: dict[Format, list[tuple[nn.Parameter, WeightQuantizer]]] = {}
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        quantizer = quantizer_of(parameter)
        if quantizer is not None and quantizer.geometry:
            quantized.setdefault(quantizer.format, []).append((parameter, quantizer))
        else:
            (matrices if parameter.dim() >= 2 else vectors).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": [one for one, _ in pairs], "format": format, "scale": [other.scale for _, other in pairs]}
        for format, pairs in quantized.items()
    ]
    if matrices:
        groups.append({"params": matrices, "format": None, "scale": None})
    if vectors:
        groups.append({"params": vectors, "format": None, "scale": None, "weight_decay": 0.0})
    return groups


def grid_of(group: dict[str, Any], index: int) -> tuple[Format, Tensor] | None:
    """Return format and scale of a group's parameter: its quantiser's, else the group's own; None: neither.

    A group's own `scale` is a number for all its parameters, or one per parameter; it is static.
    """
    parameter = group["params"][index]
    quantizer = quantizer_of(parameter)
    if quantizer is not None:
        return (quantizer.format, quantizer.scale) if quantizer.geometry else None
    format = format_or_none(group.get("format"))
    if format is None:
        return None
    scale = group.get("scale")
    own = scale[index] if isinstance(scale, list | tuple) else scale
    if isinstance(own, Tensor):
        return format, own.to(parameter.device, torch.float32)
    one = 1.0 if own is None else float(own)
    return format, torch.full((), one, dtype=torch.float32, device=parameter.device)
