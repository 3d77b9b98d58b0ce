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
STEPS = ctypes.CFUNCTYPE(None, POINTER, POINTER, POINTER, POINTER, COUNT, NUMBER, POINTER)
QUANTIZE = ctypes.CFUNCTYPE(
    None, POINTER, POINTER, COUNT, ctypes.c_uint32, NUMBER, NUMBER, NUMBER, POINTER, POINTER
)
MOVES = ctypes.CFUNCTYPE(None, POINTER, POINTER, POINTER, POINTER, COUNT, POINTER, POINTER, POINTER)
KEYS = stream_key_tensor((4, 5, 6))


class Walk(ctypes.Structure):
    _fields_ = [
        ("clip", NUMBER),
        ("scale", NUMBER),
        ("low", COUNT),
        ("high", COUNT),
    ]


class Seen(ctypes.Structure):
    _fields_ = [(name, COUNT) for name in ("least", "most", "undefined", "lost", "flips")]


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


def part_of_the_range(format, part):
    """Random numbers off the grid about one end of the normal range, which a move or a rounding may pass."""
    share = torch.rand(3000, generator=torch.Generator().manual_seed(4))
    signs = torch.randint(0, 2, (3000,), generator=torch.Generator().manual_seed(3)) * 2 - 1
    spacing = format.spacing(torch.zeros(1))
    wider = format.values[(format.values > 0) & (format.spacing(format.values) > spacing)]
    normal = wider[:1] / 2 if len(wider) else spacing
    end = {
        "within": format.largest * (0.2 + share / 2),
        "about the largest": format.largest * (0.5 + share),
        "about the smallest normal": normal * (1 + share / 2),
        "below the normal": normal * (0.5 + share / 3),
        "beyond the largest": format.largest * (1 + share),
    }
    return end[part] if part.startswith("be") else signs * end[part]


@pytest.mark.parametrize(
    ("scale", "shares"), [(0.25, (15 / 16, 15 / 16)), (3.0, (15 / 16, 1 / 2)), (1.0, (0, 0))]
)
@pytest.mark.parametrize(
    ("part", "downs"),
    [
        ("any", (-12, 3, 12)),
        ("within", (-1, 0, 1)),
        ("within", (-12, 12)),
        ("within", (0, 2**16)),
        ("within", (-(2**16), 0)),
        ("about the largest", (-12, 3, 12)),
        ("about the smallest normal", (-12, 3, 12)),
        ("below the normal", (-12,)),
        ("beyond the largest", (12,)),
    ],
)
def test_blocks_move_by_rungs_within_ends_and_tell_where_to(format, loops, x, part, scale, downs, shares):
    x = x if part == "any" else part_of_the_range(format, part)
    x = torch.cat((format.quantize(x), x)) / scale
    generator = torch.Generator().manual_seed(2)
    down = torch.tensor(downs).float()[torch.randint(0, len(downs), x.shape, generator=generator)]
    down *= 1 - torch.rand(x.shape, generator=generator) / 4
    clip = 0.875 * max(map(abs, downs))
    ends = format.rung(format.values[[0, -1]]).tolist()
    low, high = (int(end * share) for end, share in zip(ends, shares, strict=True))
    draws = torch.randint(0, 2**24, x.shape, generator=generator).int()
    to = format.rung(x * scale) - drawn(down, clip, draws)
    expected = format.from_rung(to.clamp(low, high)) / scale
    walk = Walk(clip, scale, low, high)
    found, seen = torch.empty_like(x), Seen(2**31 - 1, -(2**31), 0, 0, 7)
    move(loops, x, down, draws, found, walk, seen)
    assert torch.equal(found, expected)
    assert seen.least <= int(to.min())
    assert seen.most >= int(to.max())
    assert max(-seen.least, seen.most) == int(to.abs().max())
    assert (seen.undefined, seen.flips) == (0, 7 + int((expected != x).sum()))
    for begin in range(0, x.numel(), 512):
        here, seen = slice(begin, begin + 512), Seen(2**31 - 1, -(2**31))
        back, again = torch.empty_like(x[here]), torch.empty_like(x[here])
        move(loops, x[here], down[here], draws[here], again, walk, seen)
        move(loops, again, -down[here], draws[here], back, walk, Seen())
        assert torch.equal(again, expected[here])
        assert seen.lost or torch.equal(back, x[here])


def drawn(down, clip, draws):
    """Whole rungs, rounded stochastically by draws over 2^24."""
    size = down.abs().clamp(max=clip)
    up = draws * 2.0**-24 < size - size.floor()
    return ((size.floor() + up) * down.sign()).int()


def move(loops, x, down, draws, to, walk, seen):
    places = (tensor.data_ptr() for tensor in (x, down, draws, to))
    MOVES(loops.moves)(*places, x.numel(), ctypes.byref(walk), ctypes.byref(seen), loops.context)


@pytest.mark.parametrize("scale", [1.0, 2.0**-30, 2.0**30])
def test_normal_values_that_stay_below_the_end_can_be_moved_back(scale):
    format = exmy("E4M3")
    x = torch.tensor([1.0, -1.125, 96.0, -0.5]).repeat(128) / scale
    seen = Seen(2**31 - 1, -(2**31))
    walk = Walk(10.0, scale, -126, 126)
    loops = format.block_loops()
    if loops is None:
        pytest.skip("there is no C compiler")
    draws = torch.arange(512).int() * 2**15
    move(loops, x, torch.linspace(-9, 9, 512), draws, torch.empty_like(x), walk, seen)
    assert not seen.lost


@pytest.mark.parametrize("spoiled", ["x", "down"])
def test_a_nan_among_moves_is_told(format, loops, spoiled):
    x, down = (torch.ones(512) for _ in range(2))
    (x if spoiled == "x" else down)[300] = torch.nan
    walk, seen = Walk(10.0, 1.0, -(2**30), 2**30), Seen(2**31 - 1, -(2**31))
    move(loops, x, down, torch.zeros(512).int(), torch.empty_like(x), walk, seen)
    assert seen.undefined


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
def test_blocks_give_the_spacing_over_the_scale_and_nan_for_nan(format, loops, x, scale):
    x, found = torch.cat((x, torch.tensor([torch.nan]))), torch.empty(len(x) + 1)
    SPACINGS(loops.spacings)(x.data_ptr(), found.data_ptr(), x.numel(), scale, loops.context)
    assert torch.equal(found[:-1], format.spacing(x[:-1] * scale) / scale)
    assert bool(found[-1].isnan())


def steps(loops, before, now, scale, compares=True):
    """Call block by block: what a block holds decides which way it is taken."""
    same, shares = torch.empty(before.shape, dtype=torch.int32), torch.empty_like(before)
    for at in range(0, len(before), 192):
        ends = (one[at : at + 192] for one in (before, now, same, shares))
        first, second, third, fourth = ends
        to = third.data_ptr() if compares else None
        arguments = first.data_ptr(), second.data_ptr(), to, fourth.data_ptr(), len(first), scale
        STEPS(loops.steps)(*arguments, loops.context)
    return same, shares


def about(values, scale):
    """Return values over a scale, the middles between them, and the float32 on both sides of all."""
    middles = (values[1:].double() + values[:-1].double()).div(2).float()
    points = torch.cat((values[:1500], values[-1500:], middles[:1500], middles[-1500:])) / scale
    return torch.cat((points, points.nextafter(torch.tensor(torch.inf)), points.nextafter(-points - 1)))


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("shift", [1, 1500])
def test_blocks_tell_whether_a_step_leads_to_another_rung(format, loops, scale, shift):
    before = torch.cat((about(format.values, scale), torch.tensor([torch.inf, -torch.inf])))
    now = before.roll(shift)
    same, _ = steps(loops, before, now, scale)
    expected = format.rung(before * scale) == format.rung(now * scale)
    assert torch.equal(same, -expected.int())


def test_a_nan_has_a_rung_of_its_own_to_a_step(format, loops):
    before, now = torch.ones(192), torch.ones(192)
    before[5:7], now[6:8] = torch.nan, torch.nan
    same, shares = steps(loops, before, now, 1.0)
    assert same[4:9].tolist() == [-1, 0, -1, 0, -1]
    assert shares[6].isnan()


@pytest.mark.parametrize("scale", [2.0**-20, 3.0])
@pytest.mark.parametrize("compares", [True, False])
def test_blocks_give_the_spacings_that_a_step_is_long_but_one_at_most(format, loops, scale, compares):
    before = about(format.values, scale).clamp(-1e30, 1e30)
    spacing = format.spacing(before * scale) / scale
    now = before + spacing * torch.linspace(-1.5, 1.5, len(before))
    _, shares = steps(loops, before, now, scale, compares)
    expected = ((now - before).abs() / spacing).clamp(max=1)
    torch.testing.assert_close(shares, expected, rtol=1e-6, atol=0)


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
