"""Madam: multiplicative updates, a step proportional to the weight itself.

Madam (Bernstein et al., arXiv 2006.14560; on a logarithmic number format: LNS-Madam, Zhao et al., arXiv
2106.13914) keeps a second moment v and moves the logarithm of each weight by a normalized gradient:

    v <- beta*v + (1 - beta)*g^2,    d = clip(g / (sqrt(v)/sqrt(1 - beta^t) + eps), -clip, clip)
    w <- w * exp(-lr * sign(w) * d),  then |w| <= bound * (rms of w before its first step)

To first order that is delta w = -lr*|w|*d. A logarithmic grid has spacings proportional to |w|, so this is
ManifoldAdamW's `update` with `smooth` stiffness, without momentum and for small steps: on E7M0, where the
smooth spacing is |w|*ln2, at lr/ln2 ULPs. The paper has no eps; it is for weights whose gradients vanish.

A weight never changes its sign, and one at zero stays there. On a grid that is where every weight below half
the smallest value goes in the first snap, and where nearest rounding leaves it.

When not to use it: on layers that start at zero, and on uniform formats, whose many zeros would be dead.
Under a persistent gradient |w| grows exponentially: give it a bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from altgrad_core.hookspecs import OptimizerInputs
from altgrad_optim import MadamOptions
from altgrad_optim.adamw import plain_step, states_of
from altgrad_optim.base import (
    GeometryOptimizer,
    evaluated,
    plain_lr,
    schedule_factor,
    split_by_grid,
)


class Madam(GeometryOptimizer):
    """Multiplicative updates of the parameters that have a format; see the module's text.

    Parameters without a format, of which the update takes nothing but that they are quantized, train by
    AdamW at `other_lr`. For the multiplicative update on float32 weights, give their group a `format`.

    lr: the share of |w| that a step of direction 1 adds or takes.
    beta: decay of the second moment; `betas` are those of the parameters without a format.
    clip: limit on the direction.
    bound: limit on |w| as a multiple of the tensor's rms before its first step; 0: none. It works before any
        rounding: behind `store_on_grid`, which has a bound of its own on the grid, leave one of them 0.
    weight_decay: decoupled, at the rate `decay_lr` (following the schedule): lr is not in weight units.
    Raises ValueError on options out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        beta: float = 0.999,
        clip: float = 10.0,
        bound: float = 3.0,
        other_lr: float = 1e-3,
        decay_lr: float = 1e-3,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "beta": beta,
                "clip": clip,
                "bound": bound,
                "other_lr": other_lr,
                "decay_lr": decay_lr,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step; returns the closure's loss, None without one."""
        loss = evaluated(closure)
        for group in self.param_groups:
            gridded, plain = split_by_grid(group)
            if gridded:
                self._update(group, [weight for weight, *_ in gridded])
            plain_step(self, group, plain, plain_lr(group))
        return loss

    def _update(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        states = states_of(self.state, weights, "exp_avg_sq")
        for state, weight in zip(states, weights, strict=True):
            state["step"] += 1
            if group["bound"] and "limit" not in state:
                state["limit"] = limit_of(weight, group["bound"])
        directions = madam_directions(
            [weight.grad for weight in weights],
            [state["exp_avg_sq"] for state in states],
            [int(state["step"]) for state in states],
            group["beta"],
            group["eps"],
            group["clip"],
        )
        if group["weight_decay"]:
            torch._foreach_mul_(
                weights, 1 - group["decay_lr"] * schedule_factor(group) * group["weight_decay"]
            )
        multiply_(weights, directions, self.grid_lr(group))
        if group["bound"]:
            limits = [state["limit"] for state in states]
            torch._foreach_minimum_(weights, limits)
            torch._foreach_maximum_(weights, torch._foreach_neg(limits))


def madam_directions(
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    steps: Sequence[int],
    beta: float,
    eps: float,
    clip: float,
) -> list[Tensor]:
    """Update the second moments in place and return the clipped directions g/(sqrt(v_hat) + eps).

    averages: v, of the gradients' shapes and dtypes. steps count from 1. Arithmetic in their dtype. A zero
    gradient gives 0, whatever v is; NaN stays NaN.
    """
    torch._foreach_mul_(averages, beta)
    torch._foreach_addcmul_(averages, gradients, gradients, value=1 - beta)
    roots = torch._foreach_sqrt(averages)
    torch._foreach_div_(roots, [math.sqrt(1 - beta**step) for step in steps])
    torch._foreach_add_(roots, eps)
    # 0/0 at eps = 0; a gradient whose square has vanished goes to the clip
    torch._foreach_clamp_min_(roots, [torch.finfo(root.dtype).tiny for root in roots])
    directions = torch._foreach_div(gradients, roots)
    torch._foreach_clamp_min_(directions, -clip)
    torch._foreach_clamp_max_(directions, clip)
    return list(directions)


def multiply_(weights: Sequence[Tensor], directions: Sequence[Tensor], lr: float) -> None:
    """Multiply the weights, in place, by exp(-lr * sign(w) * direction); NaN directions give NaN."""
    exponents = torch._foreach_mul(torch._foreach_sign(weights), directions)
    torch._foreach_mul_(exponents, -lr)
    torch._foreach_exp_(exponents)
    torch._foreach_mul_(weights, exponents)


def limit_of(weight: Tensor, bound: float) -> Tensor:
    """Return `bound` times the weight's rms (float64 accumulation), 0-d; inf where that is 0."""
    limit = bound * weight.double().square().mean().sqrt()
    return torch.where(limit > 0, limit, math.inf).to(weight.dtype)


def build(options: MadamOptions, inputs: OptimizerInputs) -> Madam:
    """Return the optimizer of an experiment, where the bound is [quantize]'s and not the optimizer's."""
    return Madam(
        inputs.groups,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        beta=options.beta,
        clip=options.clip,
        bound=0.0,
        other_lr=options.other_lr,
        decay_lr=options.decay_lr,
    )
