"""What a run quantises at this moment, for policies: layers by format, and how actions name them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from altgrad_core.format import Format
from altgrad_core.lookup import format_or_none
from altgrad_core.registry import UsageError
from altgrad_core.surgery import quantizer_of


def formats(run: Any) -> dict[str, Format]:
    """Return the formats of the quantised weights by layer, in the model's order.

    Asked for in every step, since any policy may change them: it looks at the quantisers alone.
    """
    found = {run.layers[name]: quantizer_of(parameter) for name, parameter in run.trained.items()}
    return {layer: one.format for layer, one in found.items() if one is not None}


def by_format(run: Any) -> dict[str, list[str]]:
    """Return those layers by the name of their format."""
    found: dict[str, list[str]] = {}
    for layer, format in formats(run).items():
        found.setdefault(format.name, []).append(layer)
    return found


def looked_up(run: Any, name: str, where: str) -> str:
    """Return what a format calls itself; the name as it is where that means high precision.

    Raises UsageError, saying `where` it was asked for, where no such format is installed.
    """
    try:
        format = format_or_none(name, run.registry)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    return name if format is None else format.name


def named(layers: Iterable[str]) -> str:
    """Return a regex that matches these module paths and no others."""
    return "|".join(map(re.escape, layers))


def of_layers(metric: str, layers: Iterable[str], metrics: Mapping[str, float]) -> dict[str, float]:
    """Return what `metrics` holds of `<metric>/<layer>`, by layer."""
    return {layer: metrics[f"{metric}/{layer}"] for layer in layers if f"{metric}/{layer}" in metrics}


def refuse_types(metric: str, layers: Iterable[str], metrics: Mapping[str, float]) -> None:
    """Raise ValueError where the metric comes in, but for no layer: nothing would ever be decided."""
    if f"{metric}/total" in metrics and not of_layers(metric, layers, metrics):
        raise ValueError(
            f'{metric} is reported, but for none of the layers {", ".join(layers)}; set per = "layer" in its '
            "[[monitor]], and `layers` so that they are observed"
        )
