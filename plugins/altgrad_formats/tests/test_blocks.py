"""The loops over blocks, which loops of others call, against the format's own methods."""

import ctypes
import math

import pytest
import torch

from altgrad_core.format import Format
from altgrad_core.random_bits import stream_key_tensor
from altgrad_formats.exmy import ExMy
from altgrad_formats.layout import NAMED

POINTER, COUNT, NUMBER = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float
UNARY = ctypes.CFUNCTYPE(None, POINTER, POINTER, COUNT, POINTER)
SPACINGS = ctypes.CFUNCTYPE(None, POINTER, POINTER, COUNT, NUMBER, POINTER)
QUANTIZE = ctypes.CFUNCTYPE(
    None, POINTER, POINTER, COUNT, ctypes.c_uint32, NUMBER, NUMBER, NUMBER, POINTER, POINTER
)
MOVES = ctypes.CFUNCTYPE(None, POINTER, POINTER, COUNT, NUMBER, POINTER, POINTER, POINTER)
KEYS = stream_key_tensor((4, 5, 6))

WIDE = ("FP16", "E0M15", "E7M8")  # not BF16: its spacings are below float32's normal range
NAMES = [name for name, layout in NAMED.items() if layout.bits <= 8 or name in WIDE]


def exmy(name):
    layout = NAMED[name]
    return ExMy(layout.exponent_bits, layout.mantissa_bits, layout.bias, layout.specials)


def table(name):
    known = exmy(name)
    return Format(name="TABLE", bits=known.bits, values=known.values)


CASES = [
    pytest.param((make, name), id=f"{make.__name__} {name}")
    for name in NAMES
    for make in (exmy, table)
    if make is exmy or NAMED[name].bits <= 8
]


@pytest.fixture(params=CASES)
def format(request):
    make, name = request.param
    return make(name)


@pytest.fixture
def loops(format):
    found = format.block_loops()
    if found is None:
        pytest.skip("there is no C compiler, or no loop for this table")
    return found


@pytest.fixture
def x(format):
    """Grid values, what lies between and beyond them, random patterns, and infinities."""
    values = format.values
    bits = torch.randint(-(2**31), 2**31 - 1, (2000,), generator=torch.Generator().manual_seed(1))
    patterns = bits.to(torch.int32).view(torch.float32)
    middles = (values[1:].double() + values[:-1].double()).div(2).float()
    ends = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])
    return torch.cat((values[:3000], values[-3000:], middles[:3000], patterns[~patterns.isnan()], ends))


def called(function, loops, x, out):
    UNARY(function)(x.data_ptr(), out.data_ptr(), x.numel(), loops.context)
    return out


def test_blocks_give_the_rungs_of_the_format(format, loops, x):
    found = called(loops.rungs, loops, x, torch.empty(x.shape, dtype=torch.int32))
    assert torch.equal(found, format.rung(x))


def test_blocks_give_the_values_of_rungs_and_clamp_beyond_the_ends(format, loops):
    low, high = int(format.rung(format.values[:1])), int(format.rung(format.values[-1:]))
    rungs = torch.cat((torch.arange(low - 3, high + 4), torch.tensor([-(2**31) + 1, 2**31 - 1]))).int()
    found = called(loops.values, loops, rungs, torch.empty(rungs.shape))
    assert torch.equal(found, format.from_rung(rungs))


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_blocks_move_by_rungs_within_ends_and_tell_where_to(format, loops, x, scale):
    down = torch.randint(-12, 13, x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    low, high = (int(rung) // 2 for rung in format.rung(format.values[[0, -1]]))
    to = format.rung(x * scale) - down
    expected = format.from_rung(to.clamp(low, high)) / scale
    ends, seen = torch.tensor([low, high]).int(), torch.tensor([5, -5, 7]).int()
    found = x.clone()
    addresses = down.data_ptr(), found.numel(), scale, ends.data_ptr(), seen.data_ptr(), loops.context
    MOVES(loops.moves)(found.data_ptr(), *addresses)
    assert torch.equal(found, expected)
    changed = int((expected != x).sum())
    assert seen.tolist() == [min(5, int(to.min())), max(-5, int(to.max())), 7 + changed]


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_blocks_give_the_spacing_over_the_scale_and_nan_for_nan(format, loops, x, scale):
    x, found = torch.cat((x, torch.tensor([torch.nan]))), torch.empty(len(x) + 1)
    SPACINGS(loops.spacings)(x.data_ptr(), found.data_ptr(), x.numel(), scale, loops.context)
    assert torch.equal(found[:-1], format.spacing(x[:-1] * scale) / scale)
    assert bool(found[-1].isnan())


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize("limit", [None, (-1.0, 0.75)])
def test_blocks_quantize_as_the_format_does(format, loops, x, rounding, limit):
    keys = KEYS if rounding == "stochastic" else None
    limits = None if limit is None else torch.tensor(limit)
    low, high = limit or (-math.inf, math.inf)
    expected = format.fake_quantize(x, torch.tensor(4.0), rounding, keys=keys, limit=limits)
    found, half = torch.empty_like(x), 1001
    for begin, part in ((0, x[:half]), (half, x[half:])):  # a block goes on where the stream is
        QUANTIZE(loops.quantize)(
            part.data_ptr(),
            found[begin:].data_ptr(),
            part.numel(),
            begin,
            4.0,
            low,
            high,
            None if keys is None else keys.data_ptr(),
            loops.context,
        )
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())
