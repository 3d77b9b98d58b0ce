"""ManifoldAdamW: AdamW in the geometry of a format's spacing.

A format's grid is a warped image of the integers: w = T(u), with local spacing S(w) = dw/du. With two
exponents (p, q), the placement,

    delta w = -lr * S^q * Adam(S^p * g).

gradient, (1, 0): stiffness before Adam's moments. Adam divides a constant factor of the gradient out again,
    so this is plain AdamW up to eps and the lag of a changing S. It does not move weights by constant ULPs.
update, (0, 1): the normalized step is scaled, so that every weight moves by the same number of ULPs.
both, (1, 1): Adam in rung space: Riemannian Adam (Becigneul and Ganea, arXiv 1810.00760) under the metric
    1/S^2.

S is taken at w before decay, in weight units, clamped to `max_stiffness`. S^q is divided per tensor by its
rms, mean or max (`normalize`), accumulated in float64; with "none", lr reads as ULPs per step under q = 1.

The core offers two options with every stiffness, `of_format` and `refresh`: see `stiffness_optimizer`.

When not to use it: where weights are float32 masters and only the forward pass is quantized, formats hardly
differ and plain AdamW does as well. A tensor that starts at zero does not leave it under `normalize="none"`
with a learning rate meant for weight units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from altgrad_core.error_compensation import Momentum, adam_rate
from altgrad_core.groups import grid_of
from altgrad_core.hookspecs import OptimizerInputs
from altgrad_core.kernels import flat
from altgrad_core.rows import Row, in_rows
from altgrad_optim import ManifoldAdamWOptions, manifold_pass, position
from altgrad_optim.adamw import adamw_direction, plain_step, states_of
from altgrad_optim.base import Gridded, evaluated, plain_lr, refuse_others, schedule_factor
from altgrad_optim.placement import exponents
from altgrad_optim.position import Position
from altgrad_optim.powers import NORMALIZERS, limited, normalized, pointwise, powered
from altgrad_optim.stiffness_optimizer import StiffnessOptimizer


class ManifoldAdamW(StiffnessOptimizer):
    """AdamW with a stiffness; see the module's text.

    params: as for any torch optimizer; `altgrad_core.param_groups(model)` splits a model's. A group may set
        `format` and `scale` itself for weights that no quantizer knows.
    lr: learning rate of the parameters that have a grid. Weight units, except under normalize="none".
    stiffness: see `StiffnessOptimizer`.
    placement: "gradient", "update", "both", or a pair (p, q) or table {"p":, "q":}.
    normalize: "rms", "mean", "max" or "none": what S^q is divided by, per tensor.
    weight_decay: decoupled, w *= 1 - rate * weight_decay; the rate is lr, or decay_lr (following the
        schedule) where lr is not in weight units (q != 0 under normalize="none").
    other_lr: learning rate of the parameters that have no grid: plain AdamW.
    track_position: whether to count how far each weight with a grid moves, in ULPs; see `position`. It costs
        a buffer, and on a CPU half as much time again.
    Raises ValueError on options out of range.
    """

    _uncast = (position.NAME,)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        stiffness: Any = "grid",
        placement: Any = "update",
        normalize: str = "rms",
        max_stiffness: float = 1e6,
        other_lr: float = 1e-3,
        decay_lr: float = 1e-3,
        track_position: bool = False,
    ) -> None:
        p, q = exponents(placement)
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "p": p,
                "q": q,
                "normalize": normalize,
                "max_stiffness": max_stiffness,
                "other_lr": other_lr,
                "decay_lr": decay_lr,
                "track_position": track_position,
            },
            stiffness,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "placement" in param_group:
            param_group["p"], param_group["q"] = exponents(param_group.pop("placement"))
        super().add_param_group(param_group)

    def _refuse_bad_options(self, options: dict[str, Any]) -> None:
        super()._refuse_bad_options(options)
        refuse_others("normalize", options["normalize"], (*NORMALIZERS, "none"))
        if (track := options["track_position"]) not in (True, False):
            raise ValueError(f"Invalid track_position value: {track!r}; use True or False")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step; returns the closure's loss, None without one."""
        loss = evaluated(closure)
        for group in self.param_groups:
            gridded, borrowing, plain = self.by_geometry(group)
            tracked = gridded if group.get("track_position") else []
            self._update(group, [*gridded, *borrowing], position.begun(self.state, tracked))
            plain_step(self, group, plain, plain_lr(group))
        return loss

    def _update(self, group: dict[str, Any], gridded: Sequence[Gridded], positions: Sequence[Tensor]) -> None:
        """Take the step of weights that have a geometry, and count how far the first of them move.

        Those that can, in one call in C; positions of others in torch.
        """
        states_of(self.state, [weight for weight, *_ in gridded], "exp_avg", "exp_avg_sq")
        tracked = [*positions, *[None] * (len(gridded) - len(positions))]
        these = manifold_pass.found(self, group, gridded, tracked)
        uncounted = [gridded[place] for place in these.uncounted]
        before = position.starts(uncounted)
        self._update_in_rows(group, manifold_pass.step(self, group, gridded, these))
        position.advance(self.state, uncounted, before)

    def left_by_decay(self, group: dict[str, Any]) -> float:
        """Return what decay leaves of a weight in one step."""
        in_weight_units = not group["q"] or group["normalize"] != "none"
        rate = self.grid_lr(group) if in_weight_units else group["decay_lr"] * schedule_factor(group)
        return float(1 - rate * group["weight_decay"])

    def _update_in_rows(self, group: dict[str, Any], gridded: Sequence[Gridded]) -> None:
        """Do in torch what steps.c does, with the same bits: weights of one format and age share a row."""
        kinds = [
            (id(format), int(self.state[weight]["step"]), weight.grad.dtype) for weight, format, _ in gridded
        ]
        for places in in_rows([weight for weight, *_ in gridded], kinds):
            self._update_row(group, [gridded[place] for place in places])

    def _update_row(self, group: dict[str, Any], gridded: Sequence[Gridded]) -> None:
        """Take the step of weights that share format and step count."""
        weights, states = [one[0] for one in gridded], [self.state[one[0]] for one in gridded]
        row, p, q = Row(weights), group["p"], group["q"]
        firsts, seconds = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        w, gradient, m, v = map(row.of, (weights, [one.grad for one in weights], firsts, seconds))
        stiffness = (
            limited(self._stiffness_of(group, row, w, gridded), group["max_stiffness"]) if p or q else None
        )
        if stiffness is not None:
            gradient = gradient * powered(stiffness, p)
        step = int(states[0]["step"]) + 1
        direction = adamw_direction(gradient, m, v, step, group["betas"], group["eps"])
        if stiffness is not None and q:
            direction *= normalized(powered(stiffness, q), q, group["normalize"], row)
        w.mul_(self.left_by_decay(group)).sub_(direction.mul_(self.grid_lr(group)))
        for values, tensors in ((w, weights), (m, firsts), (v, seconds)):
            row.write_back(values, tensors)
        torch._foreach_add_([state["step"] for state in states], 1)

    def _stiffness_of(
        self, group: dict[str, Any], row: Row, values: Tensor, gridded: Sequence[Gridded]
    ) -> Tensor:
        """Return S at a row of weights, which have these values: at once, where it is elementwise."""
        formula = self.formula_of(group)
        if pointwise(formula) is None:
            return row.of(self.stiffness_at(group, one) for one in gridded)
        return formula(values, gridded[0][1], row.spread([scale for *_, scale in gridded]))

    @torch.no_grad()
    def momentum_of(self, weight: Tensor) -> Momentum | None:
        """Return the weight's first moment and its rate, for storage that compensates what rounding took.

        The rate has the stiffness at the weight as it is now. None before the first step.
        """
        state = self.state.get(weight)
        if not state:
            return None
        group, index = self._place_of(weight)
        lr = self.grid_lr(group)
        rate = adam_rate(state["exp_avg_sq"], state["step"], lr, group["betas"], group["eps"])
        grid = grid_of(group, index)
        if group["q"] and grid is not None:
            stiffness = limited(self.stiffness_at(group, (weight, *grid)), group["max_stiffness"])
            q, normalize = group["q"], group["normalize"]
            powers = normalized(powered(flat(stiffness), q), q, normalize, Row([weight]))
            rate = rate * powers.view_as(rate)
        return Momentum(buffer=state["exp_avg"], rate=rate, beta=group["betas"][0])

    @torch.no_grad()
    def position_of(self, weight: Tensor) -> Position | None:
        """Return how far the weight has moved and where it is; None where that is not tracked, or not yet."""
        moved = self.state.get(weight, {}).get(position.NAME)
        grid = None if moved is None else grid_of(*self._place_of(weight))
        if moved is None or grid is None:
            return None
        format, scale = grid
        return Position(moved=moved, rung=format.rung(weight * scale))


def build(options: ManifoldAdamWOptions, inputs: OptimizerInputs) -> ManifoldAdamW:
    """Return the optimizer of an experiment."""
    return ManifoldAdamW(
        inputs.groups,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        stiffness=options.stiffness.build(inputs.registry),
        placement=options.placement,
        normalize=options.normalize,
        max_stiffness=options.max_stiffness,
        other_lr=options.other_lr,
        decay_lr=options.decay_lr,
        track_position=options.track_position,
    )
