"""What ManifoldAdamW and GridOptim share: groups, learning rates, and refusals, in torch's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.groups import GEOMETRY_KEYS, grid_of


class GeometryOptimizer(torch.optim.Optimizer):
    """An optimizer that treats quantised parameters by their grid and the others as AdamW does.

    A group in which no parameter has a grid trains at `other_lr` unless it sets its own `lr`; parameters
    without a grid in a mixed group train at `other_lr`, following the group's schedule. `format` and `scale`
    are looked up at each step and never saved.
    """

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        given = "lr" in param_group
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if not given and not any(grid_of(group, index) for index in range(len(group["params"]))):
            group["lr"] = group["other_lr"]
        group["initial_lr"] = group["lr"]

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        for group in state["param_groups"]:
            for key in GEOMETRY_KEYS:
                group.pop(key, None)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        kept = [{key: group[key] for key in GEOMETRY_KEYS if key in group} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, own in zip(self.param_groups, kept, strict=True):
            group.update(own)


def split_by_grid(
    group: dict[str, Any],
) -> tuple[list[tuple[Tensor, Format, Tensor]], list[Tensor]]:
    """Return the group's parameters that have gradients: (parameter, format, scale), and the plain ones.

    Raises RuntimeError on a sparse gradient.
    """
    gridded, plain = [], []
    for index, parameter in enumerate(group["params"]):
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            raise RuntimeError(
                "sparse gradients are not supported; use torch.optim.SparseAdam for this parameter"
            )
        grid = grid_of(group, index)
        if grid is None:
            plain.append(parameter)
        else:
            gridded.append((parameter, *grid))
    return gridded, plain


def schedule_factor(group: dict[str, Any]) -> float:
    """Return the group's learning rate as a share of its initial one: what a scheduler made of it."""
    return group["lr"] / group["initial_lr"] if group["initial_lr"] else 1.0


def plain_lr(group: dict[str, Any], mixed: bool) -> float:
    """Return the learning rate of a group's plain parameters."""
    return group["other_lr"] * schedule_factor(group) if mixed else group["lr"]


def refuse_bad(**values: tuple[float, Callable[[float], bool]]) -> None:
    """Raise ValueError in torch's words for each (value, is right) that is wrong."""
    for name, (value, right) in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not right(value):
            raise ValueError(f"Invalid {name.replace('_', ' ')} value: {value!r}")


def refuse_betas(betas: tuple[float, float]) -> None:
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta!r}")


def evaluated(closure: Callable[[], Tensor] | None) -> Tensor | None:
    """Run the closure of `step`, with gradients enabled, and return its loss."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
