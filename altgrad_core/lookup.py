"""From names to live objects: formats and stiffness formulas of any installed plugin."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, cast

import attrs
import torch

from altgrad_core.format import Format
from altgrad_core.hookspecs import Stiffness
from altgrad_core.options import Choice, FormatChoice, GeometryOptions, StiffnessChoice
from altgrad_core.registry import PluginError, Registry, UsageError, discover
from altgrad_core.stiffness import Geometry
from altgrad_core.structuring import structure


def get_format(
    spec: str | Mapping[str, Any] | Format | FormatChoice, registry: Registry | None = None
) -> Format:
    """Return a format by name (`"E3M4"`), by an experiment file's table, or as given.

    A table is `{"exponent_bits": 4, "mantissa_bits": 5, "bias": 7}` or names a plugin. Raises UsageError for
    an unknown name, and for FP32, which is no format of fewer bits: see `format_or_none`.
    """
    found = format_or_none(spec, registry)
    if found is None:
        raise UsageError(f"{spec!r} means 'leave it alone' and has no grid; name a format of 3 to 16 bits")
    return found


def format_or_none(
    spec: str | Mapping[str, Any] | Format | FormatChoice | None, registry: Registry | None = None
) -> Format | None:
    """Return a format as `get_format` does; None for None, "FP32" and "none": leave it alone."""
    if spec is None or isinstance(spec, Format):
        return spec
    registry = discover() if registry is None else registry
    choice = _choice(spec, FormatChoice, registry)
    return None if choice.unquantized else _built_format(choice, registry)


def get_stiffness(spec: Any, registry: Registry | None = None) -> Stiffness:
    """Return a stiffness formula by name, by table (`{"plugin": "grid", ...}`), or the callable given.

    A table may hold, beside the formula's own options, `of_format` (a name, a table or a Format) and
    `refresh`; the result is then a `Geometry`. Raises UsageError for an unknown name or a wrong table.
    """
    if callable(spec):
        return cast(Stiffness, spec)
    registry = discover() if registry is None else registry
    if isinstance(spec, Mapping) and isinstance(of_format := spec.get("of_format"), Format):
        rest = {key: value for key, value in spec.items() if key != "of_format"}
        choice = _choice(rest, StiffnessChoice, registry)
        formula = attrs.evolve(choice, geometry=GeometryOptions()).build(registry)
        return Geometry(formula, of_format, choice.geometry.refresh)
    return cast(Stiffness, _choice(spec, StiffnessChoice, registry).build(registry))


def _choice(spec: Any, cls: type[Choice], registry: Registry) -> Any:
    value = dict(spec) if isinstance(spec, Mapping) else spec
    choice, problems = structure(value, cls, registry)
    if problems:
        raise UsageError(
            "; ".join(f"{'.'.join(map(str, one.path))}: {one.message}".lstrip(": ") for one in problems)
        )
    return choice


@functools.lru_cache(maxsize=256)
def _built_format(choice: FormatChoice, registry: Registry) -> Format:
    built = choice.build(registry)
    if not isinstance(built, Format):
        raise PluginError(
            f"{choice.title(registry)} is no Format but {type(built).__name__}: mend its plugin"
        )
    try:
        _round_something(built)
    except Exception as error:
        raise PluginError(
            f"{choice.title(registry)} cannot round: {type(error).__name__}: {error}"
        ) from error
    return built


def _round_something(format: Format) -> None:
    """Raise where a format's own arithmetic fails, or returns another shape: see it before it trains."""
    one, other = format.smallest, format.largest
    given = torch.tensor([[one, -other, 0.0], [-one, other, 0.0]], dtype=torch.float32, device="cpu")
    found = format.fake_quantize(given)
    if (found.shape, found.dtype) != (given.shape, given.dtype):
        raise ValueError(
            f"it returns the shape {tuple(found.shape)} and {found.dtype} for {tuple(given.shape)} and "
            f"{given.dtype}: rounding keeps both"
        )
