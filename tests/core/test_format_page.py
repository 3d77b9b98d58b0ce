"""What `altgrad formats` says of formats, on tables of values and fake plugins."""

import io
import json
import re
import types
from fractions import Fraction

import pytest
import rich.console
import torch
from hypothesis import given
from hypothesis import strategies as st

from altgrad_core.apps import app, guarded
from altgrad_core.format import Format
from altgrad_core.format_facts import codes, exact, facts, hexadecimal, odd_times_power, same_grid
from altgrad_core.format_page import Page
from altgrad_core.format_picture import ASCII, Ink, LogAxis, pictures

EIGHT_BITS = ["E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0"]

PLUGIN = """
from altgrad_core.format import Format

TABLE = Format(name="THREE", bits=3, values=[-4.0, -1.0, 0.0, 1.0, 2.0, 4.0])
WIDE = Format(name="WIDE", bits=3, values=[-3.0, -1.5, 0.0, 1.5, 3.0])
NARROW = Format(name="NARROW", bits=3, values=[-2.0, -1.0, 0.0, 1.0, 2.0])
NO_FORMAT = [1.0, 2.0]

@attrs.frozen(kw_only=True)
class Needed:
    base: int = attrs.field(metadata={{"example": 3, "help": "ratio"}})
    note: str = "x"

@attrs.frozen(kw_only=True)
class Optional:
    base: int = 2

def scaled(options):
    return Format(name="scaled", bits=4, values=[0.0, 1.0, 1.0 * options.base])

def broken(options):
    1 / 0

def one(name, target, options=None):
    more = {{}} if options is None else {{"options": options}}
    return Component(name=name, summary=f"about [bold] {{name}}", target=f"{{__name__}}:{{target}}", **more)

@hookimpl
def altgrad_formats():
    return [{components}]
"""


@pytest.fixture
def altgrad(capsys, monkeypatch):
    """Return a function that runs `altgrad ...` at 80 columns: exit code, output, errors."""
    monkeypatch.setenv("COLUMNS", "80")

    def command(*tokens):
        code = guarded(app, tokens)
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def formats(install, altgrad):
    """Return a function that installs a plugin of these components, and runs `altgrad formats ...`."""

    def command(components, *tokens):
        install("fake", PLUGIN.format(components=components))
        return altgrad("formats", *tokens)

    return command


@pytest.fixture
def page_of(registered):
    """Return a function that gives the lines of a format's page."""

    def lines(format, width=80):
        page = Page(format=format, entry=registered("format", "F"), facts=facts(format), codes=codes(format))
        return list(page.lines(rich.console.Console(file=io.StringIO(), width=width)))

    return lines


@pytest.fixture
def drawn():
    """Return a function that draws a format."""
    return lambda format, width=80, ink=ASCII: list(pictures(format, width, ink))


def read(text):
    """Return the number that a notation stands for, computed independently."""
    python = re.sub(r"(\d+)\^(-?\d+)", r"Fraction(\1)**(\2)", text)
    python = re.sub(r"(?<![\w.(])(\d+\.\d+)", r"Fraction('\1')", python)
    return Fraction(eval(python, {"Fraction": Fraction}))


def listed(lines):
    """Return {code: value} of the rows of values on a page."""
    found = {}
    begin = next(at for at, line in enumerate(lines) if line.startswith("positive values by binade"))
    for line in lines[begin + 1 : lines.index("values per column, linear axis")]:
        if not line.startswith("  "):
            continue
        cells, _, unit = line[9:].partition("  x ")
        names, *cells = cells.split()
        first, last = (int(name, 16) for name in (names.split("..") * 2)[:2])
        every = range(first, last + 1) if last >= first else range(first, last - 1, -1)
        values = [read(cell) * read(unit or "1") for cell in cells]
        found |= dict(zip(every, values, strict=True))
    return found


# --- notation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (448.0, "448"),
        (57344.0, "57344"),
        (0.0625, "0.0625"),
        (3.96875, "3.96875"),
        (2.0**-5, "2^-5"),
        (2.0**-9, "2^-9"),
        (2.0**64, "2^64"),
        (1.5 * 2.0**32, "1.5*2^32"),
        (255 * 2.0**120, "255*2^120"),
        (127 / 128, "1-2^-7"),
        (-127 / 128, "-(1-2^-7)"),
        (-(2.0**-9), "-2^-9"),
        (float(torch.tensor(2.0**0.125)), "~1.09051"),
    ],
)
def test_a_number_is_written_as_a_researcher_would(value, text):
    assert exact(value) == text


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_what_is_written_is_the_number_unless_it_says_about(value):
    text = exact(value)
    if "~" not in text:
        assert read(text) == Fraction(value)
    else:
        assert float(text.replace("~", "")) == pytest.approx(value, rel=1e-5)


@given(st.integers(-(2**15), 2**15).map(lambda n: 2 * n + 1), st.integers(-149, 100))
def test_a_number_is_an_odd_one_times_a_power_of_two(odd, exponent):
    assert odd_times_power(abs(odd) * 2.0**exponent) == (abs(odd), exponent)


def test_neighboring_codes_are_joined():
    assert hexadecimal([0, 0x7D, 0x7E, 0x7F, 0xFF], 8) == "00, 7d..7f, ff"
    assert hexadecimal([8], 4) == "8"
    assert hexadecimal([8], 9) == "008"


# --- facts ---------------------------------------------------------------------------------------------


def test_the_facts_of_a_table_are_its_ends_and_its_gaps():
    found = facts(Format(name="F", bits=3, values=[-4.0, -1.0, 0.0, 0.5, 2.0]))
    assert (found.lowest, found.smallest, found.largest, found.count) == (-4, 0.5, 2, 5)
    assert (found.finest, found.coarsest, found.uniform) == (0.5, 3, False)
    assert (found.exponent_bits, found.bias, found.specials, found.smallest_normal) == (None,) * 4


def test_only_the_formats_without_an_exponent_are_uniform(table, named):
    uniform = {name for name in named if facts(table(name)).uniform}
    assert uniform == {"E0M7", "E1M6", "E0M15", "E1M14"}


def test_one_grid_at_two_scales_is_recognized(table, named):
    found = same_grid({name: table(name) for name in named})
    assert found == [("E1M6", "E0M7", 4.0), ("E1M14", "E0M15", 4.0)]


def test_codes_without_a_value_are_unused_where_there_is_no_nan(table):
    found = codes(table("E2M1"))
    assert found.of_value == {value: code for code, value in enumerate(table("E2M1").values.tolist())}
    assert (found.negative_zero, found.inf, found.nan, found.unused) == ((), (), (), (15,))


def test_a_normal_value_that_special_codes_have_taken_is_none():
    class Reserved(Format):
        """E1M1 whose only exponent field with a leading one is that of inf and NaN."""

        layout = types.SimpleNamespace(exponent_bits=1, mantissa_bits=1, bias=0, specials="ieee")

    assert facts(Reserved(name="F", bits=3, values=[-1.0, 0.0, 1.0])).smallest_normal is None
    assert facts(Reserved(name="F", bits=3, values=[-3.0, -1.0, 0.0, 1.0, 2.0, 3.0])).smallest_normal == 2


# --- the page of one -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0", "E2M1", "E3M2"]
)
@pytest.mark.parametrize("width", [64, 80, 200])
def test_every_positive_value_stands_on_the_page_with_its_code(table, page_of, name, width):
    values = table(name).values.tolist()
    positive = {code: Fraction(value) for code, value in enumerate(values) if value > 0}
    assert listed(page_of(table(name), width)) == positive


def test_negative_values_that_mirror_no_positive_one_are_listed_too(page_of):
    lines = page_of(Format(name="F", bits=3, values=[-4.0, -3.0, 0.0, 0.5, 2.0]))
    assert listed(lines) == {0: 4, 1: 3, 3: Fraction(1, 2), 4: 2}
    assert "magnitudes of the negative values" in lines
    assert "  lowest           -4" in lines


def test_a_format_without_negative_values_has_a_page(page_of):
    lines = page_of(Format(name="F", bits=3, values=[0.0, 1.0, 3.0]))
    assert listed(lines) == {1: 1, 2: 3}
    assert not any("negative" in line for line in lines)


class Backwards(Format):
    """A table whose codes are handed out from the top in steps of 3, modulo 8."""

    def _decode(self, codes):
        return super()._decode(7 - (codes * 3) % 8)


def test_codes_that_do_not_count_up_stand_one_by_one(page_of):
    format = Backwards(name="F", bits=3, values=[-1.0, 0.0, 1.0, 2.0, 4.0, 8.0])
    values = format.decode(torch.arange(8)).abs().tolist()
    decoded = {code: value for code, value in enumerate(values) if value > 0}
    assert listed(page_of(format)) == decoded


def test_a_wide_format_has_a_line_for_the_outer_binades_and_that_of_1(table, page_of):
    lines = page_of(table("BF16"))
    binades = [int(line.split()[0][2:]) for line in lines if re.match(r"  2\^\S+ +[0-9a-f]{4}", line)]
    assert binades == [-133, -132, -131, -130, 0, 124, 125, 126, 127]
    assert "  2^0     beff..bf7e     128  1 to 2-2^-7" in lines


@pytest.mark.parametrize("name", [*EIGHT_BITS, "E2M1", "BF16", "E0M15", "FP16"])
@pytest.mark.parametrize("width", [64, 80, 81, 120])
def test_a_page_is_no_wider_than_asked_for(table, page_of, name, width):
    lines = page_of(table(name), width)
    assert [line for line in lines[lines.index("") :] if len(line) > width] == []


# --- pictures --------------------------------------------------------------------------------------------


def test_the_picture_of_fp4(table, drawn):
    assert drawn(table("E2M1"), 60) == [
        "values per column, linear axis",
        "  up to: . 1",
        "",
        "          . . . . .   .   .       .",
        "          +---------------+---------------+",
        "          0               4               8",
        "",
        "positive values per column, log2 axis: 12 columns a binade",
        "  up to: . 1",
        "",
        "          .           .      .    .      .    .      .",
        "          +-----------+-----------+-----------+-----------+",
        "          2^-1        2^0         2^1         2^2        2^3",
        "",
        "spacing, both axes log2",
        "     2^1 |                                    ########",
        "     2^0 |                        ####################",
        "    2^-1 |############################################",
        "          +-----------+-----------+-----------+-----------+",
        "          2^-1        2^0         2^1         2^2        2^3",
    ]


def test_a_column_is_as_high_as_the_first_power_of_two_that_is_not_below_its_count(drawn):
    counts = [1, 2, 3, 4, 5, 8, 9] * 7
    magnitudes = [2.0 ** (e - 20) * (1 + k / 16) for e, count in enumerate(counts) for k in range(count)]
    lines = drawn(Format(name="F", bits=9, values=[0.0, *magnitudes]), 64)
    assert lines[7].endswith("1 column a binade")
    assert lines[8] == "  up to: . 1  : 2  - 4  = 8  + 16"
    assert lines[10].strip() == ".:--==+" * 7


@pytest.mark.parametrize("name", ["E0M7", "E1M6", "E0M15"])
def test_a_uniform_grid_is_flat_in_density_and_in_spacing(table, drawn, name):
    lines = drawn(table(name))
    assert len(set(lines[3].strip())) == 1
    assert len(lines[3].strip()) == 64
    (row,) = [line for line in lines if "|" in line]
    assert set(row.split("|")[1]) == {"#"}


def test_powers_of_two_are_flat_on_the_logarithmic_axis(table, drawn):
    lines = drawn(table("E7M0"))
    assert lines[10].strip() == ":" * 63 + "."
    assert lines[7].endswith("2 binades a column")


def test_the_staircase_rises_by_one_level_at_each_binade_above_the_smallest_normal(table, drawn):
    bars = [line.split("│")[1] for line in drawn(table("E4M3"), ink=Ink()) if "│" in line]
    columns = [[bar[at : at + 1] or " " for bar in bars] for at in range(54)]
    heights = [sum(Ink().heights.index(one) for one in column) for column in columns]
    levels = [max(0, binade - 3) + 1 for binade in range(18)]  # 2^-9 .. 2^-6 have the spacing 2^-9
    assert heights == [4 * level for level in levels for _ in range(3)]


def test_the_density_of_a_logarithmic_table_is_flat_on_its_axis(drawn):
    magnitudes = torch.tensor([2.0 ** (k / 8) for k in range(-32, 32)])
    values = torch.cat((-magnitudes.flip(0), torch.zeros(1), magnitudes))
    lines = drawn(Format(name="LNS", bits=8, values=values), 10 + 64 + 1)
    assert lines[7].endswith("8 columns a binade")
    assert lines[10].strip() == "." * 64


@given(st.integers(-149, 126), st.integers(1, 100), st.integers(16, 200))
def test_an_axis_fits_its_room_and_holds_both_ends(lowest, binades, room):
    smallest, largest = 2.0**lowest, 2.0 ** min(127, lowest + binades)
    axis = LogAxis.over(smallest, largest, room)
    assert axis.column(smallest) == 0
    assert axis.column(largest) < axis.columns <= room
    assert axis.at(axis.column(largest)) <= largest < axis.at(axis.column(largest) + 1)


# --- the table of all, with plugins ----------------------------------------------------------------------


def test_a_table_of_values_has_a_row_and_a_page(formats):
    code, out, err = formats('one("THREE", "TABLE")')
    assert (code, err) == (0, "")
    assert ["THREE", "3", "4", "1", "6"] in [line.split() for line in out.splitlines()]
    assert "about [bold] THREE" in out


def test_a_table_of_values_can_be_looked_at(formats):
    code, out, err = formats('one("THREE", "TABLE")', "THREE")
    assert (code, err) == (0, "")
    assert listed(out.splitlines()) == {3: 1, 4: 2, 5: 4, 0: 4, 1: 1}
    assert "special codes    no value 6..7" in out


def test_a_format_that_cannot_be_built_is_named_and_the_others_are_listed(formats):
    code, out, _ = formats('one("BAD", "NO_FORMAT"), one("GONE", "nowhere"), one("THREE", "TABLE")')
    assert code == 0
    assert "broken: BAD: format 'BAD' of fake 1.0 is no Format but list: mend its plugin" in out
    assert "broken: GONE: format 'GONE' of fake 1.0: its target" in out
    assert ["THREE", "3", "4", "1", "6"] in [line.split() for line in out.splitlines()]


def test_a_narrow_console_cuts_no_number_short(install, altgrad, monkeypatch):
    install("fake", PLUGIN.format(components='one("THREE", "TABLE")'))
    wide = altgrad("formats")[1].splitlines()[:2]
    monkeypatch.setenv("COLUMNS", "20")
    assert altgrad("formats")[1].splitlines()[:2] == wide


def test_a_plugin_that_cannot_be_imported_is_named(install, altgrad):
    install("three", "1 / 0", version="0.3")
    code, out, _ = altgrad("formats")
    assert code == 0
    assert "broken: three 0.3 (ZeroDivisionError: division by zero (" in out


def test_a_format_that_needs_options_is_a_family_and_is_not_built(formats):
    _, out, _ = formats('one("F", "scaled", Needed), one("D", "scaled", Optional)', "--json")
    listing = json.loads(out)
    assert [one["name"] for one in listing["formats"]] == ["D"]
    assert [one["name"] for one in listing["families"]] == ["F", "D"]
    assert listing["families"][0]["options"] == [
        {"name": "base", "required": True, "default": None, "help": "ratio"},
        {"name": "note", "required": False, "default": '"x"', "help": ""},
    ]


def test_a_family_is_listed_with_its_options_and_its_defaults(formats):
    _, out, _ = formats('one("F", "scaled", Needed)')
    assert 'F  base, note = "x"' in out


def test_a_format_that_needs_options_is_asked_for_by_a_table(formats):
    code, out, err = formats('one("F", "scaled", Needed)', "F")
    assert (code, out) == (2, "")
    table = '{plugin = "F", base = 3, note = "x"}'
    assert err == f"base: is required and missing; try: altgrad formats '{table}'\n"


def test_a_table_of_options_is_a_name(formats):
    code, out, _ = formats('one("F", "scaled", Needed)', '{plugin = "F", base = 3}')
    assert code == 0
    assert listed(out.splitlines()) == {1: 1, 2: 3}


def test_formats_of_one_grid_are_said_to_be(formats):
    _, out, _ = formats('one("NARROW", "NARROW"), one("WIDE", "WIDE")')
    assert ["one", "grid", "WIDE", "=", "NARROW", "x", "1.5"] in [line.split() for line in out.splitlines()]


def test_two_owners_of_one_name_are_two_rows(install, altgrad):
    install("one", PLUGIN.format(components='one("T", "TABLE")'))
    install("two", PLUGIN.format(components='one("T", "WIDE")'))
    _, out, _ = altgrad("formats", "--json")
    assert {one["name"]: one["largest"] for one in json.loads(out)["formats"]} == {"one:T": 4.0, "two:T": 3.0}
    assert altgrad("formats", "two:T")[0] == 0


def test_a_second_name_of_a_format_heads_its_page(formats):
    _, out, _ = formats('one("SECOND", "TABLE")', "SECOND")
    assert out.startswith("SECOND: about [bold] SECOND\n")


def test_a_format_with_options_is_described_by_them(formats):
    """The plugin's summary may be of the defaults."""
    _, out, _ = formats('one("D", "scaled", Optional)', '{plugin = "D", base = 3}')
    assert out.startswith("scaled: D with base = 3\n")


def test_options_go_before_the_summary_in_json_too(formats):
    _, out, _ = formats('one("D", "scaled", Optional)', '{plugin = "D", base = 3}', "--json")
    assert json.loads(out)["summary"] == "D with base = 3"


def test_a_table_of_the_name_alone_is_described_by_the_summary(formats):
    _, out, _ = formats('one("THREE", "TABLE")', '{plugin = "THREE"}')
    assert out.startswith("THREE: about [bold] THREE\n")


@pytest.mark.parametrize(
    ("component", "reason"),
    [
        ('one("F", "nowhere")', "format 'F' of fake 1.0: its target 'fake_plugin_"),
        ('one("F", "NO_FORMAT")', "format 'F' of fake 1.0 is no Format but list: mend its plugin"),
        ('one("F", "broken")', "format 'F' of fake 1.0 cannot be built: ZeroDivisionError: division by"),
    ],
)
def test_a_format_that_cannot_be_built_is_one_error_that_names_its_plugin(formats, component, reason):
    code, out, err = formats(component, "F")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(reason)
