"""The commands `altgrad` and `altgrad-run --check`, with everything installed."""

import importlib.metadata
import json
import pathlib
import platform
import re
import subprocess
import sys
import tomllib

import pytest

from altgrad_core.cli import _guarded, app, run_app
from altgrad_core.experiment_file import load_experiment
from altgrad_core.hookspecs import KINDS
from altgrad_core.registry import discover

EXPERIMENTS = sorted((pathlib.Path(__file__).parents[2] / "experiments").glob("*.toml"))
PLUGINS = sorted(point.value for point in importlib.metadata.entry_points(group="altgrad"))
HEAVY = ("torch", "wandb", "datasets", "transformers", "pandas")

TINY = """
name = "tiny"
steps = 10
[data]
plugin = "markov"
[model]
n_layer = 1
n_head = 1
n_embd = 16
block_size = 8
[train]
batch_size = 2
"""


@pytest.fixture
def altgrad(capsys):
    """Return a function that runs `altgrad ...` in this process: exit code, output, errors."""

    def command(*tokens):
        code = _guarded(app, tokens)
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def altgrad_run(capsys, tmp_path, monkeypatch):
    """Return a function that runs `altgrad-run FILE ...` on a text, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(text, *tokens):
        pathlib.Path("e.toml").write_text(text)
        code = _guarded(run_app, ["e.toml", *tokens])
        return code, *capsys.readouterr()

    return command


def in_a_process(*command, **more):
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **more)


# --- altgrad plugins ---------------------------------------------------------------------------------


def test_plugins_lists_every_component_with_its_owner(altgrad):
    code, out, err = altgrad("plugins")
    assert (code, err) == (0, "")
    rows = [re.split(r" {2,}", line) for line in out.splitlines()]
    assert [row[:2] for row in rows] == [
        [kind, entry.name] for kind in KINDS for entry in discover().of_kind(kind)
    ]
    version = importlib.metadata.version("altgrad-optim")
    assert ["optimizer", "GridOptim", f"altgrad-optim {version}"] in [row[:3] for row in rows]


def test_plugins_of_one_kind(altgrad):
    code, out, _ = altgrad("plugins", "--kind", "optimizer")
    assert code == 0
    assert {line.split()[0] for line in out.splitlines()} == {"optimizer"}


def test_plugins_as_json(altgrad):
    _, out, _ = altgrad("plugins", "--json", "--without", "altgrad-data")
    listing = json.loads(out)
    by_name = {(one["kind"], one["name"]): one for one in listing["components"]}
    assert by_name["format", "E5M2"]["distribution"] == "altgrad-formats"
    assert by_name["format", "E5M2"]["summary"]
    assert ("dataset", "licenses") not in by_name
    assert (listing["broken"], listing["conflicts"], listing["left_out"]) == ([], [], ["altgrad-data"])


def test_plugins_says_what_was_left_out_and_what_is_none(altgrad):
    _, out, _ = altgrad("plugins", "--kind", "dataset", "--without", "altgrad-data")
    assert out == "no dataset is installed\n\nleft out: altgrad-data\n"


def test_an_unknown_kind_is_the_users_mistake(altgrad):
    code, out, err = altgrad("plugins", "--kind", "formats")
    assert (code, out) == (2, "")
    assert err == f"--kind is one of {', '.join(KINDS)}; not 'formats'; did you mean 'format'?\n"


def test_an_unknown_distribution_is_the_users_mistake(altgrad):
    code, _, err = altgrad("plugins", "--without", "altgrad-optimm")
    assert code == 2
    assert "no such plugin is installed; did you mean 'altgrad-optim'?" in err


@pytest.mark.parametrize("tokens", [["plugins", "--bogus"], ["plugins", "x"], ["bogus"], ["show"]])
def test_a_wrong_command_line_exits_with_2(altgrad, tokens):
    code, out, err = altgrad(*tokens)
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert err


def test_a_reader_that_leaves_early_is_no_error():
    command = [sys.executable, "-c", "from altgrad_core.cli import altgrad; altgrad()", "plugins"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


# --- altgrad show ------------------------------------------------------------------------------------


def test_show_prints_options_with_type_default_unit_and_help(altgrad, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    code, out, _ = altgrad("show", "GridOptim")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith("GridOptim: ")
    assert "  kind    optimizer" in lines
    rows = [re.split(r" {2,}", line.strip()) for line in lines]
    assert ["normalize", '"none" or "adam"', '"none"', "direction: the raw velocity, or Adam's"] in rows
    assert ["rung_clip", "number", "10.0", "largest move in one step (rungs)"] in rows


def test_show_says_how_wide_a_format_is_and_where_it_is_from(altgrad):
    _, out, _ = altgrad("show", "E5M2")
    assert "  bits    8\n" in out
    assert "  source  OCP 8-bit Floating Point Specification 1.0, E5M2\n" in out
    assert out.endswith('[quantize]\nformat = "E5M2"\n')


@pytest.mark.parametrize("name", ["AdamW", "optimizer/AdamW", "optimizer/altgrad-optim:AdamW"])
def test_a_component_can_be_named_by_kind_and_distribution(altgrad, name):
    assert altgrad("show", name)[1].startswith("AdamW: ")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamw", "nothing named 'adamw' is installed; did you mean 'AdamW'?"),
        ("xyzzy", "nothing named 'xyzzy' is installed; `altgrad plugins` lists what there is"),
        ("optimizer/E5M2", "no optimizer named 'E5M2' is installed; there are: "),
        ("optimiser/AdamW", "not 'optimiser'; did you mean 'optimizer'?"),
        ("optimizer/", "no optimizer named '' is installed; there are: "),
    ],
)
def test_show_of_what_is_not_there_is_the_users_mistake(altgrad, name, message):
    code, out, err = altgrad("show", name)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("ExMy", 'format = {plugin = "ExMy", exponent_bits = 4, mantissa_bits = 5, specials = "finite"}'),
        ("jsonl", 'path = "documents.jsonl"'),
        ("stiffness/grid", 'stiffness = {plugin = "grid"}'),
    ],
)
def test_a_snippet_has_examples_for_what_is_required(altgrad, name, line):
    assert line in altgrad("show", name)[1].splitlines()


COMPONENTS = [pytest.param(entry, id=f"{entry.kind}/{entry.name}") for entry in discover().registered]


@pytest.mark.parametrize("entry", COMPONENTS)
def test_what_show_prints_can_be_pasted_into_an_experiment(altgrad, entry, tmp_path):
    code, out, _ = altgrad("show", f"{entry.kind}/{entry.name}")
    assert code == 0
    _, heading, snippet = out.partition("\nin an experiment file\n")
    if entry.kind == "executor":
        assert not heading
        return
    path = tmp_path / "pasted.toml"
    path.write_text(f'name = "pasted"\n{snippet}')
    (cell,) = load_experiment(path).cells_on["cpu"]
    assert entry.name in json.dumps(cell.experiment.plain())
    written = tomllib.loads(snippet)
    assert set(written) <= {"quantize", "optimizer", "data", "monitor", "fallback"}


# --- altgrad-run --check -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_shipped_experiment_is_right(path):
    file = load_experiment(path)
    assert file.name == path.stem
    assert all(file.cells_on.values())


def test_check_prints_the_assembled_run_for_both_devices(altgrad_run):
    code, out, err = altgrad_run(TINY + "[on.cuda]\nsteps = 1000\n", "--check")
    assert (code, err) == (0, "")
    assert out == (
        "e.toml is right\n"
        "\n"
        "on cpu: 1 run, 160 tokens\n"
        "  format       FP32: nothing is quantised\n"
        "  optimizer    AdamW (lr 0.001, betas 0.9 0.95, eps 1e-08, weight_decay 0.1)\n"
        "  data         markov (order 2, vocab_size 16, tokens 1000000, validation_tokens 100000, "
        "concentration 0.3, seed 0), tokenizer bytes\n"
        "  model        1 layers, 1 heads, width 16, context 8: 3,504 parameters, 3,120 without embeddings\n"
        "  on the grid  0.0% of the non-embedding parameters\n"
        "  training     10 steps of 2 x 8 tokens: 160 tokens, seed 1337\n"
        "  monitors     none\n"
        "  policies     none\n"
        "\n"
        "on cuda: 1 run, 16,000 tokens\n"
        "  with steps = 1000 ([on.cuda])\n" + "".join(f"{line}\n" for line in out.splitlines()[14:22])
    )


def test_check_of_one_device_prints_that_device_only(altgrad_run):
    _, out, _ = altgrad_run(TINY + "[on.cuda]\nsteps = 1000\n", "--check", "--device", "cuda")
    assert "on cuda: 1 run, 16,000 tokens" in out
    assert "on cpu" not in out


def test_check_of_a_file_without_overlays_prints_it_once(altgrad_run):
    _, out, _ = altgrad_run(TINY, "--check", "--set", "steps=20")
    assert "on any device: 1 run, 320 tokens\n  with steps = 20 (--set)\n" in out
    assert out.count("model  ") == 1


GRID = """
[quantize]
storage = "grid"
[[quantize.rule]]
layers = 'lm_head'
format = "BF16"
[grid]
"quantize.format" = ["E5M2", "none"]
"model.n_embd" = [16, 32]
"""


def test_check_of_a_grid_prints_each_cell_with_tokens_parameters_and_share(altgrad_run):
    _, out, _ = altgrad_run(TINY + GRID, "--check")
    rows = [re.split(r" {2,}", line.strip()) for line in out.splitlines() if "n_embd=" in line]
    assert "on any device: 4 runs, 640 tokens" in out
    assert rows == [
        ["format=E5M2,n_embd=16", "160 tokens", "3,504 parameters", "98.5% on the grid"],
        ["format=E5M2,n_embd=32", "160 tokens", "13,152 parameters", "99.2% on the grid"],
        ["format=none,n_embd=16", "160 tokens", "3,504 parameters", "0.0% on the grid"],
        ["format=none,n_embd=32", "160 tokens", "13,152 parameters", "0.0% on the grid"],
    ]


def test_check_forecasts_time_and_cost_from_earlier_runs_of_the_same_model(altgrad_run, monkeypatch):
    model = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 8}
    model |= {"dropout": 0.0, "bias": False, "tie_weights": True}
    summary = {"machine": platform.node(), "device": "cpu", "model": model, "tokens_per_second": 0.04}
    others = [{**summary, "machine": "elsewhere"}, {**summary, "device": "cuda"}, {**summary, "model": {}}]
    for index, one in enumerate([summary, *others]):
        folder = pathlib.Path("runs/tiny") / f"cell{index}"
        folder.mkdir(parents=True)
        scale = 1 if one is summary else 1000
        text = json.dumps({**one, "tokens_per_second": one["tokens_per_second"] * scale})
        (folder / "summary.json").write_text(text)
    _, out, _ = altgrad_run(TINY, "--check")
    assert "on any device: 1 run, 160 tokens, about 67 min at the speed of earlier runs here\n" in out
    monkeypatch.setenv("ALTGRAD_PRICE_PER_HOUR", "9")
    _, out, _ = altgrad_run(TINY, "--check")
    assert "about 67 min at the speed of earlier runs here, cost 10.00\n" in out
    _, out, _ = altgrad_run(TINY, "--check", "--set", "model.n_embd=32")
    assert "on any device: 1 run, 160 tokens\n" in out
    _, out, _ = altgrad_run(TINY, "--check", "--out", "elsewhere")
    assert "on any device: 1 run, 160 tokens\n" in out


def test_a_wrong_file_prints_every_mistake_and_exits_with_2(altgrad_run):
    code, out, err = altgrad_run(
        TINY + "[optimizer]\nplugin = 'AdamV'\nlr = true\n", "--check", "--set", "step=1"
    )
    assert (code, out) == (2, "")
    assert err == (
        "e.toml:14: optimizer.plugin: no optimizer named 'AdamV' is installed; did you mean 'AdamW'?\n"
        "--set step=1: step: unknown key 'step'; did you mean 'steps'?\n"
    )


def test_a_wrong_file_is_refused_before_a_run_begins(altgrad_run):
    assert altgrad_run("steps = 1")[0] == 2
    assert not pathlib.Path("runs").exists()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["--device", "gpu"], "--device is auto, cpu or cuda, not 'gpu'"),
        (["--jobs", "0"], "--jobs is 1 or more, not 0"),
        (["--jobs", "x"], "int"),
        (["--set"], "--set"),
        (["--set", "steps"], "--set steps: expected key=value"),
        (["--without", "nothing"], "no such plugin is installed"),
    ],
)
def test_a_wrong_flag_exits_with_2(altgrad_run, tokens, message):
    code, _, err = altgrad_run(TINY, "--check", *tokens)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("name", ["none.toml", "."])
def test_a_file_that_is_none_exits_with_2(capsys, tmp_path, name):
    assert _guarded(run_app, [str(tmp_path / name), "--check"]) == 2
    assert "cannot be read" in capsys.readouterr().err


# --- what is imported --------------------------------------------------------------------------------

WATCH = "import sys; {code}; print(*sorted(set(sys.modules) & set({heavy!r})), file=sys.stderr)"


@pytest.mark.parametrize(
    "call",
    [
        "_guarded(app, ['plugins'])",
        "_guarded(app, ['show', 'GridOptim'])",
        "_guarded(run_app, [sys.argv[1], '--check'])",
    ],
)
def test_listing_showing_and_checking_import_nothing_heavy(call, tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(TINY + GRID)
    code = f"from altgrad_core.cli import _guarded, app, run_app; assert {call} == 0"
    heavy = (*HEAVY, "numpy")
    done = in_a_process(sys.executable, "-c", WATCH.format(code=code, heavy=heavy), str(path))
    assert (done.returncode, done.stderr) == (0, "\n")


@pytest.mark.parametrize("module", ["altgrad_core", *PLUGINS])
def test_a_plugins_shop_window_is_light(module):
    code = f"import {module} as m; [getattr(m, name)() for name in dir(m) if name.startswith('altgrad_')]"
    done = in_a_process(sys.executable, "-c", WATCH.format(code=code, heavy=HEAVY))
    assert (done.returncode, done.stderr) == (0, "\n")


def test_the_commands_are_installed():
    for command in ("altgrad", "altgrad-run"):
        found = in_a_process(pathlib.Path(sys.executable).with_name(command), "--version")
        assert (found.returncode, found.stdout) == (0, importlib.metadata.version("altgrad-core") + "\n")
