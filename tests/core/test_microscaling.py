"""OCP MX and NVFP4 against references in Python's exact numbers, written from the formats' definitions."""

import math
from fractions import Fraction

import pytest
import torch

from altgrad_core.recipe import Recipe
from altgrad_core.straight_through import quantize_ste

# name: exponent bits, mantissa bits, bias, largest value, exponent of the largest (OCP MX 1.0, table 1)
ELEMENTS = {
    "E4M3": (4, 3, 7, Fraction(448), 8),
    "E5M2": (5, 2, 15, Fraction(57344), 15),
    "E2M3": (2, 3, 1, Fraction(15, 2), 2),
    "E3M2": (3, 2, 3, Fraction(28), 4),
    "E2M1": (2, 1, 1, Fraction(6), 2),
}


def binade(x):
    """floor(log2(x)) of a positive Fraction."""
    power = x.numerator.bit_length() - x.denominator.bit_length()
    return power if Fraction(2) ** power <= x else power - 1


def nearest(x, name):
    """The element nearest to a Fraction, ties to even, saturating."""
    _, mantissa_bits, bias, largest, _ = ELEMENTS[name]
    if not x:
        return Fraction(0)
    unit = Fraction(2) ** (max(binade(abs(x)), 1 - bias) - mantissa_bits)
    return max(-largest, min(largest, round(x / unit) * unit))  # Python's round sends ties to even


def blocks_of(row, length):
    numbers = [Fraction(value) for value in row]
    return [numbers[start : start + length] for start in range(0, len(numbers), length)]


def mx(row, name):
    """Section 6.3: X = 2^(floor(log2 amax) - emax) for 32 elements; X times the element nearest to v/X."""
    out = []
    for block in blocks_of(row, 32):
        amax = max(map(abs, block))
        shared = max(-126, min(126, binade(amax) - ELEMENTS[name][4])) if amax else 0
        scale = Fraction(2) ** shared
        out += [nearest(value / scale, name) * scale for value in block]
    return out


def nvfp4(row, whole):
    """E2M1(x*t/d)*d/t, t = 448*6/amax, d = E4M3(t*amax_block/6) but no 0; and where x*t/d is nearly a tie."""
    out, near_tie = [], []
    t = Fraction(448 * 6) / whole
    for block in blocks_of(row, 16):
        d = max(nearest(t * max(map(abs, block)) / 6, "E4M3"), Fraction(1, 512))
        for value in block:
            exact = value * t / d
            out.append(nearest(exact, "E2M1") * d / t)
            near_tie.append(nearest(exact * (1 + Fraction(1, 2**21)), "E2M1") != nearest(exact, "E2M1"))
    return out, near_tie


def rows(count=24, width=83):
    """Numbers of all magnitudes; the last block of a row is short, some blocks are zero, some tiny."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(count, width, generator=generator)
    x *= torch.exp2(torch.randint(-20, 21, (count, width), generator=generator).double() / 4).float()
    x[1] *= 2.0**100
    x[2] *= 2.0**-100
    x[3] *= 2.0**-135
    x[4, :32] = 0
    x[5] = 0
    x[6, 32:64] = 2.0**-149
    x[7, :32] = torch.linspace(0, 1, 33)[1:] * 1.999  # up to twice what `fit` would allow: these saturate
    x[8, :8] = torch.tensor([1.0, 1.0625, 1.1875, 1.125, -1.0625, -0.0, 2.0**-10, 2.0**-11])  # ties
    return x


def quantized(x, recipe):
    return recipe.quantize(x, recipe.scale_of(x))


@pytest.mark.parametrize("name", ELEMENTS)
def test_block_32_under_ocp_is_ocp_mx_element_by_element(table, name):
    x = rows()
    found = quantized(x, Recipe(format=table(name), granularity="block", scale_rule="ocp"))
    for row, seen in zip(x.tolist(), found.tolist(), strict=True):
        assert [Fraction(value) for value in seen] == mx(row, name)


def test_mxfp4_by_hand(table):
    recipe = Recipe(format=table("E2M1"), granularity="block", scale_rule="ocp")
    x = torch.zeros(1, 34)
    x[0, :4] = torch.tensor([7.9, 1.25, -0.25, 0.26])  # floor(log2 7.9) = 2 = emax: scale 1, 7.9 saturates
    x[0, 32:] = torch.tensor([0.3, 0.1])  # the short block: scale 2^4, 4.8 -> 4 or 6, 1.6 -> 1.5
    assert quantized(x, recipe)[0, :4].tolist() == [6.0, 1.0, -0.0, 0.5]
    assert quantized(x, recipe)[0, 32:].tolist() == [4 / 16, 1.5 / 16]


def test_nvfp4_is_its_definition_element_by_element(table):
    recipe = Recipe(format=table("E2M1"), granularity="block", block=16, block_scale=table("E4M3"))
    for x in (rows()[6:], rows()[:1], 2.0**90 * rows()[:1], 2.0**-90 * rows()[8:9]):
        whole, skipped = Fraction(x.abs().max().item()), 0
        for row, seen in zip(x.tolist(), quantized(x, recipe).tolist(), strict=True):
            expected, near_tie = nvfp4(row, whole)
            for value, right, either in zip(seen, expected, near_tie, strict=True):
                skipped += either
                assert either or value == pytest.approx(float(right), rel=2.0**-22, abs=0)
        assert skipped <= 3


def test_nvfp4_by_hand(table):
    recipe = Recipe(format=table("E2M1"), granularity="block", block=16, block_scale=table("E4M3"))
    x = torch.zeros(32)
    x[:2] = torch.tensor([448 * 6.0, 448.0])  # the tensor's largest: t = 1, d = 448; 448/448 = 1
    x[16:19] = torch.tensor([6.0, 2.6, -0.2])  # d = 1
    found = quantized(x, recipe)
    assert found[:2].tolist() == pytest.approx([448 * 6.0, 448.0], rel=2.0**-22)  # 1/448 is no float32
    assert found[16:19].tolist() == [6.0, 3.0, -0.0]


def test_a_block_whose_step_would_round_to_zero_keeps_its_zeros_and_makes_no_nan(table):
    recipe = Recipe(format=table("E2M1"), granularity="block", block=16, block_scale=table("E4M3"))
    x = torch.zeros(4, 16)
    x[0, 0] = 1.0
    x[1, :3] = torch.tensor([2.0**-20, 2.0**-30, -0.0])
    x[2, :2] = torch.tensor([2.0**-149, -(2.0**-149)])
    found = quantized(x, recipe)
    assert found.isfinite().all()
    assert torch.equal(found == 0, (x == 0) | (x.abs() < 2.0**-22))
    assert found[1, 0].item() == pytest.approx(2.0**-20, rel=0.2)
    assert found[1, 2].signbit()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_spoils_its_own_block_only(table, bad):
    for block_scale in (None, table("E4M3")):
        recipe = Recipe(format=table("E2M1"), granularity="block", block=16, block_scale=block_scale)
        x = torch.ones(4, 16)
        x[2, 3] = bad
        found = quantized(x, recipe)
        kept = [0, 1, 3]
        torch.testing.assert_close(found[kept], x[kept], rtol=2.0**-22, atol=0)
        assert math.isnan(found[2, 3].item()) == math.isnan(bad)


def test_zeros_stay_zeros_under_every_scale(table):
    two_level = {"granularity": "block", "block": 16, "block_scale": table("E4M3")}
    for options in (two_level, {"granularity": "block"}, {"granularity": "channel"}, {"scale_rule": "exact"}):
        recipe = Recipe(format=table("E2M1"), **options)
        assert torch.equal(quantized(torch.zeros(3, 40), recipe), torch.zeros(3, 40))


MICROSCALED = {
    "MXFP8": ("E4M3", {"scale_rule": "ocp"}),
    "fit": ("E4M3", {"block": 16}),
    "NVFP4": ("E2M1", {"block": 16, "block_scale": "E4M3"}),
}


@pytest.mark.slow  # compiling takes 5 s a width
@pytest.mark.parametrize("width", [7, 33, 40])
@pytest.mark.parametrize("kind", MICROSCALED)
def test_compiled_blocks_are_those_of_eager_whatever_the_last_ones_length(table, kind, width):
    name, options = MICROSCALED[kind]
    if "block_scale" in options:
        options = {**options, "block_scale": table(options["block_scale"])}
    recipe = Recipe(format=table(name), granularity="block", **options)
    x = torch.arange(1.0, width + 1).repeat(2, 1)

    def q(x):
        return quantize_ste(x, recipe)

    torch._dynamo.reset()
    assert torch.equal(torch.compile(q, dynamic=False)(x), q(x))
