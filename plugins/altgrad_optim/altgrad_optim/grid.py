"""GridOptim: weights that move by whole rungs of their format's grid.

A rung is one step from a grid value to its neighbor. With a direction d (the raw velocity, or Adam's),

    r = clamp(lr*d, -rung_clip, rung_clip)                   # rungs, float32
    k = stochastic_round(r)                                  # |r| rounds up with probability frac|r|
    w = from_rung(clamp(rung(w*s) - k, -limit, limit)) / s

The rule founded on the raw velocity (`normalize="none"`) couples weight decay into the gradient; under
"adam", lr reads as rungs per step, and decay adds decay_lr*weight_decay*w/ulp(w) rungs before the clip.

rounding="value" rounds the target w - r*ulp(w) stochastically between its neighbors instead, never further
than rung_clip rungs, and a target beyond 0 becomes 0. Rung rounding makes log|w| a driftless random walk on
flat directions of a floating-point format, so that the largest weights grow: give a `bound`. Value rounding
shrinks the typical weight.

storage="grid": the weights between steps are on the grid and nothing else is kept. storage="master": the
float32 master is the rung coordinate u, optimizer state; the Parameter holds from_rung(round(u))/s, no random
number is drawn and nothing is lost (mirror descent in rung space).

When not to use it: where weights must cross zero often. A constant drift of r rungs a step needs rung(w)/r
steps to change a weight's sign, hundreds of them in formats with many exponents.

Source: stochastic rounding of integer updates, Gupta et al., arXiv 1502.02551.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set
from typing import Any

import torch
from torch import Tensor

from altgrad_core.grid_scales import GridScales
from altgrad_core.hookspecs import OptimizerInputs
from altgrad_core.kernels import not_compiled
from altgrad_core.random_bits import draw_seed
from altgrad_core.storage_options import SCALE_MODES, STORAGE_ROUNDINGS
from altgrad_optim import MOST_RUNGS, GridOptimOptions, one_pass, row_steps
from altgrad_optim.adamw import plain_step
from altgrad_optim.base import (
    GeometryOptimizer,
    evaluated,
    plain_lr,
    refuse_bad,
    refuse_others,
    refuse_out_of_range,
    schedule_factor,
)
from altgrad_optim.grid_state import RUNG_COORDINATE, carry_over, refuse_other_storage
from altgrad_optim.members import Member, Taken, circumstances, members, scales_of, take_over, with_gradients
from altgrad_optim.snapping import claim, snap

STORAGES = ("grid", "master")


class GridOptim(GeometryOptimizer):
    """Whole-rung updates; see the module's text. Parameters without a grid: AdamW at `other_lr`.

    step_scale: rungs per unit of direction; stored as the groups' `lr`, which schedulers drive.
    rung_clip: the largest r in one step, in rungs, 65536 at most; a fraction may round up past it.
    bound: limit on |w| as a multiple of the tensor's rms at construction; 0: none.
    storage_rounding: how weights are rounded again after a change of scale: "nearest_even", "stochastic".
    scale_mode: "adaptive" (follows the weights; under storage="grid" only) or "initial".
    generator: one seed is drawn from it at construction; None: seed 0.

    Attributes:
        flips, updates: 0-d int64 device tensors: weights whose code changed, and elements with a non-zero
            gradient, in the last step. `counts` has both by Parameter.
        watch: set it to True and each step leaves -r, the update in rungs before rounding, in `intended`.
        scales: the `GridScales`, None before there is a weight with a grid.
    Raises ValueError on options out of range.
    """

    stores_on_grid = True
    intended_in_rungs = True
    _lr_name = "step_scale"
    _uncast = (RUNG_COORDINATE,)
    _for_all_groups = ("storage", "bound", "storage_rounding", "scale_mode", "generator")
    _own = (
        "storage",
        "bound",
        "storage_rounding",
        "scale_mode",
        "seed",
        "counter",
        "scales",
        "watch",
        "intended",
        "_taken",
        "_members",
        "_placed",
        "_settled",
    )

    def __init__(
        self,
        groups: Iterable[Any],
        step_scale: float = 6.0,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay_lr: float = 1e-3,
        other_lr: float = 1e-3,
        rung_clip: float = 10,
        normalize: str = "none",
        rounding: str = "rung",
        storage: str = "grid",
        bound: float = 0.0,
        generator: torch.Generator | None = None,
        *,
        storage_rounding: str = "nearest_even",
        scale_mode: str = "adaptive",
    ) -> None:
        refuse_out_of_range({"bound": bound})
        refuse_others("storage", storage, STORAGES)
        refuse_others("storage_rounding", storage_rounding, STORAGE_ROUNDINGS)
        refuse_others("scale_mode", scale_mode, SCALE_MODES)
        self.storage = storage
        self.bound = bound
        self.storage_rounding = storage_rounding
        self.scale_mode = scale_mode
        self.seed = draw_seed(generator)
        self.counter = 0
        self.scales: GridScales | None = None
        self.watch = False
        self.intended: dict[Tensor, Tensor] = {}
        self._taken: list[Taken] = []
        self._members: list[Member] = []
        self._placed: list[list[Member | None]] = []
        self._settled: list[Any] = []
        super().__init__(
            groups,
            {
                "lr": step_scale,
                "momentum": momentum,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "decay_lr": decay_lr,
                "other_lr": other_lr,
                "rung_clip": rung_clip,
                "normalize": normalize,
                "rounding": rounding,
            },
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._settle()

    def _refuse_bad_options(self, options: dict[str, Any]) -> None:
        super()._refuse_bad_options(options)
        refuse_bad(rung_clip=(options["rung_clip"], lambda x: 0 < x <= MOST_RUNGS))
        refuse_others("normalize", options["normalize"], ("none", "adam"))
        refuse_others("rounding", options["rounding"], ("rung", "value"))

    @not_compiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step; returns the closure's loss, None without one."""
        loss = evaluated(closure)
        self._settle()
        self._taken, self.intended = [], {}
        for group, placed in zip(self.param_groups, self._placed, strict=True):
            moving, plain = with_gradients(group["params"], placed)
            taken, left = one_pass.take(self, group, moving)
            self._taken += [*taken, *row_steps.take(self, group, left)]
            plain_step(self, group, plain, plain_lr(group))
        self.counter += 1
        return loss

    @property
    def flips(self) -> Tensor:
        return self._totals()[0]

    @property
    def updates(self) -> Tensor:
        return self._totals()[1]

    def _totals(self) -> Tensor:
        """Add up the flips and updates of the last step's weights: (2,)."""
        totals = [taken.counts.sum(0) for taken in self._taken]
        return torch.stack(totals).sum(0) if totals else torch.zeros((2,), dtype=torch.int64)

    @property
    def counts(self) -> dict[Tensor, tuple[Tensor, Tensor]]:
        """(flips, updates) of each weight in the last step, 0-d int64 on its device, by Parameter."""
        found = {}
        for taken in self._taken:
            weights = [member.weight for member in taken.members]
            rows = zip(*(column.unbind() for column in taken.counts.unbind(1)), strict=True)
            found |= dict(zip(weights, rows, strict=True))
        return found

    def decay(self, group: dict[str, Any]) -> float:
        """Return the factor of the decay: of w in the gradient, or under Adam of w in spacings."""
        decay = float(group["weight_decay"])
        if group["normalize"] == "none" or not decay:
            return decay
        return float(group["decay_lr"]) * schedule_factor(group) * decay

    # --- which weights move in rungs, and their first snap -------------------------------------------

    def regrid(self, weights: Iterable[Tensor]) -> None:
        """Snap weights whose format or scale has been changed between two steps to their new grids.

        What has another format gets a scale anew, what has not keeps its own, adjusted; bounds and moments
        stay. Under master the rung coordinate follows from the weight's value. Where a weight begins or
        ceases to move in rungs, and its new update lacks a moment, moments and step count begin anew.
        """
        changed = {id(weight) for weight in weights}
        self._settle(changed)
        in_rungs = {id(member.weight) for member in self._members}
        for group in self.param_groups:
            for weight in group["params"]:
                if id(weight) in changed:
                    carry_over(self.state[weight], group, in_rungs=id(weight) in in_rungs)

    def _settle(self, changed: Set[int] = frozenset()) -> None:
        """Find the weights that move in rungs, whenever they change, and snap the new ones."""
        surroundings = circumstances(self.param_groups)
        if surroundings == self._settled and not changed:
            return
        self._settled, found = surroundings, members(self.param_groups, self.storage)
        at = {one.weight: one for one in found}
        self._placed = [[at.get(weight) for weight in group["params"]] for group in self.param_groups]
        if [one.identity for one in found] == [one.identity for one in self._members] and not changed:
            return
        before, scales_before, self._members = self._members, self.scales, found
        self.scales = scales_of(
            found,
            bound=self.bound,
            adaptive=self.scale_mode == "adaptive",
            storage_rounding=self.storage_rounding,
        )
        if self.scales is None:
            return
        if scales_before is not None:
            take_over(self.scales, found, scales_before, before, changed)
        known = {one.identity for one in before}
        snap(self, [one for one in found if one.identity not in known or id(one.weight) in changed])
        claim(found)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_members" in state:  # a copy, not what a checkpoint holds
            claim(self._members)

    def scales_in_use(self) -> GridScales:
        if self.scales is None:
            raise RuntimeError("no weight of this optimizer has a grid")
        return self.scales

    # --- state ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, and under `grid` the seed, the counter and the scales' state."""
        scales = self.scales.state_dict() if self.scales is not None else None
        return {
            **super().state_dict(),
            "grid": {"seed": self.seed, "counter": self.counter, "scales": scales},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state. Load the model's weights after making the optimizer, which snaps them."""
        own = state_dict.get("grid")
        if own is None or (own["scales"] is None) != (self.scales is None):
            raise ValueError(
                "loaded state dict is not that of a GridOptim over the same weights: quantize the model, "
                "make the optimizer, then load what its state_dict() returned"
            )
        refuse_other_storage(state_dict["state"], self._members)
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "grid"})
        self.seed, self.counter = own["seed"], own["counter"]
        if self.scales is not None:
            self.scales.load_state_dict(own["scales"])


def build(options: GridOptimOptions, inputs: OptimizerInputs) -> GridOptim:
    """Return the optimizer of an experiment."""
    return GridOptim(
        inputs.groups,
        step_scale=options.step_scale,
        momentum=options.momentum,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        decay_lr=options.decay_lr,
        other_lr=options.other_lr,
        rung_clip=options.rung_clip,
        normalize=options.normalize,
        rounding=options.rounding,
        storage=inputs.storage,
        bound=inputs.bound,
        generator=inputs.generator,
        storage_rounding=inputs.storage_rounding,
        scale_mode=inputs.scale_mode,
    )
