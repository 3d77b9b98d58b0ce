"""Overrides: keys and values of `--set`, and what a change of one value does to a tree of tables."""

import pytest

from altgrad_core.overrides import Origin, Override, Tree, from_flag, from_table, is_deep, spelled, split
from altgrad_core.registry import UsageError


def tree(data, *overrides):
    made = Tree(data)
    made.apply([Override(split(key), value, Origin((key,))) for key, value in overrides])
    return made


# --- keys and values ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("steps", ("steps",)),
        ("quantize.format", ("quantize", "format")),
        ("quantize.rule.0.format", ("quantize", "rule", 0, "format")),
        ('a."b.c".d', ("a", "b.c", "d")),
        ("a.'b.c'", ("a", "b.c")),
        ("bare-key.with_all", ("bare-key", "with_all")),
    ],
)
def test_a_key_is_split_as_toml_does(key, path):
    assert split(key) == path


@pytest.mark.parametrize(
    "key", ["", ".", "a.", ".a", "a..b", "a b", "a.'b", "a\nb", "a.\nb", '""', 'a""', "a/b"]
)
def test_what_is_no_key_is_refused(key):
    with pytest.raises(ValueError, match="is no dotted key"):
        split(key)


def test_a_key_of_very_many_steps_is_refused():
    with pytest.raises(ValueError, match="more than 20 steps"):
        split(".".join("a" * 5000))


def test_digits_that_are_no_position_stay_text():
    assert split("a.²") == ("a", "²")
    assert split("a." + "9" * 5000) == ("a", "9" * 5000)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=20", 20),
        ("a=1e-3", 1e-3),
        ("a=true", True),
        ('a="x y"', "x y"),
        ("a='x=y'", "x=y"),
        ("a=[1, 2]", [1, 2]),
        ('a={plugin = "X", lr = 1}', {"plugin": "X", "lr": 1}),
        ("a=E5M2", "E5M2"),
        ("a=dist:AdamW", "dist:AdamW"),
        ("a=../data/x.txt", "../data/x.txt"),
        (" a = 20 ", 20),
        ("a=True", "True"),
    ],
)
def test_the_value_of_a_flag_is_toml_or_a_bare_word(text, value):
    override = from_flag(text)
    assert override.path == ("a",)
    assert override.value == value
    assert type(override.value) is type(value)
    assert override.origin.flag == f"--set {text}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps", "--set steps: expected key=value, such as steps=20 or quantize.format=E5M2"),
        ("", "--set : expected key=value"),
        ("=3", "--set =3: expected key=value"),
        ("a=", "--set a=: '' is neither a TOML value nor a bare word; put text in quotes"),
        ("a=x y", "--set a=x y: 'x y' is neither a TOML value nor a bare word"),
        ("a=[1", "--set a=[1: '[1' is neither"),
        ("a=1\nb = 2", "--set a=1\nb = 2: '1\\nb = 2' is neither"),
        ("a..b=1", "--set a..b=1: 'a..b' is no dotted key"),
    ],
)
def test_a_flag_that_cannot_be_read_says_what_was_expected(text, message):
    with pytest.raises(UsageError) as caught:
        from_flag(text)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("levels", [30, 5000])
def test_a_value_that_is_nested_too_deeply_is_refused(levels):
    with pytest.raises(UsageError, match=r"nested more than 20 levels|neither a TOML value"):
        from_flag(f"a={'[' * levels}{']' * levels}")


def test_an_integer_too_long_to_be_read_is_a_bare_word():
    assert from_flag(f"a={'9' * 5000}").value == "9" * 5000


def test_nesting_is_measured_without_end():
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert is_deep(nested)
    assert not is_deep({"a": [{"b": [1, 2, {"c": 3}]}]})


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (("steps",), "steps"),
        (("quantize", "rule", 0, "format"), "quantize.rule[0].format"),
        (("a", "b.c"), 'a."b.c"'),
        (("a\nb", 'q"'), '"a\\nb"."q\\""'),
    ],
)
def test_a_path_is_spelled_for_a_person(path, text):
    assert spelled(path) == text


# --- what an override does ---------------------------------------------------------------------------


def test_a_value_is_replaced_and_missing_tables_are_made():
    assert tree({"a": 1}, ("a", 2), ("b.c", 3)).data == {"a": 2, "b": {"c": 3}}


def test_the_last_of_two_wins():
    assert tree({}, ("a", 1), ("a", 2)).data == {"a": 2}


def test_a_new_plugin_drops_the_options_of_the_old_one():
    assert tree({"o": {"plugin": "A", "lr": 1}}, ("o.plugin", "B")).data == {"o": {"plugin": "B"}}


def test_the_same_plugin_again_drops_nothing():
    assert tree({"o": {"plugin": "A", "lr": 1}}, ("o.plugin", "A")).data == {"o": {"plugin": "A", "lr": 1}}


def test_options_of_the_new_plugin_are_kept_in_any_order():
    data = {"o": {"plugin": "A", "lr": 1}}
    assert tree(data, ("o.scale", 2), ("o.plugin", "B")).data == {"o": {"plugin": "B", "scale": 2}}


def test_a_whole_table_goes_before_a_key_of_it():
    assert tree({}, ("o.lr", 2), ("o", {"plugin": "A", "lr": 1})).data == {"o": {"plugin": "A", "lr": 2}}


def test_a_new_data_set_keeps_the_tokenizer_and_the_windows():
    data = {"data": {"plugin": "A", "path": "x", "tokenizer": "bytes", "windows": 2}}
    kept = {"tokenizer": "bytes", "windows": 2, "plugin": "B"}
    assert tree(data, ("data.plugin", "B")).data == {"data": kept}


def test_a_tokenizer_elsewhere_is_an_option_like_any_other():
    assert tree({"o": {"plugin": "A", "tokenizer": 1}}, ("o.plugin", "B")).data == {"o": {"plugin": "B"}}


def test_a_plugin_at_the_top_is_a_key_like_any_other():
    assert tree({"steps": 1}, ("plugin", "A")).data == {"steps": 1, "plugin": "A"}


def test_an_element_of_a_list_is_reached_by_its_position():
    data = {"rule": [{"format": "A"}, {"format": "B"}]}
    assert tree(data, ("rule.1.format", "C")).data == {"rule": [{"format": "A"}, {"format": "C"}]}


def test_digits_are_a_key_in_a_table():
    assert tree({"a": {}}, ("a.0", 1)).data == {"a": {"0": 1}}
    assert tree({}, ("7.b", 1)).data == {"7": {"b": 1}}


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("rule.2.format", "cannot be set: rule[2] is no table or list element of the file"),
        ("rule.2", "cannot be set: the list has 1 elements, counted from 0"),
        ("rule.format", "cannot be set: the list has 1 elements, counted from 0"),
        ("rule.plugin", "cannot be set: the list has 1 elements, counted from 0"),
        ("rule.x.format", "cannot be set: rule.x is no table or list element of the file"),
        ("steps.more", "cannot be set: steps is no table or list element of the file"),
    ],
)
def test_a_value_that_has_no_place_is_a_problem(key, message):
    made = tree({"rule": [{}], "steps": 1}, (key, 1))
    assert [problem.message for problem in made.problems] == [message]
    assert made.data == {"rule": [{}], "steps": 1}
    assert made.origin(made.problems[0].path).path == (key,)


def test_a_copy_shares_nothing_with_its_original():
    first = tree({"a": {"b": [1]}})
    second = first.copy()
    second.apply([Override(("a", "b", 0), 2, Origin())])
    assert first.data == {"a": {"b": [1]}}
    assert not first.origins


def test_the_value_of_an_override_is_not_shared_between_cells():
    value = {"plugin": "A"}
    tree({}, ("o", value), ("o.lr", 1))
    assert value == {"plugin": "A"}


# --- tables of overrides -----------------------------------------------------------------------------


def test_nested_tables_are_overrides_key_by_key():
    table = {"steps": 3, "model.n_layer": 4, "train": {"batch_size": 2, "freeze": ["a"]}, "x": {}}
    assert [(one.path, one.value, one.origin.path) for one in from_table(table, ("on", "cpu"))] == [
        (("steps",), 3, ("on", "cpu", "steps")),
        (("model", "n_layer"), 4, ("on", "cpu", "model.n_layer")),
        (("train", "batch_size"), 2, ("on", "cpu", "train", "batch_size")),
        (("train", "freeze"), ["a"], ("on", "cpu", "train", "freeze")),
        (("x",), {}, ("on", "cpu", "x")),
    ]


# --- where a value was written -----------------------------------------------------------------------


def test_what_was_not_overridden_is_where_the_file_has_it():
    assert tree({"a": {"b": 1}}).origin(("a", "b")) == Origin(("a", "b"))


def test_an_overridden_value_is_where_its_override_is():
    made = tree({"a": {"b": 1}}, ("a.b", 2))
    assert made.origin(("a", "b")).path == ("a.b",)
    assert made.origin(("a", "c")).path == ("a", "c")


def test_what_is_inside_of_an_overridden_table_is_inside_of_the_override():
    assert tree({}, ("o", {"lr": 1})).origin(("o", "lr")).path == ("o", "lr")


def test_a_later_override_of_the_table_takes_the_place_of_one_of_its_keys():
    made = tree({}, ("o.lr", 1))
    made.apply([Override(("o",), {"lr": 2}, Origin(flag="--set o={lr=2}"))])
    assert made.origin(("o", "lr")).flag == "--set o={lr=2}"


def test_what_a_new_plugin_lacks_is_blamed_on_the_new_plugin():
    made = tree({"o": {"plugin": "A", "lr": 1}}, ("o.lr", 2))
    made.apply([Override(("o", "plugin"), "B", Origin(flag="--set o.plugin=B"))])
    assert made.origin(("o", "path")).flag == made.origin(("o", "lr")).flag == "--set o.plugin=B"


def test_a_tokenizer_that_survives_is_still_where_it_was_written():
    made = tree({"data": {"plugin": "A"}}, ("data.tokenizer", "bytes"))
    made.apply([Override(("data", "plugin"), "B", Origin(flag="--set data.plugin=B"))])
    assert made.origin(("data", "tokenizer")).path == ("data.tokenizer",)


def test_a_tree_leaves_the_tables_it_was_made_of_alone():
    raw = {"model": {"n_layer": 6}}
    tree = Tree(raw)
    tree.apply([Override(("model", "n_layer"), 4, Origin(("on", "cpu", "model.n_layer")))])
    assert (raw, tree.data) == ({"model": {"n_layer": 6}}, {"model": {"n_layer": 4}})
