"""Each mutant is a stiffness formula with one mistake that people make; the kit must name that mistake."""

import functools

import pytest
import torch

from altgrad_core.stiffness import Geometry, grid_stiffness, uniform_stiffness
from altgrad_core.testing import ConformanceError, check_stiffness
from altgrad_core.testing.stiffness import FORMATS

pytestmark = pytest.mark.usefixtures("one_thread")


def mutant(message):
    """Register a wrong formula with what the kit must say about it."""

    def register(formula):
        MUTANTS.append(pytest.param(formula, message, id=formula.__name__))
        return formula

    return register


MUTANTS = []


@mutant("S must be like the weight")
def answers_in_float32(weight, format, scale):
    return grid_stiffness(weight.float(), format, scale)


@mutant("S must be like the weight")
def flattens(weight, format, scale):
    return grid_stiffness(weight, format, scale).flatten()


@mutant("S must be like the weight")
def one_number_for_all(weight, format, scale):
    return weight.new_tensor(format.smallest) / scale


@mutant("that S has the weight's shape")
def looks_at_the_largest(weight, format, scale):
    return grid_stiffness(weight, format, scale) + 0 * weight.abs().max()


@mutant("that S has the weight's shape")
def needs_a_row(weight, format, scale):
    return grid_stiffness(weight, format, scale) + 0 * weight[:1]


@mutant("S must be positive and finite")
def proportional(weight, format, scale):
    return weight.abs() / 16


@mutant("S must be positive and finite")
def keeps_the_sign(weight, format, scale):
    return grid_stiffness(weight, format, scale).copysign(weight)


@mutant("S must be positive and finite")
def squares(weight, format, scale):
    spacing = grid_stiffness(weight, format, scale)
    return torch.maximum(spacing, weight * weight * spacing)


@mutant("S must be positive and finite")
def divides_by_the_weight(weight, format, scale):
    return grid_stiffness(weight, format, scale) * (weight / weight)


@mutant("S must be that of the weights given")
class Remembers:
    def __init__(self):
        self.known = {}

    def __call__(self, weight, format, scale):
        key = (weight.shape, weight.dtype, weight.stride(), format, float(scale))
        return self.known.setdefault(key, grid_stiffness(weight, format, scale))


MEMORY = {}


@mutant("S must be that of the weights given")
def remembers_globally(weight, format, scale):
    key = (weight.shape, weight.dtype, weight.stride(), format, float(scale))
    return MEMORY.setdefault(key, grid_stiffness(weight, format, scale))


@mutant("a second call must give the same")
class JittersWithItsOwnGenerator:
    def __init__(self):
        self.draws = torch.Generator().manual_seed(0)

    def __call__(self, weight, format, scale):
        noise = 1e-6 * torch.rand(weight.shape, generator=self.draws).to(weight.dtype)
        return grid_stiffness(weight, format, scale) * (1 + noise)

    def __deepcopy__(self, memo):
        return self


@mutant("a global generator advanced")
def draws_from_the_global_generator(weight, format, scale):
    torch.randperm(2)
    return grid_stiffness(weight, format, scale)


@mutant("a scale must count alike as number and tensor")
def forgets_a_scale_that_is_a_number(weight, format, scale):
    return grid_stiffness(weight, format, scale if isinstance(scale, torch.Tensor) else 1.0)


@mutant("that S follows from the arguments alone")
class CannotBeCopied:
    def __call__(self, weight, format, scale):
        return grid_stiffness(weight, format, scale)

    def __deepcopy__(self, memo):
        raise TypeError("cannot copy")


@mutant("the weight must stay as it is")
def writes_into_the_weight(weight, format, scale):
    spacing = grid_stiffness(weight, format, scale)
    weight.clamp_(min=-0.5)
    return spacing


@mutant("the scale must stay as it is")
def writes_into_the_scale(weight, format, scale):
    spacing = grid_stiffness(weight, format, scale)
    if isinstance(scale, torch.Tensor):
        scale.add_(1).sub_(1).mul_(1 + 2**-20)
    return spacing


@mutant("S must not share the weight's memory")
def overwrites_its_own_argument(weight, format, scale):
    spacing = grid_stiffness(weight, format, scale)
    return weight.set_(weight.clone()) if weight.numel() == 0 else _in_the_memory_of(weight, spacing)


def _in_the_memory_of(weight, spacing):
    """Return the spacing in a tensor whose storage the weight is moved to, unchanged itself."""
    both = torch.cat((spacing.flatten(), weight.flatten()))
    weight.set_(both[weight.numel() :].view(weight.shape))
    return both[: weight.numel()].view(spacing.shape)


@mutant("that any strides give the same S")
def views(weight, format, scale):
    return grid_stiffness(weight.view(-1), format, scale).view(weight.shape)


@mutant("S must not depend on strides")
def reads_memory_order(weight, format, scale):
    if weight.is_contiguous():
        return grid_stiffness(weight, format, scale)
    memory = torch.as_strided(weight, (weight.untyped_storage().nbytes() // weight.element_size(),), (1,), 0)
    taken = memory.repeat(1 + weight.numel() // len(memory))[: weight.numel()].reshape(weight.shape)
    return grid_stiffness(taken, format, scale)


@mutant("S must be in weight units")
def in_the_units_of_the_format(weight, format, scale):
    return format.spacing(weight.float() * scale).to(weight.dtype)


@mutant("S must be in weight units")
def ignores_the_scale(weight, format, scale):
    return grid_stiffness(weight, format, 1.0)


@mutant("S must be in weight units")
def multiplies_by_the_scale(weight, format, scale):
    return (format.spacing(weight.float() * scale) * scale).to(weight.dtype)


@mutant("S must be in weight units")
def floored_in_the_units_of_the_format(weight, format, scale):
    return grid_stiffness(weight, format, scale).clamp(min=2 * format.smallest)


def made(formula):
    return formula() if isinstance(formula, type) else formula


@pytest.mark.parametrize(("wrong", "message"), MUTANTS)
def test_a_wrong_formula_is_caught_for_the_right_reason(wrong, message):
    with pytest.raises(ConformanceError) as caught:
        check_stiffness(made(wrong))
    assert message in str(caught.value)
    assert str(caught.value).startswith(wrong.__name__ + " on ")
    assert "fix: " in str(caught.value)


def test_the_formulas_of_the_core_conform(table):
    for format in (*FORMATS, *map(table, ("E4M3", "E5M2", "E6M1", "E7M0", "BF16", "E0M15"))):
        check_stiffness(grid_stiffness, [format])
        check_stiffness(uniform_stiffness, [format], weight_units="nowhere")


def test_a_formula_in_another_geometry_conforms(table):
    check_stiffness(Geometry(grid_stiffness, of_format=table("E5M2"), refresh="never"))


def test_pure_numbers_are_not_in_weight_units():
    for claim in ("everywhere", "off zero"):
        with pytest.raises(ConformanceError, match="S must be in weight units"):
            check_stiffness(uniform_stiffness, weight_units=claim)


def test_a_neutral_number_at_zero_is_allowed_for_off_zero_only():
    def neutral_at_zero(weight, format, scale):
        return torch.where(weight == 0, 1.0, grid_stiffness(weight, format, scale)).to(weight.dtype)

    check_stiffness(neutral_at_zero, weight_units="off zero")
    with pytest.raises(ConformanceError, match=r"S must be in weight units \(3 of \d+ weights\)"):
        check_stiffness(neutral_at_zero)


def test_the_message_names_formula_and_format_and_tells_input_expected_and_seen():
    with pytest.raises(ConformanceError) as caught:
        check_stiffness(functools.partial(ignores_the_scale), FORMATS[:1])
    first, *rest = str(caught.value).splitlines()
    assert first.startswith("ignores_the_scale on UNIFORM: S must be in weight units (")
    assert rest[0] == "  input: w = -0.9921875 / 2^-5, scale 2^-5; S times 2^-5"
    assert rest[1:3] == ["  expected: 0.0078125", "  seen: 0.000244140625"]


def test_a_formula_that_serves_some_formats_only_is_tried_on_those():
    def picky(weight, format, scale):
        if format.name == "CODEBOOK":
            raise ValueError("CODEBOOK has no mantissa")
        return grid_stiffness(weight, format, scale)

    check_stiffness(picky, FORMATS[:2])
    with pytest.raises(ConformanceError, match=r"CODEBOOK has no mantissa\n  fix: .*formats="):
        check_stiffness(picky)
