"""What of some weights is tallied in a step, from what, and where what is kept of them lies; not gradients.

From one step to the next most of it stays. So a plan is made once, and stands as long as another one would be
the same: who makes something of it, such as a table of addresses, need only look whether it is handed the
plan that it has.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import attrs
import torch
from torch import Tensor

from altgrad_core.hookspecs import Step, Weight


class Asked(NamedTuple):
    """What of a weight is tallied beside its flips, and how."""

    stall: bool
    """`stayed`, `moved` and `lost`."""
    descent: bool
    """`product` and `square`."""
    in_rungs: bool
    """Whether the intended update is in rungs."""
    recode: bool
    """Whether the codes before the step come from the values before it, under the scale of then."""


class Room(NamedTuple):
    """Memory for what is kept of weights, by name: what there is before a step, and what after it is left."""

    codes_before: Mapping[str, Tensor]
    """Where a weight is recoded, its codes before the step are left."""
    codes: Mapping[str, Tensor]
    """Of after the step; maybe the same memory."""
    values: Mapping[str, Tensor]
    """Those before the step, over which those after it are written."""
    scales: Mapping[str, Tensor]
    """The same of scales that are single numbers."""

    def fill(self, codes: Mapping[str, Tensor], weights: Mapping[str, Weight]) -> None:
        """Leave here what weights are after a step, whose codes are given."""
        values = {name: weights[name].value for name in codes}
        scales = {name: scale for name in codes if (scale := weights[name].scale) is not None}
        for kept, now in (self.codes, codes), (self.values, values), (self.scales, scales):
            if names := [name for name in now if name in kept]:
                torch._foreach_copy_([kept[name] for name in names], [now[name] for name in names])


@attrs.frozen(kw_only=True, eq=False)
class Plan:
    """What is tallied of some weights. Mappings are by parameter name, and may hold others too."""

    weights: Mapping[str, Weight]
    asked: Mapping[str, Asked]
    """Of the weights that are tallied: those that have a gradient."""
    before: Mapping[str, Tensor]
    """Values before the step."""
    scales_before: Mapping[str, Tensor]
    """Their scales then, where these are not those of now."""
    intended: Mapping[str, Tensor]
    """Updates before rounding."""
    room: Room

    def scale_then(self, name: str) -> Tensor | None:
        """Return a weight's scale before the step."""
        return self.scales_before.get(name, self.weights[name].scale)


def recorded(intended: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return the intended update; None where it is the actual one and nobody has made a tensor of it."""
    found: Tensor | None = getattr(intended, "recorded", intended.get)(name)
    return found


def plan_of(
    step: Step, names: Collection[str], wanted: Collection[str], recoded: Collection[str], room: Room
) -> Plan:
    """Return what can be tallied of weights in a step, of what is wanted.

    step: carries what is known of the moment before it. recoded: weights whose codes before the step come
    from the values before it, where it carries them.
    """
    asked = {name: _asked(step, name, wanted, name in recoded) for name in names if name in step.gradients}
    return Plan(
        weights=step.weights,
        asked=asked,
        before=step.before,
        scales_before=step.scales_before,
        intended=step.intended,
        room=room,
    )


def _asked(step: Step, name: str, wanted: Collection[str], recode: bool) -> Asked:
    before = name in step.before
    known = before and name in step.intended
    in_rungs = known and step.intended_in_rungs and name in step.counts
    return Asked(known and "stall" in wanted, known and "descent" in wanted, in_rungs, before and recode)
