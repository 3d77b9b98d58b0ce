"""What TOML values become options, what is refused, and in which words."""

import math
from typing import Literal

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from altgrad_core.options import (
    FallbackChoice,
    FieldError,
    FormatChoice,
    OptimizerChoice,
    StiffnessChoice,
    above,
    at_least,
    between,
    option,
    plain,
    regexes,
    within,
    written,
)
from altgrad_core.registry import Registry
from altgrad_core.structuring import structure
from altgrad_core.wording import shown


@attrs.frozen(kw_only=True)
class Options:
    text: str = "a"
    truth: bool = False
    whole: int = 1
    number: float = 1.0
    pair: tuple[float, float] = (0.0, 1.0)
    many: tuple[str, ...] = ()
    items: list[float] = attrs.field(factory=list)
    word: Literal["one", "two"] = "one"
    mixed: Literal["auto", True, False] = "auto"
    maybe: int | None = None
    either: int | str = 1


def problems(value, cls=Options, registry=None):
    """Return the problems as text: path, colon, message."""
    _, found = structure(value, cls, registry or Registry())
    return [f"{'.'.join(map(str, one.path))}: {one.message}" for one in found]


def read(value, cls=Options, registry=None):
    structured, found = structure(value, cls, registry or Registry())
    assert not found
    return structured


# --- no coercion -------------------------------------------------------------------------------------

ACCEPTED = {
    "text": ["", "abc", "false", "é\n"],
    "truth": [True, False],
    "whole": [0, -3, 2**63 - 1, 1 - 2**63],
    "number": [1, 2.5, -0.0, 2**70, 5e-324],
    "pair": [[1, 2.5]],
    "many": [[], ["a"], ["a", "b"]],
    "items": [[], [1, 2.5]],
    "word": ["one", "two"],
    "mixed": ["auto", True, False],
    "maybe": [3],
    "either": [3, "x"],
}


@pytest.mark.parametrize(("key", "value"), [(key, one) for key, values in ACCEPTED.items() for one in values])
def test_a_value_of_the_right_type_is_taken_as_it_is(key, value):
    structured = getattr(read({key: value}), key)
    assert structured == (tuple(value) if key in ("pair", "many") else value)
    assert type(read({key: value}).number) is float


REFUSED = [
    ("text", 1, "expected text in quotes, got 1"),
    ("text", True, "expected text in quotes, got true"),
    ("text", ["a"], "expected text in quotes, got ['a']"),
    ("truth", 0, "expected true or false, got 0"),
    ("truth", 1, "expected true or false, got 1"),
    ("truth", "false", "expected true or false, got 'false'"),
    ("truth", "", "expected true or false, got ''"),
    ("whole", True, "expected a whole number, got true"),
    ("whole", 2.7, "expected a whole number, got 2.7"),
    ("whole", 2.0, "expected a whole number, got 2.0"),
    ("whole", "2", "expected a whole number, got '2'"),
    ("whole", [2], "expected a whole number, got [2]"),
    ("whole", {}, "expected a whole number, got {}"),
    ("whole", 2**63, "expected a whole number of 64 bits, got 9223372036854775808"),
    ("number", False, "expected a number, got false"),
    ("number", "1e-3", "expected a number, got '1e-3'"),
    ("number", math.nan, "expected a finite number, got nan"),
    ("number", math.inf, "expected a finite number, got inf"),
    ("number", -math.inf, "expected a finite number, got -inf"),
    ("number", [], "expected a number, got []"),
    ("pair", [1.0], "expected 2 values, got 1"),
    ("pair", [1.0, 2.0, 3.0], "expected 2 values, got 3"),
    ("pair", "ab", "expected a list, got 'ab'"),
    ("pair", 1.0, "expected a list, got 1.0"),
    ("many", "a", "expected a list, got 'a'"),
    ("many", {"a": 1}, "expected a list, got a table; write [[...]] for one element of a list"),
    ("items", "12", "expected a list, got '12'"),
    ("word", "three", "expected one of 'one', 'two'; got 'three'"),
    ("word", "ONE", "expected one of 'one', 'two'; got 'ONE'; did you mean 'one'?"),
    ("word", 1, "expected one of 'one', 'two'; got 1"),
    ("word", ["one"], "expected one of 'one', 'two'; got ['one']"),
    ("mixed", 1, "expected one of 'auto', true, false; got 1"),
    ("mixed", 0.0, "expected one of 'auto', true, false; got 0.0"),
    ("mixed", "true", "expected one of 'auto', true, false; got 'true'"),
    ("maybe", "x", "expected a whole number, got 'x'"),
    ("maybe", None, "expected a whole number, got None"),
    ("either", 1.5, "expected a whole number, got 1.5; or expected text in quotes, got 1.5"),
]


@pytest.mark.parametrize(("key", "value", "message"), REFUSED)
def test_a_value_of_another_type_is_refused(key, value, message):
    assert problems({key: value}) == [f"{key}: {message}"]


@pytest.mark.parametrize("value", ["abc", 1, [], [{}], None, True])
def test_what_is_no_table_is_refused(value):
    assert problems(value) == [f": expected a table, got {shown(value)}"]


@given(st.one_of(st.integers(), st.floats(), st.booleans(), st.text(), st.lists(st.integers())))
def test_whatever_is_taken_keeps_its_type_but_for_integers_as_numbers(value):
    for key in ("text", "truth", "whole", "number"):
        structured, found = structure({key: value}, Options, Registry())
        if not found:
            assert type(getattr(structured, key)) is (float if key == "number" else type(value))


def test_an_integer_too_long_to_be_written_out_is_refused():
    number = 1 << 20000
    assert problems({"whole": number, "number": number}) == [
        "whole: expected a whole number of 64 bits, got a very long int",
        "number: expected a finite number, got a very long int",
    ]


def test_a_long_value_is_cut_short_in_its_message():
    (problem,) = problems({"whole": "x" * 1000})
    assert len(problem) < 110
    assert problem.endswith("xxx...")


# --- every mistake, with its path --------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Inner:
    depth: int = option("how deep")
    names: tuple[str, ...] = option("names", default=())


@attrs.frozen(kw_only=True)
class Outer:
    inner: Inner = option("a table")
    rows: tuple[Inner, ...] = option("tables", default=())
    optional: Inner | None = option("a table", default=None)


def test_an_unknown_key_gets_a_suggestion_or_the_list():
    assert problems({"depht": 1}, Inner) == [
        "depth: is required and missing",
        "depht: unknown key 'depht'; did you mean 'depth'?",
    ]
    assert problems({"depth": 1, "zzz": 1}, Inner) == ["zzz: unknown key 'zzz'; the keys are: depth, names"]


def test_a_table_that_takes_no_keys_says_so(registry):
    assert problems({"plugin": "nan_guard", "patience": 3}, FallbackChoice, registry) == [
        "patience: unknown key 'patience'; no keys are expected here"
    ]


def test_all_mistakes_of_all_tables_are_found_at_once():
    value = {
        "inner": {"depth": True, "names": ["a", 1, 2]},
        "rows": [{"depth": 1}, {}, {"depth": "x", "more": 1}],
        "extra": 0,
    }
    assert sorted(problems(value, Outer)) == [
        "extra: unknown key 'extra'; the keys are: inner, rows, optional",
        "inner.depth: expected a whole number, got true",
        "inner.names.1: expected text in quotes, got 1",
        "inner.names.2: expected text in quotes, got 2",
        "rows.1.depth: is required and missing",
        "rows.2.depth: expected a whole number, got 'x'",
        "rows.2.more: unknown key 'more'; the keys are: depth, names",
    ]


def test_the_path_given_goes_in_front():
    _, found = structure({"depth": "x"}, Inner, Registry(), ("quantize", "rule", 3))
    assert found[0].path == ("quantize", "rule", 3, "depth")


def test_a_missing_table_is_required():
    assert problems({}, Outer) == ["inner: is required and missing"]


def test_an_optional_table_is_checked_where_it_is_given():
    assert problems({"inner": {"depth": 1}, "optional": {"depth": 1.5}}, Outer) == [
        "optional.depth: expected a whole number, got 1.5"
    ]


def test_the_first_wrong_value_does_not_hide_a_contradiction_elsewhere():
    @attrs.frozen(kw_only=True)
    class Contradicting:
        low: int = 0
        high: int = 1

        def __attrs_post_init__(self):
            if self.low > self.high:
                raise FieldError("low", f"low = {self.low} is above high = {self.high}")

    assert problems({"low": 3}, Contradicting) == ["low: low = 3 is above high = 1"]


def test_a_field_error_can_point_below_its_table():
    @attrs.frozen(kw_only=True)
    class Contradicting:
        rows: tuple[Inner, ...] = ()

        def __attrs_post_init__(self):
            raise FieldError(("rows", 0, "depth"), "too deep")

    assert problems({"rows": []}, Contradicting) == ["rows.0.depth: too deep"]


def test_a_plain_error_of_a_constructor_is_put_at_the_table():
    @attrs.frozen(kw_only=True)
    class Refusing:
        def __attrs_post_init__(self):
            raise ValueError("not today")

    assert problems({}, Refusing) == [": not today"]


def test_an_error_that_is_no_users_mistake_says_what_it_is():
    @attrs.frozen(kw_only=True)
    class Failing:
        table: int = 1

        def __attrs_post_init__(self):
            {}["table"]

    @attrs.frozen(kw_only=True)
    class Outside:
        inner: Failing = Failing

    assert problems({"table": 1}, Failing) == [": KeyError: 'table'"]
    assert problems({"inner": {"table": 1}}, Outside) == ["inner: KeyError: 'table'"]


def test_a_key_error_of_a_plugin_is_no_missing_key():
    @attrs.frozen(kw_only=True)
    class Named:
        @classmethod
        def from_plain(cls, value):
            return {"known": cls()}[value]

    @attrs.frozen(kw_only=True)
    class Holding:
        name: Named = option("by name")

    assert problems({"name": "other"}, Holding) == ["name: KeyError: 'other'"]


# --- validators --------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Validated:
    least: int = option("", default=5, validator=at_least(2))
    most: float = option("", default=0.5, validator=above(0))
    both: float = option("", default=0.5, validator=between(0, 1))
    open_end: tuple[float, float] = option("", default=(0.0, 0.0), validator=within(0, 1))
    pattern: str = option("", default="a", validator=regexes)
    patterns: tuple[str, ...] = option("", default=(), validator=regexes)
    of_attrs: int = option(
        "", default=3, validator=[attrs.validators.instance_of(int), attrs.validators.ge(2)]
    )
    choice: int = option("", default=1, validator=attrs.validators.in_((1, 2)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("least", 1, "expected 2 or more, got 1"),
        ("most", 0, "expected more than 0, got 0.0"),
        ("both", 1.01, "expected 0 to 1, got 1.01"),
        ("both", -0.01, "expected 0 to 1, got -0.01"),
        ("open_end", [0.5, 1], "expected 0 <= value < 1, got 1.0"),
        ("pattern", "(", "'(' is no regular expression: missing ), unterminated subpattern at position 0"),
        ("pattern", "a{99999999999}", "'a{99999999999}' is no regular expression: the repetition number is"),
        ("patterns", ["a", "*"], "'*' is no regular expression: nothing to repeat at position 0"),
        ("of_attrs", 1, "'of_attrs' must be >= 2: 1"),
        ("choice", 3, "'choice' must be in (1, 2) (got 3)"),
    ],
)
def test_a_value_out_of_range_says_what_was_expected(key, value, message):
    (problem,) = problems({key: value}, Validated)
    assert problem.startswith(f"{key}: {message}")


@pytest.mark.parametrize(
    "given", [{"least": 2}, {"both": 0}, {"both": 1}, {"open_end": [0, 0.999]}, {"pattern": "a.*[bc]$"}]
)
def test_the_ends_of_a_range_are_in_it(given):
    read(given, Validated)


def test_two_values_out_of_range_are_two_problems():
    assert len(problems({"least": 0, "most": 0}, Validated)) == 2


def test_a_validator_that_looks_at_other_fields_runs_with_the_whole_object():
    @attrs.frozen(kw_only=True)
    class Related:
        low: int = 0
        high: int = attrs.field(default=1)

        @high.validator
        def _above_low(self, attribute, value):
            if value < self.low:
                raise ValueError("high is below low")

    assert read({"low": 1, "high": 2}, Related).high == 2
    assert problems({"low": 3, "high": 2}, Related) == [": high is below low"]


def test_a_validator_sees_what_a_converter_makes():
    @attrs.frozen(kw_only=True)
    class Converted:
        name: str = attrs.field(default="a", converter=str.lower, validator=attrs.validators.in_(["a", "b"]))

    assert read({"name": "B"}, Converted).name == "b"


# --- choices of plugins ------------------------------------------------------------------------------


def test_a_plugin_is_chosen_by_name_or_by_table(registry):
    by_name = read("AdamW", OptimizerChoice, registry)
    assert by_name == read({"plugin": "AdamW"}, OptimizerChoice, registry)
    assert by_name.options.lr == 1e-3
    assert read({"plugin": "AdamW", "lr": 1}, OptimizerChoice, registry).options.lr == 1.0


def test_options_of_a_plugin_are_checked_by_its_own_class(registry):
    assert problems({"plugin": "AdamW", "lr": "1", "bets": []}, OptimizerChoice, registry) == [
        "lr: expected a number, got '1'",
        "bets: unknown key 'bets'; did you mean 'betas'?",
    ]


def test_a_table_without_plugin_lists_the_choices(registry):
    assert problems({"lr": 1}, OptimizerChoice, registry) == [
        ': the table names no plugin: add plugin = "..."; there are: AdamW, Capped, GridOptim'
    ]


@pytest.mark.parametrize("value", [5, [], True, ["AdamW"]])
def test_a_choice_is_a_name_or_a_table(registry, value):
    expected = f": expected a name, or a table with plugin = ..., got {shown(value)}"
    assert problems(value, OptimizerChoice, registry) == [expected]
    assert problems({"plugin": value}, OptimizerChoice, registry) == [
        f"plugin: expected a name, got {shown(value)}"
    ]


def test_an_unknown_plugin_is_blamed_on_the_name(registry):
    message = "no optimizer named 'adamw' is installed; did you mean 'AdamW'?"
    assert problems("adamw", OptimizerChoice, registry) == [f": {message}"]
    assert problems({"plugin": "adamw", "lr": 1}, OptimizerChoice, registry) == [f"plugin: {message}"]


def test_a_choice_inside_of_options_is_structured_too(registry):
    value = {"plugin": "GridOptim", "stiffness": {"plugin": "scaled", "factor": 3}}
    chosen = read(value, OptimizerChoice, registry).options.stiffness
    assert (chosen.plugin, chosen.options.factor) == ("scaled", 3.0)
    value["stiffness"]["factor"] = "x"
    assert problems(value, OptimizerChoice, registry) == ["stiffness.factor: expected a number, got 'x'"]


def test_a_format_table_without_plugin_is_exmy(registry):
    chosen = read({"exponent_bits": 4, "mantissa_bits": 3}, FormatChoice, registry)
    assert (chosen.plugin, chosen.options.exponent_bits) == ("ExMy", 4)
    assert problems({"exponent_bits": 4}, FormatChoice, registry) == [
        "mantissa_bits: is required and missing"
    ]


@pytest.mark.parametrize("value", ["FP32", "none", {"plugin": "FP32"}, {"plugin": "none"}])
def test_fp32_and_none_mean_the_same(registry, value):
    chosen = read(value, FormatChoice, registry)
    assert chosen == FormatChoice("FP32")
    assert chosen.unquantized
    assert chosen.plain() == "FP32"


def test_fp32_has_no_options(registry):
    assert problems({"plugin": "none", "bits": 8}, FormatChoice, registry) == [
        "bits: unknown key 'bits'; none has no options"
    ]


def test_fp32_is_suggested_for_fp_32(registry):
    (problem,) = problems("fp32", FormatChoice, registry)
    assert problem.endswith("did you mean 'FP32'?")
    assert problem.count("did you mean") == 1


def test_a_name_with_two_owners_is_an_error_until_it_is_qualified(registered):
    both = [registered("optimizer", "AdamW", distribution=name) for name in ("one", "two")]
    registry = Registry(registered=tuple(both))
    (problem,) = problems("AdamW", OptimizerChoice, registry)
    assert 'plugin = "one:AdamW" or plugin = "two:AdamW"' in problem
    assert read("two:AdamW", OptimizerChoice, registry).plugin == "two:AdamW"


# --- back to TOML ------------------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Point:
    """A class that is written in two ways."""

    x: float = 0.0
    y: float = 0.0

    @classmethod
    def from_plain(cls, value):
        if isinstance(value, str):
            if value != "origin":
                raise ValueError(f"no point is called {value!r}")
            return cls()
        return value


@attrs.frozen(kw_only=True)
class Everything:
    point: Point = Point(x=1.0)
    points: tuple[Point, ...] = ()
    maybe: int | None = None
    word: Literal["auto", True, False] = True
    pair: tuple[float, float] = (0.5, 2.0)
    stiffness: StiffnessChoice = StiffnessChoice("grid")
    format: FormatChoice | None = None


def test_a_class_with_from_plain_is_written_in_two_ways():
    assert read({"point": "origin"}, Everything).point == Point()
    assert read({"point": {"y": 2}}, Everything).point == Point(y=2.0)
    assert problems({"point": "here"}, Everything) == ["point: no point is called 'here'"]
    assert problems({"points": ["origin", {"z": 1}]}, Everything) == [
        "points.1.z: unknown key 'z'; the keys are: x, y"
    ]


def test_what_is_left_out_is_not_written():
    assert "maybe" not in plain(Everything())


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"maybe": 3, "word": "auto", "pair": [1, 2], "points": ["origin", {"x": 1}]},
        {"stiffness": {"plugin": "scaled", "factor": 0.5}, "format": "E5M2"},
        {"format": {"exponent_bits": 3, "mantissa_bits": 4}},
        {"format": "none"},
    ],
)
def test_plain_options_can_be_read_again(registry, value):
    first = read(value, Everything, registry)
    again = read(plain(first), Everything, registry)
    assert plain(again) == plain(first)
    assert read(plain(again), Everything, registry) == again


@given(
    st.builds(
        Options,
        text=st.text(),
        truth=st.booleans(),
        whole=st.integers(1 - 2**63, 2**63 - 1),
        number=st.floats(allow_nan=False, allow_infinity=False),
        many=st.lists(st.text()).map(tuple),
        mixed=st.sampled_from(["auto", True, False]),
        maybe=st.none() | st.integers(-5, 5),
        either=st.integers(-5, 5) | st.text(),
    )
)
def test_options_survive_plain_and_structure(options):
    assert read(plain(options)) == options


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "true"),
        (3, "3"),
        (1e-08, "1e-08"),
        ('a "b" é', '"a \\"b\\" é"'),
        ((1.0, 2.0), "[1.0, 2.0]"),
        (Point(x=1.0), "{x = 1.0, y = 0.0}"),
        (StiffnessChoice("grid"), '{plugin = "grid", refresh = "step"}'),
        (FormatChoice("E5M2"), '"E5M2"'),
    ],
)
def test_values_are_written_as_toml(value, text):
    assert written(value) == text
