import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import attrs
import pytest
import torch

import altgrad_formats
from altgrad_core.testing.formats import check_format
from altgrad_formats import NAMED, SECOND_NAMES, ExMyOptions, catalog
from altgrad_formats.exmy import ExMy, from_options

FORMATS = [getattr(catalog, name) for name in NAMED]
by_name = pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)

TABLE = [  # name, bits, largest, smallest, has_inf, has_nan
    ("E0M7", 8, 127 / 128, 1 / 128, False, False),
    ("E1M6", 8, 3.96875, 1 / 32, False, False),
    ("E2M5", 8, 7.875, 1 / 32, False, False),
    ("E3M4", 8, 124.0, 1 / 16, False, False),
    ("E3M4_IEEE", 8, 15.5, 2.0**-6, True, True),
    ("E4M3", 8, 448.0, 2.0**-9, False, True),
    ("E5M2", 8, 57344.0, 2.0**-16, True, True),
    ("E6M1", 8, 1.5 * 2.0**32, 2.0**-31, False, False),
    ("E7M0", 8, 2.0**64, 2.0**-62, False, False),
    ("E2M1", 4, 6.0, 0.5, False, False),
    ("E2M3", 6, 7.5, 1 / 8, False, False),
    ("E3M2", 6, 28.0, 1 / 16, False, False),
    ("FP16", 16, 65504.0, 2.0**-24, True, True),
    ("BF16", 16, 255 * 2.0**120, 2.0**-133, True, True),
]


@pytest.mark.parametrize(("name", "bits", "largest", "smallest", "has_inf", "has_nan"), TABLE)
def test_each_format_is_as_documented(name, bits, largest, smallest, has_inf, has_nan):
    format = getattr(catalog, name)
    assert (format.name, format.bits, format.largest, format.smallest) == (name, bits, largest, smallest)
    assert (format.has_inf, format.has_nan) == (has_inf, has_nan)
    assert (format.values[-1], format.values[format.values > 0][0]) == (largest, smallest)


def test_e1m6_is_e0m7_times_four():
    assert torch.equal(catalog.E1M6.values, 4 * catalog.E0M7.values)


def test_e7m0_is_zero_and_the_powers_of_two():
    powers = 2.0 ** torch.arange(-62, 65, dtype=torch.float64)
    assert torch.equal(catalog.E7M0.values.double(), torch.cat((-powers.flip(0), torch.zeros(1), powers)))


def test_fp16_is_every_finite_half():
    halves = torch.arange(-(2**15), 2**15).short().view(torch.float16)
    finite = halves[halves.isfinite()].float().unique()
    assert torch.equal(catalog.FP16.values, finite)


def test_second_names_are_the_same_objects():
    assert catalog.E5M10 is catalog.FP16
    assert catalog.E8M7 is catalog.BF16
    assert altgrad_formats.E8M7 is altgrad_formats.BF16


@by_name
def test_it_conforms(format):
    check_format(format)


@by_name
def test_it_is_a_value(format):
    format.quantize(torch.zeros(3))
    for twin in (pickle.loads(pickle.dumps(format)), copy.deepcopy(format)):
        assert twin == format
        assert hash(twin) == hash(format)
    layout = format.layout
    assert ExMy(layout.exponent_bits, layout.mantissa_bits, layout.bias, layout.specials) == format


def test_no_two_named_formats_are_equal():
    assert len(set(FORMATS)) == len(NAMED)


def test_the_default_bias_makes_the_named_format():
    assert ExMy(3, 4) == catalog.E3M4
    assert ExMy(4, 3, specials="fn") == catalog.E4M3
    assert ExMy(4, 3) != catalog.E4M3
    assert ExMy(4, 3).largest == 480.0


def test_a_name_of_one_s_own_is_for_display():
    mine = ExMy(4, 3, specials="fn", name="mine")
    assert mine.name == "mine"
    assert mine != catalog.E4M3
    assert pickle.loads(pickle.dumps(mine)).name == "mine"
    assert torch.equal(mine.values, catalog.E4M3.values)


def test_torch_s_defaults_do_not_matter():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(ExMy(3, 4).values, catalog.E3M4.values)
    finally:
        torch.set_default_dtype(before)


def test_its_repr_tells_what_it_is():
    assert repr(ExMy(4, 5)) == "<ExMy E4M5(bias=7): 10 bits, 0.000488281 to 504>"


# --- what experiment files see ------------------------------------------------------------------------


def components():
    return {component.name: component for component in altgrad_formats.altgrad_formats()}


def test_every_name_is_a_component_and_its_target_is_the_format():
    assert set(components()) == {*NAMED, *SECOND_NAMES, "ExMy"}
    for name, component in components().items():
        module, attribute = component.target.split(":")
        assert module in ("altgrad_formats.catalog", "altgrad_formats.exmy")
        if name == "ExMy":
            assert getattr(altgrad_formats.exmy, attribute) is from_options
            continue
        format = getattr(catalog, attribute)
        assert format.name == SECOND_NAMES.get(name, name)
        assert component.bits == format.bits
        assert component.summary


def test_any_format_can_be_described_by_its_numbers():
    format = from_options(ExMyOptions(exponent_bits=4, mantissa_bits=5, bias=9, specials="fn"))
    assert format == ExMy(4, 5, 9, "fn")
    assert format.name == "E4M5(bias=9,fn)"
    assert from_options(ExMyOptions(exponent_bits=3, mantissa_bits=4)) == catalog.E3M4


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"exponent_bits": 9, "mantissa_bits": 6}, r"E9M6 needs exponents up to 2\^256"),
        ({"exponent_bits": 1, "mantissa_bits": 0}, "E1M0 has 2 bits"),
        ({"exponent_bits": 0, "mantissa_bits": 7, "specials": "ieee"}, "no exponent field"),
        ({"exponent_bits": -1, "mantissa_bits": 7}, "exponent_bits"),
        ({"exponent_bits": 4, "mantissa_bits": 3, "specials": "ocp"}, "specials"),
    ],
)
def test_impossible_options_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        ExMyOptions(**options)
    with pytest.raises(ValueError, match=reason):
        ExMy(**options)


def test_every_option_explains_itself():
    assert all(field.metadata["help"] for field in attrs.fields(ExMyOptions))


def test_the_module_refuses_by_name_what_it_has_not():
    with pytest.raises(AttributeError, match="has no attribute 'E9M9'"):
        _ = altgrad_formats.E9M9


def test_listing_and_checking_import_no_torch():
    program = (
        "import sys, altgrad_formats\n"
        "altgrad_formats.altgrad_formats()\n"
        "try: altgrad_formats.ExMyOptions(exponent_bits=9, mantissa_bits=6)\n"
        "except ValueError as error: print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment_path = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment_path, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    assert done.stdout == "E9M6 needs exponents up to 2^256; float32 ends at 2^127\n"


# --- what the README says -----------------------------------------------------------------------------

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_readme_s_example_runs():
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], {})


@by_name
def test_the_readme_s_table_is_right(format):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines()]
    _, bits, bias, specials, *ends = next(row for row in rows if row[0].split(",")[0] == format.name)[:6]
    assert (int(bits), int(bias), specials) == (format.bits, format.layout.bias, format.layout.specials)
    largest, smallest = (eval(end.replace("^", "**").replace("·", "*")) for end in ends)
    assert (largest, smallest) == (format.largest, format.smallest)
