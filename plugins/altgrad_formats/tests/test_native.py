"""The loops in C against the same arithmetic in torch, bit for bit."""

import ctypes

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from altgrad_core import native, native_table
from altgrad_core.random_bits import stream_key_tensor, uniform
from altgrad_formats import native_exmy
from altgrad_formats.exmy import ExMy
from altgrad_formats.layout import NAMED

KEYS = stream_key_tensor((1, 2, 3))
SHAPES = [(e, m) for e in range(8) for m in range(16) if 3 <= 1 + e + m <= 16]


@pytest.fixture(autouse=True)
def loops():
    if native_exmy._loops() is None:
        pytest.skip("there is no C compiler here")


@pytest.fixture
def eagerly(monkeypatch):
    """Call a function as if there were no compiler."""

    def call(function):
        with monkeypatch.context() as patch:
            patch.setattr(native_exmy, "_loops", lambda: None)
            return function()

    return call


def patterns(count, seed=1):
    """Random float32 patterns: all exponents, subnormals, NaN and inf, and zeros of both signs."""
    bits = torch.randint(-(2**31), 2**31 - 1, (count,), generator=torch.Generator().manual_seed(seed))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3.4e38])
    return torch.cat((special, bits.to(torch.int32).view(torch.float32)))


def near_the_grid(format):
    """Every value, every midpoint, and the float32 numbers on both sides of each."""
    values = format.values.double()
    points = torch.cat((values, (values[1:] + values[:-1]) / 2)).float()
    points = points[points.isfinite()]
    up = torch.full_like(points, torch.inf)
    x = torch.cat((points, torch.nextafter(points, up), torch.nextafter(points, -up)))
    return x.repeat(1 + native.FEWEST_ELEMENTS // len(x))


def same_bits(a, b):
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(torch.int32), b[~nan].view(torch.int32))


def every_format():
    named = [ExMy(n.exponent_bits, n.mantissa_bits, n.bias, n.specials) for n in NAMED.values()]
    odd = [
        ExMy(8, 3, 127, "ieee"),
        ExMy(4, 3, 100),
        ExMy(4, 3, -20),
        ExMy(3, 2, 126),
        ExMy(0, 7, -30),
        ExMy(5, 2, 15, "fn"),
    ]
    return named + odd + [ExMy(e, m) for e, m in SHAPES]


@pytest.mark.parametrize("overflow", ["saturate", "ieee"])
@pytest.mark.parametrize("format", every_format(), ids=repr)
def test_rounding_to_nearest_even_gives_the_same_bits(format, overflow, eagerly):
    x = torch.cat((patterns(20_000), near_the_grid(format)[:200_000]))

    def rounded():
        return format.quantize(x, overflow=overflow)

    assert same_bits(rounded(), eagerly(rounded))


@pytest.mark.parametrize("overflow", ["saturate", "ieee"])
@pytest.mark.parametrize("format", every_format(), ids=repr)
def test_stochastic_rounding_gives_the_same_bits(format, overflow, eagerly):
    x = torch.cat((patterns(20_000), near_the_grid(format)[:20_000]))

    def rounded():
        return format.fake_quantize(x, None, "stochastic", overflow, keys=KEYS)

    assert same_bits(rounded(), eagerly(rounded))
    assert same_bits(
        rounded(), format.quantize(x, "stochastic", None, overflow, uniform=uniform((1, 2, 3), x.shape))
    )


@pytest.mark.parametrize("format", every_format(), ids=repr)
def test_codes_and_their_values_are_the_same(format, eagerly):
    x = torch.cat((patterns(20_000), near_the_grid(format)[:20_000]))
    if not format.has_nan:
        x = x[~x.isnan()]
    codes = format.encode(x)
    assert torch.equal(codes, eagerly(lambda: format.encode(x)))
    assert same_bits(format.decode(codes), eagerly(lambda: format.decode(codes)))


@pytest.mark.parametrize("name", ["E4M3", "E2M1", "E5M2", "E0M7", "FP16", "BF16", "E4M11"])
def test_every_code_has_the_same_value(name, eagerly):
    format = ExMy(
        *(getattr(NAMED[name], field) for field in ("exponent_bits", "mantissa_bits", "bias", "specials"))
    )
    kind = torch.uint8 if format.bits <= 8 else torch.int16
    codes = torch.arange(65536).to(kind)
    assert same_bits(format.decode(codes), eagerly(lambda: format.decode(codes)))


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
@pytest.mark.parametrize(
    "scale", [torch.tensor(4.0), torch.tensor(2.0**-70), torch.tensor(0.3), torch.rand(50, 1)]
)
def test_scale_and_limit_are_applied_in_the_same_pass(rounding, scale, eagerly):
    format, x = ExMy(4, 3, 7, "fn"), torch.randn(50, 301, generator=torch.Generator().manual_seed(1))
    keys = KEYS if rounding == "stochastic" else None
    limit = torch.tensor([-0.75, 0.5])

    def rounded():
        return format.fake_quantize(x, scale, rounding, keys=keys, limit=limit)

    assert same_bits(rounded(), eagerly(rounded))
    expected = eagerly(lambda: format.fake_quantize(x * scale, None, rounding, keys=keys).clamp(-0.75, 0.5))
    assert torch.equal(rounded(), expected / scale)


@pytest.mark.parametrize("count", [1023, 1024, 16383, 16384, 16385, 100_003])
def test_no_element_is_left_out_at_any_length(count, eagerly):
    x = torch.randn(count)
    assert torch.equal(ExMy(3, 4).quantize(x), eagerly(lambda: ExMy(3, 4).quantize(x)))


def test_one_and_two_threads_draw_the_same_numbers():
    x, threads, found = torch.randn(200_000), torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(ExMy(4, 3).quantize(x, "stochastic", torch.Generator().manual_seed(3)))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_an_input_of_any_strides_is_read_in_order():
    x = torch.randn(300, 200)
    assert torch.equal(ExMy(4, 3).quantize(x.t()), ExMy(4, 3).quantize(x).t())


def test_the_input_is_not_written():
    x = torch.randn(5000)
    before = x.clone()
    ExMy(4, 3).fake_quantize(x, torch.tensor(2.0))
    assert torch.equal(x, before)


def test_without_a_compiler_it_is_said_once_and_stays_eager(monkeypatch):
    monkeypatch.setattr(native, "which", lambda command: None)
    for known in (native.library, native._warn):
        known.cache_clear()
    with pytest.warns(RuntimeWarning, match="everything stays eager, which is slower: there is no C") as said:
        found = [native.library(source) for source in (native_exmy._SOURCE, native_table._SOURCE)]
    assert found == [None, None]
    assert len(said) == 1
    for known in (native.library, native._warn):
        known.cache_clear()


def test_a_source_that_does_not_compile_says_what_the_compiler_said(tmp_path, monkeypatch):
    monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "wrong.c"
    source.write_text("int f(void) { return missing; }")
    with pytest.warns(RuntimeWarning, match=r"cannot compile wrong\.c: .*missing"):
        assert native.library(source) is None


def test_a_compiled_file_is_kept_and_another_source_is_another_file(tmp_path, monkeypatch):
    monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "answer.c"
    for answer in (1, 2, 2):
        source.write_text(f"int answer(void) {{ return {answer}; }}")
        native.library.cache_clear()
        loops = native.library(source)
        assert isinstance(loops, ctypes.CDLL)
        assert loops.answer() == answer
    assert len(list((tmp_path / "cache" / "native").iterdir())) == 2
    native.library.cache_clear()


@pytest.mark.parametrize(("exponent_bits", "mantissa_bits", "bias"), [(0, 7, -121), (8, 2, 130), (5, 2, -90)])
def test_a_layout_out_of_reach_of_the_loops_still_rounds(exponent_bits, mantissa_bits, bias):
    format = ExMy(exponent_bits, mantissa_bits, bias)
    assert torch.equal(format.quantize(format.values.repeat(100)), format.values.repeat(100))


@pytest.mark.parametrize("damage", [b"", b"\x7fELF", None])
def test_a_damaged_file_in_the_cache_is_compiled_anew(tmp_path, monkeypatch, damage):
    source = tmp_path / "answer.c"
    source.write_text("int answer(void) { return 42; }")
    monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path / "cache"))
    native.library.cache_clear()
    assert native.library(source).answer() == 42
    (made,) = (tmp_path / "cache" / "native").iterdir()
    whole = made.read_bytes()
    made.unlink()  # a new file: the old one is in memory
    made.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    native.library.cache_clear()
    assert native.library(source).answer() == 42
    assert made.stat().st_size == len(whole)
    native.library.cache_clear()


def test_without_a_cache_that_can_be_written_nothing_is_left_behind(tmp_path, monkeypatch):
    source = tmp_path / "answer.c"
    source.write_text("int answer(void) { return 43; }")
    (tmp_path / "file").write_text("no folder can be made here")
    monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    native.library.cache_clear()
    assert native.library(source).answer() == 43
    assert not list(tmp_path.glob("altgrad-native-*"))
    native.library.cache_clear()


def test_a_transform_of_torch_func_sees_the_arithmetic():
    format, x = ExMy(4, 3, 7, "fn"), patterns(2040)[:2048].nan_to_num(0.0).view(2, 1024)
    for method in (format.quantize, format.rung, format.spacing):
        assert torch.equal(torch.func.vmap(method)(x), method(x))


def test_tables_made_under_a_transform_are_not_kept():
    class Owner:
        pass

    tables, owner, made = native.KeptTables(), Owner(), iter(range(9))

    def get(x):
        tables.get(owner, owner, [1], lambda: next(made))
        return x

    torch.func.vmap(get)(torch.zeros(2))
    assert [tables.get(owner, owner, [1], lambda: next(made)) for _ in range(2)] == [1, 1]


def test_another_header_is_another_file(tmp_path, monkeypatch):
    monkeypatch.setenv("ALTGRAD_CACHE", str(tmp_path / "cache"))
    source, header = tmp_path / "answer.c", tmp_path / "loops.h"
    source.write_text('#include "loops.h"\nint answer(void) { return ANSWER; }')
    monkeypatch.setattr(native, "_HEADER", header)
    for answer in (1, 2):
        header.write_text(f"#define ANSWER {answer}")
        native.library.cache_clear()
        assert native.library(source).answer() == answer
    native.library.cache_clear()


def test_a_recorded_rounding_rounds_what_it_is_given():
    format, x = ExMy(4, 3, 7, "fn"), torch.linspace(-3, 3, 2048)
    recorded = make_fx(lambda t: format.quantize(t))(torch.zeros(2048))
    assert torch.equal(recorded(x), format.quantize(x))


@pytest.mark.parametrize("layout", [(8, 0, 127, "ieee"), (7, 0, 1, "finite"), (8, 0, 130, "fn")])
@pytest.mark.parametrize("overflow", ["saturate", "ieee"])
def test_the_topmost_spacings_of_float32_round_in_large_tensors_as_in_small_ones(layout, overflow):
    format, x = ExMy(*layout), torch.tensor([3.4e38, 3e38, 2e38, 1.3e38])
    large = format.fake_quantize(x.repeat(500), rounding="stochastic", overflow=overflow, keys=KEYS)
    parts = uniform((1, 2, 3), 2000)
    small = torch.cat(
        [
            format.quantize(x, "stochastic", overflow=overflow, uniform=parts[at : at + 4])
            for at in range(0, 2000, 4)
        ]
    )
    assert torch.equal(large.nan_to_num(7.0), small.nan_to_num(7.0))


def test_a_negative_view_is_read_as_negative():
    format, x = ExMy(4, 3, 7, "fn"), torch.linspace(-3, 3, 2048)
    assert torch.equal(format.quantize(torch._neg_view(x)), format.quantize(-x))
    assert torch.equal(format.encode(torch._neg_view(x[:9])), format.encode(-x[:9]))


def test_keys_that_are_no_pair_of_int32_are_refused():
    x, format = torch.zeros(2000), ExMy(4, 3, 7, "fn")
    spaced = torch.stack((KEYS, KEYS), dim=1).view(-1)[::2]
    by_spaced = format.fake_quantize(x + 0.3, rounding="stochastic", keys=spaced)
    assert torch.equal(by_spaced, format.fake_quantize(x + 0.3, rounding="stochastic", keys=KEYS))
    for bad in (KEYS.long(), KEYS[:1]):
        with pytest.raises(ValueError, match="`keys` is"):
            format.fake_quantize(x, rounding="stochastic", keys=bad)
    with pytest.raises(ValueError, match="`limit` is"):
        format.fake_quantize(x, limit=torch.ones(3))
