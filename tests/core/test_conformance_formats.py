"""Each mutant is a format with one mistake that people make; the kit must name that mistake."""

import pytest
import torch

from altgrad_core.format import Format
from altgrad_core.table_rounding import TableRounding
from altgrad_core.testing import ConformanceError
from altgrad_core.testing.formats import check_format
from altgrad_core.value_table import round_up_to, thresholds

pytestmark = pytest.mark.usefixtures("one_thread")


VALUES = [m * 2.0**e for e in range(4) for m in (4, 5, 6, 7)]
TABLE = [-v for v in reversed(VALUES)] + [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, *VALUES]


class Sound(Format):
    def __init__(self):
        super().__init__(name="MUTANT", bits=6, values=TABLE)


def mutant(message):
    """Register a wrong format with what the kit must say about it."""

    def register(cls):
        MUTANTS.append(pytest.param(cls, message, id=cls.__name__))
        return cls

    return register


MUTANTS = []


@mutant("nearest_even: a tie must go to the even rung")
class TiesAwayFromZero(Sound):
    def _quantize(self, x, rounding, overflow, uniform):
        rounding = "nearest_away" if rounding == "nearest_even" else rounding
        return super()._quantize(x, rounding, overflow, uniform)


@mutant("nearest_even: a tie must go to the even rung")
class TiesToTheEvenIndex(Sound):
    def _quantize(self, x, rounding, overflow, uniform):
        table = TableRounding(self.values)
        wrong = thresholds(table._cells(), table.zero + 1, rounding)
        table._thresholds = lambda x, rounding: round_up_to(x.dtype, wrong)
        return table.quantize(x, rounding, overflow, uniform)


@mutant("fake_quantize must be quantize (nearest_even)")
class ForgetsTheLimit(Sound):
    def _fake_quantize(self, x, scale, rounding, overflow, keys, limit):
        return super()._fake_quantize(x, scale, rounding, overflow, keys, None)


@mutant("fake_quantize must be quantize (stochastic)")
class DrawsItsOwnNumbers(Sound):
    def _fake_quantize(self, x, scale, rounding, overflow, keys, limit):
        keys = None if keys is None else keys.flip(0)
        return super()._fake_quantize(x, scale, rounding, overflow, keys, limit)


@mutant("spacing must be the same in a large tensor")
class SpacesLargeTensorsByTheirValues(Sound):
    def _spacing(self, x):
        return super()._spacing(self._quantize(x, "nearest_even", "saturate", None) if len(x) > 4000 else x)


@mutant("nearest_even must give the nearest value")
class MidpointsInFloat16(Sound):
    def _quantize(self, x, rounding, overflow, uniform):
        return super()._quantize(x.half().to(x.dtype), rounding, overflow, uniform)


@mutant("nearest_even must give the nearest value")
class RoundsTwice(Sound):
    def _quantize(self, x, rounding, overflow, uniform):
        return super()._quantize(x.float(), rounding, overflow, uniform).to(x.dtype)


@mutant("must keep a grid value")
class ShiftsByHalfAGap(Sound):
    def _quantize(self, x, rounding, overflow, uniform):
        return super()._quantize(x + 0.51 * (x > 20), rounding, overflow, uniform)


@mutant("toward_zero must saturate beyond the ends")
class InfinityGetsThrough(Sound):
    def _quantize(self, x, rounding, overflow, uniform):
        rounded = super()._quantize(x, rounding, overflow, uniform)
        return torch.where(x.isinf() & (rounding == "toward_zero"), x, rounded)


@mutant("overflow='ieee' must not hide an overflow")
class IgnoresOverflow(Sound):
    def _quantize(self, x, rounding, overflow, uniform):
        return super()._quantize(x, rounding, "saturate", uniform)


@mutant("nearest_even must keep NaN")
class TurnsNanToZero(Sound):
    def _quantize(self, x, rounding, overflow, uniform):
        return super()._quantize(x.nan_to_num(0.0), rounding, overflow, uniform)


@mutant("a zero must keep the sign of x")
class LosesTheSignOfZero(Sound):
    def _quantize(self, x, rounding, overflow, uniform):
        return super()._quantize(x, rounding, overflow, uniform) + 0.0


@mutant("rounding up must do so")
class UpIsAwayFromZero(Sound):
    def _quantize(self, x, rounding, overflow, uniform):
        if rounding == "up":
            return super()._quantize(x.abs(), "up", overflow, None).copysign(x)
        return super()._quantize(x, rounding, overflow, uniform)


@mutant("with the random number 0.99999994")
class AddsBeforeTheFloor(Sound):
    def _quantize(self, x, rounding, overflow, uniform):
        if uniform is None:
            return super()._quantize(x, rounding, overflow, uniform)
        gap = self._spacing(x)
        shifted = (x.abs().half() + uniform.half() * gap).copysign(x)
        return super()._quantize(shifted.to(x.dtype), "toward_zero", overflow, None)


@mutant("stochastic rounding of a midpoint")
class UpWhereItShouldStay(Sound):
    def _quantize(self, x, rounding, overflow, uniform):
        flipped = None if uniform is None else 1 - 2.0**-24 - uniform
        return super()._quantize(x, rounding, overflow, flipped)


@mutant("stochastic rounding must be unbiased")
class CoinFlip(Sound):
    def _quantize(self, x, rounding, overflow, uniform):
        if uniform is None:
            return super()._quantize(x, rounding, overflow, None)
        up, down = (super(CoinFlip, self)._quantize(x, mode, overflow, None) for mode in ("up", "down"))
        return torch.where((uniform < 0.5) == (x >= 0), up, down)


@mutant("equal generators must give equal results")
class UsesItsOwnGenerator(Sound):
    generator = torch.Generator()

    def quantize(self, x, rounding="nearest_even", generator=None, overflow="saturate", *, uniform=None):
        if generator is not None:
            generator = UsesItsOwnGenerator.generator
        return super().quantize(x, rounding, generator, overflow, uniform=uniform)


@mutant("a second call must draw new random numbers")
class DrawsTheSameEachTime(Sound):
    def quantize(self, x, rounding="nearest_even", generator=None, overflow="saturate", *, uniform=None):
        if generator is not None:
            generator = torch.Generator().manual_seed(0)
        return super().quantize(x, rounding, generator, overflow, uniform=uniform)


@mutant("a global generator advanced")
class DrawsFromTheGlobalGenerator(Sound):
    def _rung(self, x):
        torch.rand(1)
        return super()._rung(x)


@mutant("quantize must not modify its input")
class WritesIntoItsInput(Sound):
    def quantize(self, x, *arguments, **options):
        rounded = super().quantize(x, *arguments, **options)
        if x.is_contiguous() and rounded.dtype == x.dtype and x.ndim == 3:
            x.copy_(rounded)
        return rounded


@mutant("quantize must keep the shape")
class Flattens(Sound):
    def quantize(self, x, *arguments, **options):
        rounded = super().quantize(x, *arguments, **options)
        return rounded.flatten() if x.ndim == 3 else rounded


@mutant("must give the same for any strides")
class ReadsMemoryOrder(Sound):
    def _spacing(self, x):
        memory_order = x.mT if x.ndim == 3 and not x.is_contiguous() else x
        return super()._spacing(memory_order.reshape(x.shape))


@mutant("quantize must be monotone")
class DitherInside(Sound):
    def _quantize(self, x, rounding, overflow, uniform):
        share = (x.abs() / self._spacing(x)) % 1
        up = (rounding == "nearest_even") & (share > 0.2) & (share < 0.3)
        rounded = super()._quantize(x, rounding, overflow, uniform)
        return torch.where(up, super()._quantize(x, "up", overflow, None), rounded)


@mutant("from_rung(rung(x)) must be quantize(x)")
class RungOfATieIsOdd(Sound):
    def _rung(self, x):
        return super()._rung(torch.nextafter(x, torch.full_like(x, torch.inf)))


@mutant("rung must count from zero")
class CountsFromTheLowest(Sound):
    def _rung(self, x):
        return super()._rung(x) + self._table.zero


@mutant("from_rung must clamp")
class WrapsRungs(Sound):
    def from_rung(self, rungs):
        values = super().from_rung(rungs)
        return torch.where(rungs > 1000, -values, values)


@mutant("NaN must have its own rung")
class NanIsRungZero(Sound):
    def rung(self, x):
        return super().rung(x.nan_to_num(0.0))


@mutant("encode must refuse NaN, as has_nan is False")
class EncodesNan(Sound):
    def encode(self, x):
        return super().encode(x.nan_to_num(0.0))


@mutant("decode must invert encode")
class SwapsTwoCodes(Sound):
    def _encode(self, x):
        codes = super()._encode(x)
        return torch.where(codes == 5, 6, codes)


@mutant("a code must fit in bits")
class SetsAHighBit(Sound):
    def _encode(self, x):
        return super()._encode(x) | 128

    def _decode(self, codes):
        return super()._decode(codes & 127)


@mutant("decode must give values of the table")
class UnusedCodesDecodeToNumbers(Sound):
    def _decode(self, codes):
        return super()._decode(codes).nan_to_num(77.0)


@mutant("spacing must be the local gap")
class SpacingOfTheIntervalBelow(Sound):
    def _spacing(self, x):
        return super()._spacing(torch.nextafter(x, torch.zeros_like(x)))


@mutant("spacing must stay what it is at the largest value")
class SpacingGrowsBeyondTheEnd(Sound):
    def _spacing(self, x):
        return super()._spacing(x) * (x.abs() / self.largest).clamp(1, 1e9)


@mutant("largest and smallest must be the ends")
class BoastsOfItsRange(Sound):
    largest = 64.0


@mutant("values must be 1-d float32")
class ValuesInFloat64(Sound):
    @property
    def values(self):
        return super().values.double()


@mutant("a format must survive pickle")
class ForgetsItsName(Sound):
    def __getstate__(self):
        return {**super().__getstate__(), "name": "ANOTHER"}


@mutant("torch.bfloat16 must be kept")
class AnswersInFloat32(Sound):
    def quantize(self, x, *arguments, **options):
        return super().quantize(x.float() if x.dtype == torch.bfloat16 else x, *arguments, **options)


@mutant("quantize of integers must be refused")
class TakesIntegers(Sound):
    def quantize(self, x, *arguments, **options):
        return super().quantize(x if x.is_floating_point() else x.float(), *arguments, **options)


@mutant("rounding='nearest' must be refused")
class GuessesTheMode(Sound):
    def quantize(self, x, rounding="nearest_even", *arguments, **options):
        return super().quantize(x, {"nearest": "nearest_even"}.get(rounding, rounding), *arguments, **options)


@mutant("RuntimeError: not implemented on Mondays")
class Raises(Sound):
    def _spacing(self, x):
        raise RuntimeError("not implemented on Mondays")


def test_the_sound_format_conforms():
    check_format(Sound())


@pytest.mark.parametrize(("wrong", "message"), MUTANTS)
def test_a_wrong_format_is_caught_for_the_right_reason(wrong, message):
    with pytest.raises(ConformanceError) as caught:
        check_format(wrong())
    assert message in str(caught.value)
    assert str(caught.value).startswith("MUTANT: ")
    assert "fix: " in str(caught.value)


def test_the_message_tells_the_input_the_expected_and_the_seen_value():
    with pytest.raises(ConformanceError) as caught:
        check_format(TiesAwayFromZero())
    lines = str(caught.value).splitlines()
    assert lines[0] == "MUTANT: nearest_even: a tie must go to the even rung (20 of 38 inputs)"
    assert lines[1:4] == ["  input: -52.0", "  expected: -48.0", "  seen: -56.0"]


class Laconic(Format):
    def _check_holds(self, x):
        super()._check_holds(x.float())
        if x.dtype == torch.float16:
            raise ValueError("no")


def test_a_dtype_refused_without_naming_the_format_is_a_fault():
    wide = Laconic(name="WIDE", bits=3, values=[-(2.0**40), 0.0, 2.0**40])
    with pytest.raises(ConformanceError, match=r"torch\.float16 cannot hold every value"):
        check_format(wide)


def test_a_class_inside_a_function_is_told_to_move():
    class Local(Format):
        pass

    with pytest.raises(ConformanceError, match="define the class at the top level of a module"):
        check_format(Local(name="LOCAL", bits=3, values=[-1, 0, 1]))
