"""Back to the grid: the last operation on weights that are stored there, whoever has moved them."""

from __future__ import annotations

from torch import Tensor

from altgrad_core.elementwise import bounded
from altgrad_core.format import Format
from altgrad_core.kernels import kernel
from altgrad_core.random_bits import uniform_like


@kernel
def landed(
    x: Tensor, factor: Tensor, scale: Tensor, limit: Tensor | None, keys: Tensor | None, format: Format
) -> Tensor:
    """Return x*factor rounded to the grid and limited there, over the scale.

    x: one row. factor, scale: 0-d, or for each element. limit: (lowest, highest) in the format's own units,
    (2,) or (elements, 2). keys: of stochastic rounding, see `uniform_like`; None: to nearest even.
    """
    draws = None if keys is None else uniform_like(x, keys)
    rounding = "nearest_even" if keys is None else "stochastic"
    values = format.quantize(x * factor, rounding=rounding, uniform=draws)
    return bounded(values, None if limit is None else limit.movedim(-1, 0)) / scale
