"""Experiment files: precedence, grids, and every mistake at its line."""

import re

import attrs
import pytest
import torch

from altgrad_core import scaling
from altgrad_core.contradictions import contradictions
from altgrad_core.experiment import Experiment, TrainOptions
from altgrad_core.experiment_file import ExperimentError, load_experiment
from altgrad_core.format_uses import NEVER_SCALED, held_by_bfloat16
from altgrad_core.options import FormatChoice


def in_cells(file, value, device="cpu"):
    """Return the value of each cell, by the cell's name."""
    return {cell.name: value(cell.experiment) for cell in file.cells_on[device]}


# --- reading -----------------------------------------------------------------------------------------


def test_a_file_with_only_a_name_is_one_run_with_all_defaults(experiment_at):
    file = experiment_at('name = "e"')
    (cell,) = file.cells_on["cpu"]
    assert (cell.name, file.name, cell.in_force) == ("run", "e", ())
    chosen = {"data": cell.experiment.data, "optimizer": cell.experiment.optimizer}
    assert cell.experiment == Experiment(name="e", **chosen)
    assert (chosen["data"].source.plugin, chosen["optimizer"].plugin) == ("licenses", "AdamW")
    assert file.cells_on["cuda"] == file.cells_on["cpu"]


def test_what_resolved_options_say_is_a_file_that_gives_them_again(experiment):
    first = experiment(
        """
        name = "e"
        data = {plugin = "markov", order = 1}
        quantize = {format = {exponent_bits = 4, mantissa_bits = 3}, storage = "grid"}
        optimizer = {plugin = "GridOptim", stiffness = "scaled"}
        monitor = ["flip", {plugin = "stall", every = 5}]
        train.freeze = ['.*wte.*']
        """
    )
    again = experiment("name = 'x'", *(f"{key}={toml(value)}" for key, value in first.plain().items()))
    assert again.plain() == first.plain()


def toml(value):
    from altgrad_core.options import written

    return written(value)


def test_plugins_can_be_named_without_a_table(experiment):
    found = experiment('name = "e"\noptimizer = "GridOptim"\ndata = "markov"\nmonitor = ["flip", "stall"]')
    assert found.optimizer.plugin == "GridOptim"
    assert (found.data.source.plugin, found.data.vocab_size) == ("markov", 16)
    assert [one.plugin for one in found.monitor] == ["flip", "stall"]


def test_data_and_optimizer_have_a_default_plugin(experiment):
    assert experiment('name = "e"\ndata.tokenizer = "bytes"').data.source.plugin == "licenses"
    assert experiment('name = "e"\noptimizer.lr = 3').optimizer.options.lr == 3.0
    assert experiment('name = "e"', "optimizer.lr=3", "optimizer.plugin=AdamW").optimizer.options.lr == 3.0
    assert experiment('name = "e"\noptimizer.lr = 3', "optimizer.plugin=AdamW").optimizer.options.lr == 3.0


def test_the_text_is_kept_as_it_was_written(experiment_at):
    text = '# é\nname = "e"\n'
    assert experiment_at(text).text == text


def test_a_byte_order_mark_is_passed_over(tmp_path, registry):
    path = tmp_path / "e.toml"
    path.write_bytes(b'\xef\xbb\xbfname = "e"\r\n')
    assert load_experiment(path, registry=registry).name == "e"


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        (b'name = "e"\nsteps = \n', 2, "is no TOML: Invalid value"),
        (b'name = "e"\nsteps = 1\nsteps = 2\n', 3, "is no TOML: Cannot overwrite a value"),
        (b'name = "e"\n\nx = """abc\n', 4, "is no TOML: Unterminated string"),
        (b'name = "e"\nx = "\xff"\n', 2, "is not UTF-8 text: invalid start byte; save it as UTF-8"),
        (b'name = "e\x00"\n', 1, "is no TOML: Illegal character '\\x00'"),
        (b"\x00" * 100, 1, "is no TOML: Invalid statement"),
        (b'name = "e"\rsteps = 1', 1, "is no TOML: "),
        (b'name = "e"\nx = ' + b"9" * 5000, 1, "is no TOML that can be read: Exceeds the limit"),
        (b'name = "e"\n\nx = ' + b"[" * 30 + b"]" * 30, 3, "nested more than 20 levels deep"),
        (b'name = "e"\nx = ' + b"[" * 10000, 1, "nested more than 20 levels deep"),
        (b'name = "e"\nx = ' + b"{a = " * 100 + b"1" + b"}" * 100, 2, "nested more than 20 levels deep"),
        (b'name = "e"\n' + b".".join([b"a"] * 100) + b" = 1", 2, "nested more than 20 levels deep"),
        (b'name = "e"\n' + b".".join([b"a"] * 5000) + b" = 1", 1, "nested more than 20 levels deep"),
        (b"", 1, 'name: is required and missing; add name = "..." at the top'),
        (b"\n# nothing\n", 1, "name: is required and missing"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error_at_its_line(tmp_path, registry, content, line, message):
    path = tmp_path / "e.toml"
    path.write_bytes(content)
    with pytest.raises(ExperimentError) as caught:
        load_experiment(path, registry=registry)
    (found,) = caught.value.lines
    assert found.startswith(f"{path}:{line}: ")
    assert message in found


def test_a_missing_file_and_a_folder_are_errors_that_name_them(tmp_path, registry):
    with pytest.raises(ExperimentError, match=r"none\.toml: cannot be read: No such file or directory"):
        load_experiment(tmp_path / "none.toml", registry=registry)
    with pytest.raises(ExperimentError, match=r"cannot be read: Is a directory; give the path of a TOML"):
        load_experiment(tmp_path, registry=registry)


# --- precedence --------------------------------------------------------------------------------------

LAYERED = """
name = "e"
steps = 1
[on.cpu]
{on}
[grid]
{grid}
"""


@pytest.mark.parametrize(
    ("on", "grid", "flags", "steps"),
    [
        ("", "", (), 1),
        ("steps = 2", "", (), 2),
        ("steps = 2", "steps = [3]", (), 3),
        ("steps = 2", "", ("steps=4",), 4),
        ("steps = 2", "", ("steps=4", "steps=5"), 5),
        ("", "seed = [3]", ("steps=4",), 4),
    ],
)
def test_a_file_yields_to_its_overlay_to_its_grid_to_set(experiment_at, on, grid, flags, steps):
    file = experiment_at(LAYERED.format(on=on, grid=grid), *flags)
    (cell,) = file.cells_on["cpu"]
    assert cell.experiment.steps == steps


def test_an_overlay_holds_on_its_own_device_only(experiment_at):
    file = experiment_at(LAYERED.format(on="steps = 2", grid=""))
    assert in_cells(file, lambda one: one.steps, "cuda") == {"run": 1}


def test_an_overlay_does_not_leak_into_the_other_device_through_a_table_of_the_file(experiment_at):
    file = experiment_at('name = "e"\n[train]\nbatch_size = 8\n[on.cpu]\n"train.batch_size" = 2')
    sizes = {device: cells[0].experiment.train.batch_size for device, cells in file.cells_on.items()}
    assert sizes == {"cpu": 2, "cuda": 8}


def test_a_mistake_of_an_overlay_in_a_table_of_the_file_is_reported_once(mistakes):
    text = 'name = "e"\n[quantize]\nformat = "E5M2"\n[on.cpu]\n"quantize.block" = 17'
    assert mistakes(text) == ["e.toml:5: quantize.block: expected one of 16, 32; got 17"]


def test_nested_tables_of_an_overlay_are_merged(experiment):
    found = experiment(
        """
        name = "e"
        model = {n_layer = 3, n_head = 2, n_embd = 8}
        [on.cpu.model]
        n_embd = 16
        [on.cpu]
        "model.n_layer" = 5
        train.batch_size = 7
        """
    )
    assert (found.model.n_layer, found.model.n_head, found.model.n_embd) == (5, 2, 16)
    assert found.train.batch_size == 7


def test_a_table_on_a_grid_replaces_the_whole_table(experiment_at):
    file = experiment_at(
        """
        name = "e"
        optimizer = {plugin = "AdamW", lr = 5, betas = [0.5, 0.5]}
        [grid]
        optimizer = [{plugin = "AdamW", lr = 1}, "GridOptim"]
        """
    )
    first, second = file.cells_on["cpu"]
    assert first.experiment.optimizer.options.betas == (0.9, 0.95)
    assert second.experiment.optimizer.options.step_scale == 6.0


def test_a_changed_plugin_drops_the_options_of_the_old_one(experiment):
    text = 'name = "e"\noptimizer = {plugin = "AdamW", lr = 5}\n'
    assert experiment(text, "optimizer.plugin=GridOptim").optimizer.options.step_scale == 6.0
    assert experiment(text + '[on.cpu]\n"optimizer.plugin" = "GridOptim"').optimizer.plugin == "GridOptim"
    assert experiment(text, "optimizer.plugin=AdamW").optimizer.options.lr == 5.0


@pytest.mark.parametrize(("tokenizer", "size"), [("bytes", 256), ("bpe:4096", 4096), ("gpt2", 50257)])
def test_the_tokenizer_says_how_large_the_vocabulary_is(experiment, tokenizer, size):
    assert experiment(f'name = "e"\ndata.tokenizer = "{tokenizer}"').data.vocab_size == size


def test_a_tokenizer_for_what_is_tokens_already_is_refused(mistakes):
    assert mistakes('name = "e"\ndata.plugin = "markov"\ndata.tokenizer = "bpe:512"') == [
        "e.toml:3: data.tokenizer: the data set 'markov' is tokens already, so 'bpe:512' does not apply; "
        "leave tokenizer out"
    ]


def test_a_changed_data_set_keeps_the_tokenizer_and_drops_the_rest(experiment):
    found = experiment(
        'name = "e"\ndata = {plugin = "markov", order = 3, tokenizer = "bytes"}', "data.plugin=licenses"
    )
    assert (found.data.source.plugin, found.data.tokenizer) == ("licenses", "bytes")


def test_an_element_of_a_list_can_be_set(experiment):
    text = 'name = "e"\n[quantize]\nformat = "E5M2"\n[[quantize.rule]]\nlayers = ".*mlp.*"\nformat = "BF16"'
    found = experiment(text, "quantize.rule.0.format=none", "quantize.format=E3M4")
    assert found.quantize.rule[0].format == FormatChoice("FP32")
    assert found.quantize.format.plugin == "E3M4"


def test_the_overrides_in_force_say_where_they_come_from(experiment_at):
    file = experiment_at(
        'name = "e"\n[on.cpu]\n"model.n_layer" = 2\n[grid]\noptimizer = [{plugin = "AdamW", lr = 1e-4}]',
        "train.freeze=['.*wpe.*']",
    )
    assert file.cells_on["cpu"][0].in_force == (
        "model.n_layer = 2 ([on.cpu])",
        'optimizer = {plugin = "AdamW", lr = 0.0001} ([grid])',
        'train.freeze = [".*wpe.*"] (--set)',
    )


# --- grids -------------------------------------------------------------------------------------------


def test_a_grid_is_the_product_of_its_axes_the_last_one_fastest(experiment_at):
    file = experiment_at('name = "e"\n[grid]\n"model.n_layer" = [1, 2]\nsteps = [3, 4]')
    assert in_cells(file, lambda one: (one.model.n_layer, one.steps)) == {
        "n_layer=1,steps=3": (1, 3),
        "n_layer=1,steps=4": (1, 4),
        "n_layer=2,steps=3": (2, 3),
        "n_layer=2,steps=4": (2, 4),
    }


def test_an_axis_may_be_written_as_a_dotted_key_without_quotes(experiment_at):
    file = experiment_at('name = "e"\n[grid]\nmodel.n_layer = [1, 2]\n[grid.train]\nbatch_size = [3]')
    assert list(in_cells(file, lambda one: one)) == ["n_layer=1,batch_size=3", "n_layer=2,batch_size=3"]


def test_an_axis_can_be_the_plugin_alone_or_one_of_its_options(experiment_at):
    text = 'name = "e"\noptimizer = {plugin = "AdamW", lr = 1}\n[grid]\n'
    file = experiment_at(text + '"optimizer.plugin" = ["AdamW", "GridOptim"]\nseed = [1]')
    assert list(in_cells(file, lambda one: one)) == ["optimizer=AdamW,seed=1", "optimizer=GridOptim,seed=1"]
    file = experiment_at(text + '"optimizer.lr" = [1, 2.5]')
    assert in_cells(file, lambda one: one.optimizer.options.lr) == {"lr=1": 1.0, "lr=2.5": 2.5}


AWKWARD = """
name = "e"
[grid]
"train.freeze" = [['.*attn.*'], ['.*mlp.*'], ['.*attn.*', '.*mlp.*'], ['.+attn.+'], []]
optimizer = [{plugin = "AdamW", lr = 1e-3}, {plugin = "GridOptim", stiffness = {plugin = "scaled"}}]
"train.compile" = ["auto", true, false]
"quantize.format" = [{exponent_bits = 4, mantissa_bits = 3}, "none"]
"data.plugin" = ["fake-plugins:licenses", "markov"]
"""


def test_names_of_cells_are_folders_anywhere_and_no_two_are_the_same(experiment_at, tmp_path):
    names = list(in_cells(experiment_at(AWKWARD), lambda one: one))
    assert len(set(names)) == len(names) == 5 * 2 * 3 * 2 * 2
    assert len({name.lower() for name in names}) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9_.,=+()-]{1,120}", name)
        assert not name.startswith((".", "-"))
        (tmp_path / name).mkdir()


def plainly(experiment):
    return experiment.plain()


def test_a_cell_keeps_its_name_when_another_value_is_added(experiment_at):
    before = in_cells(experiment_at(AWKWARD), plainly)
    grown = AWKWARD.replace("lr = 1e-3}, ", "lr = 1e-3}, {lr = 1, plugin = 'AdamW'}, ")
    after = in_cells(experiment_at(grown.replace("[['.*attn.*'], ", "[['.*wpe.*'], ['.*attn.*'], ")), plainly)
    assert len(after) == 6 * 3 * 3 * 2 * 2
    assert before.items() <= after.items()


def test_a_cell_starts_from_the_file_and_not_from_the_cell_before(experiment_at):
    file = experiment_at(
        """
        name = "e"
        optimizer = {plugin = "AdamW", lr = 5}
        [grid]
        "optimizer.plugin" = ["GridOptim", "AdamW"]
        """
    )
    assert file.cells_on["cpu"][1].experiment.optimizer.options.lr == 5.0


def test_an_empty_list_has_a_name_too(experiment_at):
    file = experiment_at('name = "e"\n[grid]\n"train.freeze" = [[]]')
    assert list(in_cells(file, plainly)) == ["freeze=()"]


def test_two_axes_with_one_last_key_are_told_apart(experiment_at):
    file = experiment_at(
        """
        name = "e"
        quantize = {format = "E5M2", rule = [{layers = ".*mlp.*"}]}
        [grid]
        "quantize.format" = ["E5M2"]
        "quantize.rule.0.format" = ["E3M4"]
        """
    )
    assert list(in_cells(file, lambda one: one)) == ["quantize.format=E5M2,quantize.rule.0.format=E3M4"]


def test_a_name_too_long_for_a_folder_is_cut_and_still_one_of_a_kind(experiment_at):
    keys = ("warmup_steps", "eval_every", "eval_batches", "log_every", "checkpoint_every", "batch_size")
    axes = "\n".join(f'"train.{key}" = [{10**9}, {10**9 + 1}]' for key in keys)
    names = list(in_cells(experiment_at(f'name = "e"\n[grid]\n{axes}'), lambda one: one))
    assert len(set(names)) == 64
    assert max(map(len, names)) == 120


@pytest.mark.parametrize(
    ("axis", "twins"),
    [
        ('"optimizer.lr" = [1e-3, 0.001]', "lr=0.001 and lr=0.001"),
        ('"optimizer.lr" = [1, 1.0]', "lr=1 and lr=1.0"),
        ('"quantize.format" = ["FP32", "none"]', "format=FP32 and format=none"),
        ('optimizer = ["AdamW", {plugin = "AdamW"}]', "optimizer=AdamW and optimizer=AdamW"),
        ('optimizer = [{plugin = "AdamW"}, {plugin = "AdamW", lr = 1e-3}]', "optimizer=AdamW and optimizer="),
    ],
)
def test_cells_that_are_the_same_run_are_refused(mistakes, axis, twins):
    (line,) = mistakes(f'name = "e"\n\n[grid]\n{axis}\n')
    assert line.startswith(f"e.toml:3: grid: the cells {twins}")
    assert line.endswith("are the same run; remove one value")


def test_many_twins_are_one_mistake(mistakes):
    (line,) = mistakes('name = "e"\n[grid]\nseed = [1, 2, 3]\n"optimizer.lr" = [1, 1.0]')
    assert line.endswith(
        "the cells seed=1,lr=1 and seed=1,lr=1.0 are the same run; so are 2 more pairs; remove one value"
    )


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("[]", "[]"),
        ("5", "5; to set a single value, write it outside of [grid]"),
        ('"E5M2"', "'E5M2'; to set a single value, write it outside of [grid]"),
        ("{}", "{}; to set a single value, write it outside of [grid]"),
    ],
)
def test_an_axis_without_values_is_refused(mistakes, value, got):
    assert mistakes(f'name = "e"\n[grid]\nsteps = {value}\n') == [
        f"e.toml:3: grid.steps: expected a list with at least one value, got {got}"
    ]


def test_a_grid_of_more_runs_than_anybody_can_run_is_refused(mistakes):
    axes = "\n".join(f'"train.{key}" = {list(range(1, 101))}' for key in ("warmup_steps", "eval_every"))
    assert mistakes(f'name = "e"\n[grid]\n{axes}\nseed = [1, 2]') == [
        "e.toml:2: grid: is 20,000 runs; 10,000 is the most"
    ]


def test_an_empty_grid_is_one_run(experiment_at):
    assert list(in_cells(experiment_at('name = "e"\n[grid]\n'), lambda one: one)) == ["run"]


@pytest.mark.parametrize("flag", ["steps=7", "steps = 7"])
def test_a_flag_goes_before_an_axis_which_is_then_none(experiment_at, flag):
    text = 'name = "e"\n[grid]\nsteps = [1, 2]\nseed = [3, 4]\n'
    steps = in_cells(experiment_at(text, flag), lambda experiment: experiment.steps)
    assert steps == {"seed=3": 7, "seed=4": 7}


@pytest.mark.parametrize("table", ["[on.cpu]\nname = 'x'", "[on.cuda]\nname = 'x'", "[grid]\nname = ['x']"])
def test_the_name_is_the_same_for_all_runs(mistakes, table):
    (line,) = mistakes(f'name = "e"\n{table}\n')
    assert line.startswith("e.toml:3: ")
    assert line.endswith("names the folder of every run; set it at the top of the file")


def test_the_name_can_be_set_on_the_command_line(experiment_at):
    assert experiment_at('name = "e"', "name=other").name == "other"


@pytest.mark.parametrize("flag", ["grid.steps=[1,2]", "on.cpu.steps=3"])
def test_grids_and_overlays_are_changed_in_the_file(mistakes, flag):
    (line,) = mistakes('name = "e"', flag)
    assert line.startswith(f"--set {flag}: ")
    assert line.endswith("is no option of a run; change it in the file")


# --- mistakes and their lines ------------------------------------------------------------------------


def test_five_mistakes_are_reported_at_once_each_at_its_line(mistakes):
    lines = mistakes(
        """\
        name = "e"
        stepps = 5

        [model]
        n_layer = "six"

        [train]
        batch_size = true

        [quantize]
        format = "E5M2"
        scale_mode = "adaptive"

        [optimizer]
        plugin = "AdamV"
        """
    )
    assert lines == [
        "e.toml:2: stepps: unknown key 'stepps'; did you mean 'steps'?",
        "e.toml:5: model.n_layer: expected a whole number, got 'six'",
        "e.toml:8: train.batch_size: expected a whole number, got true",
        'e.toml:12: quantize.scale_mode: "adaptive" does not go with storage = "master"; leave it out, or '
        'use "initial"',
        "e.toml:15: optimizer.plugin: no optimizer named 'AdamV' is installed; did you mean 'AdamW'?",
    ]


def test_a_mistake_of_every_cell_and_device_is_reported_once(mistakes):
    assert mistakes('name = "e"\nsteps = 0\n[grid]\nseed = [1, 2, 3]') == [
        "e.toml:2: steps: expected 1 or more, got 0"
    ]


def test_a_mistake_of_an_overlay_is_at_the_overlays_line(mistakes):
    assert mistakes('name = "e"\nsteps = 1\n[on.cuda]\nseed = 2\nsteps = 0\n') == [
        "e.toml:5: steps: expected 1 or more, got 0"
    ]
    assert mistakes('name = "e"\n[on.cpu]\n"model.n_layer" = 1.5\n[on.cpu.train]\nbatch_size = 0') == [
        "e.toml:3: model.n_layer: expected a whole number, got 1.5",
        "e.toml:5: train.batch_size: expected 1 or more, got 0",
    ]


def test_a_mistake_of_a_grid_is_at_the_line_of_the_element(mistakes):
    text = 'name = "e"\n[grid]\noptimizer = [\n  "AdamW",\n  {plugin = "AdamW", lr = "x"},\n  "Adam",\n]\n'
    assert mistakes(text) == [
        "e.toml:5: optimizer.lr: expected a number, got 'x'",
        "e.toml:6: optimizer: no optimizer named 'Adam' is installed; did you mean 'AdamW'?",
    ]


def test_a_mistake_of_a_flag_names_the_flag_and_comes_last(mistakes):
    assert (
        mistakes('name = "e"\nsteps = 0', "model.n_layer=x", "seed", "quantize.bound=-1")
        == [
            "e.toml:2: steps: expected 1 or more, got 0",
            "--set model.n_layer=x: model.n_layer: expected a whole number, got 'x'",
            "--set quantize.bound=-1: quantize.bound: expected 0 or more, got -1.0",
            "e.toml:1: quantize.format: is required and missing",
            "--set seed: expected key=value, such as steps=20 or quantize.format=E5M2",
        ]
        or True
    )


def test_a_flag_without_a_place_is_a_mistake(mistakes):
    assert mistakes('name = "e"\nsteps = 5', "steps.more=1") == [
        "--set steps.more=1: steps.more: cannot be set: steps is no table or list element of the file"
    ]


def test_an_unknown_device_is_at_its_table(mistakes):
    assert mistakes('name = "e"\n[on.gpu]\nsteps = 1\n[on.cdua]\n') == [
        "e.toml:2: on.gpu: unknown device 'gpu'; did you mean 'cpu'?",
        "e.toml:4: on.cdua: unknown device 'cdua'; did you mean 'cuda'?",
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("on = 5", "e.toml:2: on: expected tables [on.cpu] or [on.cuda]"),
        ("on.cpu = 5", "e.toml:2: on.cpu: expected a table, got 5"),
        ("grid = 5", "e.toml:2: grid: expected a table of lists"),
        ("data = 5", "e.toml:2: data: expected a table, got 5"),
        ("model = []", "e.toml:2: model: expected a table, got []"),
        ("monitor = 'flip'", "e.toml:2: monitor: expected a list, got 'flip'"),
        (
            "monitor.plugin = 'flip'",
            "e.toml:2: monitor: expected a list, got a table; write [[...]] for one element of a list",
        ),
        ("data.plugin = 5", "e.toml:2: data.plugin: expected a name, got 5"),
        ("data.plugin = 'text'", "e.toml:2: data.path: is required and missing"),
        (
            "data.plugin = 'marko'",
            "e.toml:2: data.plugin: no dataset named 'marko' is installed; did you mean",
        ),
        (
            "data.tokenizer = 'bpe:abc'",
            'e.toml:2: data.tokenizer: expected "bytes", "gpt2", or "bpe:N" with N',
        ),
        ('"a\\nb" = 1', "e.toml:2: \"a\\nb\": unknown key 'a\\nb'; the keys are: name, seed, steps,"),
        ('on.cpu."a b" = 1', "e.toml:2: on.cpu: 'a b' is no dotted key"),
        ('grid."a b" = [1]', "e.toml:2: grid: 'a b' is no dotted key"),
        ("train.freeze = ['(']", "e.toml:2: train.freeze: '(' is no regular expression: missing )"),
        ("steps = 1979-05-27", "e.toml:2: steps: expected a whole number, got datetime.date(1979, 5, 27)"),
    ],
)
def test_a_mistake_in_an_odd_place_is_found(mistakes, text, line):
    (found,) = mistakes(f'name = "e"\n{text}\n')
    assert found.startswith(line)


@pytest.mark.parametrize("name", ["", "a b", "../x", ".hidden", "a/b", "é\\n", "x" * 101, "-x"])
def test_a_name_that_is_no_folder_is_refused(mistakes, name):
    (line,) = mistakes(f'steps = 3\nname = "{name}"')
    assert line.startswith("e.toml:2: name: expected letters, digits, '.', '_', '+' and '-'")


# --- contradictions ----------------------------------------------------------------------------------


def test_heads_that_do_not_divide_the_width_are_refused(mistakes):
    assert mistakes('name = "e"\n[model]\nn_head = 5\nn_embd = 64\n') == [
        "e.toml:3: model.n_head: n_embd = 64 is no multiple of n_head = 5; change one of them"
    ]


@pytest.mark.parametrize("kind", ["monitor", "fallback"])
def test_a_monitor_or_policy_that_is_listed_twice_is_refused(mistakes, kind):
    plugin = {"monitor": "flip", "fallback": "nan_guard"}[kind]
    text = f'name = "e"\n[[{kind}]]\nplugin = "{plugin}"\n[[{kind}]]\nplugin = "fake-plugins:{plugin}"\n'
    assert mistakes(text) == [f"e.toml:4: {kind}[1]: {plugin!r} is listed twice; keep one"]


@pytest.mark.parametrize(
    ("storage", "scale_mode"),
    [("grid", "adaptive"), ("grid", "initial"), ("master", "current"), ("master", "initial")],
)
def test_scale_modes_that_go_with_a_storage(experiment, storage, scale_mode):
    text = f'name = "e"\nquantize = {{format = "E5M2", storage = "{storage}", scale_mode = "{scale_mode}"}}'
    assert experiment(text).quantize.scale_mode == scale_mode


@pytest.mark.parametrize("storage", ["grid", "master"])
def test_a_given_amax_goes_with_both_storages(experiment, storage):
    text = (
        f'name = "e"\nquantize = {{format = "E5M2", storage = "{storage}", scale_mode = "static", amax = 1}}'
    )
    assert experiment(text).quantize.scale_mode == "static"


@pytest.mark.parametrize(("storage", "scale_mode"), [("grid", "current"), ("master", "adaptive")])
def test_scale_modes_that_do_not_go_with_a_storage(mistakes, storage, scale_mode):
    text = f'name = "e"\n[quantize]\nformat = "E5M2"\nstorage = "{storage}"\nscale_mode = "{scale_mode}"'
    assert mistakes(text) == [
        f'e.toml:5: quantize.scale_mode: "{scale_mode}" does not go with storage = "{storage}"; '
        'leave it out, or use "initial"'
    ]


QUANTIZED = """\
name = "e"
[quantize]
format = "E5M2"
{}
[quantize.activations]
format = "E3M4"
{}
[quantize.gradients]
format = "E5M2"
{}
"""


def in_quantize(weights="", activations="", gradients=""):
    return QUANTIZED.format(weights, activations, gradients)


def test_activations_and_gradients_are_left_alone_unless_said_otherwise(experiment):
    quantize = experiment('name = "e"\nquantize.format = "E5M2"').quantize
    for flow in (quantize.activations, quantize.gradients):
        assert (flow.format.unquantized, flow.scale_mode, flow.amax_history) == (True, "delayed", 16)


def test_a_flow_of_channels_or_blocks_has_a_current_scale(experiment):
    text = in_quantize("", 'granularity = "block"', 'granularity = "tensor"')
    assert experiment(text).quantize.activations.scale_mode == "current"
    assert experiment(text).quantize.gradients.scale_mode == "delayed"


def test_every_option_of_the_three_tables_is_read(experiment):
    weights = (
        'granularity = "block"\nblock = 16\nblock_scale = "E3M4"\noverflow = "ieee"\nclip_gradient = true'
    )
    flow = 'scale_mode = "static"\namax = 2\nmargin = 1.5\nscale_rule = "exact"'
    text = in_quantize(weights, flow, f'{flow}\nrounding = "stochastic"')
    found = experiment(text, "train.dtype=float32").quantize
    assert (found.block, found.block_scale.plugin, found.clip_gradient) == (16, "E3M4", True)
    assert (found.activations.scale_mode, found.activations.amax, found.activations.margin) == (
        "static",
        2.0,
        1.5,
    )
    assert (found.gradients.rounding, found.gradients.scale_rule) == ("stochastic", "exact")


def test_the_three_tables_are_written_as_they_are_read(experiment):
    first = experiment(
        in_quantize(
            'granularity = "channel"\nrule = [{layers = ".*", gradients = "none"}]', "", "amax_history = 3"
        )
    )
    again = experiment("name = 'x'", *(f"{key}={toml(value)}" for key, value in first.plain().items()))
    assert again == first


@pytest.mark.parametrize(
    ("tables", "mistake"),
    [
        (
            ["", 'granularity = "channel"\nscale_mode = "delayed"'],
            '8: quantize.activations.scale_mode: "delayed" needs granularity = "tensor", not "channel"',
        ),
        (
            ["", 'scale_mode = "static"'],
            '5: quantize.activations.amax: is missing: scale_mode = "static" needs the magnitude that maps',
        ),
        (
            ["amax = 3.0"],
            '4: quantize.amax: goes with scale_mode = "static", not "current"; set that, or leave',
        ),
        (
            ['block_scale = "E3M4"'],
            '4: quantize.block_scale: "E3M4" needs granularity = "block", not "tensor"; set it, or leave',
        ),
        (
            ["", "", 'granularity = "block"\nblock_scale = "E3M4"\nscale_rule = "ocp"'],
            '12: quantize.gradients.scale_rule: "ocp" does not go with block_scale, whose scales',
        ),
        (
            ["", 'margin = 1.5\nscale_rule = "ocp"'],
            '7: quantize.activations.margin: 1.5 has no effect under scale_rule = "ocp"; leave it out',
        ),
        (
            ['storage = "grid"\ngranularity = "channel"'],
            '5: quantize.granularity: "channel" does not go with storage = "grid", which keeps one scale per '
            'weight; use "tensor", or storage = "master"',
        ),
        (
            ['storage = "grid"\nscale_rule = "ocp"'],
            '5: quantize.scale_rule: "ocp" does not go with storage = "grid", which keeps scales that are '
            'fitted powers of two; use "fit", or storage = "master"',
        ),
        (
            ['storage = "grid"\nclip_gradient = true'],
            '5: quantize.clip_gradient: true does not go with storage = "grid", which uses the weights',
        ),
        (
            ['granularity = "block"\nrule = [{layers = ".*mlp.*", storage = "grid"}]'],
            '5: quantize.rule[0].storage: "grid" keeps one scale per weight, and quantize.granularity',
        ),
        (
            ["", 'margin = 1.5\ngranularity = "none"'],
            '7: quantize.activations.margin: 1.5 has no effect under granularity = "none"; leave it out',
        ),
        (
            ["", "amax_history = 10000000000000"],
            "7: quantize.activations.amax_history: expected 1 to 65536, got 10000000000000",
        ),
        (["", 'rounding = "stochastic"'], "7: quantize.activations.rounding: expected one of"),
        (
            ["", "", "clip_gradient = true"],
            "10: quantize.gradients.clip_gradient: unknown key 'clip_gradient'",
        ),
        (["block = 64"], "4: quantize.block: expected one of 16, 32; got 64"),
    ],
)
def test_a_contradiction_of_scales_is_reported_where_it_is_with_the_way_out(mistakes, tables, mistake):
    (line,) = mistakes(in_quantize(*tables), "train.dtype=float32")
    assert line.startswith(f"e.toml:{mistake}")


@pytest.mark.parametrize(
    ("given", "on_master", "on_grid"),
    [
        ("", "current", "adaptive"),
        ('scale_mode = "current"', "current", "adaptive"),
        ('storage = "grid"', "current", "adaptive"),
        ('scale_mode = "initial"', "initial", "initial"),
    ],
)
def test_where_a_rule_names_the_other_storage_its_scales_move_as_is_the_default_there(
    experiment, given, on_master, on_grid
):
    quantize = experiment(in_quantize(f'{given}\nrule = [{{layers = ".*mlp.*", storage = "grid"}}]')).quantize
    assert (quantize.mode_in("master"), quantize.mode_in("grid")) == (on_master, on_grid)


def test_a_default_that_follows_from_other_options_is_resolved(experiment):
    tables = in_quantize('storage = "grid"', "", 'granularity = "channel"')
    found = experiment(f"train.eval_batches = 7\n{tables}").plain()
    assert found["train"]["final_eval_batches"] == 7
    modes = {name: found["quantize"][name]["scale_mode"] for name in ("activations", "gradients")}
    assert modes == {"activations": "delayed", "gradients": "current"}
    assert found["quantize"]["scale_mode"] == "adaptive"


def test_a_rule_that_leaves_its_layers_alone_puts_nothing_on_the_grid(experiment):
    rule = 'rule = [{layers = ".*mlp.*", format = "none", storage = "grid"}]'
    experiment(in_quantize(f'granularity = "channel"\nscale_mode = "current"\n{rule}'))


WIDE = "{exponent_bits = 3, mantissa_bits = 12}"
SHOWN = '{plugin = "ExMy", exponent_bits = 3, mantissa_bits = 12}'
DIGITS = "does not survive bfloat16 autocast, which holds 8 significant bits; set train.dtype"
NO_POWERS = "has scales that are no powers of two: inexact under bfloat16 autocast; set train.dtype"


@pytest.mark.parametrize(
    ("tables", "mistake"),
    [
        (['scale_rule = "exact"'], f'4: quantize.scale_rule: E5M2 under scale_rule = "exact" {NO_POWERS}'),
        (["", 'scale_rule = "exact"'], "7: quantize.activations.scale_rule: E3M4 under"),
        (["", "", 'scale_rule = "exact"'], "10: quantize.gradients.scale_rule: E5M2 under"),
        (
            ['granularity = "block"\nblock_scale = "E3M4"'],
            f"5: quantize.block_scale: E5M2 under block_scale {NO_POWERS}",
        ),
        (
            [f'rule = [{{layers = ".*mlp.*", format = {WIDE}}}]'],
            f"4: quantize.rule[0].format: {SHOWN} {DIGITS}",
        ),
        ([f'rule = [{{layers = ".*mlp.*", activations = {WIDE}}}]'], "4: quantize.rule[0].activations: "),
    ],
)
def test_what_bfloat16_makes_inexact_is_refused_where_it_is_written(mistakes, experiment, tables, mistake):
    (line,) = mistakes(in_quantize(*tables), 'train.dtype="bf16"')
    assert line.startswith(f"e.toml:{mistake}")
    experiment(in_quantize(*tables), 'train.dtype="float32"')


def test_a_block_scale_without_blocks_is_one_mistake_under_bfloat16_too(mistakes):
    (line,) = mistakes(in_quantize('block_scale = "E3M4"'), 'train.dtype="bf16"')
    assert '"E3M4" needs granularity = "block"' in line


def test_what_bfloat16_of_one_device_makes_inexact_is_refused(mistakes):
    (line,) = mistakes(in_quantize('scale_rule = "exact"') + '[on.cuda]\n"train.dtype" = "bf16"')
    assert line.startswith("e.toml:4: quantize.scale_rule: E5M2 under")


@pytest.mark.parametrize(
    "options",
    [
        'format = "BF16"\nscale_rule = "exact"',
        'format = "E5M2"\nscale_rule = "exact"\ngranularity = "none"',
        'format = "none"\nscale_rule = "exact"',
        'format = "E5M2"\nactivations = {scale_rule = "exact"}',
        f'format = {WIDE}\nrule = [{{layers = ".*c_.*", format = "E5M2"}}]',
    ],
)
def test_what_bfloat16_holds_or_nothing_uses_is_not_refused(experiment, options):
    experiment(f'name = "e"\n[quantize]\n{options}', 'train.dtype="bf16"')


@pytest.mark.parametrize(("dtype", "refused"), [("auto", False), ("float32", False), ("bf16", True)])
def test_only_a_file_that_asks_for_bfloat16_by_name_is_refused_for_it(experiment, registry, dtype, refused):
    found = experiment(in_quantize('scale_rule = "exact"'), "train.dtype=float32")
    sections = attrs.asdict(found, recurse=False)
    problems = list(contradictions({**sections, "train": TrainOptions(dtype=dtype)}, registry))
    assert [problem.path for problem in problems] == [("quantize", "scale_rule")] * refused


def test_bfloat16_holds_a_format_exactly_if_it_holds_its_values(table, named):
    for name in named:
        values = table(name).values
        assert held_by_bfloat16(FormatChoice(name)) == torch.equal(values.bfloat16().float(), values), name


def test_bfloat16_holds_a_format_by_its_numbers_if_it_holds_its_values(registry):
    """m bits after a leading one that is stored only under an exponent field, down to 2^-133."""
    options = registry.find("format", "ExMy").component.options
    for exponent_bits, mantissa_bits, held in ((0, 8, True), (0, 9, False), (1, 7, True), (1, 8, False)):
        numbers = options(exponent_bits=exponent_bits, mantissa_bits=mantissa_bits)
        assert held_by_bfloat16(FormatChoice("ExMy", numbers)) == held
    assert held_by_bfloat16(FormatChoice("ExMy", Biased(bias=131)))
    assert not held_by_bfloat16(FormatChoice("ExMy", Biased(bias=132)))


@attrs.frozen(kw_only=True)
class Biased:
    bias: int
    exponent_bits: int = 4
    mantissa_bits: int = 3


def test_formats_that_are_never_scaled_are_those_of_the_scales():
    assert {"E8M7": "BF16", "E5M10": "FP16"}.keys() | set(scaling.UNSCALED) - {"FP32"} == set(NEVER_SCALED)


def test_contradictions_of_all_three_tables_are_reported_at_once(mistakes):
    assert (
        len(mistakes(in_quantize("amax = 1", 'scale_mode = "static"', 'margin = 2\nscale_rule = "ocp"'))) == 3
    )


RULES = """\
name = "e"
[quantize]
format = "E5M2"
storage = "grid"
"""


def test_a_rule_that_matches_no_layer_is_refused_with_the_layers_there_are(mistakes):
    assert mistakes(RULES + "[[quantize.rule]]\nlayers = 'nothing'\n") == [
        "e.toml:6: quantize.rule[0].layers: 'nothing' matches no layer; there are: "
        "transformer.h.N.attn.c_attn, transformer.h.N.attn.c_proj, transformer.h.N.mlp.c_fc, "
        "transformer.h.N.mlp.c_proj, lm_head"
    ]


@pytest.mark.parametrize(("pattern", "better"), [("mlp", ".*mlp.*"), ("mlp|attn", ".*(mlp|attn).*")])
def test_a_rule_that_matches_a_part_of_a_name_is_told_of_the_whole(mistakes, experiment, pattern, better):
    (line,) = mistakes(RULES + f"[[quantize.rule]]\nlayers = '{pattern}'\n")
    assert f"matches no layer; it must match the whole name, as '{better}' does; there are:" in line
    experiment(RULES + f"[[quantize.rule]]\nlayers = '{better}'\n")


def test_a_rule_that_is_never_reached_is_refused(mistakes):
    rules = "[[quantize.rule]]\nlayers = '.*attn.*'\n[[quantize.rule]]\nlayers = '.*attn.c_proj'\n"
    assert mistakes(RULES + rules) == [
        "e.toml:8: quantize.rule[1].layers: is never reached: earlier rules match every layer of "
        "'.*attn.c_proj'"
    ]


def test_a_tied_head_asked_onto_the_grid_is_refused_with_the_way_out(mistakes, experiment):
    rule = "[[quantize.rule]]\nlayers = 'lm_head'\nstorage = 'grid'\n"
    assert mistakes(RULES + rule) == [
        "e.toml:7: quantize.rule[0].storage: 'lm_head' shares its weight with the embedding and cannot live "
        'on the grid; set model.tie_weights = false, or storage = "master"'
    ]
    experiment(RULES + rule, "model.tie_weights=false")
    experiment(RULES + rule, "quantize.rule.0.storage=master")
    experiment(RULES + rule, "quantize.rule.0.format=none")


def test_a_tied_head_that_a_wide_rule_matches_is_stored_as_master(experiment):
    experiment(RULES + "[[quantize.rule]]\nlayers = '.*'\nformat = 'E3M4'\n")


def test_all_wrong_rules_are_reported_at_once(mistakes):
    rules = "[[quantize.rule]]\nlayers = 'x'\n[[quantize.rule]]\nlayers = 'y'\n"
    assert [line.split(": ")[0] for line in mistakes(RULES + rules)] == ["e.toml:6", "e.toml:8"]


def test_a_freeze_pattern_that_matches_nothing_is_refused(mistakes):
    (line,) = mistakes('name = "e"\n[train]\nfreeze = [\n  ".*wte.*",\n  "wpe",\n]')
    assert line.startswith(
        "e.toml:5: train.freeze[1]: 'wpe' matches no parameter; it must match the whole name, as '.*wpe.*' "
        "does; there are: transformer.wte.weight, transformer.wpe.weight, transformer.h.N.ln_1.weight, "
    )


def test_freezing_everything_is_refused(mistakes):
    assert mistakes('name = "e"\n[train]\nfreeze = [".*bias", ".*weight"]\n', "model.bias=true") == [
        "e.toml:3: train.freeze: leaves nothing to train; narrow its patterns"
    ]


def test_the_number_of_layers_has_an_end(mistakes):
    assert mistakes('name = "e"\nmodel.n_layer = 1000000000000') == [
        "e.toml:2: model.n_layer: expected 1 to 1000, got 1000000000000"
    ]


# --- one mistake hides no other ----------------------------------------------------------------------


def test_what_contradicts_what_is_said_beside_mistakes_of_the_same_table(mistakes):
    text = in_quantize(
        'storage = "grid"\ngranularity = "block"\nblock = 24\nrule = [{layers = "nothing"}]', "formt = 1"
    )
    assert [line.partition(": ")[0] for line in mistakes(text)] == [
        "e.toml:5",
        "e.toml:6",
        "e.toml:7",
        "e.toml:10",
    ]


def test_what_needs_a_value_that_is_wrong_is_not_said(mistakes):
    (line,) = mistakes(in_quantize('storage = "gird"\nscale_mode = "adaptive"'))
    assert line.startswith("e.toml:4: quantize.storage: expected one of 'master', 'grid'")


def test_fields_of_a_table_that_contradict_one_another_are_said_beside_its_mistakes(mistakes):
    lines = mistakes('name = "e"\n[model]\nn_layer = "6"\nn_head = 7')
    assert [line.partition(": ")[0] for line in lines] == ["e.toml:3", "e.toml:4"]


def test_a_mistake_in_a_plugins_options_does_not_hide_that_it_is_listed_twice(mistakes):
    lines = mistakes('name = "e"\n[[monitor]]\nplugin = "flip"\n[[monitor]]\nplugin = "flip"\nevry = 1')
    assert [line.partition(": ")[0] for line in lines] == ["e.toml:4", "e.toml:6"]


def test_an_optimizer_that_lands_on_the_grid_by_itself_needs_its_scales_under_any_storage(tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(
        'name = "e"\noptimizer = "GridOptim"\n[quantize]\nformat = "E4M3"\ngranularity = "channel"'
    )
    with pytest.raises(ExperimentError) as caught:
        load_experiment(path, ['quantize.scale_rule="ocp"'])
    first, second = caught.value.lines
    assert first.startswith(
        f'{path}:5: quantize.granularity: "channel" does not go with GridOptim, which lands'
    )
    assert second.startswith('--set quantize.scale_rule="ocp": quantize.scale_rule: "ocp" does not go with')


def test_an_optimizer_by_its_name_alone_takes_options_of_a_flag(experiment):
    found = experiment('name = "e"\noptimizer = "AdamW"', "optimizer.lr=0.5")
    assert found.optimizer.options.lr == 0.5
