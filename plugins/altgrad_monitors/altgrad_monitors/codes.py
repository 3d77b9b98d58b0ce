"""Codes of the quantised weights, kept from step to step: one byte a weight, shared by the monitors of a run.

A weight's code is its rung under the quantiser's scale. The codes before a step are those with which the one
before it ended, under the scale of then: a change of scale re-codes a whole tensor, and its elements count as
flipped, as they do in the stored bytes. That is so whatever steps are looked at: where the one before was
not, its codes are taken from `before` and `scales_before`. What an action does to a weight before the
optimizer steps (another format, an adjusted scale, and the rounding to the new grid) is not the step's: the
codes before are then those of the values, in the format and under the scale, that the optimizer found.

What the monitors count of a step is counted once however many of them ask, and on a CPU by one pass over each
weight, which writes its codes over those of the step before. Who needs both asks for them when it starts.

What updates are compared with, the weights before the step, need not be carried by the step either, where
somebody asks for them in every step. Weights that are rounded to their grids after the optimizer are counted
while they land (`hookspecs.Onlooking`): their codes say what they were before, and what they were meant to
become is at hand there. Of others, which nothing rounds, the values are kept as the codes are, and written in
the same pass: four bytes a weight, as a copy of them takes, and not the copying. Elsewhere, under error
feedback or optimizers that land on the grid by themselves, the step carries copies and intended updates.
"""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Collection, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_core.kernels import flat
from altgrad_core.updates import Updates
from altgrad_monitors import native_tally, tally
from altgrad_monitors.landings import Landings, leaves_residuals, on_grid, told_of
from altgrad_monitors.tally import Asked, Tally, decoded, recorded, scale_then
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
    """The codes of every quantised weight of one run, as of the last step that was looked at."""

    def __init__(self, run: Any) -> None:
        self.wanted: set[str] = set()
        self.both_codes = self.follows_updates = False
        self._index = run.step
        self._run = weakref.ref(run)
        self._tally: Tally | None = None
        self._before: dict[str, Tensor] = {}
        self._codes: dict[str, Tensor] = {}
        self._values: dict[str, Tensor] = {}
        self._formats: dict[str, Format | None] = {}
        self._scales: dict[str, Tensor] = {}
        self._scales_before: dict[str, Tensor] = {}
        self._seen: Mapping[str, Weight] | None = None
        self._weights: dict[str, Weight] = {}
        self._landing: set[str] = set()
        self._landings = Landings()
        self._table = native_tally.Table()
        self._layers: dict[str, tuple[Collection[str], dict[str, str]]] = {}
        self._follow(run.weights())

    def needs(self, *, updates: bool = False) -> tuple[str, ...]:
        """Return what the next step must carry for its flips, or its updates too: nothing that is kept."""
        if updates and not self.follows_updates:
            return "before", "intended"
        run = self._run()
        kept = run is None or (run.step == self._index and not _regridded(run))
        if kept and not (updates and self._carried()):
            return ("landing",) if updates and self._landing else ()
        return (
            ("before", "intended") if updates and any(map(on_grid, self._weights.values())) else ("before",)
        )

    def _carried(self) -> bool:
        """Whether there are weights whose values are not kept, nor to be told when they land."""
        return self._codes.keys() - self._landing != self._values.keys()

    def onlookers(self, gradients: Mapping[str, Tensor]) -> dict[str, tuple[int, int] | None]:
        """Return what tallies weights while they land, by name; see `hookspecs.Onlooking`."""
        wanted = self.wanted if self.follows_updates else set()
        before = {name: self._codes[name] for name in gradients if name in self._landing}
        now = {name: torch.empty_like(one) for name, one in before.items()} if self.both_codes else before
        return self._landings.begin(self._index + 1, wanted, self._weights, gradients, before, now)

    def tally(self, step: Step) -> Tally:
        """Return what is wanted of this step's weights that have a gradient; computed once.

        Where steps were left out in between, or a weight has another format since, the codes before the step
        come from `step.before`. Without it they are those of the last look, and no code of another format
        counts as flipped.
        """
        if self._tally is None or step.index != self._index:
            left_out = step.index != self._index + 1
            changed = _regridded(self._run())
            self._follow(step.weights)
            landed, overwritten = self._landings.landed(step, self.wanted)
            stale = {*self._weights} if left_out else self._weights.keys() & {*changed, *overwritten}
            step = self._with_values(step, stale, landed)
            asked = {
                name: tally.asked(step, name, self.wanted, name in stale)
                for name in self._weights
                if name in step.gradients and name not in landed
            }
            self._tally, self._index = self._tallied(asked, landed, step), step.index
            self._catch_up(self._weights.keys() - step.gradients.keys(), step)
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
        if not self.both_codes:
            raise RuntimeError("the codes before a step are not kept: start with book_of(run)")
        found = self.tally(step)
        columns = (found.column(name).unbind() for name in ("flips", "updates", "flips_of_updated"))
        return {
            name: Flips(
                flips=flips,
                updates=updates,
                flips_of_updated=both,
                before=self._before[name],
                now=self._codes[name],
                scale_before=self._scales_before[name],
            )
            for name, flips, updates, both in zip(found.names, *columns, strict=True)
        }

    def _with_values(self, step: Step, stale: Collection[str], landed: Collection[str]) -> Step:
        """Return the step with the weights before it and the updates, where they are known here."""
        if not self.follows_updates:
            return step
        untold = {
            name: one for name, one in step.unrounded.items() if name not in landed and name in self._landing
        }
        known = {name: self._decoded(name, step) for name in untold if name not in step.before}
        known |= {name: value for name, value in self._values.items() if name not in stale}
        before, after = known | step.before, {name: weight.value for name, weight in step.weights.items()}
        given = {name: update for name in step.intended if (update := recorded(step, name)) is not None}
        given |= {name: one - before[name] for name, one in untold.items() if name not in given}
        return attrs.evolve(step, before=before, intended=Updates(given, after, before))

    def _decoded(self, name: str, step: Step) -> Tensor:
        """Return what a weight on its grid was before the step, by its codes."""
        weight, scale = self._weights[name], scale_then(step, name)
        assert weight.format is not None and scale is not None  # noqa: PT018 - for the type checker
        return decoded(self._codes[name], weight.format, scale).view(weight.value.shape)

    def keep_both(self, run: Any) -> None:
        """Keep codes and scales of both sides of a step from here on."""
        if not self.both_codes:
            self.both_codes = True
            self._scales = {name: _scale(weight) for name, weight in _quantized(run.weights()).items()}

    def _knows(self, name: str, weight: Weight) -> bool:
        """Whether the codes kept of a weight are of the format it has now."""
        kept = self._formats.get(name)
        return kept is weight.format or kept == weight.format  # most are the same object: sooner told

    def _follow(self, weights: Mapping[str, Weight]) -> None:
        """Take up weights that have been quantised since, or in another format; forget those that are not."""
        if weights is self._seen:
            return
        self._seen, self._weights = weights, _quantized(weights)
        for name in self._codes.keys() - self._weights.keys():
            del self._codes[name], self._formats[name]
            self._values.pop(name, None)
        for name, weight in self._weights.items():
            if not self._knows(name, weight):
                self._codes[name], self._formats[name] = _codes(weight), weight.format
                self._scales.pop(name, None)
        self._landing = told_of(self._run(), self._weights)
        self._values = {name: one for name, one in self._values.items() if name not in self._landing}

    def _tallied(self, asked: dict[str, Asked], landed: Collection[str], step: Step) -> Tally:
        """Tally a step, and take up codes and values after it: in one pass where there is a loop for it.

        landed: of these the tally is there already.
        """
        before = {name: self._codes[name] for name in asked}
        now = {name: torch.empty_like(one) for name, one in before.items()} if self.both_codes else before
        values = self._places_of_values(asked, step)
        taken = self._table.tallied(asked, step, before, now, values)
        done = set() if taken is None else set(taken.names)
        others = {name: ask for name, ask in asked.items() if name not in done}
        if others:
            now = {name: now[name] if name in done else _codes(step.weights[name]) for name in asked}
        for name in (name for name, ask in others.items() if ask.recode):
            before[name] = _codes(step.weights[name], step.before[name], scale_then(step, name))
        parts = [self._landings.tally(landed)] if landed else []
        parts += [] if taken is None else [taken]
        if others:
            parts.append(tally.tallied(others, step, before, now))
        for name in values.keys() - done:
            values[name].copy_(step.weights[name].value)
        self._values |= values
        self._take_up(asked, step, before | self._landings.before(landed), now | self._landings.now(landed))
        return tally.joined(parts, [name for name in self._weights if name in asked or name in landed])

    def _catch_up(self, names: Collection[str], step: Step) -> None:
        """Take up weights without a gradient: whose scale has moved all the same, or who moved unseen."""
        for name in names:
            weight = step.weights[name]
            self._codes[name] = _codes(weight)
            if name in self._values:
                self._values[name].copy_(weight.value)
            if self.both_codes:
                self._scales[name] = _scale(weight)

    def _take_up(
        self, asked: Mapping[str, Asked], step: Step, before: dict[str, Tensor], now: dict[str, Tensor]
    ) -> None:
        """Take up the codes after a step; and those before it, with the scales, where somebody wants both."""
        self._codes |= now
        if self.both_codes:
            self._before = before
            recoded = {name for name, ask in asked.items() if ask.recode}
            self._scales_before = {name: self._scale_before(name, step, name in recoded) for name in now}
            self._scales |= {name: _scale(step.weights[name]) for name in now}

    def _places_of_values(self, names: Collection[str], step: Step) -> dict[str, Tensor]:
        """Return where the values of these weights are kept: what is there already, of others new memory."""
        if not self.follows_updates:
            return {}
        return {
            name: torch.empty_like(step.weights[name].value) if found is None else found
            for name in names
            if name not in self._landing
            for found in [self._values.get(name)]
        }

    def _scale_before(self, name: str, step: Step, recoded: bool) -> Tensor:
        """Return the scale under which the codes before a step are."""
        weight = step.weights[name]
        kept = None if recoded else self._scales.get(name)
        return _scale(weight, scale_then(step, name)) if kept is None else kept


def _codes(weight: Weight, value: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Return the codes of a weight, or of other values of it under another scale, as one row."""
    scale = weight.scale if scale is None else scale
    assert weight.format is not None and scale is not None  # noqa: PT018 - for the type checker
    return codes(flat(weight.value if value is None else value), weight.format, row_of(scale))


def _scale(weight: Weight, scale: Tensor | None = None) -> Tensor:
    """Return a weight's scale, or another one of it, 0-d or as a row that stays what it is."""
    scale = weight.scale if scale is None else scale
    assert scale is not None
    return row_of(scale).clone()


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
        book.keep_both(run)
    if every == 1:
        book.follows_updates = not leaves_residuals(run)
    return book


def chosen(pattern: str, step: Step) -> dict[str, Weight]:
    """Return the quantised weights of the step whose layer the pattern matches, by parameter name."""
    return {
        name: weight for name, weight in _quantized(step.weights).items() if _matches(pattern, weight.layer)
    }


@functools.cache
def _matches(pattern: str, layer: str) -> bool:
    return re.fullmatch(pattern, layer) is not None


def _quantized(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    return {name: weight for name, weight in weights.items() if weight.format is not None}
