"""Weights that are tallied while they land on their grids: which these are, and what was found of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from typing import Any

import torch
from torch import Tensor

from altgrad_core.hookspecs import Step, Weight
from altgrad_monitors.native_tally import Table
from altgrad_monitors.tally import Asked, Tally, decodable


class Landings:
    """The weights of one step that somebody is told of, and what was found of them."""

    def __init__(self) -> None:
        self._index = 0
        self._wanted: Set[str] = frozenset()
        self._table = Table()
        self._told: Collection[str] = ()
        self._gradients: Mapping[str, Tensor] = {}
        self._before: Mapping[str, Tensor] = {}
        self._now: Mapping[str, Tensor] = {}

    def begin(
        self,
        index: int,
        wanted: Set[str],
        weights: Mapping[str, Weight],
        gradients: Mapping[str, Tensor],
        before: Mapping[str, Tensor],
        now: Mapping[str, Tensor],
    ) -> dict[str, tuple[int, int] | None]:
        """Return whom to tell of each of the weights that have codes in `before`; None: nobody can be told.

        index: of the step. wanted: as in `book_of`. now: where the codes after it go, which may be `before`.
        """
        ask = Asked("stall" in wanted, "descent" in wanted, in_rungs=False, recode=False)
        asked = dict.fromkeys(before, ask)
        told = self._table.onlookers(asked, weights, gradients, before, now)
        self._index, self._wanted, self._told = index, wanted | {"flips"}, told
        self._gradients, self._before, self._now = gradients, before, now  # whose memory is written
        return {name: told.get(name) for name in before}

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

    def before(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return their codes before the step."""
        return {name: self._before[name] for name in names}

    def now(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return their codes after it."""
        return {name: self._now[name] for name in names}


def leaves_residuals(run: Any) -> bool:
    """Whether updates are rounded by who does not tell of it: the step carries what they were meant to be."""
    storage = getattr(run, "storage", None)
    tells = storage is None or getattr(storage, "rounds_at_once", False)
    return not tells or hasattr(getattr(run, "optimizer", None), "watch")


def told_of(run: Any, weights: Mapping[str, Weight]) -> set[str]:
    """Return the weights that somebody can be told of when they land: all that a storage rounds, or none."""
    stored = {name: weight for name, weight in weights.items() if on_grid(weight)}
    if getattr(run, "storage", None) is None or leaves_residuals(run):
        return set()
    return {*stored} if all(map(_has_values_by_code, stored.values())) else set()


def on_grid(weight: Weight) -> bool:
    return weight.storage == "grid"


def _has_values_by_code(weight: Weight) -> bool:
    """Whether a weight on a grid has the values that its codes say."""
    assert weight.format is not None  # of one on a grid
    return weight.value.dtype == torch.float32 and decodable(weight.format)
