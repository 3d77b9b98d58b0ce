"""The commands `altgrad` and `altgrad-run --check`, with everything installed."""

import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import re
import shlex
import socket
import subprocess
import sys
import tomllib

import pytest
import torch

from altgrad_core.apps import app, guarded, run_app
from altgrad_core.experiment_file import load_experiment
from altgrad_core.hookspecs import KINDS
from altgrad_core.lookup import get_format
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
        code = guarded(app, tokens)
        return code, *capsys.readouterr()

    return command


@pytest.fixture
def altgrad_run(capsys, tmp_path, monkeypatch):
    """Return a function that runs `altgrad-run FILE ...` on a text, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(text, *tokens):
        pathlib.Path("e.toml").write_text(text)
        code = guarded(run_app, ["e.toml", *tokens])
        return code, *capsys.readouterr()

    return command


def in_a_process(*command, **more):
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **more)


@pytest.mark.parametrize(("seed", "following"), [(0, 1), (2**63 - 2, 2**63 - 1), (2**63 - 1, 0)])
def test_the_next_command_of_a_run_is_one_that_is_taken(seed, following, altgrad_run):
    code, out, _ = altgrad_run(TINY, "--set", f"seed={seed}", "--set", "steps=1", "--set", "data.tokens=4000")
    assert code == 0
    *_, command = re.findall(r"another seed: altgrad-run (.*)", out)
    file, *flags = shlex.split(command)
    assert flags[1:-2:2] == [f"seed={following}", "steps=1", "data.tokens=4000"]
    load_experiment(file, flags[1:-2:2])


def test_the_next_command_is_one_that_a_shell_takes(altgrad_run, tmp_path):
    _, out, _ = altgrad_run(TINY, "--set", "steps=1", "--set", "data.tokens=4000", "--out", "a b/it's")
    *_, command = re.findall(r"another seed: (.*)", out)
    assert shlex.split(command)[-2:] == ["--out", "a b/it's-seed1338"]


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


@pytest.mark.parametrize(
    "tokens",
    [
        ["plugins"],
        pytest.param(["formats"], marks=pytest.mark.slow),
        pytest.param(["formats", "BF16", "--json"], marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_leaves_early_is_no_error(tokens):
    command = [sys.executable, "-c", "from altgrad_core.cli import altgrad; altgrad()", *tokens]
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
    _, _, snippet = out.partition("\nin an experiment file\n")
    path = tmp_path / "pasted.toml"
    path.write_text(f'name = "pasted"\n{snippet}')
    file = load_experiment(path)
    (cell,) = file.cells_on["cpu"]
    assert entry.name in f"{json.dumps(cell.experiment.plain())} {file.executor.plugin}"
    written = tomllib.loads(snippet)
    assert set(written) <= {"quantize", "optimizer", "data", "monitor", "fallback", "executor"}


# --- altgrad formats ---------------------------------------------------------------------------------


def row_of(name, out):
    (row,) = [
        line.split() for line in out.splitlines() if line.split()[:1] == [name] and line.split()[1].isdigit()
    ]
    return row


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("E0M7", "E0M7 8 0 7 0 finite 1-2^-7 2^-7 255 uniform"),
        ("E1M6", "E1M6 8 1 6 0 finite 3.96875 2^-5 2 255 uniform"),
        ("E2M5", "E2M5 8 2 5 1 finite 7.875 2^-5 1 255"),
        ("E3M4", "E3M4 8 3 4 1 finite 124 0.0625 1 255"),
        ("E4M3", "E4M3 8 4 3 7 fn 448 2^-9 2^-6 253"),
        ("E5M2", "E5M2 8 5 2 15 ieee 57344 2^-16 2^-14 247"),
        ("E6M1", "E6M1 8 6 1 31 finite 1.5*2^32 2^-31 2^-30 255"),
        ("E7M0", "E7M0 8 7 0 63 finite 2^64 2^-62 2^-62 255"),
        ("E2M1", "E2M1 4 2 1 1 finite 6 0.5 1 15"),
        ("BF16", "BF16 16 8 7 127 ieee 255*2^120 2^-133 2^-126 65279"),
    ],
)
def test_a_formats_row_has_its_layout_its_range_and_its_size(altgrad, name, row, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert row_of(name, altgrad("formats")[1]) == row.split()


def test_the_table_says_which_formats_are_one_grid(altgrad, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = altgrad("formats")[1]
    assert "one grid" in out
    assert "E1M6 = E0M7 x 4, E1M14 = E0M15 x 4, E5M10 = FP16, E8M7 = BF16\n" in out


def test_the_table_fits_a_terminal_of_80_columns(altgrad, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, altgrad("formats")[1].splitlines())) <= 80


def test_the_table_lists_every_installed_format(altgrad):
    listing = json.loads(altgrad("formats", "--json")[1])
    names = {one["name"] for one in (*listing["formats"], *listing["families"])}
    assert names == {entry.name for entry in discover().of_kind("format")}
    assert listing["failed"] == {}
    (family,) = listing["families"]
    assert family["name"] == "ExMy"
    assert [one["name"] for one in family["options"]] == [
        "exponent_bits",
        "mantissa_bits",
        "bias",
        "specials",
    ]


NARROW = [entry.name for entry in discover().of_kind("format") if (entry.component.bits or 16) <= 8]


@pytest.mark.parametrize("name", [*NARROW, "BF16"])
def test_a_formats_values_in_json_are_those_that_its_codes_decode_to(altgrad, name):
    page = json.loads(altgrad("formats", name, "--json")[1])
    format = get_format(name)
    values, found = zip(*((one["value"], one["code"]) for one in page["values"]), strict=True)
    assert list(values) == format.values.tolist()
    assert (
        format.encode(format.values).tolist()
        == torch.tensor(found).to(format.encode(format.values).dtype).tolist()
    )
    special = page["special_codes"]
    assert len(found) + sum(map(len, special.values())) == 2**format.bits


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("E4M3", "-0 80; NaN 7f, ff"),
        ("E5M2", "-0 80; inf 7c, fc; NaN 7d..7f, fd..ff"),
        ("E7M0", "-0 80"),
        ("BF16", "-0 8000; inf 7f80, ff80; NaN 7f81..7fff, ff81..ffff"),
    ],
)
def test_a_formats_page_names_its_special_codes(altgrad, name, line):
    assert f"  special codes    {line}\n" in altgrad("formats", name)[1]


def test_a_formats_page_lists_its_values_by_binade_with_their_codes(altgrad, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = altgrad("formats", "E4M3")[1].splitlines()
    assert "  2^-6   08..0f     8     9    10    11    12    13    14    15  x 2^-9" in lines
    assert "  2^0    38..3f     1 1.125  1.25 1.375   1.5 1.625  1.75 1.875" in lines
    assert "  2^8    78..7e   256   288   320   352   384   416   448" in lines
    assert "negative values mirror them: 81 = -2^-9 to fe = -448" in lines


def test_a_format_by_its_numbers_is_a_table_as_in_a_file(altgrad):
    code, out, _ = altgrad("formats", "{exponent_bits = 4, mantissa_bits = 3, bias = 7}")
    assert code == 0
    assert out.startswith("E4M3(bias=7): ")
    assert "  largest          480\n" in out


@pytest.mark.parametrize("name", ["FP32", "none"])
def test_fp32_is_explained(altgrad, name):
    code, out, _ = altgrad("formats", name)
    assert (code, "leave it alone" in out.replace("\n", " ")) == (0, True)
    assert "leave it alone" in json.loads(altgrad("formats", name, "--json")[1])["meaning"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("E4M33", "no format named 'E4M33' is installed; did you mean 'E4M3'?"),
        ("E4M5", "; try: altgrad formats '{exponent_bits = 4, mantissa_bits = 5}'"),
        ("ExMy", '; try: altgrad formats \'{plugin = "ExMy", exponent_bits = 4, mantissa_bits = 5, spec'),
        ("{exponent_bits = 4", "is no inline TOML table such as {exponent_bits = 4, mantissa_bits = 5"),
        ("{exponent_bits = 4}", "mantissa_bits: is required and missing"),
        ("{exponent_bits = 12, mantissa_bits = 5}", "E12M5 has 18 bits with its sign; a format has 3 to 16"),
        ("", "no format named '' is installed; there are: "),
    ],
)
def test_what_is_no_format_is_the_users_mistake(altgrad, name, message):
    code, out, err = altgrad("formats", name)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_the_way_out_of_an_error_is_a_format(altgrad):
    err = altgrad("formats", "E4M5")[2]
    assert altgrad("formats", err.split("'")[-2])[1].startswith("E4M5(bias=7): ")


def test_show_points_to_the_values_of_a_format(altgrad):
    assert "  values  altgrad formats E4M3\n" in altgrad("show", "E4M3")[1]
    values = next(line for line in altgrad("show", "ExMy")[1].splitlines() if line.startswith("  values"))
    assert altgrad(*shlex.split(values)[2:])[0] == 0


def test_the_pictures_are_plain_characters_where_the_output_has_no_others():
    command = [sys.executable, "-c", "from altgrad_core.cli import altgrad; altgrad()", "formats", "E2M1"]
    done = in_a_process(*command, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout.isascii(), done.stderr) == (0, True, "")


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
        "  format       FP32: nothing is quantized\n"
        "  optimizer    AdamW (lr 0.001, other_lr 0.001, betas 0.9 0.95, eps 1e-08, weight_decay 0.1)\n"
        "  task         language modelling\n"
        "  data         markov (order 2, vocab_size 16, tokens 1000000, validation_tokens 100000, "
        "concentration 0.3, seed 0), tokenizer bytes\n"
        "  model        1 layers, 1 heads, width 16, context 8: 3,504 parameters, 3,120 without embeddings\n"
        "  on the grid  0.0% of the non-embedding parameters\n"
        "  training     10 steps of 2 x 8 tokens: 160 tokens, seed 1337\n"
        "  monitors     none\n"
        "  policies     none\n"
        "\n"
        "on cuda: 1 run, 16,000 tokens\n"
        "  with steps = 1000 ([on.cuda])\n" + "".join(f"{line}\n" for line in out.splitlines()[15:24])
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


@pytest.mark.parametrize("price", ["9 EUR", "nan", "-1"])
def test_a_price_that_is_none_is_refused_before_a_run_begins(price, altgrad_run, monkeypatch):
    monkeypatch.setenv("ALTGRAD_PRICE_PER_HOUR", price)
    code, out, err = altgrad_run(TINY)
    assert (code, out) == (2, "")
    assert err == f"$ALTGRAD_PRICE_PER_HOUR is {price!r}; set it to a number, 0 or more, or unset it\n"


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
        (["--jobs", "x"], "'x' is no whole number"),
        (["--jobs", "1.5"], "'1.5' is no whole number"),
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
    assert guarded(run_app, [str(tmp_path / name), "--check"]) == 2
    assert "cannot be read" in capsys.readouterr().err


LONG, HOMELESS = 300 * "x", "~no-such-user/x"


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        (["--out"], LONG),
        *itertools.product((["--resume"], ["--set", "init_from"], ["--set", "baseline"]), (LONG, HOMELESS)),
    ],
)
def test_a_folder_that_cannot_be_is_refused_in_one_line(altgrad_run, flag, name):
    tokens = [*flag, name] if len(flag) == 1 else [flag[0], f"{flag[1]}='{name}'"]
    code, _, err = altgrad_run(TINY, "--quiet", *tokens)
    assert (code, len(err.splitlines())) == (2, 1)
    assert name[:50] in err


# --- what is imported --------------------------------------------------------------------------------

WATCH = "import sys; {code}; print(*sorted(set(sys.modules) & set({heavy!r})), file=sys.stderr)"


@pytest.mark.parametrize(
    "call",
    [
        "guarded(app, ['plugins'])",
        "guarded(app, ['show', 'GridOptim'])",
        "guarded(run_app, [sys.argv[1], '--check'])",
    ],
)
def test_listing_showing_and_checking_import_nothing_heavy(call, tmp_path):
    path = tmp_path / "e.toml"
    path.write_text(TINY + GRID)
    code = f"from altgrad_core.apps import guarded, app, run_app; assert {call} == 0"
    heavy = (*HEAVY, "numpy")
    done = in_a_process(sys.executable, "-c", WATCH.format(code=code, heavy=heavy), str(path))
    assert (done.returncode, done.stderr) == (0, "\n")


OFFLINE = """
name = "e"
[data]
plugin = "eurlex"
"""
REFUSED = re.compile(
    r"the data set 'eurlex' cannot be prepared: no network: http://127.0.0.1:\d+ does not answer, and no "
    r'copy of .*; set path to .*, or take plugin = "licenses", .*, which need no network\n\n'
)


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A machine whose hub refuses connections, with empty caches; returns the file of an experiment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for cache in ("HF_HOME", "ALTGRAD_CACHE"):
        monkeypatch.setenv(cache, str(tmp_path / cache))
    path = tmp_path / "e.toml"
    path.write_text(OFFLINE)
    return path


@pytest.mark.parametrize("grid", ["", "[grid]\nseed = [1, 2]\n"])
def test_that_there_is_no_network_is_said_before_torch_is_imported(offline, tmp_path, grid):
    offline.write_text(OFFLINE + grid)
    arguments = [str(offline), "--out", str(tmp_path / "runs")]
    code = f"from altgrad_core.apps import guarded, run_app; assert guarded(run_app, {arguments}) == 2"
    done = in_a_process(sys.executable, "-c", WATCH.format(code=code, heavy=HEAVY))
    assert (done.returncode, done.stdout) == (0, "")
    assert REFUSED.fullmatch(done.stderr)
    assert not (tmp_path / "runs").exists()


def test_a_check_needs_no_network(offline):
    assert guarded(run_app, [str(offline), "--check"]) == 0


def test_a_grid_runs_the_cells_whose_data_are_there(offline, tmp_path, capsys):
    offline.write_text(TINY + '[grid]\ndata = [{plugin = "eurlex"}, {plugin = "markov", tokens = 500}]\n')
    assert guarded(run_app, [str(offline), "--out", str(tmp_path), "--quiet"]) == 1
    assert re.search("failed .*\n.* finished ", capsys.readouterr().out)


@pytest.mark.parametrize("module", ["altgrad_core", *PLUGINS])
def test_a_plugins_shop_window_is_light(module):
    code = f"import {module} as m; [getattr(m, name)() for name in dir(m) if name.startswith('altgrad_')]"
    done = in_a_process(sys.executable, "-c", WATCH.format(code=code, heavy=HEAVY))
    assert (done.returncode, done.stderr) == (0, "\n")


def test_the_commands_are_installed():
    for command in ("altgrad", "altgrad-run"):
        found = in_a_process(pathlib.Path(sys.executable).with_name(command), "--version")
        assert (found.returncode, found.stdout) == (0, importlib.metadata.version("altgrad-core") + "\n")
