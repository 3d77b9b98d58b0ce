"""AltGrad: the bench on which people find out how 8-bit number formats train.

    import altgrad_core as altgrad

    E3M4 = altgrad.get_format("E3M4")
    altgrad.quantize_model(model, "E3M4")

This module imports no torch: its names are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from altgrad_core.commands import run as run
    from altgrad_core.commands import run_all as run_all
    from altgrad_core.experiment_file import load_experiment as load_experiment
    from altgrad_core.format import Format as Format
    from altgrad_core.groups import param_groups as param_groups
    from altgrad_core.lookup import get_format as get_format
    from altgrad_core.recipe import Recipe as Recipe
    from altgrad_core.registry import discover as plugins  # noqa: F401 - a public name
    from altgrad_core.rules import Rule as Rule
    from altgrad_core.storage import store_on_grid as store_on_grid
    from altgrad_core.straight_through import quantize_gradient as quantize_gradient
    from altgrad_core.straight_through import quantize_ste as quantize_ste
    from altgrad_core.surgery import dequantize_model as dequantize_model
    from altgrad_core.surgery import held_weights as held_weights
    from altgrad_core.surgery import quantize_model as quantize_model

_HOMES = {
    "Format": "format",
    "Recipe": "recipe",
    "Rule": "rules",
    "dequantize_model": "surgery",
    "get_format": "lookup",
    "held_weights": "surgery",
    "load_experiment": "experiment_file",
    "param_groups": "groups",
    "plugins": "registry:discover",
    "quantize_gradient": "straight_through",
    "quantize_model": "surgery",
    "quantize_ste": "straight_through",
    "run": "commands",
    "run_all": "commands",
    "store_on_grid": "storage",
}
"""Public name to the module it lives in."""

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    found = getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
