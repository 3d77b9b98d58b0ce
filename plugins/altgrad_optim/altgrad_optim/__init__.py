"""Optimizers for AltGrad: torch's AdamW, ManifoldAdamW, GridOptim, Madam, RiemannianAdam.

This module is light: options and registration. The optimizers, and the pure functions `adamw_direction` and
`grid_step` that they are made of, are imported when they are asked for. `AdamW` is torch's own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import attrs

from altgrad_core.hookspecs import Component, hookimpl
from altgrad_core.options import StiffnessChoice, above, at_least, between, option, within

if TYPE_CHECKING:
    from torch.optim import AdamW as AdamW

    from altgrad_optim.adamw import adamw_direction as adamw_direction
    from altgrad_optim.grid import GridOptim as GridOptim
    from altgrad_optim.grid_manifold import GridManifold as GridManifold
    from altgrad_optim.madam import Madam as Madam
    from altgrad_optim.manifold import ManifoldAdamW as ManifoldAdamW
    from altgrad_optim.riemannian_adam import RiemannianAdam as RiemannianAdam
    from altgrad_optim.rungs import grid_step as grid_step

PLACEMENTS = {"gradient": (1.0, 0.0), "update": (0.0, 1.0), "both": (1.0, 1.0)}
"""Placement to the exponents (p, q) of delta w = -lr * S^q * Adam(S^p * g)."""

MOST_RUNGS = 2**16
"""The largest rung_clip of GridOptim: no format of up to 16 bits has more rungs."""

_BETAS = "decay of the first and second moment's averages"
_DECAY = "decoupled decay of matrices; vectors have none"

_ROUNDINGS = ("nearest_even", "stochastic", "error_feedback")
"""What [quantize] storage_rounding may be where an optimizer has no first moment for "eco"."""


def _roundings(betas: tuple[float, float]) -> tuple[str, ...]:
    """Return what [quantize] storage_rounding may be with Adam's moments: "eco" too, if the first decays."""
    return (*_ROUNDINGS, "eco") if betas[0] else _ROUNDINGS


@attrs.frozen(kw_only=True)
class AdamWOptions:
    """torch.optim.AdamW, fused: the baseline."""

    lr: float = option("learning rate", default=1e-3, validator=at_least(0))
    other_lr: float = option(
        "learning rate of the parameters that [quantize] does not cover, where it covers any; default: lr",
        default=attrs.Factory(lambda options: options.lr, takes_self=True),
        validator=at_least(0),
    )
    betas: tuple[float, float] = option(_BETAS, default=(0.9, 0.95), validator=within(0, 1))
    eps: float = option("added to the square root of the second moment", default=1e-8, validator=at_least(0))
    weight_decay: float = option(_DECAY, default=0.1, validator=at_least(0))

    @property
    def storage_roundings(self) -> tuple[str, ...]:
        return _roundings(self.betas)


@attrs.frozen(kw_only=True)
class Placement:
    """Where the stiffness S acts: delta w = -lr * S^q * Adam(S^p * g)."""

    p: float = option("exponent of S on the gradient", default=0.0)
    q: float = option("exponent of S on the update", default=0.0)

    @classmethod
    def from_plain(cls, value: Any) -> Any:
        """Read a placement by name, or leave the table {p, q} as it is."""
        if isinstance(value, str):
            if value not in PLACEMENTS:
                raise ValueError(
                    f"expected one of {', '.join(PLACEMENTS)} or a table {{p, q}}, got {value!r}"
                )
            p, q = PLACEMENTS[value]
            return cls(p=p, q=q)
        return value


@attrs.frozen(kw_only=True)
class ManifoldAdamWOptions:
    """AdamW with a stiffness: Adam's step, or its gradient, measured in the format's spacing."""

    lr: float = option(
        "learning rate; under normalize = none and q = 1, ULPs per step", default=1e-3, validator=at_least(0)
    )
    other_lr: float = option("learning rate of unquantized parameters", default=1e-3, validator=at_least(0))
    placement: Placement = option("gradient, update, both, or {p, q}", default=Placement(p=0.0, q=1.0))
    stiffness: StiffnessChoice = option(
        "a stiffness formula, or a table with options", default=StiffnessChoice("grid")
    )
    normalize: Literal["rms", "mean", "max", "none"] = option(
        "what S^q is divided by, per tensor", default="rms"
    )
    max_stiffness: float = option("S is clamped to it", unit="weight units", default=1e6, validator=above(0))
    betas: tuple[float, float] = option(_BETAS, default=(0.9, 0.95), validator=within(0, 1))
    eps: float = option("added to the square root of the second moment", default=1e-8, validator=at_least(0))
    weight_decay: float = option(_DECAY, default=0.1, validator=at_least(0))
    decay_lr: float = option(
        "rate of the decay where lr is not in weight units", default=1e-3, validator=at_least(0)
    )
    track_position: bool = option(
        "count how far each quantized weight moves, in ULPs, at 4 bytes a weight", default=False
    )

    @property
    def storage_roundings(self) -> tuple[str, ...]:
        return _roundings(self.betas)


@attrs.frozen(kw_only=True)
class GridOptimOptions:
    """Updates in whole rungs of the format's grid."""

    step_size: ClassVar[str] = "step_scale"
    """Which option is the step size that [compare] tunes; lr where a class says nothing."""
    stores_on_grid: ClassVar[bool] = True
    """It lands on the grid by itself, and rounds again after a change of scale only."""
    storage_roundings: ClassVar[tuple[str, ...]] = ("nearest_even", "stochastic")
    """What [quantize] storage_rounding may be; where a class says nothing, the run finds out."""

    step_scale: float = option(
        "rungs per unit of direction; with normalize = adam, rungs per step",
        default=6.0,
        validator=at_least(0),
    )
    other_lr: float = option("learning rate of unquantized parameters", default=1e-3, validator=at_least(0))
    normalize: Literal["none", "adam"] = option("direction: the raw velocity, or Adam's", default="none")
    rounding: Literal["rung", "value"] = option("what is rounded stochastically", default="rung")
    momentum: float = option("of the velocity", default=0.9, validator=within(0, 1))
    betas: tuple[float, float] = option(
        _BETAS + " (normalize = adam, and unquantized parameters)",
        default=(0.9, 0.95),
        validator=within(0, 1),
    )
    eps: float = option("added to the square root of the second moment", default=1e-8, validator=at_least(0))
    weight_decay: float = option(
        "coupled under none, decoupled under adam and of unquantized matrices",
        default=0.0,
        validator=at_least(0),
    )
    decay_lr: float = option("rate of the decay under adam", default=1e-3, validator=at_least(0))
    rung_clip: float = option(
        "largest move in one step", unit="rungs", default=10.0, validator=[above(0), between(0, MOST_RUNGS)]
    )


@attrs.frozen(kw_only=True)
class MadamOptions:
    """Multiplicative updates; the bound on |w| is [quantize]'s, and the paper's is 3."""

    storage_roundings: ClassVar[tuple[str, ...]] = _ROUNDINGS

    lr: float = option("share of |w| per unit of direction", default=0.01, validator=at_least(0))
    other_lr: float = option("learning rate of unquantized parameters", default=1e-3, validator=at_least(0))
    beta: float = option("decay of the second moment's average", default=0.999, validator=within(0, 1))
    clip: float = option("limit on the normalized gradient", default=10.0, validator=above(0))
    betas: tuple[float, float] = option(
        _BETAS + " (unquantized parameters)", default=(0.9, 0.95), validator=within(0, 1)
    )
    eps: float = option("added to the square root of the second moment", default=1e-8, validator=at_least(0))
    weight_decay: float = option(_DECAY, default=0.0, validator=at_least(0))
    decay_lr: float = option(
        "rate of the decay, since lr is not in weight units", default=1e-3, validator=at_least(0)
    )


@attrs.frozen(kw_only=True)
class RiemannianAdamOptions:
    """geoopt's RiemannianAdam on the manifold of the format's grid; needs altgrad-optim[geoopt]."""

    storage_roundings: ClassVar[tuple[str, ...]] = _ROUNDINGS

    lr: float = option("learning rate", unit="ULPs per step", default=0.1, validator=at_least(0))
    other_lr: float = option("learning rate of unquantized parameters", default=1e-3, validator=at_least(0))
    stiffness: StiffnessChoice = option(
        "a stiffness formula, or a table with options; the metric is 1/S^2", default=StiffnessChoice("grid")
    )
    max_stiffness: float = option("S is clamped to it", unit="weight units", default=1e6, validator=above(0))
    retraction: Literal["add", "grid"] = option(
        "where a step ends: at w + u, or at the grid value nearest to it", default="add"
    )
    betas: tuple[float, float] = option(_BETAS, default=(0.9, 0.95), validator=within(0, 1))
    eps: float = option("added to the square root of the second moment", default=1e-8, validator=at_least(0))
    weight_decay: float = option(_DECAY, default=0.1, validator=at_least(0))
    decay_lr: float = option(
        "rate of the decay, since lr is not in weight units", default=1e-3, validator=at_least(0)
    )


@hookimpl
def altgrad_optimizers() -> list[Component]:
    return [
        Component(
            name="AdamW",
            summary="torch.optim.AdamW, fused: the baseline",
            options=AdamWOptions,
            target="altgrad_optim.adamw:build",
            source="arXiv 1711.05101; defaults of nanoGPT",
        ),
        Component(
            name="ManifoldAdamW",
            summary="AdamW in the geometry of the format's spacing",
            options=ManifoldAdamWOptions,
            target="altgrad_optim.manifold:build",
            source="docs/science.md; placement both is Riemannian Adam, arXiv 1810.00760",
        ),
        Component(
            name="GridOptim",
            summary="updates in whole rungs, rounded stochastically",
            options=GridOptimOptions,
            target="altgrad_optim.grid:build",
        ),
        Component(
            name="Madam",
            summary="multiplicative updates, a step proportional to |w|: a rival without the grid",
            options=MadamOptions,
            target="altgrad_optim.madam:build",
            source="arXiv 2006.14560; on a logarithmic format LNS-Madam, arXiv 2106.13914",
        ),
        Component(
            name="RiemannianAdam",
            summary="geoopt's, with metric 1/S^2: the reference of ManifoldAdamW's placement both",
            options=RiemannianAdamOptions,
            target="altgrad_optim.riemannian_adam:build",
            source="geoopt; arXiv 1810.00760",
        ),
    ]


_LAZY = {
    "AdamW": "torch.optim",
    "GridManifold": "altgrad_optim.grid_manifold",
    "GridOptim": "altgrad_optim.grid",
    "Madam": "altgrad_optim.madam",
    "ManifoldAdamW": "altgrad_optim.manifold",
    "RiemannianAdam": "altgrad_optim.riemannian_adam",
    "adamw_direction": "altgrad_optim.adamw",
    "grid_step": "altgrad_optim.rungs",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
