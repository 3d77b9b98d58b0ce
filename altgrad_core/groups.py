"""Parameter groups, and what an optimizer may know of a weight's grid."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
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
    """Split the trainable parameters of a (possibly quantized) model into groups for any torch optimizer.

    One group per number format, one of covered matrices without a format (for each geometry that they take),
    one of the other matrices, one of vectors. Every group has `format` (a Format or None), `scale` (the
    quantizers' own 0-d tensors, one per parameter, or None) and `covered`: whether the optimizer's own rule
    and `lr` are for it, where it can follow them; the other groups train by AdamW at `other_lr`. Vectors have
    `weight_decay` 0.0, the others leave it to the optimizer. `of_format`, where a group has it, is the format
    whose geometry its weights take instead of the one that the optimizer's stiffness names.

    covered: weights that take the place of quantized ones though they have no format, such as those of
        [quantize] format = "FP32", or these with the `of_format` of each; the quantized ones are covered
        anyway.
    """
    taken = dict(covered) if isinstance(covered, Mapping) else dict.fromkeys(covered)
    kinds = _Kinds.of((one for one in model.parameters() if one.requires_grad), taken)
    groups = [
        *(_on_a_grid(format, pairs) for format, pairs in kinds.quantized.items()),
        *(_on_float32(of_format, weights) for of_format, weights in kinds.float32.items()),
        _not_covered(kinds.matrices),
        {**_not_covered(kinds.vectors), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


@attrs.define
class _Kinds:
    """The parameters of a model by what an optimizer may do with them."""

    quantized: dict[Format, list[tuple[nn.Parameter, WeightQuantizer]]] = attrs.field(factory=dict)
    float32: dict[Format | None, list[nn.Parameter]] = attrs.field(factory=dict)
    """Covered weights without a format, by the format whose geometry they take; None: nobody says which."""
    matrices: list[nn.Parameter] = attrs.field(factory=list)
    vectors: list[nn.Parameter] = attrs.field(factory=list)

    @classmethod
    def of(cls, parameters: Iterable[nn.Parameter], covered: Mapping[nn.Parameter, Format | None]) -> _Kinds:
        kinds = cls()
        for parameter in parameters:
            quantizer = quantizer_of(parameter)
            if quantizer is not None and quantizer.covered:
                kinds.quantized.setdefault(quantizer.format, []).append((parameter, quantizer))
            elif parameter.dim() < 2:
                kinds.vectors.append(parameter)
            elif quantizer is None and parameter in covered:
                kinds.float32.setdefault(covered[parameter], []).append(parameter)
            else:
                kinds.matrices.append(parameter)
        return kinds


def _on_a_grid(format: Format, pairs: Sequence[tuple[nn.Parameter, WeightQuantizer]]) -> dict[str, Any]:
    weights, quantizers = zip(*pairs, strict=True)
    scales = [quantizer.scale for quantizer in quantizers]
    return {"params": list(weights), "format": format, "scale": scales, "covered": True}


def _on_float32(of_format: Format | None, weights: list[nn.Parameter]) -> dict[str, Any]:
    group = {**_not_covered(weights), "covered": True}
    return group if of_format is None else {**group, "of_format": of_format}


def _not_covered(parameters: list[nn.Parameter]) -> dict[str, Any]:
    return {"params": parameters, "format": None, "scale": None, "covered": False}


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
    """Return format and scale of a group's parameter: its quantizer's, else the group's own; None: neither.

    A group's own `scale` is a number for all its parameters, or one per parameter; it is static.
    """
    parameter = group["params"][index]
    quantizer = quantizer_of(parameter)
    if quantizer is not None:
        return (quantizer.format, quantizer.scale) if quantizer.covered else None
    format = format_or_none(group.get("format"))
    if format is None:
        return None
    scale = group.get("scale")
    own = scale[index] if isinstance(scale, list | tuple) else scale
    if isinstance(own, Tensor):
        return format, own.to(parameter.device, torch.float32)
    one = 1.0 if own is None else float(own)
    return format, torch.full((), one, dtype=torch.float32, device=parameter.device)
