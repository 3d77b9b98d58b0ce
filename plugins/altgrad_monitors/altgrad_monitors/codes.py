"""What each step does to the codes of the quantized weights, counted once for all monitors of a run.

A weight's code is its rung under the quantizer's scale. The codes before a step are those with which the one
before it ended, under the scale of then: a change of scale re-codes a whole tensor, and its elements count as
flipped, as they do in the stored bytes. That is so whatever steps are looked at: where the one before was
not, its codes are taken from `before` and `scales_before`. What an action does to a weight before the
optimizer steps (another format, an adjusted scale, and the rounding to the new grid) is not the step's: the
codes before are then those of the values, in the format and under the scale, that the optimizer found.

On a CPU all is counted by one pass over each weight, which leaves what is kept of it for the next step: its
codes, one byte a weight, over those of the step before. Who needs both asks for them when it starts.

What updates are compared with, the weights before the step, need not be carried by the step either, where
somebody asks for them in every step: values are kept in place of codes, by the same pass (`kept`).
Weights that are rounded to their grids after the optimizer are counted while they land
(`hookspecs.Onlooking`), where what they were meant to become is at hand. Elsewhere, under error feedback or
optimizers that land on the grid by themselves, the step carries copies and intended updates.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor

from altgrad_core.hookspecs import Step, Weight
from altgrad_monitors import native_tally, tally
from altgrad_monitors.kept import Kept, codes_of, quantized
from altgrad_monitors.landings import Landings, leaves_residuals, tells
from altgrad_monitors.plan import Plan
from altgrad_monitors.tally import Summed, Tally
from altgrad_monitors.tally import codes as codes
from altgrad_monitors.tally import row_of as row_of


@attrs.frozen(kw_only=True)
class Flips:
    """One weight in one step; the counts are 0-d float64 device tensors."""

    flips: Tensor
    """Codes that changed."""
    updates: Tensor
    """Elements with a non-zero gradient."""
    flips_of_updated: Tensor
    """Codes that changed among those."""
    before: Tensor
    """The codes before the step, as one row."""
    now: Tensor
    """The codes after it."""
    scale_before: Tensor
    """The scale under which the codes before are, 0-d or as a row."""


class CodeBook:
    """What each step of one run did to the codes of its quantized weights, and what is kept of them for that.

    Attributes:
        wanted: what is tallied beside flips, of `stall` and `descent`.
        kept: codes and values as of the last step that was looked at.
    """

    def __init__(self, run: Any) -> None:
        self.wanted: set[str] = set()
        self.kept = Kept(run.weights())
        self._index = run.step
        self._run = weakref.ref(run)
        self._tally: Tally | None = None
        self._landings = Landings(self.kept)
        self._table = native_tally.Table()
        self._plan: Plan | None = None
        self._made_of: object = None
        self._summed: dict[tuple[str, str], Summed] = {}
        self._chosen: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {}

    def needs(self, *, updates: bool = False) -> tuple[str, ...]:
        """Return what the next step must carry for its flips, or its updates too: nothing that is kept."""
        run, kept = self._run(), self.kept
        if updates and not kept.follows_updates:
            return "before", "intended"
        if run is None or (run.step == self._index and not _regridded(run)):
            return ("landing",) if updates and kept.on_grid and tells(run) else ()
        return ("before", "intended") if updates and kept.on_grid else ("before",)

    def onlookers(self, gradients: Mapping[str, Tensor]) -> dict[str, tuple[int, int] | None]:
        """Return what tallies weights while they land, by name; see `hookspecs.Onlooking`."""
        landing = {name: gradient for name, gradient in gradients.items() if name in self.kept.on_grid}
        told = self._landings.begin(self._index + 1, self.wanted, landing)
        return {name: told.get(name) for name in landing}

    def tally(self, step: Step) -> Tally:
        """Return what is wanted of this step's weights that have a gradient; computed once.

        Where steps were left out in between, or a weight has another format since, the codes before the step
        come from `step.before`. Without it they are those of the last look, and no code of another format
        counts as flipped.
        """
        if self._tally is None or step.index != self._index:
            self.kept.follow(step.weights)
            landed, overwritten = self._landings.landed(step, self.wanted)
            changed = {*_regridded(self._run()), *overwritten}
            stale = self.kept.weights.keys() if step.index != self._index + 1 else changed
            self._tally, self._index = self._tallied(step, landed, stale), step.index
            self._summed = {}
        return self._tally

    def summed(self, step: Step, pattern: str, per: str) -> Summed:
        """Return the sums over the weights whose layer the pattern matches; computed once.

        per: `layer` or `type`.
        """
        found = self.tally(step)
        if (pattern, per) not in self._summed:
            names, layers = self._chosen.get(pattern, ((), {}))
            if names != found.names:
                layers = {name: step.weights[name].layer for name in found.names}
                layers = {name: layer for name, layer in layers.items() if _matches(pattern, layer)}
                self._chosen[pattern] = found.names, layers
            self._summed[pattern, per] = tally.summed(found.of(tuple(layers)), tuple(layers.values()), per)
        return self._summed[pattern, per]

    def flips(self, step: Step) -> dict[str, Flips]:
        """Return the flips of this step by parameter name, with the codes before and after it.

        Raises RuntimeError where only counts were asked for at the start.
        """
        if not self.kept.both_codes:
            raise RuntimeError("the codes before a step are not kept: start with book_of(run)")
        found = self.tally(step)
        columns = tally.columns_of(found.table)
        counts = (columns[name].unbind() for name in ("flips", "updates", "flips_of_updated"))
        return {
            name: Flips(
                flips=flips,
                updates=updates,
                flips_of_updated=both,
                before=self.kept.codes_before[name],
                now=self.kept.codes[name],
                scale_before=self.kept.scales_before[name],
            )
            for name, flips, updates, both in zip(found.names, *counts, strict=True)
        }

    def _tallied(self, step: Step, landed: tuple[str, ...], stale: Collection[str]) -> Tally:
        """Tally a step, and take up what is after it: in one pass where there is a loop for it.

        landed: these have been tallied. stale: of these what is kept is not what was before the step.
        """
        left = tuple(name for name in self.kept.weights if name not in landed)
        plan = self._plan_of(step, left, stale)
        parts = [self._landings.tally(landed)] if landed else []
        if (taken := self._table.tallied(plan, step.gradients)) is not None:
            parts.append(taken)
        done = set() if taken is None else {*taken.names}
        if others := [name for name in left if name not in done]:
            parts += _in_torch(plan, others, step.gradients)
        self.kept.take_up(plan, left)
        names = tuple(name for name in self.kept.weights if name in plan.asked or name in landed)
        return tally.joined(parts, names)

    def _plan_of(self, step: Step, names: tuple[str, ...], stale: Collection[str]) -> Plan:
        """Return what is tallied of these weights: the plan that stands, if the step adds nothing to it."""
        if stale or step.before or step.intended or step.unrounded:
            self._plan = None
            return self.kept.plan(step, names, self.wanted, stale)
        asked = frozenset(self.wanted), tuple(step.gradients), step.intended_in_rungs, tuple(step.counts)
        made_of = self.kept.generation, names, asked
        if self._plan is None or made_of != self._made_of:
            self._plan, self._made_of = self.kept.plan(step, names, self.wanted, stale), made_of
        return self._plan


def _in_torch(plan: Plan, names: Sequence[str], gradients: Mapping[str, Tensor]) -> list[Tally]:
    """Tally those of these weights that have a gradient, and leave what is kept of all of them."""
    now = {name: codes_of(plan.weights[name]) for name in names}
    asked = [name for name in names if name in plan.asked]
    before = {name: _codes_before(plan, name) for name in asked}
    found = [tally.tallied(plan, asked, gradients, before, now)] if asked else []
    plan.room.fill(now, plan.weights)
    return found


def _codes_before(plan: Plan, name: str) -> Tensor:
    """Return a weight's codes before the step, which are in the room then, where it has one for them."""
    kept = plan.room.codes_before.get(name)
    if not plan.asked[name].recode:
        assert kept is not None  # else it would be recoded
        return kept
    codes = codes_of(plan.weights[name], plan.before[name], plan.scale_then(name))
    return codes if kept is None else kept.copy_(codes)


def _regridded(run: Any) -> Collection[str]:
    """Return the weights to which an action has given another format or scale since the step began."""
    found: Collection[str] = getattr(run, "regridded", ())
    return found


_BOOKS: weakref.WeakKeyDictionary[Any, CodeBook] = weakref.WeakKeyDictionary()


def book_of(run: Any, *wanted: str, every: int = 0) -> CodeBook:
    """Return the run's code book, made at the first asking.

    wanted: what is tallied, of `flips`, `stall` and `descent`; nothing means flips with the codes on both
    sides of the step, which takes a second byte a weight. every: how often updates are asked for; 0: never.
    """
    if run not in _BOOKS:
        _BOOKS[run] = CodeBook(run)
    book = _BOOKS[run]
    book.wanted |= set(wanted)
    if not wanted:
        book.kept.keep_both()
    if every == 1 and not leaves_residuals(run):
        book.kept.keep_values()
    return book


def chosen(pattern: str, step: Step) -> dict[str, Weight]:
    """Return the quantized weights of the step whose layer the pattern matches, by parameter name."""
    return {
        name: weight for name, weight in quantized(step.weights).items() if _matches(pattern, weight.layer)
    }


@functools.cache
def _matches(pattern: str, layer: str) -> bool:
    return re.fullmatch(pattern, layer) is not None
