"""Error feedback: what rounding took from a weight is given back before the next step.

A weight on the grid is w = Q(x), x being what the optimizer left. Its residual e = x - w is kept, and added
back when the next step begins: the forward and the backward pass see w, the optimizer sees w + e. After the
first snap e = w0 - Q(w0). Small updates add up in e until they reach half a spacing, so that nearest rounding
does not stall (Seide et al. 2014 for gradients; Collage, arXiv 2405.03637, for weights, in two numbers).

In float32 the residual is exact, w + e follows the recursion of a float32 master, and the run is that of
`storage = "master"` to the bit: a check, not a way to save memory. In a format of k bits it costs k bits a
weight. It is then a multiple of the spacing next to the weight, on the side on which the residual lies:

    e = m * gap(w, sign e),    |m| < 1/2,

so that every weight uses the format alike, whatever its size. The power of two that maps m onto the format
is the largest at which 1/2 falls no further out than one step past the format's largest value; m is rounded
to nearest even and cut off at the last value below 1/2. Hence a weight that no update moves stays where it
is: w + e rounds to w again. What saturation cuts off is not kept in a format: such a weight comes back
without delay. Updates below half a step of the residual's own grid are still lost: of a spacing, 1/512 in
E0M7, but 1/64 in E4M3, whose grid is coarsest where the residual is largest. A uniform residual format keeps
the smallest updates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from altgrad_core import scaling
from altgrad_core.elementwise import wide, wide_codes
from altgrad_core.format import Format
from altgrad_core.rows import Row

HALF_SPACING = 0.5
"""The largest residual of nearest rounding, as a multiple of the spacing next to the weight."""


class ErrorFeedback:
    """The residuals of grid-stored weights.

    formats: the weights'. residual_format: what the residuals are stored in; "same": each as its weight;
    None: as they are, in the weight's dtype (float32).

    The state is one tensor per weight, of its shape: codes in uint8 (formats of up to 8 bits) or int16, or
    the residuals themselves.
    """

    def __init__(
        self, weights: Sequence[Tensor], formats: Sequence[Format], residual_format: Format | str | None
    ) -> None:
        self._formats = list(formats)
        self._codes = [
            None if chosen is None else residual_codes(chosen)
            for format in formats
            for chosen in [format if isinstance(residual_format, str) else residual_format]
        ]
        self.stored = [
            torch.zeros_like(weight.detach())
            if codes is None
            else codes.encode(torch.zeros_like(weight.detach()))
            for weight, codes in zip(weights, self._codes, strict=True)
        ]

    def residual(self, index: int, weight: Tensor, scale: Tensor) -> Tensor:
        """Return the residual of one weight that is on its grid under this scale, in its shape and dtype."""
        row = Row([weight])
        return self.residuals([index], row, row.of([weight]), scale).view_as(weight)

    def residuals(self, places: Sequence[int], row: Row, weights: Tensor, scale: Tensor) -> Tensor:
        """Return the residuals of a row of weights that are on their grids under this scale, in their dtype.

        places: of the weights, all of one format. scale: 0-d, or for each element.
        """
        stored, codes = row.of(self.stored[place] for place in places), self._codes[places[0]]
        if codes is None:
            return stored
        multiple = codes.decode(stored)
        gap = gap_beside(self._formats[places[0]], weights, scale, multiple)
        return (multiple * gap).to(weights.dtype)

    def keep(self, places: Sequence[int], row: Row, weights: Tensor, scale: Tensor, residual: Tensor) -> None:
        """Store the residuals of a row of weights that have just been rounded under this scale."""
        codes = self._codes[places[0]]
        if codes is not None:
            residual = codes.encode(residual / gap_beside(self._formats[places[0]], weights, scale, residual))
        row.write(residual, [self.stored[place] for place in places])

    def take_over(self, other: ErrorFeedback, places: Mapping[int, int]) -> None:
        """Take up the residuals of weights that `other` has kept: its place to the place here."""
        for theirs, mine in places.items():
            self.stored[mine] = other.stored[theirs]

    def state_dict(self) -> dict[str, Any]:
        return {"formats": self._names(), "stored": list(self.stored)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up saved residuals. Raises ValueError where they are of other formats or shapes."""
        if list(state["formats"]) != self._names():
            raise ValueError(
                f"the saved residuals are stored in {', '.join(state['formats'])}, these in "
                f"{', '.join(self._names())}: give the same residual_format"
            )
        for mine, saved in zip(self.stored, state["stored"], strict=True):
            if mine.shape != saved.shape:
                raise ValueError(
                    f"a saved residual is of shape {tuple(saved.shape)}, its weight {tuple(mine.shape)};"
                    " load what was saved with this model"
                )
            mine.copy_(saved)

    def _names(self) -> list[str]:
        return ["FP32" if codes is None else codes.format.name for codes in self._codes]


class ResidualCodes:
    """Multiples of the spacing, |m| < 1/2, as codes of a format; see the module's text.

    A code is the rung counted from the lowest that occurs. (The format's own codes would do, but `encode`
    makes the host wait for a device, to refuse NaN where there is no code for it.) A NaN is stored as
    anything: its weight is NaN too.
    """

    def __init__(self, format: Format) -> None:
        self.format = format
        self.factor = _factor(format)
        below_half = math.nextafter(HALF_SPACING * self.factor, 0.0)
        ends = torch.tensor([-below_half, below_half], dtype=torch.float64)
        self._lowest, self._highest = map(int, format.rung(format.quantize(ends, "toward_zero")))
        self._dtype = torch.uint8 if format.bits <= 8 else torch.int16
        multiples = (
            format.from_rung(torch.arange(self._lowest, self._highest + 1, device="cpu")) / self.factor
        )
        self._multiples = {multiples.device: multiples}
        self._of_format_code = self._counted(
            format.rung(format.decode(torch.arange(2**format.bits, device="cpu")))
        )

    def encode(self, multiple: Tensor) -> Tensor:
        """Return the codes of the nearest multiples, uint8 or int16; ties to even."""
        scaled = multiple * self.factor
        if not scaled.is_cpu:
            return self._counted(self.format.rung(scaled))
        codes = self.format.encode(scaled if self.format.has_nan else scaled.nan_to_num_())  # a loop in C
        return _looked_up(self._of_format_code, codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the multiples, float32."""
        if codes.device not in self._multiples:
            self._multiples[codes.device] = self._multiples[torch.device("cpu")].to(codes.device)
        return _looked_up(self._multiples[codes.device], codes)

    def _counted(self, rungs: Tensor) -> Tensor:
        return (rungs.clamp(self._lowest, self._highest) - self._lowest).to(self._dtype)


def _looked_up(table: Tensor, codes: Tensor) -> Tensor:
    found: Tensor = table.index_select(0, wide_codes(codes).flatten())
    return found.reshape(codes.shape)


@functools.lru_cache(maxsize=64)
def residual_codes(format: Format) -> ResidualCodes:
    """Return the codes of a format."""
    return ResidualCodes(format)


def _factor(format: Format) -> float:
    """Return the power of two that maps multiples onto the format; 1 for formats that are never scaled."""
    if not scaling.scaled(format):
        return 1.0
    last, largest = format.values[-2:].double().tolist()
    exponent = math.frexp((2 * largest - last) / HALF_SPACING)[1] - 1
    return 2.0 ** max(-scaling.LARGEST_EXPONENT, min(scaling.LARGEST_EXPONENT, exponent))


def gap_beside(format: Format, weight: Tensor, scale: Tensor, direction: Tensor) -> Tensor:
    """Return the gap of the grid next to each weight, on the side that the sign of `direction` points to.

    In weight units, positive, float32 or float64. At a power of two the gaps on the two sides differ; nearest
    rounding leaves at most half of this one. Beyond the format's end it is the last gap.
    """
    scaled = wide(weight) * scale
    side = torch.full_like(scaled, math.inf).copysign_(direction)
    return format.spacing(scaled.nextafter(side)) / scale
