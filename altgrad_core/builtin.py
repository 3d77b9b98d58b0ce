"""The components that the core registers itself.

The stiffness formulas `grid` and `uniform` are here so that optimizers work, and are tested, without
altgrad_formats; `local` is the executor that needs nothing but this machine.
"""

from __future__ import annotations

from altgrad_core.hookspecs import Component, hookimpl


@hookimpl
def altgrad_stiffness() -> list[Component]:
    return [
        Component(
            name="grid",
            summary="the format's true spacing at the weight, ulp(w*s)/s",
            target="altgrad_core.stiffness:grid",
            source="unit in the last place, as in IEEE 754",
        ),
        Component(
            name="uniform",
            summary="1 everywhere: the null control",
            target="altgrad_core.stiffness:uniform",
        ),
    ]


@hookimpl
def altgrad_executors() -> list[Component]:
    return [
        Component(
            name="local",
            summary="cells on this machine, one after another or in --jobs processes",
            target="altgrad_core.grids:local_executor",
        )
    ]
