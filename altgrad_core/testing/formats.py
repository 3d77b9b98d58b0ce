"""Checks that hold for every number format, whatever its arithmetic.

    from altgrad_core.testing.formats import check_format

    def test_my_format_conforms():
        check_format(MY_FORMAT)

All expectations are built from `format.values` alone.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from altgrad_core.format import NAN_RUNG, Format
from altgrad_core.random_bits import stream_key_tensor, uniform_like
from altgrad_core.testing import ConformanceError
from altgrad_core.testing.expect import checking, expect, expect_error, fail, no_random_trace
from altgrad_core.testing.rounding import ROUNDING_CHECKS, Intervals
from altgrad_core.value_table import FEWEST_BITS, MOST_BITS

_KEEP_CHECKS = "override the methods named _...; Format's public ones check their arguments"


def check_format(format: Format, *, seed: int = 0) -> None:
    """Run every check of the format contract; `seed` picks the random inputs.

    Raises ConformanceError at the first check that fails.
    """
    _table_is_well_formed(format)  # the others trust it
    case = Intervals.of(format, seed)
    random = "take random numbers from `generator` or `uniform` only"
    for check in (*ROUNDING_CHECKS, *_CHECKS):
        rule = f"while checking that {check.__doc__}"
        with (
            no_random_trace(format.name, rule, random),
            checking(format.name, check, "raise for wrong arguments only"),
        ):
            check(case)


# Each docstring completes "check that ...".


def _table_is_well_formed(format: Format) -> None:
    """bits, values, largest and smallest describe one table."""
    values = format.values
    sorted_row = values.ndim == 1 and values.dtype == torch.float32 and bool((values.diff() > 0).all())
    if not (sorted_row and bool(values.isfinite().all()) and bool((values == 0).any())):
        fail(
            format.name,
            "values must be 1-d float32, finite, strictly increasing, and contain 0",
            given="values",
            expected="such a tensor",
            seen=values,
            fix="sort; leave out duplicates, NaN and inf; one zero is enough",
        )
    if not (FEWEST_BITS <= format.bits <= MOST_BITS and len(values) <= 2**format.bits):
        rule, expected = "bits must suffice for the values", f"{FEWEST_BITS} to {MOST_BITS}, 2^bits values"
        seen = f"{format.bits} bits, {len(values)} values"
        fail(format.name, rule, given="bits", expected=expected, seen=seen, fix="count the codes")
    ends = tuple(values[values > 0][[-1, 0]].tolist())
    if (format.largest, format.smallest) != ends:
        rule = "largest and smallest must be the ends of the positive values"
        fix = "leave both to Format, or make them agree with values"
        both = (format.largest, format.smallest)
        fail(format.name, rule, given="largest, smallest", expected=ends, seen=both, fix=fix)


def _copies_are_equal(case: Intervals) -> None:
    """a format equals, and hashes like, its copies."""
    format = case.format
    for how in ("pickle", "deepcopy"):
        try:
            twin = pickle.loads(pickle.dumps(format)) if how == "pickle" else copy.deepcopy(format)
        except Exception as error:
            fix = "define the class at the top level of a module; hold tensors and numbers only"
            rule = f"a format must be open to {how}: {type(error).__name__}: {error}"
            raise ConformanceError(f"{case.name}: {rule}\n  fix: {fix}") from error
        if twin != format or hash(twin) != hash(format) or twin.name != format.name:
            fix = "compare by content: extend `_identity` by what your class adds"
            rule = f"a format must survive {how}"
            fail(case.name, rule, given=how, expected=repr(format), seen=repr(twin), fix=fix)


def _rungs_count_from_zero(case: Intervals) -> None:
    """rungs count grid values from zero, and invert."""
    format, x, rungs = case.format, case.format.values, case.rungs
    fix = "the rung is the index in values less that of zero, int32"
    expect(case.name, "rung must count from zero", x, format.rung(x), rungs, fix)
    for dtype in (torch.int32, torch.int64, torch.float32):
        given, fix = rungs.to(dtype), "from_rung gives float32, for integers and for whole floats"
        expect(case.name, "from_rung must invert rung", given, format.from_rung(given), x, fix)
    beyond = torch.tensor([int(rungs[0]) - 1, -(2**30), int(rungs[-1]) + 1, 2**31 - 1], dtype=torch.int32)
    seen, fix = format.from_rung(beyond), "clamp to the rungs of the ends"
    expect(case.name, "from_rung must clamp", beyond, seen, x[[0, 0, -1, -1]], fix)
    x, fix = case.probes_and_ties, "both round to nearest even and saturate"
    seen = format.from_rung(format.rung(x))
    expect(case.name, "from_rung(rung(x)) must be quantize(x)", x, seen, format.quantize(x).float(), fix)


def _nan_has_a_rung(case: Intervals) -> None:
    """NaN survives rung and from_rung, and encode where it has a code."""
    format, nan = case.format, torch.tensor([torch.nan])
    sentinel = torch.tensor([NAN_RUNG], dtype=torch.int32)
    fix = f"the rung of NaN is altgrad_core.format.NAN_RUNG, {NAN_RUNG}"
    expect(case.name, "NaN must have its own rung", nan, format.rung(nan), sentinel, fix)
    expect(case.name, "from_rung must give NaN back", sentinel, format.from_rung(sentinel), nan, fix)
    if format.has_nan:
        seen, fix = format.decode(format.encode(nan)), "has_nan promises a code"
        expect(case.name, "NaN must survive encode and decode", nan, seen, nan, fix)
    else:
        rule = "encode must refuse NaN, as has_nan is False"
        encode = partial(format.encode, nan)
        expect_error(case.name, ValueError, rule, encode, given="nan", fix=_KEEP_CHECKS)


def _codes_invert(case: Intervals) -> None:
    """encode and decode are inverse on the grid."""
    format, x = case.format, case.format.values
    codes = format.encode(x)
    storage = torch.uint8 if format.bits <= 8 else torch.int16
    if codes.dtype != storage:
        rule, fix = "codes of up to 8 bits are uint8, wider ones int16", "convert at the end of encode"
        fail(case.name, rule, given=f"bits={format.bits}", expected=storage, seen=codes.dtype, fix=fix)
    expect(case.name, "decode must invert encode", x, format.decode(codes), x, "one code for each value")
    top = int((codes.int() & 0xFFFF).max())
    if top >= 2**format.bits:
        rule, fix = "a code must fit in bits", "a code is a bit pattern `bits` wide"
        fail(case.name, rule, given="values", expected=f"< {2**format.bits}", seen=top, fix=fix)
    x, fix = case.probes_and_ties, "encode rounds to nearest even and saturates"
    expect(case.name, "encode must round", x, format.encode(x), format.encode(format.quantize(x)), fix)


def _every_code_decodes(case: Intervals) -> None:
    """decode gives a value of the table, inf or NaN for every code."""
    decoded = case.format.decode(torch.arange(2**case.format.bits, dtype=torch.int32))
    stray = (decoded.isfinite() & ~torch.isin(decoded, case.format.values)).nonzero()
    if len(stray):
        code = int(stray[0])
        rule, fix = "decode must give values of the table", "a code without a value decodes to NaN"
        seen = float(decoded[code])
        fail(case.name, rule, given=f"code {code}", expected="one of values, or NaN", seen=seen, fix=fix)


def _spacing_is_the_gap(case: Intervals) -> None:
    """spacing is the gap of the interval that holds x, on its side of zero."""
    format, inner, outer = case.format, case.inner, case.outer
    gap = (outer - inner).abs()
    fix = "the gap [lo, hi) that holds |x|: at a grid value the one further from zero"
    for x in (inner, case.middle, torch.nextafter(outer, inner)):
        own = (x != 0) | (case.upper > 0)  # at zero itself: the positive side
        expect(case.name, "spacing must be the local gap", x[own], format.spacing(x[own]), gap[own], fix)
    end = torch.tensor([1.0, 2.0, 1e6, torch.inf], dtype=torch.float64) * format.largest
    seen = format.spacing(end)
    if not (gap[-1] <= seen[0] < torch.inf and bool((seen == seen[0]).all())):
        rule, fix = "spacing must stay what it is at the largest value", "clamp x first; keep the last gap"
        expected = f"one number, at least {float(gap[-1])}"
        fail(case.name, rule, given=end.tolist(), expected=expected, seen=seen.tolist(), fix=fix)


def _scaled_rounding_is_rounding(case: Intervals) -> None:
    """fake_quantize is quantize under a scale, within limits, and by the stream of random numbers."""
    format, x = case.format, case.probes_and_ties.float()
    keys, limit = stream_key_tensor((1, 2, 3)), format.values[[len(format.values) // 3, -1]]
    uniform = uniform_like(x, keys)
    for scale in (torch.tensor(4.0), torch.tensor(2.0**-5)):
        scaled, fix = x / scale, "scale, round, limit, and divide: the same numbers as by single steps"
        for rounding, drawn, named in (("nearest_even", None, None), ("stochastic", uniform, keys)):
            rounded = format.quantize(scaled * scale, rounding, uniform=drawn)
            expected = torch.minimum(torch.maximum(rounded, limit[0]), limit[1]) / scale
            seen = format.fake_quantize(scaled, scale, rounding, keys=named, limit=limit)
            expect(case.name, f"fake_quantize must be quantize ({rounding})", scaled, seen, expected, fix)


def _size_does_not_matter(case: Intervals) -> None:
    """an element is rounded alike in small tensors and in large ones, which other code may serve."""
    format, x = case.format, case.probes_and_ties.float()
    fix = "both ways must give the same bits"
    parts: dict[str, Callable[[Tensor], Tensor]] = {
        "quantize": format.quantize,
        "rung": format.rung,
        "spacing": format.spacing,
        "encode": format.encode,
        "decode": lambda t: format.decode(format.encode(t)),
    }
    for name, method in parts.items():
        by_parts = torch.cat([method(part) for part in torch.split(x, 100)])
        expect(case.name, f"{name} must be the same in a large tensor", x, method(x), by_parts, fix)


def _symmetric_grids_are_odd(case: Intervals) -> None:
    """on a symmetric grid the rung of -x is that of x turned round, and the spacing is the same."""
    format, x = case.format, case.probes_and_ties
    if not case.is_symmetric:
        return
    fix = "work on the magnitude and put the sign back"
    expect(case.name, "rung(-x) must be -rung(x)", x, format.rung(-x), -format.rung(x), fix)
    expect(case.name, "spacing(-x) must be spacing(x)", x, format.spacing(-x), format.spacing(x), fix)


def _any_strides_will_do(case: Intervals) -> None:
    """any shape and strides will do, and the input is left alone."""
    format = case.format
    x = case.probes.float()[::68][:60].contiguous().reshape(3, 4, 5)
    half = torch.tensor(0.5)
    methods: dict[str, Callable[[Tensor], Tensor]] = {
        "quantize": format.quantize,
        "stochastic": lambda t: format.quantize(t, "stochastic", uniform=half.expand(t.shape)),
        "spacing": format.spacing,
        "rung": format.rung,
        "encode": format.encode,
        "decode": lambda t: format.decode(format.encode(t)),
        "from_rung": lambda t: format.from_rung(format.rung(t)),
    }
    fix = "no view, no assumption of contiguity, and never write into x"
    for given in (x, x.transpose(0, 2), x[:, ::2, 1:], x[:1].expand(6, 4, 5), x[0, 0, 0], x[:, :0]):
        before = given.clone()
        for name, method in methods.items():
            seen = method(given)
            expect(case.name, f"{name} must not modify its input", before, given, before, fix)
            if seen.shape != given.shape:
                rule, expected = f"{name} must keep the shape", tuple(given.shape)
                fail(case.name, rule, given="x", expected=expected, seen=tuple(seen.shape), fix=fix)
            rule, same = f"{name} must give the same for any strides", method(given.contiguous())
            expect(case.name, rule, given, seen, same, fix)


def _dtype_is_kept_or_refused(case: Intervals) -> None:
    """the result has the input's dtype, or the dtype is refused by name."""
    format, x = case.format, case.format.values
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        given = x.to(dtype)
        if torch.equal(given.float(), x):
            expect(case.name, f"{dtype} must be kept", given, format.quantize(given), given, "convert back")
            continue
        try:
            seen: object = format.quantize(given)
        except ValueError as refusal:
            if format.name in str(refusal) and str(dtype) in str(refusal):
                continue
            seen = f"a ValueError saying {str(refusal)!r}"
        rule, expected = f"{dtype} cannot hold every value", "a ValueError that names both"
        fail(case.name, rule, given=str(dtype), expected=expected, seen=seen, fix=_KEEP_CHECKS)


def _wrong_arguments_are_refused(case: Intervals) -> None:
    """wrong arguments are refused."""
    format, x, whole = case.format, torch.zeros(3), torch.zeros(3, dtype=torch.int32)
    refused: dict[str, tuple[type[Exception], Callable[[], object]]] = {
        "quantize of integers": (TypeError, lambda: format.quantize(whole)),
        "spacing of integers": (TypeError, lambda: format.spacing(whole)),
        "rung of integers": (TypeError, lambda: format.rung(whole)),
        "encode of integers": (TypeError, lambda: format.encode(whole)),
        "decode of floats": (TypeError, lambda: format.decode(x)),
        "rounding='nearest'": (ValueError, lambda: format.quantize(x, "nearest")),
        "overflow='wrap'": (ValueError, lambda: format.quantize(x, overflow="wrap")),
        "stochastic without a generator": (ValueError, lambda: format.quantize(x, "stochastic")),
    }
    for given, (kind, call) in refused.items():
        expect_error(case.name, kind, f"{given} must be refused", call, given=given, fix=_KEEP_CHECKS)


_CHECKS: tuple[Callable[[Intervals], None], ...] = (
    _copies_are_equal,
    _rungs_count_from_zero,
    _nan_has_a_rung,
    _codes_invert,
    _every_code_decodes,
    _spacing_is_the_gap,
    _scaled_rounding_is_rounding,
    _size_does_not_matter,
    _symmetric_grids_are_odd,
    _any_strides_will_do,
    _dtype_is_kept_or_refused,
    _wrong_arguments_are_refused,
)
