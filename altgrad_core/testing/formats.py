"""Checks that hold for every number format, whatever its arithmetic.

    from altgrad_core.testing.formats import check_format

    def test_my_format_conforms():
        check_format(MY_FORMAT)

All expectations are built from `format.values` alone. Between two neighbours lo < hi the kit knows what
each mode must give just above lo, just below the midpoint, at it, just above it, and just below hi; so
nothing here repeats a format's arithmetic, and every interval of the table is visited.
"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable

import attrs
import numpy as np
import torch
from torch import Tensor

from altgrad_core.format import FEWEST_BITS, MOST_BITS, NAN_RUNG, OVERFLOWS, ROUNDINGS, Format, midpoints
from altgrad_core.testing import ConformanceError

_LAST_UNIFORM = 1 - 2.0**-24
_DRAWS = 4096
_STANDARD_ERRORS = 5
_DETERMINISTIC = tuple(mode for mode in ROUNDINGS if mode != "stochastic")


def check_format(format: Format, *, seed: int = 0) -> None:
    """Run every check of the format contract; `seed` picks the random inputs.

    Raises ConformanceError at the first check that fails.
    """
    _check_table(format)  # the others trust it
    subject = _Subject.of(format, seed)
    for check in _CHECKS:
        states = _global_random_states()
        try:
            check(subject)
        except ConformanceError:
            raise
        except Exception as error:
            rule = (check.__doc__ or "").rstrip(".")
            raise ConformanceError(
                f"{format.name}: {type(error).__name__} while checking that {rule}: {error}\n"
                "  fix: the methods of a format raise for wrong arguments only"
            ) from error
        if states != _global_random_states():
            raise ConformanceError(
                f"{format.name}: a global random state changed while checking that {check.__doc__}\n"
                "  expected: random numbers from `generator` or `uniform` only\n"
                "  fix: never call torch.rand, numpy.random or random without a generator of your own"
            )


@attrs.frozen
class _Subject:
    """A format and the intervals of its table: float64, one entry for each pair of neighbours."""

    format: Format
    values: Tensor  # (n,) float64
    zero: int
    lower: Tensor  # (n - 1,)
    upper: Tensor
    middle: Tensor
    middle_is_exact: Tensor  # bool: whether float64 holds the exact midpoint
    random: Tensor  # (4096,) float64, sorted, from beyond the lowest value to beyond the largest
    seed: int

    @classmethod
    def of(cls, format: Format, seed: int) -> _Subject:
        values = format.values.double()
        lower, upper = values[:-1], values[1:]
        middle, missing = midpoints(lower, upper)
        generator = torch.Generator().manual_seed(seed)
        at = torch.randint(len(lower), (4096,), generator=generator)
        inside = lower[at] + torch.rand(4096, generator=generator, dtype=torch.float64) * (upper - lower)[at]
        ends = 1.5 * values[[0, -1]]
        zero = int((values < 0).sum())
        probes = torch.cat((inside, ends)).sort().values
        return cls(format, values, zero, lower, upper, middle, missing == 0, probes, seed)

    @property
    def is_symmetric(self) -> bool:
        return torch.equal(self.values, -self.values.flip(0))

    @property
    def rungs(self) -> Tensor:
        return torch.arange(len(self.values), dtype=torch.int32) - self.zero

    @property
    def inner(self) -> Tensor:
        """The neighbour toward zero, of each interval."""
        return torch.where(self.lower >= 0, self.lower, self.upper)

    @property
    def outer(self) -> Tensor:
        return torch.where(self.lower >= 0, self.upper, self.lower)


def _fail(format: Format, rule: str, given: str, expected: object, seen: object, fix: str) -> None:
    raise ConformanceError(
        f"{format.name}: {rule}\n  input: {given}\n  expected: {expected}\n  seen: {seen}\n  fix: {fix}"
    )


def _expect(
    format: Format,
    rule: str,
    x: Tensor,
    seen: Tensor,
    expected: Tensor,
    fix: str,
    *,
    signed_zero: bool = False,
) -> None:
    """Fail at the first element of `seen` that is not `expected` (NaN equals NaN)."""
    if seen.shape != expected.shape or seen.dtype != expected.dtype:
        described = [f"{t.dtype} of shape {tuple(t.shape)}" for t in (expected, seen)]
        _fail(format, rule, f"{x.dtype} of shape {tuple(x.shape)}", *described, fix)
    same = (seen == expected) | (seen.isnan() & expected.isnan())
    if signed_zero:
        same &= seen.isnan() | (seen.signbit() == expected.signbit())
    wrong = (~same).flatten().nonzero()
    if len(wrong):
        at = int(wrong[0])
        given, wanted, got = (repr(t.flatten()[at].item()) for t in (x, expected, seen))
        _fail(format, f"{rule} ({len(wrong)} of {same.numel()} inputs)", given, wanted, got, fix)


def _raises(format: Format, kind: type[Exception], rule: str, given: str, call: Callable[[], object]) -> None:
    try:
        seen = call()
    except kind:
        return
    _fail(
        format, rule, given, f"a {kind.__name__}", repr(seen), "keep the checks of altgrad_core.format.Format"
    )


def _next(x: Tensor, toward: float) -> Tensor:
    return torch.nextafter(x, torch.full_like(x, toward))


def _global_random_states() -> tuple[bytes, object, str]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state())


# --- the checks: each docstring completes "check that ..." ---------------------------------------------


def _check_table(format: Format) -> None:
    """name, bits, values, largest and smallest describe one table."""
    values = format.values
    well_formed = values.ndim == 1 and values.dtype == torch.float32 and bool((values.diff() > 0).all())
    if not (well_formed and bool(values.isfinite().all()) and bool((values == 0).any())):
        _fail(
            format,
            "values must be a 1-d float32 tensor, finite, strictly increasing, with 0",
            "values",
            "such a tensor",
            values,
            "sort, remove duplicates, NaN and inf; one zero is enough",
        )
    if not (FEWEST_BITS <= format.bits <= MOST_BITS and len(values) <= 2**format.bits):
        _fail(format, "bits must hold the values", "bits", "3 to 16", format.bits, "count the codes")
    ends = (float(values[-1]), float(values[values > 0].min()) if bool((values > 0).any()) else None)
    if (format.largest, format.smallest) != ends:
        _fail(
            format,
            "largest and smallest must be values[-1] and the smallest positive value",
            "largest, smallest",
            ends,
            (format.largest, format.smallest),
            "leave both to Format, or make them agree with values",
        )


def _check_value_semantics(subject: _Subject) -> None:
    """a format equals, and hashes like, its copies."""
    format = subject.format
    for how, twin in (("pickle", pickle.loads(pickle.dumps(format))), ("deepcopy", copy.deepcopy(format))):
        if twin != format or hash(twin) != hash(format) or twin.name != format.name:
            fix = "compare by content: extend `_identity` with what your class adds"
            _fail(format, f"a format must survive {how}", how, repr(format), repr(twin), fix)


def _check_grid_values_stay(subject: _Subject) -> None:
    """every rounding mode leaves values on the grid where they are."""
    format, x = subject.format, subject.format.values
    for mode in _DETERMINISTIC:
        seen = format.quantize(x, mode)
        _expect(format, f"{mode} must keep a grid value", x, seen, x, "quantize must be idempotent")
    for r in (0.0, 0.5, _LAST_UNIFORM):
        seen = format.quantize(x, "stochastic", uniform=torch.full_like(x, r))
        rule = f"stochastic rounding with the random number {r!r} must keep a grid value"
        fix = "n = floor(y), then n + (r < y - n); floor(y + r) is inexact and moves grid values"
        _expect(format, rule, x, seen, x, fix)


def _check_nearest(subject: _Subject) -> None:
    """nearest_even and nearest_away give the nearest value, and ties as named."""
    format, middle, exact = subject.format, subject.middle, subject.middle_is_exact
    below, above = _next(middle, -torch.inf), _next(middle, torch.inf)
    even = torch.where(subject.rungs[:-1] % 2 == 0, subject.lower, subject.upper)
    for mode, tie in (("nearest_even", even), ("nearest_away", subject.outer)):
        rule = f"{mode} must give the nearest value"
        fix = "compare with the exact midpoint, in float64: it may need one bit more than float32 has"
        _expect(format, rule, below[exact], format.quantize(below[exact], mode), subject.lower[exact], fix)
        _expect(format, rule, above[exact], format.quantize(above[exact], mode), subject.upper[exact], fix)
        x, expected = middle[exact], tie[exact]
        rule = f"{mode}: a tie must go {'to the even rung' if mode == 'nearest_even' else 'away from zero'}"
        fix = "count rungs from zero; between rung 3 and 4 a tie is 4, on the negative side too"
        _expect(format, rule, x, format.quantize(x, mode), expected, fix)
        narrow = x.float().double() == x
        x, expected = x[narrow].float(), expected[narrow].float()
        _expect(format, f"{rule}, in float32 as in float64", x, format.quantize(x, mode), expected, fix)


def _check_directed(subject: _Subject) -> None:
    """toward_zero, up and down go where they say."""
    format = subject.format
    expected = {"toward_zero": subject.inner, "up": subject.upper, "down": subject.lower}
    points = (_next(subject.lower, torch.inf), subject.middle, _next(subject.upper, -torch.inf))
    for mode, values in expected.items():
        for x in points:
            inside = (subject.lower < x) & (x < subject.upper)
            seen = format.quantize(x[inside], mode)
            fix = "these modes look at the neighbours only, not at the distance"
            _expect(format, f"rounding {mode} must do so", x[inside], seen, values[inside], fix)


def _check_monotone(subject: _Subject) -> None:
    """a larger input never gives a smaller value or rung."""
    format, x = subject.format, subject.random
    for what, seen in (("quantize", format.quantize(x)), ("rung", format.rung(x))):
        falls = (seen.diff() < 0).nonzero()
        if len(falls):
            i = int(falls[0])
            given, got = x[i : i + 2].tolist(), seen[i : i + 2].tolist()
            fix = "look for a range (subnormals, the top binade) handled by another formula"
            _fail(format, f"{what} must be monotone", repr(given), "no decrease", got, fix)


def _check_odd(subject: _Subject) -> None:
    """on a symmetric grid -x mirrors x."""
    format, x = subject.format, subject.random
    if not subject.is_symmetric:
        return
    fix = "round the magnitude and put the sign back"
    _expect(format, "quantize(-x) must be -quantize(x)", x, format.quantize(-x), -format.quantize(x), fix)
    _expect(format, "rung(-x) must be -rung(x)", x, format.rung(-x), -format.rung(x), fix)
    _expect(format, "spacing(-x) must be spacing(x)", x, format.spacing(-x), format.spacing(x), fix)


def _check_ends(subject: _Subject) -> None:
    """what is out of range saturates, or overflows when asked to."""
    format, lowest, largest = subject.format, subject.values[0], subject.values[-1]
    far = torch.tensor([1.0, 1e3, torch.inf], dtype=torch.float64)
    for end, x in ((largest, 4 * largest * far), (lowest, -4 * torch.maximum(-lowest, largest) * far)):
        for mode in _DETERMINISTIC:
            seen, fix = format.quantize(x, mode), "clamp to values[0] and values[-1], infinities too"
            _expect(format, f"{mode} must saturate beyond the ends", x, seen, end.expand(3), fix)
        special = (end.new_ones(3) * (torch.inf if format.has_inf else torch.nan)).copysign(x)
        seen, fix = format.quantize(x, overflow="ieee"), "inf if has_inf, else NaN; never a finite value"
        _expect(format, "overflow='ieee' must not hide an overflow", x, seen, special, fix)
        seen, fix = format.quantize(x[:2], "toward_zero", overflow="ieee"), "IEEE 754, 7.4"
        _expect(format, "toward_zero must never overflow", x[:2], seen, end.expand(2), fix)


def _check_nan_and_zero(subject: _Subject) -> None:
    """NaN stays NaN and zeros keep their sign."""
    format = subject.format
    nan = torch.tensor([torch.nan])
    fix = "let NaN through: a diverged run must be seen, not turned into a number"
    for overflow in OVERFLOWS:
        for mode in _DETERMINISTIC:
            seen = format.quantize(nan, mode, overflow=overflow)
            _expect(format, f"{mode} must keep NaN", nan, seen, nan, fix)
    _expect(format, "spacing of NaN must be NaN", nan, format.spacing(nan), nan, fix)
    sentinel = torch.tensor([NAN_RUNG], dtype=torch.int32)
    _expect(format, "rung of NaN must be NAN_RUNG", nan, format.rung(nan), sentinel, fix)
    _expect(format, "from_rung(NAN_RUNG) must be NaN", sentinel, format.from_rung(sentinel), nan, fix)
    if format.has_nan:
        _expect(
            format, "NaN must survive encode and decode", nan, format.decode(format.encode(nan)), nan, fix
        )
    else:
        _raises(format, ValueError, "has_nan is False: encode must refuse", "nan", lambda: format.encode(nan))
    x = torch.tensor([0.0, -0.0, format.smallest / 4, -format.smallest / 4])
    zeros = torch.tensor([0.0, -0.0, 0.0, -0.0])
    fix = "finish with copysign(result, x)"
    _expect(format, "a zero must keep x's sign", x, format.quantize(x), zeros, fix, signed_zero=True)


def _check_rungs(subject: _Subject) -> None:
    """rungs count grid values from zero, and invert."""
    format, x, rungs = subject.format, subject.format.values, subject.rungs
    fix = "the rung is the index in values less that of zero, int32"
    _expect(format, "rung must count from zero", x, format.rung(x), rungs, fix)
    for dtype in (torch.int32, torch.int64, torch.float32):
        given, fix = rungs.to(dtype), "from_rung gives float32 for integers and for whole floats"
        _expect(format, "from_rung must invert rung", given, format.from_rung(given), x, fix)
    beyond = torch.tensor([rungs[0] - 1, -(2**30), rungs[-1] + 1, 2**31 - 1], dtype=torch.int32)
    ends, fix = x[[0, 0, -1, -1]], "clamp to the rungs of the ends"
    _expect(format, "from_rung must clamp", beyond, format.from_rung(beyond), ends, fix)
    x = subject.random
    expected = format.quantize(x).float()
    fix = "both round to nearest even and saturate"
    _expect(
        format, "from_rung(rung(x)) must be quantize(x)", x, format.from_rung(format.rung(x)), expected, fix
    )


def _check_codes(subject: _Subject) -> None:
    """encode and decode are inverse on the grid."""
    format, x = subject.format, subject.format.values
    codes = format.encode(x)
    storage = torch.uint8 if format.bits <= 8 else torch.int16
    if codes.dtype != storage:
        _fail(
            format,
            "encode's dtype follows from bits",
            f"bits={format.bits}",
            storage,
            codes.dtype,
            "see above",
        )
    _expect(format, "decode must invert encode", x, format.decode(codes), x, "one code for each value")
    patterns = codes.int() & 0xFFFF
    if bool((patterns >= 2**format.bits).any()):
        fix = "a code is a bit pattern of `bits` bits"
        _fail(format, "a code must fit in bits", "values", f"< {2**format.bits}", int(patterns.max()), fix)
    x = subject.random
    fix = "encode rounds to nearest even and saturates"
    _expect(format, "encode must round first", x, format.encode(x), format.encode(format.quantize(x)), fix)
    every = torch.arange(2**format.bits, dtype=torch.int32)
    decoded = format.decode(every)
    stray = decoded.isfinite() & ~torch.isin(decoded, format.values)
    if bool(stray.any()):
        at = int(stray.nonzero()[0])
        fix = "a code without a value decodes to NaN"
        _fail(format, "decode gives values of the table only", f"code {at}", "one", float(decoded[at]), fix)


def _check_spacing(subject: _Subject) -> None:
    """spacing is the gap of x's interval, on its side of zero."""
    format, inner, outer = subject.format, subject.inner, subject.outer
    gap = (outer - inner).abs()
    fix = "the gap [lo, hi) that holds |x|; at a grid value the one further from zero"
    for x in (inner, subject.middle, torch.nextafter(outer, inner)):
        own = x != 0 if bool((subject.lower < 0).any()) else x >= 0  # at zero the positive side's gap
        _expect(format, "spacing must be the local gap", x[own], format.spacing(x[own]), gap[own], fix)
    zero, first = subject.values.new_zeros(1), subject.values[subject.zero + 1].reshape(1)
    _expect(format, "spacing at zero must be the first gap", zero, format.spacing(zero), first, fix)
    end = torch.tensor([1.0, 2.0, 1e6, torch.inf]) * format.largest
    seen = format.spacing(end.double())
    last = float(seen[0])
    if not (float(gap[-1]) <= last < torch.inf and bool((seen == last).all())):
        fix = "clamp x to the ends first; keep the last gap"
        _fail(
            format,
            "spacing must not change beyond the end",
            end,
            f">= {float(gap[-1])}, one value",
            seen,
            fix,
        )


def _check_stochastic(subject: _Subject) -> None:
    """stochastic rounding takes one of two neighbours, up with the right probability."""
    format, middle = subject.format, subject.middle
    x = middle[subject.middle_is_exact]
    inner, outer = (side[subject.middle_is_exact] for side in (subject.inner, subject.outer))
    fix = "on the magnitude, outward where r < (|x| - lo)/gap"
    for r, expected in ((0.5 - 2.0**-24, outer), (0.5, inner)):
        seen = format.quantize(x, "stochastic", uniform=torch.full_like(x, r, dtype=torch.float32))
        _expect(format, f"stochastic rounding of a midpoint, random number {r!r}", x, seen, expected, fix)
    picks = torch.linspace(0, len(middle) - 1, 32).long()
    lower, gap = subject.lower[picks], (subject.upper - subject.lower)[picks]
    x = (lower + gap * torch.linspace(0.05, 0.95, 32, dtype=torch.float64)).repeat(_DRAWS, 1)
    generator = torch.Generator().manual_seed(subject.seed)
    drawn = format.quantize(x, "stochastic", generator)
    if torch.equal(drawn, format.quantize(x, "stochastic", generator)):
        _fail(format, "stochastic must draw", "two calls", "two results", "one", "draw from `generator`")
    stray = (drawn != lower) & (drawn != subject.upper[picks])
    if bool(stray.any()):
        given, seen = float(x[stray][0]), float(drawn[stray][0])
        _fail(format, "stochastic must take one of the two neighbours", repr(given), "lo or hi", seen, fix)
    moved = (drawn - lower) / gap
    share = ((x[0] - lower) / gap).clamp(0, 1)
    error = (moved.mean(0) - share) / (share * (1 - share) / _DRAWS).sqrt().clamp(min=2.0**-24)
    worst = int(error.abs().argmax())
    if abs(float(error[worst])) > _STANDARD_ERRORS:
        given = f"{float(x[0, worst])!r}, {_DRAWS} times"
        expected, seen = f"up in {float(share[worst]):.4f} of them", f"{float(moved.mean(0)[worst]):.4f}"
        _fail(format, "stochastic rounding must be unbiased", given, expected, seen, fix)
    again = format.quantize(x, "stochastic", torch.Generator().manual_seed(subject.seed))
    _expect(format, "equal generators must give equal results", x, again, drawn, "keep no state of your own")


def _check_tensors(subject: _Subject) -> None:
    """any shape and strides will do, and the input is left alone."""
    format = subject.format
    x = subject.random.float()[:60].reshape(3, 4, 5)
    fix = "reshape, not view; never write in place into x"
    shapes = (x, x.transpose(0, 2), x[:, ::2, 1:], x[:1].expand(6, 4, 5), x[0, 0, 0], x[:, :0], x[:0, 0, 0])
    for given in shapes:
        before = given.clone()
        plain = given.contiguous()
        for method in (format.quantize, format.spacing, format.rung, format.encode):
            rule = f"{method.__name__} must not depend on strides"
            _expect(format, rule, given, method(given), method(plain), fix)
        _expect(format, "the input must not be modified", before, given, before, fix)
        uniform = torch.full(given.shape, 0.5)
        seen = format.quantize(given, "stochastic", uniform=uniform)
        _expect(
            format,
            "shape must be kept",
            given,
            seen,
            format.quantize(plain, "stochastic", uniform=uniform),
            fix,
        )
    codes, rungs = format.encode(x), format.rung(x)
    for method, given in ((format.decode, codes), (format.from_rung, rungs)):
        before = given.clone()
        transposed = method(given.transpose(0, 2)).transpose(0, 2)
        _expect(
            format, f"{method.__name__} must not depend on strides", given, transposed, method(given), fix
        )
        _expect(format, "the input must not be modified", before, given, before, fix)


def _check_dtypes(subject: _Subject) -> None:
    """the result has the input's dtype, or the input is refused by name."""
    format, x = subject.format, subject.format.values
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        given = x.to(dtype)
        if torch.equal(given.float(), x):
            _expect(format, f"{dtype} must be kept", given, format.quantize(given), given, "convert back")
            continue
        try:
            seen = format.quantize(given)
        except ValueError as refusal:
            if format.name in str(refusal) and str(dtype) in str(refusal):
                continue
            seen = f"a ValueError saying {str(refusal)!r}"
        wanted, fix = "a ValueError naming both", "keep the checks of altgrad_core.format.Format"
        _fail(format, f"{dtype} cannot hold every value", str(dtype), wanted, seen, fix)


def _check_refusals(subject: _Subject) -> None:
    """wrong arguments are refused."""
    format, x = subject.format, torch.zeros(3)
    for call in (format.quantize, format.spacing, format.rung, format.encode):
        rule = f"{call.__name__} must refuse integers"
        _raises(format, TypeError, rule, "int32", lambda call=call: call(x.int()))
    _raises(format, TypeError, "decode must refuse floats", "float32", lambda: format.decode(x))
    _raises(
        format,
        ValueError,
        "an unknown rounding must be refused",
        "'nearest'",
        lambda: format.quantize(x, "nearest"),
    )
    _raises(
        format,
        ValueError,
        "an unknown overflow must be refused",
        "'wrap'",
        lambda: format.quantize(x, overflow="wrap"),
    )
    rule = "stochastic rounding without a generator must be refused"
    _raises(format, ValueError, rule, "generator=None", lambda: format.quantize(x, "stochastic"))


_CHECKS: tuple[Callable[[_Subject], None], ...] = (
    _check_value_semantics,
    _check_grid_values_stay,
    _check_nearest,
    _check_directed,
    _check_monotone,
    _check_odd,
    _check_ends,
    _check_nan_and_zero,
    _check_rungs,
    _check_codes,
    _check_spacing,
    _check_stochastic,
    _check_tensors,
    _check_dtypes,
    _check_refusals,
)
