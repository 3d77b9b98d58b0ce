"""The locator against hand-counted lines, and against generated files whose lines the generator knows."""

import datetime
import random

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad_core.locator import lines, locate


def test_keys_stand_under_their_table():
    text = "a = 1\n\n[b]  # a table\nc = 2\n"
    assert lines(text) == {("a",): 1, ("b",): 3, ("b", "c"): 4}


def test_an_empty_file_has_no_positions():
    assert lines("") == lines("# only a comment") == lines("\n \n") == {}


def test_a_quoted_key_with_a_dot_is_one_component():
    text = '[on.cpu]\n"model.n_layer" = 4\n\'a.b\'."c\\u0064" = 1\n'
    assert lines(text) == {
        ("on",): 1,
        ("on", "cpu"): 1,
        ("on", "cpu", "model.n_layer"): 2,
        ("on", "cpu", "a.b"): 3,
        ("on", "cpu", "a.b", "cd"): 3,
    }


def test_intermediate_tables_are_where_they_are_first_mentioned():
    text = "a . b.c = 1\na.b.d = 2\na.e = 3\n"
    assert lines(text) == {("a",): 1, ("a", "b"): 1, ("a", "b", "c"): 1, ("a", "b", "d"): 2, ("a", "e"): 3}


def test_a_table_with_a_header_is_at_its_header_though_a_sub_table_came_first():
    assert lines("[a.b]\n[a]\n") == {("a",): 2, ("a", "b"): 1}


def test_table_arrays_count_their_elements():
    text = "[[q.rule]]\nformat = 1\n\n[[ q . rule ]]\nformat = 2\n"
    assert lines(text) == {
        ("q",): 1,
        ("q", "rule"): 1,
        ("q", "rule", 0): 1,
        ("q", "rule", 0, "format"): 2,
        ("q", "rule", 1): 4,
        ("q", "rule", 1, "format"): 5,
    }


def test_a_sub_table_belongs_to_the_last_element():
    text = "[[a.b]]\n[a.b.c]\nx = 1\n[[a.b]]\n[a.b.c]\n[[a.b.d]]\n[[a.b.d]]\ny = 2\n"
    found = lines(text)
    assert found["a", "b", 0, "c"] == 2
    assert found["a", "b", 0, "c", "x"] == 3
    assert found["a", "b", 1, "c"] == 5
    assert found["a", "b", 1, "d", 0] == 6
    assert found["a", "b", 1, "d", 1, "y"] == 8
    assert len(found) == 11


def test_arrays_of_inline_tables_over_several_lines():
    text = (
        "[grid]\noptimizer = [ # arms\n  {plugin = 'A', lr = 1},\n\n  {plugin = 'B',\n lr.x = [1,\n2]},\n]\n"
    )
    found = lines(text)
    assert found["grid", "optimizer"] == 2
    assert found["grid", "optimizer", 0] == found["grid", "optimizer", 0, "lr"] == 3
    assert found["grid", "optimizer", 1] == found["grid", "optimizer", 1, "plugin"] == 5
    assert found["grid", "optimizer", 1, "lr", "x", 0] == 6
    assert found["grid", "optimizer", 1, "lr", "x", 1] == 7


@pytest.mark.parametrize(
    "value",
    [
        '"""\n[fake]\nkey = \'\'\'\n"""',
        "'''\n[fake]\nkey = \"\"\"\n'''",
        '"""\\"""\n]"""',
        '"""two more""\n""quotes"""""',
        "'''two more''\n''quotes'''''",
        '""',
        "''",
        '""""""',
        r'"a \" # \\"',
        r"'C:\'",
        "1979-05-27 07:32:00",
        "1979-05-27T07:32:00.5+01:00",
        "07:32:00",
        "-1_000.5e-3",
        "0xdead_beef",
        "inf",
        "[[],[[1],{}],]",
        "[ # ] \n ']' ]",
        "{ }",
    ],
)
def test_the_line_after_a_value_is_counted_right(value):
    text = f"a = {value}\nb = [{value}, {value}]\nend = 1\n"
    tomli.loads(text)
    assert lines(text)["end",] == text.count("\n")
    assert not {"fake", "key"} & {part for path in lines(text) for part in path}


def test_windows_line_ends_count_once():
    assert lines("a = 1\r\n\r\n[b]\r\nc = '''\r\n'''\r\nd = 2") == {
        ("a",): 1,
        ("b",): 3,
        ("b", "c"): 4,
        ("b", "d"): 6,
    }


def test_the_deepest_nesting_that_tomli_takes_is_located():
    depth = 399
    text = "a = " + "[\n" * depth + "]" * depth
    tomli.loads(text)
    assert lines(text)[("a", *[0] * (depth - 1))] == depth


def test_a_missing_path_is_at_its_nearest_ancestor():
    positions = lines("\n[a]\nb = {c = 1}\n")
    assert locate(positions, ("a", "b", "c")) == 3
    assert locate(positions, ("a", "missing", 0, "x")) == 2
    assert locate(positions, ("missing",)) == 1
    assert locate(positions, ()) == 1


# --- generated files ---------------------------------------------------------------------------------

names = st.sampled_from(["a", "b", "c-d", "1", "", "e.f", 'g"h', "i'j", "k#l", "m\nn", "ö=", "[o]"])
texts = st.text(st.sampled_from(list("ab\"'\\#=[]{},\n\t é.")), max_size=12)
moments = st.datetimes(timezones=st.sampled_from([None, datetime.UTC]))
numbers = st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.booleans()
scalars = (
    texts | numbers | moments | moments.map(datetime.datetime.date) | moments.map(datetime.datetime.time)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(names, values | st.lists(st.dictionaries(names, values, max_size=3)), max_size=5)


class Writer:
    """Writes data as TOML in spellings chosen by `random`, noting the line on which each path is written."""

    def __init__(self, choices: random.Random) -> None:
        self.text = ""
        self.truth: dict[tuple[str | int, ...], int] = {}
        self.choices = choices

    def note(self, path, line=None):
        self.truth.setdefault(path, line or self.text.count("\n") + 1)

    def one_of(self, *options):
        return self.choices.choice(options)

    def blank(self):
        return self.one_of("", "", " ", "\t ")

    def gap(self):
        """Return what may stand between the parts of an array or of an inline table."""
        return self.one_of("", "", " ", "\n", ' # ] } [x] = "\n', "\n\n\t")

    def end_line(self):
        self.text += (
            self.blank() + self.one_of("", "", "# [x] = ''' \"") + self.one_of("\n", "\n", "\n \n# a = 1\n")
        )

    def string(self, value, multiline=True):
        escaped = "".join(f"\\u{ord(c):04x}" if c in '"\\\n\t' else c for c in value)
        spellings = [f'"{escaped}"']
        if not set(value) & set("'\n"):
            spellings.append(f"'{value}'")
        if multiline:
            body = value.replace("\\", "\\\\").replace('"""', '""\\"')
            spellings.append(f'"""\n{body}"""')
            if not value.startswith(" "):  # a backslash at the end of a line swallows the blanks that follow
                spellings.append(f'"""\\\n  \n{escaped}"""')
            if "'''" not in value:
                spellings.append(f"'''\n{value}'''")
        return self.one_of(*spellings)

    def key(self, parts):
        bare = [
            self.one_of(p, f'"{p}"') if p in ("a", "b", "c-d", "1") else self.string(p, False) for p in parts
        ]
        return (self.blank() + "." + self.blank()).join(bare)

    def scalar(self, value):
        match value:
            case bool():
                return str(value).lower()
            case int():
                return self.one_of(f"{value:_}", hex(value) if value >= 0 else str(value))
            case float():
                return repr(value)
            case datetime.datetime():
                return value.isoformat(self.one_of("T", " "))
            case datetime.date() | datetime.time():
                return value.isoformat()
        return self.string(value)

    def pair(self, table, parts, value):
        for length in range(1, len(parts) + 1):
            self.note((*table, *parts[:length]))
        self.text += self.key(parts) + self.blank() + "=" + self.blank()
        self.value((*table, *parts), value)

    def value(self, path, value):
        if not isinstance(value, dict | list):
            self.text += self.scalar(value)
            return
        self.text += "[" if isinstance(value, list) else "{"
        items = list(enumerate(value)) if isinstance(value, list) else self.dotted(value)
        for number, (name, item) in enumerate(items):
            self.text += ("," if number else "") + self.gap()
            if isinstance(value, list):
                self.note((*path, name))
                self.value((*path, name), item)
            else:
                self.pair(path, name, item)
        self.text += self.gap() + (self.one_of("", ",") if items else "") + self.gap()
        self.text += "]" if isinstance(value, list) else "}"

    def dotted(self, table):
        """Return (key parts, value) pairs; some sub-tables are taken apart into dotted keys."""
        pairs = []
        for name, value in table.items():
            if isinstance(value, dict) and value and self.one_of(True, False):
                pairs += [((name, *parts), inner) for parts, inner in self.dotted(value)]
            else:
                pairs.append(((name,), value))
        self.choices.shuffle(pairs)
        return pairs

    def header(self, path, brackets):
        name = [part for part in path if isinstance(part, str)]
        self.text += (
            self.blank() + "[" * brackets + self.blank() + self.key(name) + self.blank() + "]" * brackets
        )
        self.end_line()

    def table(self, path, table):
        """Write the body of a table: its own pairs, then those sub-tables that get headers."""
        with_header = {n for n, v in table.items() if is_table_like(v) and self.one_of(True, True, False)}
        for parts, value in self.dotted({n: v for n, v in table.items() if n not in with_header}):
            self.text += self.blank()
            self.pair(path, parts, value)
            self.end_line()
        for name in sorted(with_header):
            self.sub_table((*path, name), table[name])

    def sub_table(self, path, value):
        line = self.text.count("\n") + 1
        if isinstance(value, list):
            for index, element in enumerate(value):
                for known in (*ancestors(path), path, (*path, index)):
                    self.note(known)
                self.header(path, 2)
                self.table((*path, index), element)
            return
        is_implied = (
            value and all(isinstance(v, dict) and v for v in value.values()) and self.one_of(True, False)
        )
        if is_implied:  # only its sub-tables have headers, which mention it
            for name, inner in value.items():
                self.sub_table((*path, name), inner)
            return
        for known in ancestors(path):
            self.note(known)
        self.truth[path] = line
        self.header(path, 1)
        self.table(path, value)


def ancestors(path):
    return [path[:length] for length in range(1, len(path))]


def is_table_like(value):
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(element, dict) for element in value)
    )


@settings(max_examples=60, deadline=None)
@given(documents, st.randoms(use_true_random=False), st.booleans())
def test_every_path_of_a_generated_file_is_on_its_line(document, choices, windows):
    writer = Writer(choices)
    writer.table((), document)
    text = writer.text.replace("\n", "\r\n") if windows else writer.text
    assert tomli.loads(text) == document
    assert lines(text) == writer.truth
