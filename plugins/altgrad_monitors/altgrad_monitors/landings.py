"""Weights that are tallied while they land on their grids: which these are, and what was found of them."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from torch import Tensor

from altgrad_core.hookspecs import Step
from altgrad_monitors.kept import Kept
from altgrad_monitors.native_tally import Table
from altgrad_monitors.plan import Plan
from altgrad_monitors.tally import Tally


class Landings:
    """The weights of one step that somebody is told of, and what was found of them."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._index = 0
        self._wanted: Set[str] = frozenset()
        self._table = Table()
        self._plan: Plan | None = None
        self._made_of: object = None
        self._told: Mapping[str, tuple[int, int]] = {}
        self._gradients: Mapping[str, Tensor] = {}

    def begin(
        self, index: int, wanted: Set[str], gradients: Mapping[str, Tensor]
    ) -> Mapping[str, tuple[int, int]]:
        """Return whom to tell of each of the weights with these gradients, whose values are kept.

        index: of the step. wanted: as in `book_of`.
        """
        made_of = self._kept.generation, frozenset(wanted), tuple(gradients)
        if self._plan is None or made_of != self._made_of:
            self._plan, self._made_of = self._kept.plan_of_landing(tuple(gradients), wanted), made_of
        self._told = self._table.onlookers(self._plan, gradients)
        self._index, self._wanted = index, wanted | {"flips"}
        self._gradients = gradients  # which are read
        return self._told

    def landed(self, step: Step, wanted: Set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the weights of which all has been tallied that can be, and those whose codes alone have.

        The latter are those of which the step carries more than was asked for when they landed.
        """
        self._gradients = {}  # nobody reads them any more
        if step.index != self._index:
            return (), ()
        told = tuple(name for name in self._told if name not in step.unrounded)
        if self._wanted >= wanted or not step.intended:
            return told, ()
        less = tuple(name for name in told if name in step.before and name in step.intended)
        return tuple(name for name in told if name not in less), less

    def tally(self, names: tuple[str, ...]) -> Tally:
        """Return the tally of weights that have landed, and keep what they are now."""
        assert self._plan is not None  # by which they have landed
        self._kept.take_up(self._plan, names)
        return self._table.told().of(names)


def leaves_residuals(run: Any) -> bool:
    """Whether updates are rounded by who does not tell of it: the step carries what they were meant to be."""
    storage = getattr(run, "storage", None)
    tells = storage is None or getattr(storage, "rounds_at_once", False)
    return not tells or hasattr(getattr(run, "optimizer", None), "watch")


def tells(run: Any) -> bool:
    """Whether somebody can be told of the weights of a run when they land: all that its storage rounds."""
    return getattr(run, "storage", None) is not None and not leaves_residuals(run)
