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
from collections.abc import Collection, Mapping
from typing import Any

import attrs
from torch import Tensor

from altgrad_core.hookspecs import Step, Weight
from altgrad_core.updates import Updates
from altgrad_monitors import native_tally, tally
from altgrad_monitors.kept import Kept, Room, codes_of, quantized
from altgrad_monitors.landings import Landings, leaves_residuals, on_grid, told_of
from altgrad_monitors.tally import Asked, Tally, recorded, scale_then
from altgrad_monitors.tally import codes as codes
from altgrad_monitors.tally import row_of as row_of


@attrs.frozen(kw_only=True)
class Flips:
    """One weight in one step; the counts are 0-d int64 device tensors."""

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
        self._landings = Landings()
        self._table = native_tally.Table()
        self._layers: dict[str, tuple[Collection[str], dict[str, str]]] = {}

    def needs(self, *, updates: bool = False) -> tuple[str, ...]:
        """Return what the next step must carry for its flips, or its updates too: nothing that is kept."""
        if updates and not self.kept.follows_updates:
            return "before", "intended"
        run, on_grids = self._run(), any(map(on_grid, self.kept.weights.values()))
        known = run is None or (run.step == self._index and not _regridded(run))
        if known and not (updates and self.kept.weights.keys() != self.kept.values.keys()):
            return ("landing",) if updates and self._landing() else ()
        return ("before", "intended") if updates and on_grids else ("before",)

    def _landing(self) -> set[str]:
        """Return the weights that are to be told when they land."""
        return told_of(self._run(), self.kept.weights) if self.kept.follows_updates else set()

    def onlookers(self, gradients: Mapping[str, Tensor]) -> dict[str, tuple[int, int] | None]:
        """Return what tallies weights while they land, by name; see `hookspecs.Onlooking`."""
        landing = self._landing().intersection(gradients)
        room = self.kept.room([name for name in self.kept.values if name in landing])
        told = self._landings.begin(self._index + 1, self.wanted, self.kept.weights, gradients, room)
        return {name: told.get(name) for name in landing}

    def tally(self, step: Step) -> Tally:
        """Return what is wanted of this step's weights that have a gradient; computed once.

        Where steps were left out in between, or a weight has another format since, the codes before the step
        come from `step.before`. Without it they are those of the last look, and no code of another format
        counts as flipped.
        """
        if self._tally is None or step.index != self._index:
            left_out = step.index != self._index + 1
            changed = _regridded(self._run())
            self.kept.follow(step.weights)
            landed, overwritten = self._landings.landed(step, self.wanted)
            weights = self.kept.weights
            stale = {*weights} if left_out else weights.keys() & {*changed, *overwritten}
            step = self._with_kept(step, stale)
            self._tally, self._index = self._tallied(stale, landed, step), step.index
        return self._tally

    def looked_at(self, pattern: str, step: Step) -> tuple[Tally, list[str]]:
        """Return the tally of the weights whose layer the pattern matches, and their layers."""
        found = self.tally(step)
        names, layers = self._layers.get(pattern, ((), {}))
        if names is not found.names:
            layers = {
                name: layer for name in found.names if _matches(pattern, layer := step.weights[name].layer)
            }
            self._layers[pattern] = found.names, layers
        return found.of(list(layers)), list(layers.values())

    def flips(self, step: Step) -> dict[str, Flips]:
        """Return the flips of this step by parameter name, with the codes before and after it.

        Raises RuntimeError where only counts were asked for at the start.
        """
        if not self.kept.both_codes:
            raise RuntimeError("the codes before a step are not kept: start with book_of(run)")
        found = self.tally(step)
        columns = (found.column(name).unbind() for name in ("flips", "updates", "flips_of_updated"))
        return {
            name: Flips(
                flips=flips,
                updates=updates,
                flips_of_updated=both,
                before=self.kept.codes_before[name],
                now=self.kept.codes[name],
                scale_before=self.kept.scales_before[name],
            )
            for name, flips, updates, both in zip(found.names, *columns, strict=True)
        }

    def _with_kept(self, step: Step, stale: Collection[str]) -> Step:
        """Return the step with the values before it, their scales, and the updates, where they are known."""
        kept = self.kept
        if not kept.follows_updates:
            return step
        known = {
            name: value
            for name, value in kept.values.items()
            if name not in step.before and (name not in stale or name not in kept.codes)
        }
        before, after = known | {**step.before}, {name: one.value for name, one in step.weights.items()}
        scales = {name: kept.scales[name] for name in known if name in kept.scales}
        given = {name: update for name in step.intended if (update := recorded(step, name)) is not None}
        untold = {name: one for name, one in step.unrounded.items() if name in before and name not in given}
        given |= {name: one - before[name] for name, one in untold.items()}
        intended = Updates(given, after, before)
        return attrs.evolve(
            step, before=before, scales_before={**step.scales_before} | scales, intended=intended
        )

    def _tallied(self, stale: Collection[str], landed: Collection[str], step: Step) -> Tally:
        """Tally a step, and take up what is after it: in one pass where there is a loop for it.

        stale: of these what is kept is not what was before the step. landed: these have been tallied.
        """
        kept, left = self.kept, [name for name in self.kept.weights if name not in landed]
        room = kept.room(left)
        asked = {
            name: tally.asked(step, name, self.wanted, name in stale or name not in kept.codes)
            for name in left
            if name in step.gradients
        }
        parts = [self._landings.tally(landed)] if landed else []
        taken = self._table.tallied(asked, step, room)
        parts += [] if taken is None else [taken]
        done = set() if taken is None else set(taken.names)
        others = {name: ask for name, ask in asked.items() if name not in done}
        now = {name: codes_of(step.weights[name]) for name in left if name not in done}
        if others:
            parts.append(_tallied_in_torch(others, room, step, now))
        room.fill(now, step)
        recoded = {name for name, ask in asked.items() if ask.recode}
        kept.take_up(room.joined(self._landings.room(landed)), step, recoded)
        return tally.joined(parts, [name for name in kept.weights if name in asked or name in landed])


def _tallied_in_torch(asked: Mapping[str, Asked], room: Room, step: Step, now: Mapping[str, Tensor]) -> Tally:
    """Tally weights, whose codes before the step are left in the room where they are recoded."""
    for name in (name for name, ask in asked.items() if ask.recode):
        before = step.before[name], scale_then(step, name)
        room.codes_before[name] = codes_of(step.weights[name], *before)
    return tally.tallied(asked, step, room.codes_before, now)


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
    if every == 1:
        book.kept.follows_updates = not leaves_residuals(run)
    return book


def chosen(pattern: str, step: Step) -> dict[str, Weight]:
    """Return the quantized weights of the step whose layer the pattern matches, by parameter name."""
    return {
        name: weight for name, weight in quantized(step.weights).items() if _matches(pattern, weight.layer)
    }


@functools.cache
def _matches(pattern: str, layer: str) -> bool:
    return re.fullmatch(pattern, layer) is not None
