from fractions import Fraction

import pytest

from altgrad_formats.layout import NAMED, Layout, default_bias

ENDS = {  # name: (largest, smallest positive), computed by hand
    "E0M7": (Fraction(127, 128), Fraction(1, 128)),
    "E1M6": (Fraction(127, 32), Fraction(1, 32)),
    "E2M5": (Fraction(63, 8), Fraction(1, 32)),
    "E3M4": (124, Fraction(1, 16)),
    "E3M4_IEEE": (Fraction(31, 2), Fraction(1, 64)),
    "E4M3": (448, Fraction(1, 2**9)),
    "E5M2": (57344, Fraction(1, 2**16)),
    "E6M1": (3 * 2**31, Fraction(1, 2**31)),
    "E7M0": (2**64, Fraction(1, 2**62)),
    "E2M1": (6, Fraction(1, 2)),
    "E2M3": (Fraction(15, 2), Fraction(1, 8)),
    "E3M2": (28, Fraction(1, 16)),
    "FP16": (65504, Fraction(1, 2**24)),
    "BF16": (255 * 2**120, Fraction(1, 2**133)),
    "E0M15": (Fraction(2**15 - 1, 2**15), Fraction(1, 2**15)),
    "E1M14": (Fraction(2**15 - 1, 2**13), Fraction(1, 2**13)),
    "E2M13": (8 - Fraction(1, 2**11), Fraction(1, 2**13)),
    "E3M12": (32 - Fraction(1, 2**8), Fraction(1, 2**14)),
    "E4M11": (512 - Fraction(1, 2**3), Fraction(1, 2**17)),
    "E6M9": (2**33 - 2**23, Fraction(1, 2**39)),
    "E7M8": (2**65 - 2**56, Fraction(1, 2**70)),
}


def value(layout, magnitude):
    significand, unit = layout.split(magnitude)
    return significand * Fraction(2) ** unit


@pytest.mark.parametrize("name", NAMED)
def test_each_named_format_has_the_ends_computed_by_hand(name):
    layout = NAMED[name]
    assert (value(layout, layout.largest_code), value(layout, 1)) == ENDS[name]


@pytest.mark.parametrize("name", NAMED)
def test_a_code_splits_as_the_definition_says(name):
    layout = NAMED[name]
    E, M, bias = layout.exponent_bits, layout.mantissa_bits, layout.bias
    for magnitude in range(0, layout.largest_code + 1, 1 + layout.magnitudes // 500):
        e, m = magnitude >> M, magnitude % 2**M
        if E == 0:
            expected = magnitude * Fraction(2) ** (-M - bias)
        elif e == 0:
            expected = Fraction(2) ** (1 - bias) * Fraction(m, 2**M)
        else:
            expected = Fraction(2) ** (e - bias) * (1 + Fraction(m, 2**M))
        assert value(layout, magnitude) == expected


@pytest.mark.parametrize(
    ("layout", "inf_code", "nan_code", "largest_code"),
    [
        (NAMED["E3M4"], None, None, 0x7F),
        (NAMED["E4M3"], None, 0x7F, 0x7E),
        (NAMED["E5M2"], 0x7C, 0x7E, 0x7B),
        (NAMED["FP16"], 0x7C00, 0x7E00, 0x7BFF),
        (NAMED["BF16"], 0x7F80, 0x7FC0, 0x7F7F),
        (Layout(4, 0, 7, "ieee"), 0xF, None, 0xE),
        (Layout(4, 0, 7, "fn"), None, 0xF, 0xE),
        (Layout(0, 7, 0, "fn"), None, 0x7F, 0x7E),
    ],
)
def test_special_codes_are_where_the_standards_put_them(layout, inf_code, nan_code, largest_code):
    assert (layout.inf_code, layout.nan_code, layout.largest_code) == (inf_code, nan_code, largest_code)


@pytest.mark.parametrize(
    ("shape", "bias"),
    [((0, 7), 0), ((0, 3), 0), ((1, 6), 0), ((2, 5), 1), ((3, 4), 1), ((3, 5), 3), ((3, 2), 3), ((4, 5), 7)],
)
def test_the_default_bias_is_the_named_format_s_or_ieee_s(shape, bias):
    assert default_bias(*shape) == bias


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        ((3, 4, 1), "E3M4"),
        ((3, 4, 3, "ieee"), "E3M4_IEEE"),
        ((3, 4, 3), "E3M4(bias=3)"),
        ((4, 3, 7, "fn"), "E4M3"),
        ((4, 3, 7), "E4M3(bias=7)"),
        ((4, 5, 7), "E4M5(bias=7)"),
        ((4, 5, 7, "fn"), "E4M5(bias=7,fn)"),
        ((4, 5, -7, "ieee"), "E4M5(bias=-7,ieee)"),
        ((5, 10, 15, "ieee"), "FP16"),
        ((8, 7, 127, "ieee"), "BF16"),
    ],
)
def test_a_layout_s_name_is_the_catalog_s_or_says_it_all(numbers, name):
    assert Layout(*numbers).name == name


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        ((9, 6, 255), r"E9M6 needs exponents up to 2\^256; float32 ends at 2\^127"),
        ((8, 7, 127), r"E8M7 needs exponents up to 2\^128; float32 ends at 2\^127"),
        ((4, 3, -200), r"E4M3\(bias=-200\) needs exponents up to 2\^215"),
        ((0, 7, -129), r"E0M7\(bias=-129\) needs exponents up to 2\^128"),
        ((4, 3, 150), r"E4M3\(bias=150\) needs values down to 2\^-152; float32 ends at 2\^-149"),
        ((0, 7, 143), r"E0M7\(bias=143\) needs values down to 2\^-150"),
        ((1, 0, 0), "E1M0 has 2 bits with its sign; a format has 3 to 16"),
        ((8, 8, 127), "E8M8 has 17 bits with its sign; a format has 3 to 16"),
        ((-1, 8, 0), "exponent_bits=-1, mantissa_bits=8: a format cannot have a negative number of bits"),
        ((8, -1, 0), "a format cannot have a negative number of bits"),
        ((0, 7, 0, "ieee"), "E0M7 has no exponent field, of which specials='ieee' takes the top one"),
        ((4, 3, 7, "fnuz"), "specials='fnuz' is not one of 'finite', 'ieee', 'fn'"),
    ],
)
def test_what_is_no_format_is_refused_with_the_reason(numbers, reason):
    with pytest.raises(ValueError, match=reason):
        Layout(*numbers)


def test_the_widest_ranges_that_fit_are_accepted():
    assert Layout(0, 7, -128).split(127) == (127, 121)
    assert Layout(8, 0, 128).split(255) == (1, 127)
    assert Layout(8, 3, 147).split(1) == (1, -149)
    assert Layout(7, 8, 0).split(2**15 - 1) == (2**9 - 1, 127 - 8)
