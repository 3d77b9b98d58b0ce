"""What is kept of quantized weights from one step looked at to the next: their codes, or their values.

Codes take a byte a weight, and say what has flipped. Who asks what has moved as well, in every step, needs
the values: four bytes a weight, from which the codes of then follow, under the scale of then. Both are kept
where somebody wants the codes of both sides of a step, and where a weight has no single scale.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set

import attrs
import torch
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_core.kernels import flat
from altgrad_core.updates import Updates
from altgrad_monitors import tally
from altgrad_monitors.plan import Asked, Plan, Room, plan_of, recorded
from altgrad_monitors.tally import row_of


class Kept:
    """The codes and values of every quantized weight of one run, as of the last step that was looked at.

    Attributes:
        weights: the quantized weights, as of the last look.
        on_grid: the names of those that live on their grids.
        both_codes: whether codes, and the scales they are under, are kept of both sides of a step.
        follows_updates: whether values are kept.
        codes, values: by parameter name, of each one or both.
        scales: under which they are: where values are kept alone 0-d, under `both_codes` 0-d or as a row.
        codes_before, scales_before: of the other side of the step, under `both_codes`.
        generation: another number whenever something that is kept has come to lie elsewhere.
    """

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self.both_codes = self.follows_updates = False
        self.weights: dict[str, Weight] = {}
        self.on_grid: Set[str] = frozenset()
        self.codes: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        self.codes_before: dict[str, Tensor] = {}
        self.scales_before: dict[str, Tensor] = {}
        self.generation = 0
        self._formats: dict[str, Format | None] = {}
        self._seen: Mapping[str, Weight] | None = None
        self.follow(weights)

    # --- which weights, and what of them -----------------------------------------------------------------

    def follow(self, weights: Mapping[str, Weight]) -> None:
        """Take up weights that have been quantized since, or in another format; forget those that are not."""
        if weights is self._seen:
            return
        self._seen, self.weights = weights, quantized(weights)
        self.on_grid = frozenset(name for name, one in self.weights.items() if one.storage == "grid")
        for name in self._formats.keys() - self.weights.keys():
            self._forget(name)
        for name in self.weights:
            if not self._knows(name):
                self._begin(name)
        self.generation += 1

    def keep_both(self) -> None:
        """Keep codes and scales of both sides of a step from here on."""
        if self.both_codes:
            return
        for name, weight in self.weights.items():
            then = self.scales.get(name)
            if name not in self.codes:
                self.codes[name] = codes_of(weight, self.values[name], then)
            self.scales[name] = scale_of(weight, then)
        self.both_codes = True
        self.generation += 1

    def keep_values(self) -> None:
        """Follow updates from here on: keep the values of the weights, as they are now."""
        if self.follows_updates:
            return
        self.follows_updates = True
        for name in self.weights:
            self._begin(name)
        self.generation += 1

    def _by_value(self, name: str) -> bool:
        """Whether the values of a weight are to be kept alone, with its scale."""
        scale = self.weights[name].scale
        return self.follows_updates and not self.both_codes and scale is not None and not scale.dim()

    def _knows(self, name: str) -> bool:
        """Whether what is kept of a weight is of the format it has now, and as it is to be kept."""
        kept, format = self._formats.get(name), self.weights[name].format
        same = kept is format or kept == format  # most are the same object: sooner told
        return same and (name in self.codes) != self._by_value(name)

    def _begin(self, name: str) -> None:
        """Keep of a weight what it is now."""
        self._forget(name)
        weight = self.weights[name]
        self._formats[name] = weight.format
        if self.follows_updates:
            self.values[name] = weight.value.clone()
        if not self._by_value(name):
            self.codes[name] = codes_of(weight)
        if self.both_codes or self._by_value(name):
            self.scales[name] = scale_of(weight)

    def _forget(self, name: str) -> None:
        for kept in (self.codes, self.values, self.scales, self._formats):
            kept.pop(name, None)

    # --- what is tallied with it -------------------------------------------------------------------------

    def plan(
        self, step: Step, names: Collection[str], wanted: Collection[str], stale: Collection[str]
    ) -> Plan:
        """Return what is tallied of these weights after a step.

        stale: of these what is kept is not what was before the step.
        """
        step = self._with_values(step, stale)
        recoded = {name for name in names if name in stale or name not in self.codes}
        return plan_of(step, names, wanted, recoded, self._room(names))

    def plan_of_landing(self, names: Collection[str], wanted: Collection[str]) -> Plan:
        """Return what is tallied of these weights, whose values are kept, while they land on their grids."""
        room, stall, descent = self._room(names), "stall" in wanted, "descent" in wanted
        return Plan(
            weights=self.weights,
            asked={name: Asked(stall, descent, False, name not in self.codes) for name in names},
            before=room.values,
            scales_before=room.scales,
            intended={},
            room=room._replace(scales={}),  # which stay
        )

    def _room(self, names: Collection[str]) -> Room:
        """Return where what is kept of these weights lies, and where that of after a step is to be left."""
        codes = {name: self.codes[name] for name in names if name in self.codes}
        after = {name: torch.empty_like(one) for name, one in codes.items()} if self.both_codes else codes
        values = {name: self.values[name] for name in names if name in self.values}
        scales = {name: self.scales[name] for name in names if self._by_value(name)}
        return Room(codes, after, values, scales)

    def _with_values(self, step: Step, stale: Collection[str]) -> Step:
        """Return the step with the values before it, their scales, and the updates, where they are known."""
        if not self.follows_updates:
            return step
        known = {
            name: value
            for name, value in self.values.items()
            if name not in step.before and (name not in stale or name not in self.codes)
        }
        before, after = known | {**step.before}, {name: one.value for name, one in step.weights.items()}
        scales = {name: self.scales[name] for name in known if self._by_value(name)}
        given = {
            name: update for name in step.intended if (update := recorded(step.intended, name)) is not None
        }
        untold = {name: one for name, one in step.unrounded.items() if name in before and name not in given}
        given |= {name: one - before[name] for name, one in untold.items()}
        return attrs.evolve(
            step,
            before=before,
            scales_before={**step.scales_before} | scales,
            intended=Updates(given, after, before),
        )

    def take_up(self, plan: Plan, names: Collection[str]) -> None:
        """Keep what has been left of these weights in a plan's room, where that is other memory."""
        if not self.both_codes:
            return
        for name in names:
            recoded = name in plan.asked and plan.asked[name].recode
            then = scale_of(plan.weights[name], plan.scale_then(name)) if recoded else self.scales[name]
            self.scales_before[name], self.scales[name] = then, scale_of(plan.weights[name])
            self.codes_before[name], self.codes[name] = plan.room.codes_before[name], plan.room.codes[name]
        self.generation += 1


def codes_of(weight: Weight, value: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Return the codes of a weight, or of other values of it under another scale, as one row."""
    scale = weight.scale if scale is None else scale
    assert weight.format is not None and scale is not None  # noqa: PT018 - for the type checker
    return tally.codes(flat(weight.value if value is None else value), weight.format, row_of(scale))


def scale_of(weight: Weight, scale: Tensor | None = None) -> Tensor:
    """Return a weight's scale, or another one of it, 0-d or as a row that stays what it is."""
    scale = weight.scale if scale is None else scale
    assert scale is not None
    return row_of(scale).clone()


def quantized(weights: Mapping[str, Weight]) -> dict[str, Weight]:
    return {name: weight for name, weight in weights.items() if weight.format is not None}
