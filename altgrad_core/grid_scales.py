"""The scales of grid-stored weights, and the bound on the weights: what every way of storing shares.

One power of two per weight maps it onto its format. As weights train, the scale follows their largest
magnitude with hysteresis (`scaling.adapted`), so that they do not leave their grid at every fluctuation. The
bound keeps weights from running away; it is the same for all optimizers, so that arms of a comparison differ
in geometry and not in who may grow.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from altgrad_core import scaling
from altgrad_core.format import Format

OF_THE_WEIGHT = ("rms", "rescales")
"""What the state says of a weight, whatever its format: what its bound follows from, and a count."""

STATE = ("exponents", "seen", *OF_THE_WEIGHT)

_LARGEST_FLOAT = float(np.finfo(np.float32).max)
_SLACK = 2.0**-20  # of a range that need not be exact: whatever is outside is worked out


class HostScale(NamedTuple):
    """What a step on a CPU needs of a scale, as numbers."""

    limits: tuple[float, float]
    """The lowest and the largest grid value within the bound, times the scale; infinite without a bound."""
    quiet: tuple[float, float]
    """The scale stays as it is where low < amax <= high, of weights before rounding."""


Kind = tuple[Format, float]
"""A format and a margin: scales of one kind follow from their amax alike."""


class GridScales:
    """The scales of grid-stored weights as they train, and the bound on the weights.

    scales: 0-d float32 tensors, written in place when a scale moves.
    fitted: which scales are fitted to the weights now; the others (1, or static) stay as they are.
    adaptive: which of those follow the weights afterwards.
    bound: limit on |w| as a multiple of the tensor's float32 rms at construction; 0 means none.
    adjustments: powers of two that multiply the scales that fit the weights; None: 1.
    may_move: whether any scale is adaptive.

    The state is device tensors of shape (n,): exponents k of the scales that fit, whether a positive amax was
    seen, the initial rms, and the number of scale changes.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        formats: Sequence[Format],
        scales: Sequence[Tensor],
        *,
        fitted: Sequence[bool],
        adaptive: Sequence[bool],
        bound: float = 0.0,
        margins: Sequence[float] | None = None,
        shrink_early: bool = False,
        adjustments: Sequence[float] | None = None,
    ) -> None:
        device = weights[0].device if weights else torch.device("cpu")
        if any(scale.dim() for scale in scales):
            raise ValueError(
                "a weight on the grid has one scale, these have one per channel or block: "
                'quantize_model(..., granularity="tensor")'
            )
        self.scales = list(scales)
        self.bound = bound
        self.shrink_early = shrink_early
        self._fitted = torch.tensor(list(fitted), device=device)
        self._moving = [one and other for one, other in zip(fitted, adaptive, strict=True)]
        self._adaptive = torch.tensor(self._moving, device=device)
        self.may_move = any(self._moving)
        self._host: list[HostScale] | None = None
        self._host_bounds: list[float] | None = None
        self._kind_of: list[Kind] = list(zip(formats, margins or [1.0] * len(self.scales), strict=True))
        self._kinds = _positions(self._kind_of, device)
        amax = scaling.amax(weights) if weights else torch.zeros(0, dtype=torch.float64)
        self.rms = rms_of(weights) if weights else torch.zeros(0)
        self.seen = scaling.usable(amax)
        self.exponents = torch.zeros(len(self.scales), dtype=torch.int32, device=device)
        for (format, margin), at in self._kinds.items():
            self.exponents[at] = scaling.fitted_exponent(amax[at], format, margin).to(torch.int32)
        self.rescales = torch.zeros_like(self.exponents)
        factors = adjustments or [1.0] * len(self.scales)
        self._shift_of = [math.frexp(factor)[1] - 1 for factor in factors]
        self._shifts = torch.tensor(self._shift_of, dtype=torch.int32, device=device)
        self._write()

    def adapt(self, amax: Tensor) -> None:
        """Move the scales after an update whose unrounded weights have this amax, (n,); 0: not updated."""
        if not self.may_move:
            return
        moved = self.exponents.clone()
        for (format, margin), at in self._kinds.items():
            moved[at] = scaling.adapted(
                self.exponents[at], self.seen[at], amax[at], format, margin, self.shrink_early
            )
        moved = torch.where(self._adaptive, moved, self.exponents)
        self.rescales += moved != self.exponents
        self.seen |= scaling.usable(amax)
        self.exponents.copy_(moved)
        self._write()

    def adapt_some(self, amax: Mapping[int, float]) -> None:
        """Do what `adapt` does, on a CPU, for weights at some places, at the cost of these."""
        if not self.may_move or not amax:
            return
        for place, one in amax.items():
            self._adapt_one(place, one)
        if self._host is not None:
            new = dict(zip(amax, self._hosts(list(amax)), strict=True))
            self._host = [new.get(place, one) for place, one in enumerate(self._host)]

    def _adapt_one(self, place: int, amax: float) -> None:
        before, seen = int(self.exponents[place]), bool(self.seen[place])
        if not seen and 0 < amax < math.inf:
            self.seen[place] = True
        if not self._moving[place]:
            return
        now = scaling.adapted_number(before, seen, amax, *self._kind_of[place], self.shrink_early)
        if now != before:
            self.exponents[place] = now
            self.rescales[place] += 1
            self.scales[place].fill_(2.0 ** scaling.clamped(now + self._shift_of[place]))

    def limits(self) -> Tensor | None:
        """Return the lowest and the largest grid value within each weight's bound; None: no bound.

        (n, 2) float32, times the scale. A weight whose initial rms is 0 has no bound: the format's ends.
        """
        bounds = self.bounds()
        if bounds is None or not self.scales:
            return None
        multiples = bounds * torch.stack(self.scales)
        limits = torch.stack((-multiples, multiples), dim=1)
        for (format, _), at in self._kinds.items():
            limits[at] = format.quantize(limits[at], rounding="toward_zero")
        return limits

    def limits_at(self, places: Collection[int]) -> dict[int, Tensor] | None:
        """Return the rows of `limits` of some weights, by place: on a CPU at the cost of these."""
        if len(places) == len(self.scales) or not self.exponents.is_cpu:
            limits = self.limits()
            return None if limits is None else {place: limits[place] for place in places}
        if not self.bound:
            return None
        host = self.on_host()
        return {
            place: torch.tensor(host[place].limits, dtype=torch.float32, device="cpu") for place in places
        }

    def on_host(self) -> list[HostScale]:
        """Return what a step on a CPU needs of the weights' scales; waits for another device.

        The list is made anew when a scale moves, and never written to.
        """
        if self._host is None:
            bounds = self.bounds()
            self._host_bounds = None if bounds is None else bounds.tolist()
            self._host = self._hosts(range(len(self.scales)))
        return self._host

    def _hosts(self, places: Sequence[int]) -> list[HostScale]:
        exponents, seen = self.exponents.tolist(), self.seen.tolist()
        return [
            HostScale(
                limits=self._host_limits(place), quiet=self._quiet(place, exponents[place], seen[place])
            )
            for place in places
        ]

    def _host_limits(self, place: int) -> tuple[float, float]:
        """Return a weight's row of `limits`."""
        if self._host_bounds is None:
            return -math.inf, math.inf
        format, _ = self._kind_of[place]
        values, multiple = format.values.numpy(), self._host_bounds[place] * float(self.scales[place])
        most = np.float32(min(multiple, _LARGEST_FLOAT))
        low = values[values.searchsorted(-most)]
        return -abs(float(low)), float(values[values.searchsorted(most, side="right") - 1])

    def _quiet(self, place: int, exponent: int, seen: bool) -> tuple[float, float]:
        """Return a range (low, high] of amax in which `adapt` surely leaves a weight's scale."""
        if not self._moving[place]:
            return -1.0, math.inf
        if not seen:
            return math.inf, math.inf  # none: the first positive amax sets the scale
        format, margin = self._kind_of[place]
        unit = math.ldexp(1.0, -exponent)
        slack = 0.0 if margin == 1.0 else _SLACK  # a quotient by a power of two is exact
        high = format.largest * unit / margin * (1 - slack)
        low = format.largest * unit / 4 / margin * (1 + slack)
        if not self.shrink_early:  # then the scale shrinks only for what rounds past the largest value
            high = max(high, scaling.last_midpoint(format)[0] * unit * (1 - _SLACK))
        return low, high

    def bounds(self) -> Tensor | None:
        """Return the bound on |w| in weight units, (n,) float32, inf where there is none; None: no bound."""
        return torch.where(self.rms > 0, self.bound * self.rms, math.inf) if self.bound else None

    def take_over(self, other: GridScales, places: Mapping[int, int], keys: Collection[str] = STATE) -> None:
        """Take up the state of weights that `other` has kept: its place to the place here.

        keys: of the state; those of `OF_THE_WEIGHT` alone, for weights that have another format now.
        """
        if places:
            theirs, mine = list(places), list(places.values())
            for key, own in self.state_dict().items():
                if key in keys:
                    own[mine] = other.state_dict()[key][theirs]
            self._write()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state; the scales themselves are the quantizers' and follow from the exponents."""
        return {"exponents": self.exponents, "seen": self.seen, "rms": self.rms, "rescales": self.rescales}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for key, mine in self.state_dict().items():
            if state[key].shape != mine.shape:
                raise ValueError(
                    f"the saved scales are of {len(state[key])} weights, these are {len(mine)}; quantize the "
                    "model as it was when they were saved"
                )
            mine.copy_(state[key])
        self._write()

    def _write(self) -> None:
        """Set the fitted scales to 2^k, in place."""
        self._host = None
        if not self.scales:
            return
        most = scaling.LARGEST_EXPONENT
        powers = scaling.power_of_two((self.exponents + self._shifts).clamp(-most, most))
        current = torch.stack(self.scales).to(powers.device)
        torch._foreach_copy_(self.scales, list(torch.where(self._fitted, powers, current).unbind()))


@torch.no_grad()
def rms_of(weights: Sequence[Tensor]) -> Tensor:
    """Return each tensor's root mean square, (n,) float32; by float64: no square overflows."""
    return torch.stack([weight.double().square().mean().sqrt().float() for weight in weights])


def _positions(kinds: Sequence[Kind], device: torch.device) -> dict[Kind, Tensor]:
    """Return where each distinct kind stands: kind to a 1-d index tensor."""
    found: dict[Kind, list[int]] = {}
    for index, kind in enumerate(kinds):
        found.setdefault(kind, []).append(index)
    return {kind: torch.tensor(indices, device=device) for kind, indices in found.items()}
