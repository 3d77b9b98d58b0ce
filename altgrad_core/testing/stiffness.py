"""Checks that hold for every stiffness formula.

    from altgrad_core.testing import check_stiffness

    def test_my_formula_conforms():
        check_stiffness(my_formula)

A formula is (weight, format, scale) -> S: the spacing that it sees at each weight, positive, in the weight's
shape and dtype and in its units. It is tried on formats given as tables, or on those of `formats`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal

import attrs
import torch
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.hookspecs import Stiffness
from altgrad_core.testing.expect import checking, expect, fail, no_random_trace

WeightUnits = Literal["everywhere", "off zero", "nowhere"]

_POWERS = [2.0**e for e in range(-10, 5)]
FORMATS = (
    Format(name="UNIFORM", bits=8, values=[k / 128 for k in range(-127, 128)]),
    Format(name="POWERS", bits=5, values=[*(-p for p in reversed(_POWERS)), 0.0, *_POWERS]),
    Format(name="CODEBOOK", bits=4, values=[-3.0, -1.25, -0.5, 0.0, 0.25, 0.75, 1.5, 3.0]),
)
"""A uniform grid, one with spacings from 2^-10 up, and one that is not symmetric."""

_SCALES = (2.0**-20, 1.0, 2.0**20)
_SHIFTS = (-5, 3)  # exponents k of a change of units by 2^k
_DOUBLE, _SINGLE = 1e-9, 1e-5
"""Relative tolerances: far above the rounding of float64 and float32, far below any factor of 2."""


def check_stiffness(
    formula: Stiffness,
    formats: Sequence[Format] = FORMATS,
    *,
    weight_units: WeightUnits = "everywhere",
    seed: int = 0,
) -> None:
    """Run every check of the stiffness contract on each format; `seed` picks the random weights.

    weight_units: where S(w/2^k, s*2^k) = S(w, s)/2^k. "off zero" is for a formula with a neutral number at
    w = 0, such as `ideal`; "nowhere" for one that gives pure numbers, such as `uniform`.

    Raises ConformanceError at the first check that fails.
    """
    for format in formats:
        case = _Case.of(formula, format, weight_units, seed)
        for check in _CHECKS:
            _run(check, case)


def _run(check: Callable[[_Case], None], case: _Case) -> None:
    rule, random = f"while checking that {check.__doc__}", "draw from a torch.Generator with a fixed seed"
    fix = "a formula serves any floating-point weight; for other formats than the kit's give formats=[...]"
    with no_random_trace(case.name, rule, random), checking(case.name, check, fix):
        check(case)


@attrs.frozen
class _Case:
    """A formula on one format, and weights that cover it."""

    formula: Stiffness
    format: Format
    weight_units: WeightUnits
    weights: Tensor  # (n,) float64, in the format's own units: grid values, what lies between, normal ones

    @classmethod
    def of(cls, formula: Stiffness, format: Format, weight_units: WeightUnits, seed: int) -> _Case:
        values = format.values.double()
        values = values[:: max(1, len(values) // 300)]
        middle = (values[1:] + values[:-1]) / 2
        draws = torch.randn(100, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ends = torch.tensor([-0.0, 0.0, format.smallest, format.largest], dtype=torch.float64)
        weights = torch.cat((values, middle, ends, draws * format.largest / 4))
        return cls(formula, format, weight_units, weights)

    @property
    def name(self) -> str:
        formula = getattr(self.formula, "func", self.formula)  # a functools.partial's own
        return f"{getattr(formula, '__name__', type(formula).__name__)} on {self.format.name}"

    def stiffness(self, weight: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        return self.formula(weight, self.format, scale)


# Each docstring completes "check that ...".


def _keeps_shape_and_dtype(case: _Case) -> None:
    """S has the weight's shape, dtype and device."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        row = case.weights[:24].to(dtype)
        for weight in (row, row.reshape(2, 3, 4), row[5], row[:0], row.reshape(4, 6)[:, :0]):
            seen = case.stiffness(weight, torch.tensor(2.0))
            expected, got = ((t.dtype, tuple(t.shape), t.device) for t in (weight, seen))
            if got != expected:
                rule, fix = "S must be like the weight", "S.to(weight.dtype), in the weight's shape"
                fail(case.name, rule, given="weight", expected=expected, seen=got, fix=fix)


def _is_positive_and_finite(case: _Case) -> None:
    """S is positive and finite at every finite weight."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        limits = torch.finfo(dtype)
        subnormal = limits.smallest_normal * limits.eps
        sizes = torch.tensor([subnormal, 3 * subnormal, limits.smallest_normal, limits.max], dtype=dtype)
        for scale in _SCALES:
            weight = torch.cat((case.weights.to(dtype) / scale, sizes, -sizes))
            weight = weight[weight.isfinite()]
            seen = case.stiffness(weight, scale)
            if len(wrong := (~((seen > 0) & seen.isfinite())).nonzero()):
                at = int(wrong[0])
                given = f"{weight[at].item()!r} ({dtype}, scale {scale:g})"
                rule, fix = "S must be positive and finite", "take the first gap at 0, clamp to dtype's range"
                fail(case.name, rule, given=given, expected="> 0", seen=seen[at].item(), fix=fix)


def _leaves_its_inputs_alone(case: _Case) -> None:
    """weight and scale are read only, and S is a tensor of its own."""
    weight, scale = case.weights.float(), torch.tensor(4.0)
    before = weight.clone()
    seen = case.stiffness(weight, scale)
    fix = "no in-place operation on the weight or the scale"
    expect(case.name, "the weight must stay as it is", before, weight, before, fix)
    expect(case.name, "the scale must stay as it is", scale, scale, torch.tensor(4.0), fix)
    if seen.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
        rule, fix = "S must not share the weight's memory", "return a new tensor"
        fail(case.name, rule, given="weight", expected="memory of its own", seen="the weight's", fix=fix)


def _follows_from_its_arguments(case: _Case) -> None:
    """S follows from the arguments alone, whatever was asked before, in a copy of the formula too."""
    weight, scale = case.weights.float(), torch.tensor(4.0)
    _is_not_stale(case, weight, -weight.roll(7) / 2)
    first = case.stiffness(weight, scale)
    fix = "no state, no fresh random numbers; an optimizer keeps S where refresh is never"
    expect(case.name, "a second call must give the same", weight, case.stiffness(weight, scale), first, fix)
    seen = case.stiffness(weight, 4.0)
    expect(case.name, "a scale must count alike as number and tensor", weight, seen, first, fix)
    twin = copy.deepcopy(case.formula)
    expect(case.name, "a deep copy must give the same", weight, twin(weight, case.format, scale), first, fix)


def _is_not_stale(case: _Case, weight: Tensor, other: Tensor) -> None:
    """Ask for weight and then for other; compare with other in float64, where nothing came before."""
    exact = case.stiffness(other.double())
    case.stiffness(weight)
    seen = case.stiffness(other)
    wrong = ((seen - exact).abs() > _SINGLE * exact + torch.finfo(torch.float32).tiny).nonzero()
    if len(wrong):
        at = int(wrong[0])
        rule, fix = "S must be that of the weights given, not of those before", "keep nothing between calls"
        pair = exact[at].item(), seen[at].item()
        fail(case.name, rule, given=other[at].item(), expected=pair[0], seen=pair[1], fix=fix)


def _any_strides_will_do(case: _Case) -> None:
    """any strides give the same S."""
    block = case.weights[:48].float().reshape(4, 3, 4)
    fix = "reshape or flatten, not view; go by index, not by memory"
    for weight in (block.transpose(0, 2), block[:, ::2, 1:], block[:1].expand(5, 3, 4), block[0].t()):
        seen, expected = case.stiffness(weight, 2.0), case.stiffness(weight.contiguous(), 2.0)
        expect(case.name, "S must not depend on strides", weight, seen, expected, fix)


def _is_in_weight_units(case: _Case) -> None:
    """where the weight is divided by 2^k and the scale multiplied by it, S is divided by 2^k."""
    if case.weight_units == "nowhere":
        return
    weight = case.weights if case.weight_units == "everywhere" else case.weights[case.weights != 0]
    expected = case.stiffness(weight, 1.0)
    for shift in _SHIFTS:
        seen = case.stiffness(weight / 2.0**shift, 2.0**shift) * 2.0**shift
        if len(wrong := ((seen - expected).abs() > _DOUBLE * expected).nonzero()):
            at = int(wrong[0])
            given = f"w = {weight[at].item()!r} / 2^{shift}, scale 2^{shift}; S times 2^{shift}"
            rule = f"S must be in weight units ({len(wrong)} of {len(weight)} weights)"
            fix = "measure at weight * scale, divide by scale; pure numbers: say weight_units"
            pair = expected[at].item(), seen[at].item()
            fail(case.name, rule, given=given, expected=pair[0], seen=pair[1], fix=fix)


_CHECKS: tuple[Callable[[_Case], None], ...] = (
    _keeps_shape_and_dtype,
    _is_positive_and_finite,
    _leaves_its_inputs_alone,
    _follows_from_its_arguments,
    _any_strides_will_do,
    _is_in_weight_units,
)
