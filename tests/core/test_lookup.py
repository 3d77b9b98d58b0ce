import pytest
import torch

from altgrad_core.format import Format
from altgrad_core.lookup import format_or_none, get_format, get_stiffness
from altgrad_core.registry import PluginError, UsageError, discover
from altgrad_core.stiffness import grid_stiffness, uniform_stiffness

FOUR = Format(name="FOUR", bits=3, values=[-1.0, 0.0, 1.0, 2.0])

PLUGIN = """
from altgrad_core.options import option

@attrs.frozen(kw_only=True)
class StepsOptions:
    count: int = option("values", default=3)

@hookimpl
def altgrad_formats():
    return [
        Component(name="STEPS", summary="", options=StepsOptions, target=f"{__name__}:build"),
        Component(name="BROKEN", summary="", target=f"{__name__}:nothing"),
    ]

@hookimpl
def altgrad_stiffness():
    return [Component(name="twice", summary="", target=f"{__name__}:twice")]

def build(options):
    from altgrad_core.format import Format
    return Format(name=f"STEPS{options.count}", bits=8, values=range(options.count))

def nothing(options):
    return 3

def twice(options):
    return lambda weight, format, scale: 2 * weight
"""


@pytest.fixture
def plugins(install):
    install("steps", PLUGIN)
    return discover()


def test_a_format_is_found_by_name(plugins):
    assert get_format("STEPS", plugins).values.tolist() == [0, 1, 2]
    assert get_format("STEPS").name == "STEPS3", "among what is installed"


def test_a_format_is_found_by_table(plugins):
    assert get_format({"plugin": "STEPS", "count": 5}, plugins).values.tolist() == [0, 1, 2, 3, 4]
    assert get_format({"plugin": "steps:STEPS"}, plugins).name == "STEPS3"


def test_the_same_table_is_the_same_object(plugins):
    table = {"plugin": "STEPS", "count": 5}
    assert get_format(table, plugins) is get_format(dict(table), plugins)


def test_a_format_is_itself(plugins):
    assert get_format(FOUR, plugins) is FOUR
    assert format_or_none(FOUR) is FOUR


@pytest.mark.parametrize("nothing", ["FP32", "none", None])
def test_what_means_to_leave_alone_is_no_format(plugins, nothing):
    assert format_or_none(nothing, plugins) is None
    with pytest.raises(UsageError, match="means 'leave it alone'"):
        get_format(nothing, plugins)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("STEP", "no format named 'STEP'.*did you mean 'STEPS'"),
        (3, "expected a name, or a table.*got 3"),
        ({"plugin": "STEPS", "count": "5"}, "count: "),
        ({"plugin": "STEPS", "cuont": 5}, "cuont"),
    ],
)
def test_a_wrong_name_or_table_is_a_value_error_that_says_why(plugins, spec, message):
    with pytest.raises(ValueError, match=message):
        get_format(spec, plugins)


def test_a_plugin_that_gives_no_format_is_named(plugins):
    with pytest.raises(PluginError, match=r"'BROKEN' of steps 1.0 is no Format but int: mend its plugin"):
        get_format("BROKEN", plugins)


def test_a_stiffness_is_found_by_name_by_table_or_is_itself(plugins):
    assert get_stiffness("grid", plugins) is grid_stiffness
    assert get_stiffness({"plugin": "uniform"}, plugins) is uniform_stiffness
    assert get_stiffness("twice", plugins)(torch.tensor([3.0]), FOUR, 1.0).tolist() == [6]
    assert get_stiffness(max, plugins) is max


def test_a_wrong_stiffness_is_a_value_error(plugins):
    with pytest.raises(ValueError, match="did you mean 'twice'"):
        get_stiffness("twise", plugins)
    with pytest.raises(ValueError, match="expected a name, or a table"):
        get_stiffness(3, plugins)
