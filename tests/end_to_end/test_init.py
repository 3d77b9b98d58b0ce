"""What a run starts from: another run's last weights, and weights rounded to a format's grid."""

import json
import shutil

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core import checkpoint
from altgrad_core.apps import guarded, run_app
from altgrad_core.record import read_lines
from altgrad_core.registry import UsageError

TINY = """
name = "{name}"
seed = 7
steps = 6
{top}
[data]
plugin = "markov"
tokens = 4000
[model]
n_layer = 2
n_head = 2
n_embd = 16
block_size = 16
[train]
batch_size = 2
device = "cpu"
warmup_steps = 2
eval_every = 3
eval_batches = 2
log_every = 1
checkpoint_every = 2
{tables}
"""
ADAMW = "[optimizer]\nplugin = 'AdamW'\nlr = 1e-2\n"
STILL = "[optimizer]\nplugin = 'AdamW'\nlr = 0.0\n"
GRID = "[quantize]\nformat = '{}'\nstorage = 'grid'\n"
ARMS = {
    "unquantized": ADAMW,
    "grid": GRID.format("E4M3") + "storage_rounding = 'stochastic'\nbound = 4.0\n" + ADAMW,
    "master": "[quantize]\nformat = 'E5M2'\nscale_mode = 'initial'\nbound = 4.0\n" + ADAMW,
    "rungs": GRID.format("E7M0") + "[optimizer]\nplugin = 'GridOptim'\n",
    "manifold": "[quantize]\nformat = 'E3M4'\n[optimizer]\nplugin = 'ManifoldAdamW'\nlr = 1e-2\n"
    "stiffness = {plugin = 'grid', refresh = 'never'}\n",
}


def ran(folder, name, tables, overrides, top):
    path = folder / f"{name}.toml"
    path.write_text(TINY.format(name=name, top=top, tables=tables))
    return altgrad.run(altgrad.load_experiment(path, overrides), out=folder / "runs", quiet=True)


@pytest.fixture
def run(tmp_path):
    """Return a function that runs a tiny experiment in a folder of its own; the result has `weights`."""

    def run(name, tables=ADAMW, *overrides, top=""):
        return ran(tmp_path, name, tables, overrides, top)

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run that has trained, for all tests."""
    tmp_path = tmp_path_factory.mktemp("trained")
    return ran(tmp_path, "source", ADAMW, [], "").folder


@pytest.fixture
def source(trained, tmp_path):
    """The folder of a run that has trained, a copy of the test's own."""
    folder = tmp_path / "trained" / "run"
    shutil.copytree(trained, folder)
    return folder


def weights_of(folder):
    folder = getattr(folder, "folder", folder)  # or a result's
    return checkpoint.newest(folder / "checkpoints")[0].model


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def start_from(folder):
    return f"init_from = '{folder}'"


# --- another run's weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_a_run_starts_from_the_last_weights_of_another_whatever_its_formats(arm, run):
    source = run("source", ARMS[arm])
    still = run("fine", STILL, "steps=1", top=start_from(source.folder))
    assert same(weights_of(still), weights_of(source))


def test_its_first_evaluation_is_the_last_of_the_run_it_starts_from(run, source, lines):
    fine = run("fine", ADAMW, "steps=1", top=start_from(source))
    *_, last = read_lines(source / "metrics.jsonl")
    assert lines(fine.folder)[0]["validation/loss"] == last["validation/loss"]


def test_scales_and_grids_are_fitted_to_the_weights_it_starts_from(run, source):
    still = run("fine", GRID.format("E4M3") + STILL, "steps=1", top=start_from(source))
    saved = checkpoint.newest(still.folder / "checkpoints")[0]
    e4m3, before = altgrad.get_format("E4M3"), weights_of(source)
    for name, scale in saved.state["scales"].items():
        assert scale == 2.0 ** torch.floor(torch.log2(448 / before[name].abs().max()))
        assert torch.equal(saved.model[name], e4m3.fake_quantize(before[name], scale))


@pytest.mark.parametrize("arm", ["grid", "master", "manifold"])
def test_a_run_goes_on_bit_for_bit_though_the_run_it_started_from_is_gone(
    arm, run, source, interrupted_at, tmp_path, lines
):
    top = start_from(source) + "\n"
    whole = run("fine", ARMS[arm], top=top)
    shutil.move(whole.folder, tmp_path / "whole")
    undo = interrupted_at(4)
    assert run("fine", ARMS[arm], top=top).outcome == "interrupted"
    undo()
    shutil.rmtree(source)
    parts = run("fine", ARMS[arm], top=top)
    assert same(weights_of(parts), weights_of(tmp_path / "whole"))
    whole_lines = list(read_lines(tmp_path / "whole" / "metrics.jsonl"))
    assert [line["train/loss"] for line in lines(parts.folder)[1:]] == [
        line["train/loss"] for line in whole_lines[1:]
    ]


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("model.block_size=32", r"transformer.wpe.weight is \(16, 16\) there and \(32, 16\) here"),
        ("data.vocab_size=12", r"transformer.wte.weight is \(16, 16\) there and \(12, 16\) here$"),
        ("model.n_layer=3", "they have no transformer.h.2.ln_1.weight; .*model.n_layer: 2 -> 3"),
        ("model.n_layer=1", "they have transformer.h.1.attn.c_attn.weight, .*model.n_layer: 2 -> 1"),
        ("model.bias=true", "they have no transformer.h.0.ln_1.bias; .*model.bias: False -> True"),
        ("model.n_head=4", "no size tells the heads of attention apart; set model.n_head = 2"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_the_name_of_the_tensor(override, reason, run, source):
    with pytest.raises(UsageError, match=f"init_from: the weights of {source} do not fit: {reason}"):
        run("fine", ADAMW, override, top=start_from(source))


def test_a_tied_head_goes_into_an_untied_one_and_never_back(run, source):
    untied = run("untied", ADAMW, "model.tie_weights=false", top=start_from(source))
    assert not torch.equal(weights_of(untied)["lm_head.weight"], weights_of(untied)["transformer.wte.weight"])
    with pytest.raises(
        UsageError, match=r"transformer.wte.weight and lm_head.weight are one tensor here and"
    ):
        run("tied", top=start_from(untied.folder))


def test_weights_that_had_diverged_are_refused(run, source):
    newest = max((source / "checkpoints").glob("step_*"))
    saved = checkpoint.load(newest)
    saved.model["transformer.h.1.mlp.c_fc.weight"][3, 4] = float("nan")
    checkpoint.save(newest.parent, newest.name, saved.model, saved.state)
    with pytest.raises(UsageError, match=r"transformer.h.1.mlp.c_fc.weight holds NaN or infinity"):
        run("fine", top=start_from(source))


def test_a_damaged_checkpoint_is_passed_over_and_said(run, source, capsys):
    newest, *others = sorted((source / "checkpoints").glob("step_*"), reverse=True)
    (newest / "model.safetensors").write_bytes(b"")
    still = run("fine", STILL, "steps=1", top=start_from(source))
    assert same(weights_of(still), checkpoint.load(others[0]).model)
    assert f"warning: {newest}: model.safetensors is not what its manifest says" in capsys.readouterr().out
    for path in others:
        shutil.rmtree(path)
    best = source / "checkpoints" / "best"
    kept = run("from_the_best", STILL, "steps=1", top=start_from(source))
    assert same(weights_of(kept), checkpoint.load(best).model)
    assert f"warning: {best} is taken, of step 3; none of a step is whole" in capsys.readouterr().out
    shutil.rmtree(best)
    with pytest.raises(UsageError, match="has no whole checkpoint left"):
        run("none_left", top=start_from(source))


def test_a_run_of_which_the_best_alone_was_kept_will_do(run, source, capsys):
    for path in (source / "checkpoints").glob("step_*"):
        shutil.rmtree(path)
    still = run("fine", STILL, "steps=1", top=start_from(source))
    assert same(weights_of(still), checkpoint.load(source / "checkpoints" / "best").model)
    assert "warning" not in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_refused_with_those_that_are(run, source):
    with pytest.raises(UsageError, match=f"is no run folder, but has some in it: name one of {source}$"):
        run("fine", top=start_from(source.parent))
    with pytest.raises(UsageError, match="init_from: nowhere has no checkpoint; name the folder of a run"):
        run("other", top="init_from = 'nowhere'")


def test_the_command_exits_with_2_and_one_line(source, tmp_path, capsys):
    path = tmp_path / "e.toml"
    path.write_text(TINY.format(name="e", top="init_from = 'nowhere'", tables=""))
    assert guarded(run_app, [str(path), "--out", str(tmp_path / "runs")]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "init_from: nowhere has no checkpoint; name the folder of a run, such as 'runs/my_experiment/run'"
    ]


def test_other_tokens_are_said(run, capsys, tmp_path):
    """Byte pairs are learnt from the data set: those of another one are others."""
    texts = "a tale of two formats. ", "number grids and their ends. "
    data = []
    for number, text in enumerate(texts):
        path = tmp_path / f"{number}.txt"
        path.write_text(text * 400)
        data.append(f"data={{plugin='text', path='{path}', tokenizer='bpe:258'}}")
    first = run("first", ADAMW, data[0], "steps=1")
    run("same", ADAMW, data[0], "steps=1", top=start_from(first.folder))
    assert "warning" not in capsys.readouterr().out
    run("other", ADAMW, data[1], "steps=1", top=start_from(first.folder))
    said = f"warning: init_from: {first.folder} was trained on other tokens: tokenizer bpe:258 on text"
    assert said in capsys.readouterr().out


def test_byte_pairs_of_another_text_at_the_same_path_are_said(run, capsys, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a tale of two formats. " * 400)
    data = f"data={{plugin='text', path='{path}', tokenizer='bpe:258'}}"
    first = run("first", ADAMW, data, "steps=1")
    path.write_text("number grids and their ends. " * 400)
    run("second", ADAMW, data, "steps=1", top=start_from(first.folder))
    assert f"warning: init_from: {first.folder} was trained on other tokens" in capsys.readouterr().out


def test_the_same_byte_pairs_are_said_to_be_none_whatever_the_labels_are(run, capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"a tale of {n} formats. " * 9, "labels": [n % 2], "kinds": [n % 3]} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [
        f"data={{plugin='jsonl', path='{path}', tokenizer='bpe:258', labels='{key}'}}" for key in rows[0]
    ][1:]
    first = run("first", ADAMW, data[0], "steps=1")
    run("second", ADAMW, data[1], "steps=1", top=start_from(first.folder))
    assert "warning" not in capsys.readouterr().out


def test_what_a_run_starts_from_is_in_its_resolved_options(run, source):
    fine = run("fine", ADAMW, "train.init_format=E4M3", "steps=1", top=start_from(source))
    options = json.loads((fine.folder / "resolved.json").read_text())["options"]
    assert options["init_from"] == str(source)
    assert options["train"]["init_format"] == "E4M3"


# --- rounded to a grid ---------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["E4M3", "E7M0", "E0M7"])
def test_unquantized_weights_can_start_where_those_of_the_grid_start(format, run):
    grid = run("grid", GRID.format(format) + STILL, "steps=1")
    control = run("control", STILL, "steps=1", f"train.init_format={format}")
    assert same(weights_of(control), weights_of(grid))


def test_a_tied_head_and_what_is_no_linear_stay_as_they_are(run):
    plain, rounded = (
        weights_of(run(name, STILL, "steps=1", f"train.init_format={name}")) for name in ("none", "E2M1")
    )
    changed = {name for name in plain if not torch.equal(plain[name], rounded[name])}
    linears = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert changed == {f"transformer.h.{n}.{layer}.weight" for n in (0, 1) for layer in linears}


def test_none_and_fp32_round_nothing(run):
    one, other = (run(format, STILL, "steps=1", f"train.init_format={format}") for format in ("none", "FP32"))
    assert same(weights_of(one), weights_of(other))


def test_layers_with_a_format_of_their_own_start_as_they_would(run):
    rules = "".join(
        f"[[quantize.rule]]\nlayers = '{layers}'\n{what}\n"
        for layers, what in ((".*attn.*", "format = 'BF16'"), (".*c_fc", "storage = 'master'"))
    )
    quantized = "[quantize]\nformat = 'FP32'\n" + rules + STILL
    plain = weights_of(run("plain", quantized, "steps=1"))
    rounded = weights_of(run("rounded", quantized, "steps=1", "train.init_format=E2M1"))
    changed = {name.split(".", 3)[3] for name in plain if not torch.equal(plain[name], rounded[name])}
    assert changed == {"mlp.c_fc.weight", "mlp.c_proj.weight"}


def test_the_grid_is_that_of_quantize(run):
    tables = "[quantize]\nformat = 'FP32'\ngranularity = 'channel'\nscale_rule = 'exact'\n" + STILL
    rounded = weights_of(run("rounded", tables, "steps=1", "train.init_format=E2M1"))
    weight = rounded["transformer.h.0.mlp.c_fc.weight"]
    largest = weight.abs().amax(dim=1, keepdim=True)
    codes = weight / largest * 6  # E2M1 ends at 6, which is each channel's own largest weight
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert (codes.abs().unsqueeze(-1) - grid).abs().amin(-1).max() < 1e-5
    assert largest.unique().numel() == 64


def test_they_are_rounded_to_nearest_however_the_forward_pass_rounds(run):
    tables = "[quantize]\nformat = 'FP32'\nrounding = 'up'\n" + STILL
    one = run("up", tables, "steps=1", "train.init_format=E4M3")
    other = run("nearest", STILL, "steps=1", "train.init_format=E4M3")
    assert same(weights_of(one), weights_of(other))


def test_weights_of_another_run_are_rounded_too(run, source):
    start = weights_of(source)
    still = weights_of(run("fine", STILL, "steps=1", "train.init_format=E4M3", top=start_from(source)))
    weight = start["transformer.h.0.attn.c_attn.weight"]
    scale = 2.0 ** torch.floor(torch.log2(448 / weight.abs().max()))
    expected = altgrad.get_format("E4M3").fake_quantize(weight, scale)
    assert torch.equal(still["transformer.h.0.attn.c_attn.weight"], expected)
    assert torch.equal(still["transformer.wte.weight"], start["transformer.wte.weight"])


def test_a_wrong_format_is_refused_at_its_line(run):
    with pytest.raises(UsageError, match=r"toml:\d+: train.init_format: .*did you mean 'E4M3'"):
        run("wrong", "init_format = 'E4M33'\n" + ADAMW)
