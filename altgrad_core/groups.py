"""Parameter groups, and what an optimizer may know of a weight's grid."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from altgrad_core.format import Format
from altgrad_core.lookup import format_or_none
from altgrad_core.quantizer import WeightQuantizer, quantizer_of

GEOMETRY_KEYS = ("format", "scale", "covered", "of_format")
"""Keys of a group that describe its grid; they are no part of an optimizer's saved state."""


def param_groups(
    model: nn.Module, covered: Collection[nn.Parameter] | Mapping[nn.Parameter, Format | None] = ()
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a (possibly quantised) model into groups for any torch optimizer.

    One group per number format, one of covered matrices without a format (for each geometry that they take),
    one of the other matrices, one of vectors. Every group has `format` (a Format or None), `scale` (the
    quantisers' own 0-d tensors, one per parameter, or None) and `covered`: whether the optimizer's own rule
    and `lr` are for it, where it can follow them; the other groups train by AdamW at `other_lr`. Vectors have
    `weight_decay` 0.0, the others leave it to the optimizer. `of_format`, where a group has it, is the format
    whose geometry its weights take instead of the one that the optimizer's stiffness names.

    covered: weights that take the place of quantised ones though they have no format, such as those of
        [quantize] format = "FP32", or these with the `of_format` of each; the quantised ones are covered
        anyway.
    """
    quantized: dict[Format, list[tuple[nn.Parameter, WeightQuantizer]]] = {}
    float32: dict[Format | None, list[nn.Parameter]] = {}
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    taken = dict(covered) if isinstance(covered, Mapping) else dict.fromkeys(covered)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        quantizer = quantizer_of(parameter)
        if quantizer is not None and quantizer.geometry:
            quantized.setdefault(quantizer.format, []).append((parameter, quantizer))
        elif parameter.dim() < 2:
            vectors.append(parameter)
        elif quantizer is None and parameter in taken:
            float32.setdefault(taken[parameter], []).append(parameter)
        else:
            matrices.append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": [one for one, _ in pairs],
            "format": format,
            "scale": [other.scale for _, other in pairs],
            "covered": True,
        }
        for format, pairs in quantized.items()
    ]
    plain = {"format": None, "scale": None, "covered": False}
    groups += [
        {"params": params, **plain, "covered": True} | ({} if of_format is None else {"of_format": of_format})
        for of_format, params in float32.items()
    ]
    groups += [
        {"params": matrices, **plain},
        {"params": vectors, **plain, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def without_geometry(state: dict[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state dict as it is saved: its groups do not tell of grids."""
    groups = [
        {key: value for key, value in group.items() if key not in GEOMETRY_KEYS}
        for group in state["param_groups"]
    ]
    return {**state, "param_groups": groups}


@contextlib.contextmanager
def geometry_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Have a state dict loaded inside, and let the groups tell of grids what they did before."""
    kept = [{key: group[key] for key in GEOMETRY_KEYS if key in group} for group in optimizer.param_groups]
    yield
    for group, own in zip(optimizer.param_groups, kept, strict=True):
        for key in GEOMETRY_KEYS:
            group.pop(key, None)
        group.update(own)


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
