"""The executor `ray` for AltGrad: the cells of a grid as tasks of a Ray cluster.

This module is light: options and registration; it imports neither Ray nor torch.
"""

from __future__ import annotations

import re
from typing import Any

import attrs

from altgrad_core.hookspecs import Component, hookimpl
from altgrad_core.options import at_least, option

ADDRESS = re.compile(r"(auto|[^\s/]+:\d+)?")


def _is_an_address(_: Any, field: Any, value: str) -> None:
    """Attrs validator: what a cluster can be joined by."""
    if not ADDRESS.fullmatch(value):
        raise ValueError(
            f'expected "" (start one on this machine), "auto" (the one of this machine) or "host:port", '
            f"got {value!r}"
        )


def _can_be_divided(_: Any, field: Any, value: float | None) -> None:
    """Attrs validator: Ray shares out fractions of one device, and whole devices."""
    if value is not None and (value < 0 or (value > 1 and value != int(value))):
        raise ValueError(f"expected 0 to 1, or a whole number above 1, got {value!r}")


@attrs.frozen(kw_only=True)
class RayOptions:
    """Where the cells run, what each of them takes, and how often one that is lost is tried again."""

    address: str = option(
        'the cluster: "host:port", or "auto" for that of this machine; empty: start one on this machine',
        default="",
        validator=_is_an_address,
    )
    cpus_per_cell: float = option(
        "CPU cores a cell takes, and its threads", unit="cores", default=1.0, validator=_can_be_divided
    )
    gpus_per_cell: float | None = option(
        "GPUs a cell takes; 0.5: two cells share one; left out: 1 where the cluster has any, otherwise 0",
        unit="GPUs",
        default=None,
        validator=_can_be_divided,
    )
    retries: int = option(
        "how often a cell is tried again whose process or node is lost", default=3, validator=at_least(0)
    )


@hookimpl
def altgrad_executors() -> list[Component]:
    return [
        Component(
            name="ray",
            summary="cells as tasks of a Ray cluster, with shares of GPUs; lost ones resume elsewhere",
            options=RayOptions,
            target="altgrad_ray.executor:RayExecutor",
            source="Moritz et al. 2018, Ray: a distributed framework for emerging AI applications",
        )
    ]
