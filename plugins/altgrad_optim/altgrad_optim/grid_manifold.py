"""GridManifold: the geometry of a format's grid as a geoopt manifold, and checks of what it promises.

Seen from the rungs u, a grid is w = T(u) with local spacing S(w) = dw/du. The flat metric du^2 on the rungs
is the Riemannian metric 1/S(w)^2 on the weights, element by element:

    inner product      <u, v>_w = u*v / S(w)^2
    gradient           grad = S(w)^2 * g
    retraction         R_w(u) = w + u, or the grid value nearest to it
    transport w to y   v -> v * S(y)/S(w): what keeps its length in rungs

Adam under it (Becigneul and Ganea, arXiv 1810.00760) is ManifoldAdamW's placement `both`, and any optimizer
of geoopt runs on it:

    weight = geoopt.ManifoldParameter(data, manifold=GridManifold(E4M3, scale=16.0))
    optimizer = geoopt.optim.RiemannianAdam([weight], lr=0.1)            # lr in ULPs per step

Limits. The retraction is of first order: it ignores that S changes within the step, so at a binade's edge a
step of k ULPs is not k rungs. S jumps there, so this is a manifold between the edges only. float32 holds S^2
and 1/S^2 where S lies within about 2^-63 and 2^63; below, S^2*g vanishes and the weight stands still.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.lookup import get_stiffness
from altgrad_core.registry import UsageError
from altgrad_core.stiffness import metric_violations, out_of_range
from altgrad_optim.powers import limited

try:
    from geoopt import Manifold
except ModuleNotFoundError as error:
    raise UsageError(
        "GridManifold and RiemannianAdam work by geoopt, which is not installed: "
        "pip install 'altgrad-optim[geoopt]'; ManifoldAdamW with placement = \"both\" needs no geoopt"
    ) from error

RETRACTIONS = ("add", "grid")


class GridManifold(Manifold):  # type: ignore[misc]
    """The manifold of a format's grid, values/scale; see the module's text.

    stiffness: name of an installed formula, a table, or a callable `(weight, format, scale)`; S is clamped to
        `max_stiffness`, weight units.
    retraction: "add", x + u; or "grid", the grid value nearest to it (ties to the even rung).
    Raises ValueError for an unknown retraction.
    """

    ndim = 0
    name = "Grid"
    reversible = False

    def __init__(
        self,
        format: Format,
        scale: Tensor | float = 1.0,
        stiffness: Any = "grid",
        *,
        max_stiffness: float = 1e6,
        retraction: str = "add",
    ) -> None:
        super().__init__()
        if retraction not in RETRACTIONS:
            raise ValueError(f"Invalid retraction: {retraction!r}; use one of {', '.join(RETRACTIONS)}")
        self.format = format
        self.scale = scale
        self.stiffness = get_stiffness(stiffness)
        self.max_stiffness = max_stiffness
        self.retraction = retraction

    def stiffness_at(self, x: Tensor) -> Tensor:
        """Return S(x), of x's shape and dtype."""
        return limited(self.stiffness(x, self.format, self.scale), self.max_stiffness)

    # S divides each factor before they meet: S^2 leaves float32's range long before u/S does.

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """Return u*v/S(x)^2, element by element."""
        stiffness = self.stiffness_at(x)
        return (u / stiffness) * ((u if v is None else v) / stiffness)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return S(x)^2 times the gradient u."""
        stiffness = self.stiffness_at(x)
        return stiffness * (stiffness * u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return where a step u from x ends; u = 0 leaves every x where it is, as a retraction must."""
        if self.retraction == "add":
            return x + u
        return torch.where(u == 0, x, self.projx(x + u))

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Return the tangent vector v at x as one at y, of the same length in rungs."""
        return v / self.stiffness_at(x) * self.stiffness_at(y)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the retraction, which stands for the geodesic to first order."""
        return self.retr(x, u)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return u: the tangent space is everything."""
        return u

    def projx(self, x: Tensor) -> Tensor:
        """Return x itself; where steps end on the grid, the grid value nearest to it."""
        if self.retraction == "add":
            return x
        scale = torch.as_tensor(self.scale, device=x.device)
        return self.format.fake_quantize(x, scale.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.format.name}, retraction={self.retraction!r}"

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not bool(x.isfinite().all()):
            return False, "some weights are not finite"
        if self.retraction == "grid" and not torch.equal(self.projx(x), x):
            return False, f"some weights are not on the grid of {self.format.name}"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        return (True, None) if bool(u.isfinite().all()) else (False, "some elements are not finite")


def invariants(manifold: GridManifold, x: Tensor) -> Mapping[str, Tensor]:
    """Return how many elements break what the manifold promises, by check, 0-d on x's device.

    metric_violations: the metric 1/S(x)^2 is not positive and finite. out_of_range: x, where a retraction has
    ended, lies beyond the grid's ends. In a run the monitor `stiffness` reports both.
    """
    return {
        "metric_violations": metric_violations(manifold.stiffness_at(x)),
        "out_of_range": out_of_range(x, manifold.format, manifold.scale),
    }
