"""What the optimizers with a geometry share: groups, learning rates, and refusals, in torch's words."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.groups import geometry_kept, grid_of, without_geometry
from altgrad_core.lookup import format_or_none
from altgrad_core.quantizer import quantizer_of

Gridded = tuple[Tensor, Format, Tensor]
"""A weight, its format, and its scale: 0-d, or one that broadcasts against the weight."""


class GeometryOptimizer(torch.optim.Optimizer):
    """An optimizer that treats quantized parameters by their grid and the others as AdamW does.

    The `lr` of a group in which some parameter has a grid is that of the parameters with a grid; those
    without one train at `other_lr`, following the group's schedule. The `lr` of a group without any grid is
    `other_lr` unless the group sets it (`lr_is_other`). `format` and `scale` are looked up at each step and
    never saved.
    """

    _own: ClassVar[tuple[str, ...]] = ()
    """Attributes beside torch's that a copy or a pickle of the optimizer keeps."""
    _uncast: ClassVar[tuple[str, ...]] = ()
    """Tensors of a parameter's state whose dtype is their own; torch loads all others in the parameter's."""

    _for_all_groups: ClassVar[tuple[str, ...]] = ()
    """Options of the constructor that no group has for itself."""
    _lr_name: ClassVar[str] = "lr"
    """What the constructor calls `lr`."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group. Raises ValueError on its options as the constructor does on its own."""
        for name in self._for_all_groups:
            if name in param_group:
                raise ValueError(
                    f"{name!r} is one for all groups: give it to {type(self).__name__} itself, or make two"
                )
        if self._lr_name in param_group:
            param_group["lr"] = param_group.pop(self._lr_name)
        self._refuse_bad_options(self.defaults | param_group)
        given = "lr" in param_group
        for key in param_group.keys() & {"format", "of_format"}:
            param_group[key] = format_or_none(param_group[key])
        if not isinstance(param_group["params"], Tensor):
            param_group["params"] = list(
                param_group["params"]
            )  # it may be a generator, and is looked at twice
            _refuse_bad_scale(param_group)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["lr_is_other"] = not any(grid_of(group, index) for index in range(len(group["params"])))
        if group["lr_is_other"] and not given:
            group["lr"] = group["other_lr"]
        group["first_lr"] = group["lr"]

    def _refuse_bad_options(self, options: dict[str, Any]) -> None:
        """Raise ValueError, in torch's words, on a group's options that are out of range."""
        refuse_bad(**{self._lr_name: (options["lr"], _not_negative)})
        refuse_out_of_range(options)
        if "betas" in options:
            refuse_betas(options["betas"])

    def grid_lr(self, group: dict[str, Any]) -> float:
        """Return the learning rate of the group's parameters that have a grid."""
        if group["lr_is_other"]:  # they were quantized after the optimizer was made
            return float(self.defaults["lr"] * schedule_factor(group))
        return float(group["lr"])

    def _place_of(self, weight: Tensor) -> tuple[dict[str, Any], int]:
        """Return the group of a weight, and its index there."""
        return next(
            (group, index)
            for group in self.param_groups
            for index, one in enumerate(group["params"])
            if one is weight
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: getattr(self, name) for name in self._own}}

    def state_dict(self) -> dict[str, Any]:
        return without_geometry(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        options = self.defaults.keys() & self.param_groups[0].keys()  # torch adds to the defaults of a copy
        for group in state_dict["param_groups"]:
            if missing := sorted(options - group.keys()):
                whose = f"loaded state dict is not that of a {type(self).__name__}"
                raise ValueError(f"{whose}: its groups have no {missing[0]!r}")
        with geometry_kept(self):
            super().load_state_dict(state_dict)
        self._take_uncast(state_dict)

    def _take_uncast(self, state_dict: dict[str, Any]) -> None:
        """Take up what torch has cast to the parameters' dtype as it was saved."""
        saved = [place for group in state_dict["param_groups"] for place in group["params"]]
        mine = [parameter for group in self.param_groups for parameter in group["params"]]
        for place, parameter in zip(saved, mine, strict=True):
            for name in self._uncast:
                if name in (state := state_dict["state"].get(place, {})):
                    self.state[parameter][name] = state[name].to(parameter.device, copy=True)


def split_by_grid(
    group: dict[str, Any],
) -> tuple[list[Gridded], list[Tensor]]:
    """Return the group's parameters that have gradients: (parameter, format, scale), and the plain ones.

    Raises RuntimeError on a sparse gradient.
    """
    gridded, plain = [], []
    for index, parameter in enumerate(group["params"]):
        gradient = parameter.grad
        if gradient is None:
            continue
        refuse_sparse(gradient)
        grid = grid_of(group, index)
        if grid is None:
            plain.append(parameter)
        else:
            gridded.append((parameter, *grid))
    return gridded, plain


def refuse_sparse(gradient: Tensor) -> None:
    """Raise RuntimeError on a sparse gradient."""
    if gradient.is_sparse:
        raise RuntimeError(
            "sparse gradients are not supported; use torch.optim.SparseAdam for this parameter"
        )


def schedule_factor(group: dict[str, Any]) -> float:
    """Return the group's learning rate as a share of the one it was made with: what a schedule made of it.

    (Not of `initial_lr`, which OneCycleLR and CyclicLR overwrite by the low end of their schedule.)
    """
    return float(group["lr"] / group["first_lr"]) if group["first_lr"] else 1.0


def plain_lr(group: dict[str, Any]) -> float:
    """Return the learning rate of a group's parameters that have no grid."""
    return float(group["lr"] if group["lr_is_other"] else group["other_lr"] * schedule_factor(group))


def _not_negative(value: float) -> bool:
    return value >= 0


def _positive(value: float) -> bool:
    return value > 0


def _finite_and_not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def _a_share(value: float) -> bool:
    return 0 <= value < 1


RANGES: Mapping[str, Callable[[float], bool]] = {
    **dict.fromkeys(("eps", "weight_decay", "decay_lr", "other_lr"), _not_negative),
    **dict.fromkeys(("max_stiffness", "clip"), _positive),
    **dict.fromkeys(("beta", "momentum"), _a_share),
    "bound": _finite_and_not_negative,
}
"""What options of the same name must be, whichever optimizer has them."""

_TORCH_NAMES = {"lr": "learning rate", "eps": "epsilon value"}


def refuse_out_of_range(options: Mapping[str, Any]) -> None:
    """Raise ValueError for the first of the options that `RANGES` knows and that is out of range."""
    refuse_bad(**{name: (options[name], right) for name, right in RANGES.items() if name in options})


def refuse_bad(**values: tuple[float, Callable[[float], bool]]) -> None:
    """Raise ValueError in torch's words for each (value, is right) that is wrong."""
    for name, (value, right) in values.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not right(float(value)):
            raise ValueError(f"Invalid {_TORCH_NAMES.get(name, f'{name} value')}: {value!r}")


def _refuse_bad_scale(group: dict[str, Any]) -> None:
    """Raise ValueError unless a group's own scale is one positive number, or one for each parameter.

    Quantizers' scales, which `param_groups` lists, are their own affair.
    """
    scale, params = group.get("scale"), group["params"]
    scales = list(scale) if isinstance(scale, list | tuple) else [scale] * len(params)
    if len(scales) != len(params):
        raise ValueError(f"Invalid scale value: {len(scales)} scales for {len(params)} parameters")
    for one, parameter in zip(scales, params, strict=True):
        if one is None or quantizer_of(parameter) is not None or getattr(one, "is_meta", False):
            continue
        if (isinstance(one, Tensor) and one.dim()) or not 0 < float(one) < math.inf:
            raise ValueError(f"Invalid scale value: {one!r}; a positive number, or a 0-d tensor of one")


def refuse_others(name: str, given: Any, allowed: Sequence[str]) -> None:
    """Raise ValueError for a word that is not among the allowed ones."""
    if given not in allowed:
        raise ValueError(f"Invalid {name} value: {given!r}; use one of {', '.join(allowed)}")


def refuse_betas(betas: Sequence[float]) -> None:
    """Raise ValueError unless they are two decays in [0, 1)."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"Invalid betas value: {betas!r}; a pair of decays")
    for index, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta!r}")


def evaluated(closure: Callable[[], Tensor] | None) -> Tensor | None:
    """Run the closure of `step`, with gradients enabled, and return its loss."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
