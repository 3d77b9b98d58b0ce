"""What a run quantizes at this moment, for policies: layers by format, and how actions name them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from altgrad_core.format import Format
from altgrad_core.lookup import format_or_none
from altgrad_core.quantizer import quantizer_of
from altgrad_core.registry import UsageError
from altgrad_core.surgery import quantized_flows


def formats(run: Any) -> dict[str, Format]:
    """Return the formats of the quantized weights by layer, in the model's order.

    Asked for in every step, since any policy may change them: it looks at the quantizers alone.
    """
    found = {run.layers[name]: quantizer_of(parameter) for name, parameter in run.trained.items()}
    return {layer: one.format for layer, one in found.items() if one is not None}


def by_format(run: Any) -> dict[str, list[str]]:
    """Return those layers by the name of their format."""
    found: dict[str, list[str]] = {}
    for layer, format in formats(run).items():
        found.setdefault(format.name, []).append(layer)
    return found


def flow_layers(run: Any, kind: str) -> list[str]:
    """Return the layers whose `activations` or `gradients` are quantized."""
    names = (name.rpartition(".") for name in quantized_flows(run.model))
    return [layer for layer, _, found in names if found == kind]


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


def refuse_unwatched(run: Any, policy: str, monitor: str, layers: Collection[str], *, each: bool) -> None:
    """Raise UsageError where a monitor's options leave a policy nothing to read of these layers.

    each: the policy reads the metrics of single layers, not the total alone.
    """
    options = _options_of(run, monitor)
    if layers and not watched(run, monitor, layers):
        raise UsageError(
            f"{policy} reads {monitor!r}, whose layers = {options.layers!r} matches none of those that it "
            f"decides about ({', '.join(layers)}); widen that pattern"
        )
    if layers and each and getattr(options, "per", "layer") != "layer":
        raise UsageError(
            f"{policy} reads single layers of {monitor!r}, which reports by type of layer; set "
            'per = "layer" in its [[monitor]]'
        )


def watched(run: Any, monitor: str, layers: Collection[str]) -> list[str]:
    """Return those of the layers that a monitor's option `layers` lets it observe."""
    pattern = getattr(_options_of(run, monitor), "layers", ".*")
    return [layer for layer in layers if re.fullmatch(pattern, layer)]


def _options_of(run: Any, monitor: str) -> Any:
    """Return a monitor's options as the experiment gives them; None where they are the defaults."""
    found = (one.options for one in run.experiment.monitor if one.bare_name == monitor)
    return next(found, None)


def refuse_types(metric: str, layers: Iterable[str], metrics: Mapping[str, float]) -> None:
    """Raise ValueError where the metric comes in, but for no layer: nothing would ever be decided."""
    if f"{metric}/total" in metrics and not of_layers(metric, layers, metrics):
        raise ValueError(
            f'{metric} is reported, but for none of the layers {", ".join(layers)}; set per = "layer" in its '
            "[[monitor]], and `layers` so that they are observed"
        )
