"""Weights that are tallied while they land on their grids: which these are, and what was found of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from typing import Any

from torch import Tensor

from altgrad_core.hookspecs import Step, Weight
from altgrad_monitors.kept import Room
from altgrad_monitors.native_tally import Table
from altgrad_monitors.tally import Asked, Tally


class Landings:
    """The weights of one step that somebody is told of, and what was found of them."""

    def __init__(self) -> None:
        self._index = 0
        self._wanted: Set[str] = frozenset()
        self._table = Table()
        self._told: Collection[str] = ()
        self._gradients: Mapping[str, Tensor] = {}
        self._room = Room({}, {}, {}, {})

    def begin(
        self,
        index: int,
        wanted: Set[str],
        weights: Mapping[str, Weight],
        gradients: Mapping[str, Tensor],
        room: Room,
    ) -> dict[str, tuple[int, int]]:
        """Return whom to tell of each of the weights with values in the room.

        index: of the step. wanted: as in `book_of`. room: of the values, and maybe codes, before the step.
        """
        stall, descent = "stall" in wanted, "descent" in wanted
        asked = {name: Asked(stall, descent, False, name not in room.codes_before) for name in room.values}
        told = self._table.onlookers(asked, weights, gradients, room)
        self._index, self._wanted, self._told = index, wanted | {"flips"}, told
        self._gradients, self._room = gradients, room  # whose memory is written
        return told

    def landed(self, step: Step, wanted: Collection[str]) -> tuple[list[str], list[str]]:
        """Return the weights of which all has been tallied that can be, and those whose codes alone have.

        The latter are those of which the step carries more than was asked for when they landed.
        """
        self._gradients = {}  # nobody reads them any more
        if step.index != self._index:
            return [], []
        told = [name for name in self._told if name not in step.unrounded]
        if self._wanted >= {*wanted} or not step.intended:
            return told, []
        less = [name for name in told if name in step.before and name in step.intended]
        return [name for name in told if name not in less], less

    def tally(self, names: Collection[str]) -> Tally:
        """Return the tally of weights that have landed."""
        return self._table.told().of(list(names))

    def room(self, names: Collection[str]) -> Room:
        """Return where what is kept of weights that have landed has been left."""
        return Room(*({name: one[name] for name in names if name in one} for one in self._room))


def leaves_residuals(run: Any) -> bool:
    """Whether updates are rounded by who does not tell of it: the step carries what they were meant to be."""
    storage = getattr(run, "storage", None)
    tells = storage is None or getattr(storage, "rounds_at_once", False)
    return not tells or hasattr(getattr(run, "optimizer", None), "watch")


def told_of(run: Any, weights: Mapping[str, Weight]) -> set[str]:
    """Return the weights that somebody can be told of when they land: all that a storage rounds, or none."""
    if getattr(run, "storage", None) is None or leaves_residuals(run):
        return set()
    return {name for name, weight in weights.items() if on_grid(weight)}


def on_grid(weight: Weight) -> bool:
    return weight.storage == "grid"
