"""Whatever is in an experiment file: it loads, or every line of the error says where the mistake is."""

import contextlib
import io
import pathlib
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from altgrad_core.apps import guarded, run_app
from altgrad_core.experiment_file import ExperimentError, load_experiment

CPU_SECONDS = 1.0
"""A file may take so long at most."""

SHIPPED = [
    path.read_text() for path in sorted((pathlib.Path(__file__).parents[2] / "experiments").glob("*.toml"))
]

VALID = """\
name = "e"
seed = 3
init_from = "runs/e/run"
[data]
plugin = "markov"
order = 2
tokenizer = "bytes"
[model]
n_layer = 2
n_head = 2
n_embd = 32
[train]
batch_size = 4
freeze = ['.*wte.*', ".*wpe.*"]
compile = "auto"
init_format = {exponent_bits = 4, mantissa_bits = 3}
[quantize]
format = {exponent_bits = 4, mantissa_bits = 3}
storage = "grid"
bound = 8.0
[[quantize.rule]]
layers = '.*attn.*'
format = "E3M4"
[[quantize.rule]]
layers = 'lm_head'
storage = "master"
[optimizer]
plugin = "GridOptim"
stiffness = {plugin = "scaled", factor = 2}
[[monitor]]
plugin = "flip"
every = 5
[[fallback]]
plugin = "nan_guard"
[on.cpu]
"model.n_layer" = 1
train.batch_size = 2
[grid]
"quantize.format" = ["E5M2", {exponent_bits = 3, mantissa_bits = 4}]
optimizer = [{plugin = "AdamW", lr = 1e-3}, "GridOptim"]
"""

LONG_NUMBER = "0x" + "f" * 5000
"""Python refuses to write it in decimal."""

VALUES = [
    *("true", "0", "-1", "2.7", "1e400", "nan", "-inf", "9223372036854775808", LONG_NUMBER),
    *('""', '"FP32"', '"none"', '"false"', '"a:b"', '"\\u0000"', "'('", "'.*'", '"""\n"""', "1979-05-27"),
    *("[]", "[[]]", "[1, true]", '["E5M2"]', "{}", "{plugin = 5}", '{plugin = "flip"}', "{a.b.c = 1}"),
    *("[" * 15 + "]" * 15, "[" * 60 + "]" * 60, "{x = " * 40 + "1" + "}" * 40, "1 2", "", "[", '"'),
]
KEYS = [
    *("x", "name", "steps", "on", "grid", "on.cpu.name", "grid.seed", "data", "data.source", "plugin", "0"),
    *('"a b"', '"a.b"', '"\\n"', "''", '"é"', "quantize.rule", "model.n_embd.x", "on.gpu", "a." * 50 + "a"),
]
LINES = [
    *("[x]", "[[x]]", "[on]", "[on.cuda]", "[[grid]]", "[[quantize.rule]]", "[grid.model]", "[[data]]", "]"),
    *("[model]", "[on.cpu.model]", "[a.b.c.d]", "=", "# \x00", "\t", "x = '''", "\ufeff", "name"),
]

value = (
    st.sampled_from(VALUES) | st.text(max_size=8).map(repr) | st.integers().map(str) | st.floats().map(str)
)
key = st.sampled_from(KEYS) | st.sampled_from(re.findall(r"^[\w.\"]+(?= =)", VALID, re.MULTILINE))
anywhere = st.integers(0, len(VALID))


def with_value(text, index, new):
    assignments = list(re.finditer(r"(?<= = ).*$", text, re.MULTILINE))
    if not assignments:
        return text
    at = assignments[index % len(assignments)]
    return text[: at.start()] + new + text[at.end() :]


def with_line(text, index, new):
    lines = text.split("\n")
    lines.insert(index % (len(lines) + 1), new)
    return "\n".join(lines)


def without_line(text, index, count):
    lines = text.split("\n")
    at = index % len(lines)
    return "\n".join(lines[:at] + lines[at + count :])


def with_text(text, index, new):
    at = index % (len(text) + 1)
    return text[:at] + new + text[at:]


mutation = st.one_of(
    st.tuples(st.just(with_value), anywhere, value),
    st.tuples(st.just(with_line), anywhere, st.tuples(key, value).map(" = ".join)),
    st.tuples(st.just(with_line), anywhere, st.sampled_from(LINES)),
    st.tuples(st.just(without_line), anywhere, st.integers(1, 3)),
    st.tuples(st.just(with_text), anywhere, st.text(max_size=3)),
    st.tuples(st.just(lambda text, index, _: text[:index]), anywhere, st.none()),
)
flag = st.tuples(key, value).map("=".join) | st.text(max_size=8)

ENCODINGS = [*["utf-8"] * 6, "utf-8-sig", "utf-16", "utf-32", "utf-7", "cp500", "latin-1"]
BYTES = [b"\0", b"\xff", b"\xc3", b"\x1a", b"\r", b"\n\n", b"\xef\xbb\xbf", b"", b"'''", b"\x00" * 9000]
damage = st.none() | st.tuples(st.integers(0, 5000), st.integers(0, 40), st.sampled_from(BYTES))
"""Where bytes are replaced, how many, and by which."""


def mutated(text, mutations):
    for change, index, new in mutations:
        text = change(text, index, new)
    return text


def damaged(whole, harm):
    if harm is None:
        return whole
    at, count, new = harm
    at %= len(whole) + 1
    return whole[:at] + new + whole[at + count :]


def test_the_file_that_is_mutated_is_right(registry, tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(VALID)
    assert len(load_experiment(path, registry=registry).cells_on["cpu"]) == 4


@settings(max_examples=150, deadline=None)
@example(mutations=[(with_line, VALID[: VALID.index("[grid]")].count("\n"), f"x = {LONG_NUMBER}")], flags=[])
@example(mutations=[], flags=[f"steps={LONG_NUMBER}"])
@given(mutations=st.lists(mutation, max_size=4), flags=st.lists(flag, max_size=2))
def test_a_mutated_file_loads_or_every_line_of_its_error_has_a_place(
    tmp_path_factory, registry, mutations, flags
):
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(mutated(VALID, mutations).encode(errors="surrogatepass"))
    try:
        file = load_experiment(path, flags, registry)
    except ExperimentError as error:
        for line in error.lines:
            assert re.match(rf"{re.escape(str(path))}:\d+: |--set ", line)
            assert len(line.splitlines()) == 1
    else:
        assert file.cells_on["cpu"]
        assert file.cells_on["cuda"]


def checked(path):
    """Return the exit code of `altgrad-run FILE --check`, what it printed, its errors, its CPU seconds."""
    out, errors = io.StringIO(), io.StringIO()
    began = time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = guarded(run_app, [str(path), "--check"])
    return code, out.getvalue(), errors.getvalue(), time.process_time() - began


def damaged_files(count):
    """Return the test of so many damaged files: shipped ones, with the options of the installed plugins."""

    @settings(max_examples=count, deadline=None)
    @given(
        text=st.sampled_from(SHIPPED),
        mutations=st.lists(mutation, max_size=3),
        encoding=st.sampled_from(ENCODINGS),
        harm=damage,
    )
    def test(tmp_path_factory, text, mutations, encoding, harm):
        path = tmp_path_factory.getbasetemp() / "fuzz.toml"
        handler = "surrogatepass" if encoding in ("utf-8", "utf-16", "utf-32") else "replace"
        path.write_bytes(damaged(mutated(text, mutations).encode(encoding, handler), harm))
        code, out, errors, seconds = checked(path)
        assert (code, bool(out), bool(errors)) in ((0, True, False), (2, False, True))
        assert seconds < CPU_SECONDS
        for line in errors.splitlines():
            assert re.match(rf"{re.escape(str(path))}:\d+: ", line)

    return test


test_the_command_checks_a_damaged_file_or_refuses_it_by_its_lines_within_a_second = damaged_files(100)
test_it_does_so_with_a_thousand = pytest.mark.slow(damaged_files(1000))
