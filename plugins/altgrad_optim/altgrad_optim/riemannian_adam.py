"""RiemannianAdam: geoopt's optimizer on the manifold of each weight's grid.

Riemannian Adam (Becigneul and Ganea, arXiv 1810.00760) as geoopt implements it, on `GridManifold`. With
weight decay or without, it takes the steps of ManifoldAdamW under `placement="both", normalize="none"`,
computed by other people's code: the reference that shows that `both` is Adam under the metric 1/S^2.

Its first moment is that of the Riemannian gradient S^2*g, transported with the weight; ManifoldAdamW keeps
that of S*g. In float32 S^2*g vanishes where S is below about 2^-63, and the weight then stands still.

A borrowed geometry (`of_format`, see `stiffness_optimizer`) is a metric as any other; the weight has no grid
to land on, so that its steps end at w + u. Under `refresh = "never"` the metric is flat, one per weight.

geoopt's own weight decay is coupled: it is added to the gradient, in place. So geoopt works on clones with
its decay at 0, and the decoupled decay follows as a second retraction, from where the step ended, by
-decay_lr*weight_decay*w, with w from before the step; the momentum is transported along.

When not to use it: for anything but the comparison. ManifoldAdamW does the same, faster, with normalized
steps and every option. With `retraction="grid"` a step below half a spacing is lost, as under nearest
rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad_core.groups import grid_of
from altgrad_core.hookspecs import OptimizerInputs
from altgrad_core.kernels import not_compiled
from altgrad_optim import RiemannianAdamOptions
from altgrad_optim.adamw import moments, plain_step
from altgrad_optim.base import Gridded, evaluated, plain_lr, refuse_others, schedule_factor
from altgrad_optim.stiffness_optimizer import StiffnessOptimizer


class RiemannianAdam(StiffnessOptimizer):
    """geoopt's RiemannianAdam; see the module's text. Parameters without a grid: AdamW at `other_lr`.

    lr: ULPs per step.
    stiffness: see `StiffnessOptimizer`. max_stiffness, retraction: the manifold's, see `GridManifold`.
    weight_decay: decoupled, at the rate `decay_lr` (following the schedule): lr is not in weight units.
    Raises UsageError where geoopt is not installed; ValueError on options out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        stiffness: Any = "grid",
        max_stiffness: float = 1e6,
        retraction: str = "add",
        other_lr: float = 1e-3,
        decay_lr: float = 1e-3,
    ) -> None:
        import altgrad_optim.grid_manifold  # noqa: F401 - says what to install where geoopt is missing

        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "max_stiffness": max_stiffness,
                "retraction": retraction,
                "other_lr": other_lr,
                "decay_lr": decay_lr,
            },
            stiffness,
        )

    def _refuse_bad_options(self, options: dict[str, Any]) -> None:
        from altgrad_optim.grid_manifold import RETRACTIONS

        super()._refuse_bad_options(options)
        refuse_others("retraction", options["retraction"], tuple(RETRACTIONS))

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step; returns the closure's loss, None without one."""
        loss = evaluated(closure)
        for group in self.param_groups:
            gridded, borrowing, plain = self.by_geometry(group)
            for one in gridded:
                self._move(group, one, group["retraction"])
            for one in borrowing:
                self._move(group, one, "add")
            plain_step(self, group, plain, plain_lr(group))
        return loss

    def _move(self, group: dict[str, Any], gridded: Gridded, retraction: str) -> None:
        weight, state = gridded[0], self.state[gridded[0]]
        moments(state, weight, "exp_avg", "exp_avg_sq")
        manifold = self._manifold(group, gridded, retraction)
        point = geoopt_step(weight, manifold, state, self.grid_lr(group), group["betas"], group["eps"])
        state["step"] += 1
        if group["weight_decay"]:
            rate = group["decay_lr"] * schedule_factor(group) * group["weight_decay"]
            ended = manifold.retr(point, -rate * weight)
            state["exp_avg"].copy_(manifold.transp(point, ended, state["exp_avg"]))
            point = ended
        weight.copy_(point)

    def _manifold(self, group: dict[str, Any], gridded: Gridded, retraction: str) -> Any:
        from altgrad_optim.grid_manifold import GridManifold

        _, format, scale = gridded
        given = {"max_stiffness": group["max_stiffness"], "retraction": retraction}
        return GridManifold(format, scale, self.formula_at(group, gridded), **given)

    @torch.no_grad()
    def invariants(self) -> Mapping[str, Tensor]:
        """Return how many weights break what the manifold promises, by check, 0-d; empty without a grid.

        See `grid_manifold.invariants`; a monitor can report the counts as they are.
        """
        from altgrad_optim.grid_manifold import invariants

        found = [
            invariants(self._manifold(group, (weight, *grid), group["retraction"]), weight)
            for group in self.param_groups
            for index, weight in enumerate(group["params"])
            if (grid := grid_of(group, index)) is not None
        ]
        return {name: torch.stack([one[name] for one in found]).sum() for name in (found[0] if found else ())}


def geoopt_step(
    weight: Tensor,
    manifold: Any,
    state: Mapping[str, Any],
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Return where geoopt's RiemannianAdam takes a weight; the moments in `state` are updated in place.

    Weight, gradient and step count stay as they are.
    """
    import geoopt

    point = geoopt.ManifoldParameter(weight.detach().clone(), manifold=manifold)
    point.grad = None if weight.grad is None else weight.grad.clone()
    optimizer = geoopt.optim.RiemannianAdam([point], lr=lr, betas=betas, eps=eps)
    # a float32 step count would make the bias corrections float32
    optimizer.state[point] = {**state, "step": int(state["step"])}
    optimizer.step()
    return point.detach()


def build(options: RiemannianAdamOptions, inputs: OptimizerInputs) -> RiemannianAdam:
    """Return the optimizer of an experiment."""
    return RiemannianAdam(
        inputs.groups,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        stiffness=options.stiffness.build(inputs.registry),
        max_stiffness=options.max_stiffness,
        retraction=options.retraction,
        other_lr=options.other_lr,
        decay_lr=options.decay_lr,
    )
