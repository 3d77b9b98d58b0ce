"""Whatever is in an experiment file: it loads, or every line of the error says where the mistake is."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from altgrad_core.experiment_file import ExperimentError, load_experiment

VALID = """\
name = "e"
seed = 3
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

VALUES = [
    *("true", "0", "-1", "2.7", "1e400", "nan", "-inf", "9223372036854775808", "0x" + "f" * 5000),
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


def test_the_file_that_is_mutated_is_right(registry, tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(VALID)
    assert len(load_experiment(path, registry=registry).cells_on["cpu"]) == 4


@settings(max_examples=150, deadline=None)
@given(mutations=st.lists(mutation, max_size=4), flags=st.lists(flag, max_size=2))
def test_a_mutated_file_loads_or_every_line_of_its_error_has_a_place(
    tmp_path_factory, registry, mutations, flags
):
    text = VALID
    for change, index, new in mutations:
        text = change(text, index, new)
    path = tmp_path_factory.getbasetemp() / "fuzz.toml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    try:
        file = load_experiment(path, flags, registry)
    except ExperimentError as error:
        for line in error.lines:
            assert re.match(rf"{re.escape(str(path))}:\d+: |--set ", line)
            assert len(line.splitlines()) == 1
    else:
        assert file.cells_on["cpu"]
        assert file.cells_on["cuda"]
