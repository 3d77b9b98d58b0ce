"""`range`: what rounding does at the ends of the formats, wherever a tensor is quantized.

Overflow, underflow and non-finite elements are counted inside the quantizers (`altgrad_core.range_counts`
defines them), over all micro-batches of the observed step, apart for

    forward     weights that the forward pass quantizes, and activations
    backward    gradients of the Linears' outputs
    optimizer   weights that are rounded onto their grid after the step: what lies past the format's end, or
                past the bound, is cut off there

<direction>_<kind>_count      how many elements, in the step
<direction>_<kind>_fraction   their share of the elements that were quantized there
saturated_<flow>              the share that overflowed, of weights, activations or gradients alone
amax_<flow>, amax_ema_<flow>  largest finite magnitude before rounding, and its average over the observed
                              steps: e <- e + alpha*(amax - e), which begins with the first amax
octaves_<flow>                octaves from the smallest non-zero to the largest value after rounding
rescale                       weights whose scale is another than at the last observation, among those that
                              have one scale

A weight on the grid counts as `weights` where it is rounded, after the step. GridOptim's rungs are counted by
`rung_counts`; its float32 masters are not looked at. Nothing is counted in evaluation. `total` takes counts
and shares over all layers together, of amax and octaves the largest. Where nothing was quantized in the step,
nothing is reported: of a step that was skipped, forward and backward only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from altgrad_core.hookspecs import Step
from altgrad_core.landing_counts import LandingCounts
from altgrad_core.quantized_linear import Quantized
from altgrad_core.quantizer import WeightQuantizer, count_ranges, quantizer_of
from altgrad_core.range_counts import (
    AMAX,
    ELEMENTS,
    LARGEST,
    NONFINITE,
    OVERFLOW,
    SMALLEST,
    UNDERFLOW,
    RangeCounts,
    RangeTable,
)
from altgrad_core.surgery import quantized_flows
from altgrad_core.watching import due_monitors
from altgrad_monitors import RangeOptions
from altgrad_monitors.reporting import largest, pooled, reported, summed
from altgrad_monitors.rung_counts import RungCounts

KINDS = {"overflow": OVERFLOW, "underflow": UNDERFLOW, "nonfinite": NONFINITE}
FLOWS = {"forward": ("weights", "activations"), "backward": ("gradients",), "optimizer": ("landing",)}
"""Direction to the places that it sums up; `landing` is where weights are rounded onto their grid."""


@attrs.frozen
class Place:
    """Where tensors are quantized: the row of its counters in the run's table."""

    kind: str  # weights, landing, activations or gradients
    layer: str
    row: int
    weight: nn.Parameter | None = None

    @property
    def quantizer(self) -> WeightQuantizer | None:
        """What quantizes the weight at the moment; it may be another after a change of format."""
        return None if self.weight is None else quantizer_of(self.weight)


class Range:
    """Has the quantizers count, and reports what they counted; see the module's text."""

    undefined_is_nan = True
    provides: Mapping[str, str] = {
        **{f"{direction}_{kind}_count": "sum" for direction in FLOWS for kind in KINDS},
        **{f"{direction}_{kind}_fraction": "mean" for direction in FLOWS for kind in KINDS},
        **{f"saturated_{flow}": "mean" for flow in ("weights", "activations", "gradients")},
        **{f"amax_{flow}": "" for flow in ("weights", "activations", "gradients")},
        **{f"amax_ema_{flow}": "" for flow in ("weights", "activations", "gradients")},
        **{f"octaves_{flow}": "mean" for flow in ("weights", "activations", "gradients")},
        "rescale": "sum",
    }

    def __init__(self, options: RangeOptions) -> None:
        self.every = options.every
        self.needs: tuple[str, ...] = ()
        self._options, self.layers = options, options.layers
        self._table: RangeTable | None = None
        self._places: list[Place] = []
        self._rows: list[RangeCounts] = []
        self._averages = self._scales = torch.empty(0)
        self._saved: Mapping[str, Any] | None = None
        self._run: Any = None
        self._rungs: RungCounts | None = None

    def start(self, run: Any) -> None:
        """Hang counters on the run's quantizers. Raises ValueError for averages that are of other layers."""
        self._run = run
        self._places = list(self._found(run))
        self._table = RangeTable(len(self._places), run.device, lambda: run.step + 1, self._due)
        self._rows = [RangeCounts(self._table, place.row) for place in self._places]
        self._averages = torch.full((len(self._places),), torch.nan, dtype=torch.float64, device=run.device)
        self._scales = self._scales_now()
        if self._saved is not None:
            self._take_up(self._saved)
        self._attach()
        if run.storage is None and getattr(run.optimizer, "intended_in_rungs", False):
            self.needs = RungCounts.needs
            self._rungs = RungCounts(run, self._table, self._landing())

    def _found(self, run: Any) -> Iterator[Place]:
        """Yield the places of the layers to observe; every weight has two, of which one at most is in use."""
        linears = {id(one.weight) for one in run.model.modules() if isinstance(one, Quantized)}
        places = [
            (kind, run.layers[name], weight)
            for name, weight in run.model.named_parameters()
            if id(weight) in linears
            for kind in ("weights", "landing")
        ]
        for name in quantized_flows(run.model):
            layer, _, kind = name.rpartition(".")
            places.append((kind, layer, None))
        chosen = [one for one in places if re.fullmatch(self.layers, one[1])]
        for row, (kind, layer, weight) in enumerate(chosen):
            yield Place(kind, layer, row, weight)

    def _due(self, index: int) -> bool:
        """Whether this monitor will be shown the step: by its interval, or because a policy reads it."""
        return any(watched.plugin is self for watched in due_monitors(self._run, index))

    def _attach(self) -> None:
        """Have whatever rounds in these places count; what an action changes there counts as well."""
        flows = quantized_flows(self._run.model)
        for place, row in zip(self._places, self._rows, strict=True):
            if place.weight is None:
                flows[f"{place.layer}.{place.kind}"].ranges = row
            elif place.kind == "weights":
                count_ranges(place.weight, row)
        storage = self._run.storage
        if storage is not None:
            storage.ranges = LandingCounts(self._landing(), storage.rounding)

    def _landing(self) -> dict[Tensor, RangeCounts]:
        """Return where weights count that are rounded onto their grids."""
        return {
            place.weight: self._rows[place.row]
            for place in self._places
            if place.kind == "landing" and place.weight is not None
        }

    def _in_use(self, place: Place) -> bool:
        """Whether tensors were rounded, and counted, here in this step."""
        return self._table is not None and self._rows[place.row].index == self._table.index

    def end(self, run: Any, outcome: str) -> None:
        """Take the counters away again."""
        for flow in quantized_flows(run.model).values():
            flow.ranges = None
        for place in self._places:
            if place.weight is not None:
                count_ranges(place.weight, None)
        if run.storage is not None:
            run.storage.ranges = None
        if self._rungs is not None:
            self._rungs.remove()

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return what was counted in this step; nothing where it was not counted."""
        table = self._table
        if table is None or not table.on or table.index != step.index:
            return {}
        if self._rungs is not None:
            self._rungs.add(step)
        self._charge(table)
        self._average(table.ends[:, AMAX].double())
        totals, octaves = table.totals.double().unbind(), _octaves(table.ends).unbind()
        amax, averages = table.ends[:, AMAX].clone().unbind(), self._averages.clone().unbind()
        metrics: dict[str, Tensor | float] = {}
        for direction, kinds in FLOWS.items():
            metrics |= self._counts(direction, _added(self._by_layer(kinds, totals)))
        for flow in ("weights", "activations", "gradients"):
            kinds = ("weights", "landing") if flow == "weights" else (flow,)
            found = _added(self._by_layer(kinds, totals))
            shares = {layer: (one[OVERFLOW], one[ELEMENTS]) for layer, one in found.items()}
            metrics |= reported(f"range/saturated_{flow}", shares, pooled, self._options.per)
            for name, numbers in (("amax", amax), ("amax_ema", averages), ("octaves", octaves)):
                alone = {layer: one[0] for layer, one in self._by_layer(kinds, numbers).items()}
                metrics |= reported(f"range/{name}_{flow}", alone, largest, self._options.per)
        return metrics | self._rescaled()

    def skipped(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return what was counted in a step without an update: who backs off must see what overflowed."""
        return self.observe(step)

    def _charge(self, table: RangeTable) -> None:
        """Add the time of the counting, which is spent inside the step, to the monitor's cost."""
        for watched in self._run.monitors:
            if watched.plugin is self:
                watched.seconds += table.seconds
        table.seconds = 0.0

    def _by_layer(self, kinds: tuple[str, ...], numbers: tuple[Tensor, ...]) -> dict[str, list[Tensor]]:
        """Return the numbers of the places in use, by layer."""
        found: dict[str, list[Tensor]] = {}
        for place in self._places:
            if place.kind in kinds and self._in_use(place):
                found.setdefault(place.layer, []).append(numbers[place.row])
        return found

    def _counts(self, direction: str, found: Mapping[str, Tensor]) -> dict[str, Tensor | float]:
        metrics: dict[str, Tensor | float] = {}
        for kind, column in KINDS.items():
            counts = {layer: one[column] for layer, one in found.items()}
            shares = {layer: (one[column], one[ELEMENTS]) for layer, one in found.items()}
            metrics |= reported(f"range/{direction}_{kind}_count", counts, summed, self._options.per)
            metrics |= reported(f"range/{direction}_{kind}_fraction", shares, pooled, self._options.per)
        return metrics

    def _average(self, amax: Tensor) -> None:
        """Let the averages follow; a step in which nothing was seen leaves them."""
        moved = self._averages + self._options.alpha * (amax - self._averages)
        moved = torch.where(self._averages.isnan(), amax, moved)
        self._averages = torch.where(amax > 0, moved, self._averages)

    def _rescaled(self) -> dict[str, Tensor | float]:
        """Return the changes of scale since the last observation."""
        scales = self._scales_now()
        known = ~(scales.isnan() | self._scales.isnan())
        changed = (known & (scales != self._scales)).double().unbind()
        self._scales = scales
        weights = [place for place in self._places if place.kind == "weights"]
        layers = {
            place.layer: one
            for place, one in zip(weights, changed, strict=True)
            if place.quantizer is not None and not place.quantizer.scale.dim()
        }
        return reported("range/rescale", layers, summed, self._options.per)

    def _scales_now(self) -> Tensor:
        """Return the weights' scales; NaN where there is none, or more than one."""
        none = torch.full((), torch.nan, device=self._run.device)
        quantizers = [place.quantizer for place in self._places if place.kind == "weights"]
        scales = [none if each is None or each.scale.dim() else each.scale for each in quantizers]
        return torch.stack(scales) if scales else torch.empty(0)

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the scales of the last observation."""
        places = [f"{place.layer}.{place.kind}" for place in self._places]
        return {"places": places, "averages": self._averages, "scales": self._scales}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep what was saved for `start`."""
        self._saved = state

    def _take_up(self, state: Mapping[str, Any]) -> None:
        if list(state["places"]) != (own := self.state_dict()["places"]):
            raise ValueError(
                f"the saved averages are of {len(state['places'])} other places than these {len(own)}"
            )
        self._averages = state["averages"].to(self._averages.device)
        self._scales = state["scales"].to(self._scales.device)


def _added(found: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """Return each layer's counters, those of its weight and of its inputs together."""
    return {layer: rows[0] if len(rows) == 1 else rows[0] + rows[1] for layer, rows in found.items()}


def _octaves(ends: Tensor) -> Tensor:
    """Return the octaves from the smallest to the largest of each row, float64; 0 where there is no value."""
    highest, lowest = (torch.frexp(ends[:, column])[1] for column in (LARGEST, SMALLEST))
    return torch.where(ends[:, LARGEST] > 0, highest - lowest + 1, 0).double()
