"""Checks of how a format rounds, from its table of values alone.

Between two neighbors lo < hi it is known what each mode must give just above lo, just below the
midpoint, at it, just above it, and just below hi. So nothing here repeats a format's arithmetic, and
every interval of the table is visited.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from altgrad_core.format import OVERFLOWS, ROUNDINGS, Format
from altgrad_core.testing.expect import expect, fail
from altgrad_core.value_table import midpoints

DETERMINISTIC = tuple(mode for mode in ROUNDINGS if mode != "stochastic")
LAST_UNIFORM = 1 - 2.0**-24
"""The largest random number there is."""
_DRAWS = 4096
_STANDARD_ERRORS = 5


@attrs.frozen
class Intervals:
    """A format under test and the intervals of its table: float64, one entry per pair of neighbors."""

    format: Format
    values: Tensor  # (n,)
    lower: Tensor  # (n - 1,)
    upper: Tensor
    middle: Tensor
    middle_is_exact: Tensor  # bool: whether float64 holds the exact midpoint
    probes: Tensor  # sorted random numbers, from beyond the lowest value to beyond the largest
    seed: int

    @classmethod
    def of(cls, format: Format, seed: int) -> Intervals:
        values = format.values.double()
        lower, upper = values[:-1], values[1:]
        middle, missing = midpoints(lower, upper)
        generator = torch.Generator().manual_seed(seed)
        at = torch.randint(len(lower), (4096,), generator=generator)
        share = torch.rand(4096, generator=generator, dtype=torch.float64)
        probes = torch.cat((lower[at] + share * (upper - lower)[at], 1.5 * values[[0, -1]]))
        return cls(format, values, lower, upper, middle, missing == 0, probes.sort().values, seed)

    @property
    def name(self) -> str:
        return self.format.name

    @property
    def zero(self) -> int:
        """The index of zero in the table."""
        return int((self.values < 0).sum())

    @property
    def is_symmetric(self) -> bool:
        return torch.equal(self.values, -self.values.flip(0))

    @property
    def rungs(self) -> Tensor:
        return torch.arange(len(self.values), dtype=torch.int32) - self.zero

    @property
    def probes_and_ties(self) -> Tensor:
        return torch.cat((self.probes, self.middle[self.middle_is_exact]))

    @property
    def inner(self) -> Tensor:
        """Each interval's end toward zero."""
        return torch.where(self.lower >= 0, self.lower, self.upper)

    @property
    def outer(self) -> Tensor:
        """Each interval's end away from zero."""
        return torch.where(self.lower >= 0, self.upper, self.lower)


def _above(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, torch.inf))


def _below(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, -torch.inf))


# Each docstring completes "check that ...".


def grid_values_stay(case: Intervals) -> None:
    """every rounding mode leaves values on the grid where they are."""
    x = case.format.values
    for mode in DETERMINISTIC:
        seen = case.format.quantize(x, mode)
        expect(case.name, f"{mode} must keep a grid value", x, seen, x, "quantize must be idempotent")
    for r in (0.0, 0.5, LAST_UNIFORM):
        seen = case.format.quantize(x, "stochastic", uniform=torch.full_like(x, r))
        rule = f"stochastic rounding with the random number {r!r} must keep a grid value"
        fix = "n = floor(y), then n + (r < y - n); floor(y + r) is inexact and moves grid values"
        expect(case.name, rule, x, seen, x, fix)


def nearest_is_nearest(case: Intervals) -> None:
    """nearest_even and nearest_away give the nearest value."""
    exact = case.middle_is_exact
    below, above = _below(case.middle)[exact], _above(case.middle)[exact]
    fix = "compare with the exact midpoint, in float64: it may need one bit more than float32 has"
    for mode in ("nearest_even", "nearest_away"):
        rule = f"{mode} must give the nearest value"
        expect(case.name, rule, below, case.format.quantize(below, mode), case.lower[exact], fix)
        expect(case.name, rule, above, case.format.quantize(above, mode), case.upper[exact], fix)


def ties_go_where_they_should(case: Intervals) -> None:
    """ties go to the even rung, or away from zero."""
    even = torch.where(case.rungs[:-1] % 2 == 0, case.lower, case.upper)
    for mode, goal, winner in (
        ("nearest_even", "to the even rung", even),
        ("nearest_away", "away from zero", case.outer),
    ):
        x, expected = case.middle[case.middle_is_exact], winner[case.middle_is_exact]
        fix = "count rungs from zero, on both sides: between rungs 3 and 4 the even one is 4"
        expect(case.name, f"{mode}: a tie must go {goal}", x, case.format.quantize(x, mode), expected, fix)
        held = x.float().double() == x
        x, expected = x[held].float(), expected[held].float()
        rule = f"{mode}: a tie must go {goal}, in float32 as in float64"
        expect(case.name, rule, x, case.format.quantize(x, mode), expected, fix)


def directed_modes_look_at_neighbors_only(case: Intervals) -> None:
    """toward_zero, up and down go where they say."""
    for mode, goal in (("toward_zero", case.inner), ("up", case.upper), ("down", case.lower)):
        for x in (_above(case.lower), case.middle, _below(case.upper)):
            inside = (case.lower < x) & (x < case.upper)
            seen = case.format.quantize(x[inside], mode)
            fix = "these modes look at the neighbors only, not at the distance"
            expect(case.name, f"rounding {mode} must do so", x[inside], seen, goal[inside], fix)


def rounding_is_monotone(case: Intervals) -> None:
    """a larger input never gives a smaller value or rung."""
    x = case.probes
    for what, seen in (("quantize", case.format.quantize(x)), ("rung", case.format.rung(x))):
        falls = (seen.diff() < 0).nonzero()
        if len(falls):
            at = slice(int(falls[0]), int(falls[0]) + 2)
            fail(
                case.name,
                f"{what} must be monotone",
                given=x[at].tolist(),
                expected="no decrease",
                seen=seen[at].tolist(),
                fix="look for a range (subnormals, the top binade) that another formula handles",
            )


def symmetric_grids_round_symmetrically(case: Intervals) -> None:
    """on a symmetric grid -x rounds to the mirror image of what x rounds to."""
    if case.is_symmetric:
        x, fix = case.probes_and_ties, "round the magnitude and put the sign back"
        mirrored = -case.format.quantize(x)
        expect(case.name, "quantize(-x) must be -quantize(x)", x, case.format.quantize(-x), mirrored, fix)


def ends_hold(case: Intervals) -> None:
    """what is out of range saturates, or overflows when asked to."""
    lowest, largest = case.values[0], case.values[-1]
    reach = 4 * torch.tensor([1.0, 1e3, torch.inf], dtype=torch.float64) * torch.maximum(-lowest, largest)
    special = torch.full_like(reach, torch.inf if case.format.has_inf else torch.nan)
    for x, end in ((reach, largest.expand(3)), (-reach, lowest.expand(3))):
        for mode in DETERMINISTIC:
            seen, fix = case.format.quantize(x, mode), "clamp to values[0] and values[-1], infinities too"
            expect(case.name, f"{mode} must saturate beyond the ends", x, seen, end, fix)
        seen, fix = case.format.quantize(x, overflow="ieee"), "inf if has_inf, else NaN; nothing finite"
        expect(case.name, "overflow='ieee' must not hide an overflow", x, seen, special.copysign(x), fix)
        x, fix = x[:2], "rounding toward zero, IEEE 754 gives the largest finite value"
        seen = case.format.quantize(x, "toward_zero", overflow="ieee")
        expect(case.name, "toward_zero must never overflow", x, seen, end[:2], fix)


def nan_stays_nan(case: Intervals) -> None:
    """quantize and spacing keep NaN."""
    nan = torch.tensor([torch.nan])
    fix = "let NaN through: a diverged run must be seen, not turned into a number"
    for overflow in OVERFLOWS:
        for mode in DETERMINISTIC:
            seen = case.format.quantize(nan, mode, overflow=overflow)
            expect(case.name, f"{mode} must keep NaN", nan, seen, nan, fix)
    seen = case.format.quantize(nan, "stochastic", uniform=torch.zeros(1))
    expect(case.name, "stochastic must keep NaN", nan, seen, nan, fix)
    expect(case.name, "the spacing at NaN must be NaN", nan, case.format.spacing(nan), nan, fix)


def zeros_keep_their_sign(case: Intervals) -> None:
    """a zero, and what rounds to zero, keeps its sign."""
    tiny = case.format.smallest / 4
    x, zeros = torch.tensor([0.0, -0.0, tiny, -tiny]), torch.tensor([0.0, -0.0, 0.0, -0.0])
    seen, fix = case.format.quantize(x, "toward_zero"), "finish with copysign(result, x)"
    expect(case.name, "a zero must keep the sign of x", x, seen, zeros, fix, signed_zero=True)


def stochastic_takes_a_neighbor(case: Intervals) -> None:
    """stochastic rounding goes outward exactly where r < (|x| - lo)/gap."""
    exact = case.middle_is_exact
    x, fix = case.middle[exact], "on the magnitude: outward where r < (|x| - lo)/gap"
    for r, goal in ((0.5 - 2.0**-24, case.outer), (0.5, case.inner)):
        seen = case.format.quantize(x, "stochastic", uniform=torch.full(x.shape, r))
        rule = f"stochastic rounding of a midpoint with the random number {r!r}"
        expect(case.name, rule, x, seen, goal[exact], fix)


def stochastic_is_unbiased(case: Intervals) -> None:
    """stochastic rounding goes up with the right probability, from the generator it is given."""
    at = torch.linspace(0, len(case.lower) - 1, 32).long()
    lower, gap = case.lower[at], (case.upper - case.lower)[at]
    x = (lower + gap * torch.linspace(0.05, 0.95, 32, dtype=torch.float64)).expand(_DRAWS, 32)
    generator = torch.Generator().manual_seed(case.seed)
    drawn = case.format.quantize(x, "stochastic", generator)
    share = (x[0] - lower) / gap
    seen = ((drawn - lower) / gap).mean(0)
    errors = (seen - share).abs() / (share * (1 - share) / _DRAWS).sqrt()
    worst = int(errors.nan_to_num(torch.inf).argmax())
    if not float(errors[worst]) <= _STANDARD_ERRORS:
        fail(
            case.name,
            "stochastic rounding must be unbiased",
            given=f"{float(x[0, worst])!r}, {_DRAWS} times",
            expected=f"up in {float(share[worst]):.4f} of them, within {_STANDARD_ERRORS} standard errors",
            seen=f"{float(seen[worst]):.4f}",
            fix="on the magnitude: outward where r < (|x| - lo)/gap, r uniform on [0, 1)",
        )
    again = case.format.quantize(x, "stochastic", torch.Generator().manual_seed(case.seed))
    expect(case.name, "equal generators must give equal results", x, again, drawn, "keep no state")
    if torch.equal(drawn, case.format.quantize(x, "stochastic", generator)):
        fix = "draw a seed from `generator` in each call"
        rule = "a second call must draw new random numbers"
        fail(case.name, rule, given="one generator", expected="two results", seen="one", fix=fix)


ROUNDING_CHECKS = (
    grid_values_stay,
    nearest_is_nearest,
    ties_go_where_they_should,
    directed_modes_look_at_neighbors_only,
    rounding_is_monotone,
    symmetric_grids_round_symmetrically,
    ends_hold,
    nan_stays_nan,
    zeros_keep_their_sign,
    stochastic_takes_a_neighbor,
    stochastic_is_unbiased,
)
