"""Which weights move in rungs, what is known of each, and their scales."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence, Set
from typing import Any, NamedTuple

import attrs
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.grid_scales import OF_THE_WEIGHT, GridScales
from altgrad_core.groups import grid_of
from altgrad_core.quantizer import WeightQuantizer, quantizer_of
from altgrad_core.recipe import refuse_off_grid
from altgrad_optim.base import refuse_sparse


@attrs.frozen(eq=False)
class Member:
    """A weight that moves in rungs."""

    weight: Tensor
    format: Format
    scale: Tensor  # 0-d float32, the quantizer's own where there is one
    quantizer: WeightQuantizer | None
    index: int  # of its random stream and of its scale
    master: bool

    @property
    def identity(self) -> tuple[Any, ...]:
        """What tells it from another weight, or from the same one under another surgery."""
        return id(self.weight), id(self.quantizer), self.format, self.master

    @property
    def fitted(self) -> bool:
        """Whether the optimizer fits the scale to the weight; a group's own scale is static."""
        return self.quantizer is not None and self.quantizer.fitted

    @functools.cached_property
    def rungs(self) -> tuple[int, int]:
        """The format's lowest and largest rung."""
        low, high = self.format.rung(self.format.values[[0, -1]]).tolist()
        return low, high


class Taken(NamedTuple):
    """What a step did to some weights."""

    members: Sequence[Member]
    counts: Tensor
    """(n, 2) int64: of each how many elements changed, and how many have a non-zero gradient."""


def members(groups: Iterable[dict[str, Any]], storage: str) -> list[Member]:
    """Return the weights that have a grid; under "grid" storage not those whose rule says "master"."""
    found: list[Member] = []
    for group in groups:
        for place, weight in enumerate(group["params"]):
            grid, quantizer = grid_of(group, place), quantizer_of(weight)
            own = (quantizer.storage if quantizer else None) or storage
            if grid is not None and not (own == "master" and storage == "grid"):
                if quantizer is not None:
                    refuse_off_grid(quantizer.recipe)
                found.append(Member(weight, *grid, quantizer, len(found), own == "master"))
    return found


def scales_of(
    found: Sequence[Member], *, bound: float, adaptive: bool, storage_rounding: str
) -> GridScales | None:
    """Return the scales of weights that move in rungs, fitted to them now; None where there is none.

    adaptive: whether they follow the weights; under master they do not.
    """
    if not found:
        return None
    return GridScales(
        [member.weight.detach() for member in found],
        [member.format for member in found],
        [member.scale for member in found],
        fitted=[member.fitted for member in found],
        adaptive=[adaptive and not member.master for member in found],
        margins=[member.quantizer.margin if member.quantizer else 1.0 for member in found],
        bound=bound,
        shrink_early=storage_rounding == "stochastic",
        adjustments=[member.quantizer.adjustment if member.quantizer else 1.0 for member in found],
    )


def take_over(
    scales: GridScales,
    found: Sequence[Member],
    scales_before: GridScales,
    before: Sequence[Member],
    changed: Set[int],
) -> None:
    """Have scales go on as they were: of the same members all, of weights with another format their bound.

    changed: ids of the weights whose format or scale is another.
    """
    identities = {one.identity: one.index for one in before}
    weights = {id(one.weight): one.index for one in before}
    same = {weights[key]: one.index for one in found if (key := id(one.weight)) in changed & weights.keys()}
    scales.take_over(scales_before, same, OF_THE_WEIGHT)
    places = {identities[one.identity]: one.index for one in found if one.identity in identities}
    scales.take_over(scales_before, places)


def circumstances(groups: Iterable[dict[str, Any]]) -> list[Any]:
    """Return what `members` depends on, quickly: as long as it stays equal, so do they."""
    return [
        (id(weight), quantizer, (quantizer.recipe, quantizer.storage, quantizer.covered))
        if quantizer is not None
        else (id(weight), group.get("format"))
        for group in groups
        for weight in group["params"]
        for quantizer in (quantizer_of(weight),)
    ]


def with_gradients(
    parameters: Iterable[Tensor], members: Iterable[Member | None]
) -> tuple[list[Member], list[Tensor]]:
    """Return those that have a gradient: the members, and the parameters that are none.

    Raises RuntimeError on a sparse gradient.
    """
    moving, plain = [], []
    for parameter, member in zip(parameters, members, strict=True):
        gradient = parameter.grad
        if gradient is None:
            continue
        refuse_sparse(gradient)
        if member is None:
            plain.append(parameter)
        else:
            moving.append(member)
    return moving, plain
