"""What optimizers with a stiffness share: which weights have a geometry, and what S is at them.

A weight with a grid has the geometry of its own format, or of the formula's `of_format`. With `of_format` a
weight without a grid may borrow that geometry, at the format's own fit scale, and stays a float32 number:

- in groups of `param_groups` the covered weights do; where no weight is covered or has a grid, all matrices;
- a group made by hand, which has no `covered`, borrows with everything in it, unless some weight has a grid.

So arms of a comparison differ in those weights only. A group's own `of_format` goes before the formula's.
With `refresh = "never"` S stays that of the initial weights, in the optimizer's state; a change of scale does
not change it either.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
import torch
from torch import Tensor

from altgrad_core.groups import grid_of
from altgrad_core.hookspecs import Stiffness
from altgrad_core.lookup import get_stiffness
from altgrad_core.registry import PluginError
from altgrad_core.stiffness import Geometry
from altgrad_optim.base import GeometryOptimizer, Gridded, split_by_grid


class StiffnessOptimizer(GeometryOptimizer):
    """An optimizer whose rule has a stiffness; see the module's text.

    stiffness: name of an installed formula, a table with options, or a callable `(weight, format, scale)`;
        `altgrad_core.stiffness.Geometry` gives a callable of your own the options `of_format` and `refresh`.

    Weights with a borrowed geometry train at the `lr` that their group sets, or else the constructor's, on
    the group's schedule.
    """

    _own = ("stiffness",)
    _for_all_groups = ("stiffness",)

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], stiffness: Any) -> None:
        self.stiffness: Stiffness = get_stiffness(stiffness)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        sets_lr = self._lr_name in param_group
        super().add_param_group(param_group)
        self.param_groups[-1]["sets_lr"] = sets_lr

    def grid_lr(self, group: dict[str, Any]) -> float:
        """Return the learning rate of the group's parameters with a geometry."""
        return float(group["lr"]) if group.get("sets_lr") else super().grid_lr(group)

    def formula_of(self, group: dict[str, Any]) -> Stiffness:
        """Return the formula of a group's weights: with the group's own `of_format`, if it has one."""
        own = group.get("of_format")
        if own is None:
            return self.stiffness
        geometry = self.stiffness if isinstance(self.stiffness, Geometry) else Geometry(self.stiffness)
        return attrs.evolve(geometry, of_format=own)

    def by_geometry(self, group: dict[str, Any]) -> tuple[list[Gridded], list[Gridded], list[Tensor]]:
        """Return the group's parameters that have gradients: with a grid, borrowing one, and the plain ones.

        Raises RuntimeError on a sparse gradient.
        """
        gridded, plain = split_by_grid(group)
        of_format, covered = getattr(self.formula_of(group), "of_format", None), group.get("covered")
        named = covered or group.get("of_format") is not None
        if of_format is None or (not named and self._told_apart()):
            return gridded, [], plain
        unit = torch.ones((), dtype=torch.float32)  # the formula fits its own scale
        borrows = [covered is not False or weight.dim() >= 2 for weight in plain]
        pairs = list(zip(plain, borrows, strict=True))
        borrowing = [(weight, of_format, unit) for weight, borrowed in pairs if borrowed]
        return gridded, borrowing, [weight for weight, borrowed in pairs if not borrowed]

    def _told_apart(self) -> bool:
        """Return whether anything says which weights the geometry is for."""
        return any(
            group.get("covered") or grid_of(group, index) is not None
            for group in self.param_groups
            for index in range(len(group["params"]))
        )

    def stiffness_at(self, group: dict[str, Any], gridded: Gridded) -> Tensor:
        """Return S at the weight, or at what it was before its first step under `refresh = "never"`.

        Raises PluginError for an S of another shape: loops in C would read beyond its end.
        """
        return _like(gridded[0], self.formula_at(group, gridded)(*gridded), self.formula_of(group))

    def formula_at(self, group: dict[str, Any], gridded: Gridded) -> Stiffness:
        """Return the formula of a weight's S: under `refresh = "never"` what S was before the first step."""
        formula = self.formula_of(group)
        if getattr(formula, "refresh", "step") != "never":
            return formula
        state = self.state[gridded[0]]
        if "stiffness" not in state:
            _refuse_late_start(int(state.get("step", 0)))
            state["stiffness"] = _like(gridded[0], formula(*gridded), formula).clone()
        return lambda *_: state["stiffness"]


def _like(weight: Tensor, stiffness: Any, formula: Stiffness) -> Tensor:
    """Return a formula's S. Raises PluginError, which says where the formula is, for one of another shape."""
    if isinstance(stiffness, Tensor) and stiffness.shape == weight.shape:
        return stiffness
    own: Any = formula.formula if isinstance(formula, Geometry) else formula
    definition = own if hasattr(own, "__qualname__") else type(own)
    tensor = isinstance(stiffness, Tensor)
    given = f"the shape {tuple(stiffness.shape)}" if tensor else repr(stiffness)
    raise PluginError(
        f"the stiffness {definition.__module__}.{definition.__qualname__} gave {given} for a weight of the "
        f"shape {tuple(weight.shape)}; it must give a tensor like the weight"
    )


def _refuse_late_start(steps: int) -> None:
    if steps:
        raise RuntimeError(
            f"refresh='never' keeps the stiffness of the initial weights, but a weight has taken {steps}"
            " steps and its state has none; load a state saved under refresh='never', or use refresh='step'"
        )
