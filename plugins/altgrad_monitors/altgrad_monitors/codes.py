"""Codes of the quantised weights, kept from step to step: one byte a weight, shared by the monitors of a run.

A weight's code is its rung under the quantiser's scale. The codes before a step are those with which the one
before it ended, under the scale of then: a change of scale re-codes a whole tensor, and its elements count as
flipped, as they do in the stored bytes. That is so whatever steps are looked at: where the one before was
not, its codes are taken from `before` and `scales_before`. Only of a weight that has been given another
format, the codes before are those in the new one, of the values that it was given with it.

What the monitors count of a step is counted once however many of them ask, and on a CPU by one pass over each
weight, which writes its codes over those of the step before. Who needs both asks for them when it starts.

What updates are compared with, the weights before the step, is kept in the same way, and written in the same
pass, where somebody asks for it in every step and nothing is rounded after the optimizer. It takes four bytes
a weight, as a copy of them does, and not the copying. Elsewhere the step carries it.
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
    """The codes of every quantised weight of one run, as of the last step that was looked at."""

    def __init__(self, run: Any) -> None:
        self.wanted: set[str] = set()
        self.both_codes = self.keeps_values = False
        self._index, self._switches = run.step, _switches(run)
        self._run = weakref.ref(run)
        self._tally: Tally | None = None
        self._before: dict[str, Tensor] = {}
        self._codes: dict[str, Tensor] = {}
        self._values: dict[str, Tensor] = {}
        self._formats: dict[str, Format | None] = {}
        self._scales: dict[str, Tensor] = {}
        self._scales_before: dict[str, Tensor] = {}
        self._follow(_quantised(run.weights()))

    def needs(self, *, updates: bool = False) -> tuple[str, ...]:
        """Return what the next step must carry for its flips, or its updates too: nothing that is kept."""
        if updates and not self.keeps_values:
            return "before", "intended"
        run = self._run()
        kept = run is None or (run.step == self._index and _switches(run) == self._switches)
        kept &= not updates or self._values.keys() == self._codes.keys()
        return () if kept else ("before",)

    def tally(self, step: Step) -> Tally:
        """Return what is wanted of this step's weights that have a gradient; computed once.

        Where steps were left out in between, or a weight has another format since, the codes before the step
        come from `step.before`. Without it they are those of the last look, and no code of another format
        counts as flipped.
        """
        if self._tally is None or step.index != self._index:
            weights = _quantised(step.weights)
            left_out = step.index != self._index + 1
            stale = {name for name, weight in weights.items() if left_out or not self._knows(name, weight)}
            self._follow(weights)
            step = self._with_values(step, stale)
            asked = {
                name: tally.asked(step, name, self.wanted, name in stale)
                for name in weights
                if name in step.gradients
            }
            self._tally, self._index = self._tallied(asked, step), step.index
            self._switches = _switches(self._run())
        return self._tally

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

    def _with_values(self, step: Step, stale: Collection[str]) -> Step:
        """Return the step with the weights before it and the updates, where they are kept here."""
        if not self.keeps_values:
            return step
        kept = {name: value for name, value in self._values.items() if name not in stale}
        before, after = kept | step.before, {name: weight.value for name, weight in step.weights.items()}
        given = {name: update for name in step.intended if (update := recorded(step, name)) is not None}
        return attrs.evolve(step, before=before, intended=Updates(given, after, before))

    def keep_both(self, run: Any) -> None:
        """Keep codes and scales of both sides of a step from here on."""
        if not self.both_codes:
            self.both_codes = True
            self._scales = {name: _scale(weight) for name, weight in _quantised(run.weights()).items()}

    def _knows(self, name: str, weight: Weight) -> bool:
        """Whether the codes kept of a weight are of the format it has now."""
        kept = self._formats.get(name)
        return kept is weight.format or kept == weight.format  # most are the same object: sooner told

    def _follow(self, weights: Mapping[str, Weight]) -> None:
        """Take up weights that have been quantised since, or in another format; forget those that are not."""
        for name in self._codes.keys() - weights.keys():
            del self._codes[name], self._formats[name]
            self._values.pop(name, None)
        for name, weight in weights.items():
            if not self._knows(name, weight):
                self._codes[name], self._formats[name] = _codes(weight), weight.format
                self._scales.pop(name, None)

    def _tallied(self, asked: dict[str, Asked], step: Step) -> Tally:
        """Tally a step, and take up codes and values after it: in one pass where there is a loop for it."""
        before = {name: self._codes[name] for name in asked}
        now = {name: torch.empty_like(one) for name, one in before.items()} if self.both_codes else before
        values = self._places_of_values(asked, step)
        taken = native_tally.tallied(asked, step, before, now, values)
        done = set() if taken is None else set(taken.names)
        others = {name: ask for name, ask in asked.items() if name not in done}
        now = {name: now[name] if name in done else _codes(step.weights[name]) for name in asked}
        for name in (name for name, ask in others.items() if ask.recode):
            before[name] = _codes(step.weights[name], step.before[name], scale_then(step, name))
        parts = [] if taken is None else [taken]
        if others:
            parts.append(tally.tallied(others, step, before, now))
        for name in values.keys() - done:
            values[name].copy_(step.weights[name].value)
        self._codes |= now
        self._values |= values
        if self.both_codes:
            self._before = before
            self._scales_before = {name: self._scale_before(name, step, ask) for name, ask in asked.items()}
            self._scales |= {name: _scale(step.weights[name]) for name in asked}
        return tally.joined(parts, list(asked))

    def _places_of_values(self, names: Collection[str], step: Step) -> dict[str, Tensor]:
        """Return where the values of these weights are kept: what is there already, of others new memory."""
        if not self.keeps_values:
            return {}
        return {
            name: torch.empty_like(step.weights[name].value) if found is None else found
            for name in names
            for found in [self._values.get(name)]
        }

    def _scale_before(self, name: str, step: Step, ask: Asked) -> Tensor:
        """Return the scale under which the codes before a step are."""
        weight = step.weights[name]
        kept = None if ask.recode else self._scales.get(name)
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


def _switches(run: Any) -> int:
    """Return how often formats have been switched in a run."""
    return len(getattr(run, "switches", ()))


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
        book.keeps_values = not _rounds_updates(run)
    return book


def _rounds_updates(run: Any) -> bool:
    """Whether updates are rounded after they are made, so that there are others than the actual ones."""
    return getattr(run, "storage", None) is not None or hasattr(getattr(run, "optimizer", None), "watch")


def chosen(pattern: str, step: Step) -> dict[str, Weight]:
    """Return the quantised weights of the step whose layer the pattern matches, by parameter name."""
    return {
        name: weight for name, weight in _quantised(step.weights).items() if _matches(pattern, weight.layer)
    }


@functools.cache
def _matches(pattern: str, layer: str) -> bool:
    return re.fullmatch(pattern, layer) is not None


def layers_of(pattern: str, step: Step, names: Collection[str]) -> dict[str, str]:
    """Return the layers of those of these weights that are `chosen`, by parameter name."""
    return {name: one.layer for name, one in chosen(pattern, step).items() if name in names}


def _quantised(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    return {name: weight for name, weight in weights.items() if weight.format is not None}
