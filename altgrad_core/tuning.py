"""Which step size an arm gets: the best factor of a list, which grows where the best is on its edge.

A factor's loss is the mean over the tuning seeds; one seed that diverged makes it infinite. The list grows by
the ratio of its last two factors, `MOST_EXTENSIONS` times at most, and no further than the optimizers take
it: a best factor still on the edge is no optimum, and what was run at it gives no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import attrs

MOST_EXTENSIONS = 2
"""How often a list of factors grows."""

_DIGITS = 12
"""Significant digits of a factor or a step size: 0.1 x 3 is 0.3."""


def rounded(number: float) -> float:
    """Return a number without the noise of its last digits."""
    return float(f"{number:.{_DIGITS}g}")


@attrs.define
class Tuning:
    """The factors of one group of runs, and what they came to."""

    given: Sequence[float]
    """The list of the file."""
    added: list[float] = attrs.field(factory=list)
    losses: dict[float, dict[int, float | None]] = attrs.field(factory=dict)
    """Factor to seed to loss: inf where the run diverged, None where it failed and is to be run again."""

    @property
    def factors(self) -> list[float]:
        """Every factor so far, ascending."""
        return sorted((*self.given, *self.added))

    @property
    def complete(self) -> bool:
        """Whether every factor has its loss of every seed."""
        return all(
            factor in self.losses and None not in self.losses[factor].values() for factor in self.factors
        )

    @property
    def best(self) -> float | None:
        """The factor with the lowest mean loss, of equal ones the nearest to 1; None: not all have run.

        Where everything diverged it is the smallest. A list of one factor leaves nothing to choose.
        """
        if len(self.given) == 1:
            return self.given[0]
        if not self.complete:
            return None
        means = {factor: _mean(list(self.losses[factor].values())) for factor in self.factors}
        if min(means.values()) == math.inf:
            return self.factors[0]
        return min(means, key=lambda factor: (means[factor], abs(math.log(factor)), factor))

    @property
    def on_the_edge(self) -> bool:
        """Whether the best factor is the first or the last, so that a better one may lie beyond."""
        return len(self.given) > 1 and self.best in (self.factors[0], self.factors[-1])

    def extend(self, can_run: Callable[[float], bool]) -> float | None:
        """Add the factor beyond the edge that the best is on, and return it; None: it is not, or no more.

        can_run: whether there are runs of a factor; one that is 0 or inf has none.
        """
        if not self.on_the_edge or len(self.added) >= MOST_EXTENSIONS:
            return None
        edge, inner, *_ = self.factors if self.best == self.factors[0] else self.factors[::-1]
        beyond = rounded(edge * (edge / inner))
        if not 0 < beyond < math.inf or not can_run(beyond):
            return None
        self.added.append(beyond)
        return beyond


def _mean(losses: Sequence[float | None]) -> float:
    return math.fsum(loss for loss in losses if loss is not None) / len(losses)
