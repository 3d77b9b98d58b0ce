"""Whole runs of task = "classification": they learn, resume, quantize, and say what they are."""

import json
import math
import random
import re
import subprocess
import sys

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core import checkpoint, loop
from altgrad_core.apps import guarded, run_app
from altgrad_core.record import read_json, read_lines
from altgrad_core.registry import UsageError

LABELS = 3
TINY = """
name = "{name}"
seed = 7
steps = 40
task = "classification"
{top}
[data]
plugin = "jsonl"
path = "acts.jsonl"
split = "split"
label_count = 3
windows = 2
[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
[train]
batch_size = 16
device = "cpu"
warmup_steps = 2
eval_every = 20
eval_batches = 0
log_every = 10
checkpoint_every = 20
{tables}
"""
ADAMW = "[optimizer]\nplugin = 'AdamW'\nlr = 2e-2\n"
GRID = "[quantize]\nformat = 'E4M3'\nstorage = 'grid'\nstorage_rounding = 'stochastic'\n"
FLOWS = "[quantize.activations]\nformat = 'E4M3'\n[quantize.gradients]\nformat = 'E5M2'\n"
EXTRA_PASSES = "".join(
    f"[[monitor]]\nplugin = '{name}'\nevery = 5\n"
    for name in ("attention_entropy", "fidelity", "fisher", "kurtosis")
)
CLOCKS = ("time/", "cost/", "memory/")


def act(draw):
    """Return a document whose labels are which of three kinds of letters are in it; one in eight has none."""
    labels = [label for label in range(LABELS) if draw.random() < 0.5]
    letters = "xyz" + "".join("abcdefghi"[3 * label : 3 * label + 3] for label in labels)
    return {"text": "".join(draw.choices(letters, k=draw.randint(12, 50))), "labels": labels}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def acts(tmp_path, monkeypatch):
    """Write the documents, and work in their folder; returns those of the validation split."""
    monkeypatch.chdir(tmp_path)
    draw = random.Random(0)
    rows = [{**act(draw), "split": "train" if number % 5 else "validation"} for number in range(400)]
    write(tmp_path / "acts.jsonl", rows)
    return [row for row in rows if row["split"] == "validation"]


@pytest.fixture
def load(acts, tmp_path):
    """Return a function that writes an experiment and loads it."""

    def load(name, tables=ADAMW, *overrides, top=""):
        path = tmp_path / f"{name}.toml"
        path.write_text(TINY.format(name=name, top=top, tables=tables))
        return altgrad.load_experiment(path, overrides)

    return load


@pytest.fixture
def run(load):
    """Return a function that runs an experiment, quietly."""

    def run(*arguments, top="", out="runs"):
        return altgrad.run(load(*arguments, top=top), out=out, quiet=True)

    return run


def lines(result):
    return [
        {key: value for key, value in line.items() if not key.startswith(CLOCKS)}
        for line in read_lines(result.folder / "metrics.jsonl")
    ]


def weights(result):
    return checkpoint.newest(result.folder / "checkpoints")[0].model


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def prior_loss(rows):
    """Return the loss of who knows the shares of the labels and nothing of the text, in nats per label."""
    shares = [sum(label in row["labels"] for row in rows) / len(rows) for label in range(LABELS)]
    return sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in shares) / LABELS


# --- what is learnt ------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantize", ["", GRID, GRID + FLOWS], ids=["float32", "grid", "flows"])
def test_it_learns_more_than_the_shares_of_the_labels(run, acts, quantize):
    final = run("learning", quantize + ADAMW).summary["final"]
    assert final["validation/loss"] < 0.5 * prior_loss(acts)
    assert final["validation/micro_f1"] > 0.85
    assert final["validation/macro_f1"] > 0.85


def test_an_evaluation_says_loss_and_f1_and_nothing_of_tokens(run):
    evaluated = [line for line in lines(run("said", ADAMW, "steps=2")) if "validation/loss" in line]
    assert len(evaluated) == 2
    for line in evaluated:
        names = {name for name in line if name.startswith("validation/")}
        assert names == {"validation/loss", "validation/micro_f1", "validation/macro_f1"}


def test_the_first_loss_is_that_of_a_coin(run):
    first, *_ = lines(run("coin", ADAMW, "steps=1"))
    assert first["validation/loss"] == pytest.approx(math.log(2), abs=0.05)


def test_evaluation_is_the_models_answer_on_each_document_of_the_split_once(run, acts):
    more = "steps=5", "train.batch_size=30", "data.windows=4"  # a last batch is smaller; nothing is cut off
    result = run("checked", ADAMW, *more)
    model = altgrad_model(result)
    logits = torch.stack([answer(model, row["text"]) for row in acts])
    true = torch.tensor([[label in row["labels"] for label in range(LABELS)] for row in acts]).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, true)
    found = result.summary["final"]
    assert found["validation/loss"] == pytest.approx(expected.item(), rel=1e-5)
    hits = ((logits > 0) & (true > 0)).sum().item()
    assert found["validation/micro_f1"] == pytest.approx(2 * hits / ((logits > 0).sum() + true.sum()).item())


def altgrad_model(result):
    from altgrad_core.model_options import ModelOptions
    from altgrad_core.text_classifier import TextClassifier

    options = ModelOptions(n_layer=1, n_head=2, n_embd=16, block_size=16)
    model = TextClassifier(options, 256, LABELS, torch.Generator())
    model.load_state_dict(weights(result), strict=True)
    return model.eval()


@torch.no_grad()
def answer(model, text):
    """Return the logits of one text, window by window, without padding."""
    tokens = torch.tensor([*text.encode(), 0])  # bytes, and the end of the document
    means = [model.transformer(window[None])[0].mean(0) for window in tokens.split(16)]
    return model.classifier(torch.stack(means)).mean(0)


def test_documents_without_any_label_are_learnt_from(acts, run, tmp_path):
    assert any(not row["labels"] for row in acts)
    draw = random.Random(1)
    rows = [{**act(draw), "labels": [], "split": split} for split in ("train", "validation") * 4]
    write(tmp_path / "acts.jsonl", rows)
    final = run("none", ADAMW).summary["final"]
    assert final["validation/loss"] < 0.3
    assert (final["validation/micro_f1"], final["validation/macro_f1"]) == (0.0, 0.0)


# --- order, resume, purity -----------------------------------------------------------------------------


def test_arms_of_one_seed_learn_from_the_same_documents(run, monkeypatch):
    seen = {}
    one_step = loop._one_step

    def watched(state):
        key = state.experiment.name, state.step
        seen[key] = state.task.training_batch(state.step, 0)
        one_step(state)

    monkeypatch.setattr(loop, "_one_step", watched)
    run("float32", ADAMW, "steps=2")
    run("quantized", GRID + ADAMW, "steps=2")
    for step in range(2):
        both = zip(seen["float32", step], seen["quantized", step], strict=True)
        assert all(torch.equal(one, other) for one, other in both)


@pytest.mark.parametrize("tables", [ADAMW, GRID + FLOWS + ADAMW + EXTRA_PASSES], ids=["float32", "all"])
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(run, interrupted_at, tables):
    more = "train.gradient_accumulation=2", "model.dropout=0.1", "steps=24", "train.log_every=1"
    whole = run("fine", tables, *more, out="whole")
    undo = interrupted_at(10)
    assert run("fine", tables, *more).outcome == "interrupted"
    undo()
    parts = run("fine", tables, *more)
    assert same(weights(parts), weights(whole))
    assert lines(parts) == lines(whole)


def test_monitors_with_passes_of_their_own_report_and_change_nothing(run):
    plain, looked_at = run("plain", GRID + ADAMW), run("eyed", GRID + ADAMW + EXTRA_PASSES)
    assert same(weights(plain), weights(looked_at))
    final = looked_at.summary["final"]
    for name in ("fidelity/cosine", "fisher/trace", "kurtosis/excess"):
        assert math.isfinite(final[f"{name}/classifier"]), name
    assert math.isfinite(final["attention_entropy/entropy/total"])


def test_padding_is_nothing_to_the_monitors_of_activations(run):
    """No document has more than 50 tokens: windows of 16 beyond the fourth are padding alone."""
    watching = "".join(
        f"[[monitor]]\nplugin = '{name}'\nevery = 1\n" for name in ("attention_entropy", "kurtosis")
    )
    four, eight = (
        {
            name: value
            for name, value in lines(
                run(f"w{windows}", ADAMW + watching, f"data.windows={windows}", "steps=1")
            )[-1].items()
            if name.startswith(("attention_entropy/", "kurtosis/"))
        }
        for windows in (4, 8)
    )
    assert len(four) == 2 * 2 + 2 * 6
    assert eight == pytest.approx(four, rel=1e-5)


def test_the_head_is_the_monitors_classifier_and_an_epoch_is_a_pass_over_the_documents(run):
    watching = "[[monitor]]\nplugin = 'rank'\nevery = 10\nper = 'type'\n"
    result = run("grouped", ADAMW + watching)
    assert result.summary["final"]["rank/stable_rank/classifier"] >= 1
    assert [line["step"] for line in lines(result) if "epoch/index" in line] == [20, 40]  # 320 documents
    assert result.summary["passes"] == 2


# --- what it starts from -------------------------------------------------------------------------------


def test_a_classifier_takes_the_trunk_of_a_language_model_and_says_that_its_head_is_new(load, capsys):
    plain = ("task='language_modelling'", "data.windows=1", "steps=3", "model.tie_weights=false")
    source = altgrad.run(load("source", ADAMW, *plain), out="runs", quiet=True)
    still = load("fine", ADAMW, "optimizer.lr=0.0", "steps=1", top=f"init_from = '{source.folder}'")
    taken = weights(altgrad.run(still, out="runs"))
    trunk = {name: one for name, one in weights(source).items() if name != "lm_head.weight"}
    assert same({name: taken[name] for name in trunk}, trunk)
    assert taken.keys() - trunk.keys() == {"classifier.weight", "classifier.bias"}
    said = "at step 3; its head is left out, the head here is classifier, which starts afresh\n"
    assert said in capsys.readouterr().out


def test_a_tied_language_model_takes_the_trunk_of_a_classifier_and_its_embedding_is_the_head(load, capsys):
    source = altgrad.run(load("source", ADAMW, "steps=3"), out="runs", quiet=True)
    plain = ("task='language_modelling'", "data.windows=1", "steps=1", "optimizer.lr=0.0")
    taken = weights(
        altgrad.run(load("fine", ADAMW, *plain, top=f"init_from = '{source.folder}'"), out="runs")
    )
    for name in ("transformer.wte.weight", "lm_head.weight"):
        assert torch.equal(taken[name], weights(source)["transformer.wte.weight"])
    assert "its head is left out, the head here is the token embedding\n" in capsys.readouterr().out


def test_more_windows_of_the_same_byte_pairs_are_the_same_tokens(load, capsys):
    pytest.importorskip("tokenizers")
    pairs = "data.tokenizer='bpe:260'", "steps=1"
    source = altgrad.run(load("source", ADAMW, *pairs), out="runs", quiet=True)
    more = load("fine", ADAMW, *pairs, "data.windows=3", top=f"init_from = '{source.folder}'")
    altgrad.run(more, out="runs", quiet=True)
    assert "was trained on other tokens" not in capsys.readouterr().out


def test_a_classifier_takes_the_head_of_one_with_the_same_labels_alone(run, capsys):
    source = run("source", ADAMW, "steps=3")
    start = f"init_from = '{source.folder}'"
    again = run("again", ADAMW, "optimizer.lr=0.0", "steps=1", top=start)
    assert same(weights(again), weights(source))
    other = run("other", ADAMW, "optimizer.lr=0.0", "steps=1", "data.label_count=5", top=start)
    assert weights(other)["classifier.weight"].shape == (5, 16)


def test_a_trunk_that_does_not_fit_is_refused(run):
    source = run("source", ADAMW, "steps=1")
    with pytest.raises(UsageError, match=r"transformer.wpe.weight is \(16, 16\) there and \(8, 16\) here"):
        run("fine", ADAMW, "model.block_size=8", top=f"init_from = '{source.folder}'")


# --- grids, comparisons, baselines ---------------------------------------------------------------------

COMPARED = """
[grid]
optimizer = [{plugin = "AdamW", lr = 1e-3}, {plugin = "AdamW", lr = 1e-3, weight_decay = 0.0}]
[compare]
arm = "optimizer"
tune = [1.0, 20.0, 60.0]
tune_seeds = [1]
seeds = [2]
metric = "validation/micro_f1"
"""


def test_a_comparison_by_f1_takes_the_step_size_with_the_most(load, capsys, tmp_path):
    file = load("compared", COMPARED)
    command = [str(file.path), "--set", "steps=20", "--set", "train.eval_every=0", "--quiet"]
    assert guarded(run_app, [*command, "--out", str(tmp_path / "runs")]) == 0
    assert "micro F1    macro F1  folder" in capsys.readouterr().out
    found = {"seed=1": {}, "seed=2": {}}
    for path in (tmp_path / "runs" / "compared").glob("*weight_decay*"):
        _, seed, step = path.name.rsplit(",", 2)
        found[seed][step] = read_json(path / "summary.json")["final"]["validation/micro_f1"]
    (chosen,) = found["seed=2"]
    assert len(set(found["seed=1"].values())) == len(found["seed=1"]) >= 3
    assert found["seed=1"][chosen] == max(found["seed=1"].values())


def test_a_metric_of_another_task_is_refused(load):
    with pytest.raises(UsageError, match=r"no evaluation gives 'validation/perplexity'; .*/macro_f1 \(task"):
        load("compared", COMPARED, 'compare.metric="validation/perplexity"')


def test_a_baseline_of_another_task_is_refused_before_the_training(run, load):
    source = run("source", ADAMW, "steps=1")
    top = f"baseline = '{source.folder}'"
    with pytest.raises(UsageError, match="is a run of task = 'classification', this one of 'language_mod"):
        run("other", ADAMW, "task='language_modelling'", "data.windows=1", top=top)
    assert run("fine", ADAMW, "steps=1", top=top).summary["baseline"]["more"].keys() == {
        "validation/loss",
        "validation/micro_f1",
        "validation/macro_f1",
    }


# --- what is said --------------------------------------------------------------------------------------


def test_check_says_the_task_and_counts_the_head_without_torch_or_the_data(load, tmp_path):
    file = load("checked", GRID + ADAMW)
    (tmp_path / "acts.jsonl").unlink()
    code = (
        "import sys; from altgrad_core.apps import run_app;"
        f"run_app([{str(file.path)!r}, '--check'], result_action='return_value');"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (
        "task         classification (3 labels; of a document the first 2 windows of 16 tokens)"
        in done.stdout
    )
    # Embeddings 16 x (256 + 16), a block 12 x 16 x 16, three LayerNorms, the head 16 x 3 + 3.
    assert f"{16 * 272 + 12 * 256 + 3 * 16 + 51:,} parameters" in done.stdout
    assert "training     40 steps of 16 x 2 x 16 tokens" in done.stdout


def test_header_and_summary_say_the_task_and_its_metrics(load, capsys):
    result = altgrad.run(load("said", ADAMW, "steps=20"), out="runs")
    out = capsys.readouterr().out
    assert "  task         classification (3 labels; of a document the first 2 windows" in out
    assert "320 documents of " in out
    assert "passes over the training documents" in out
    final = result.summary["final"]
    assert (
        f"{final['validation/loss']:.4f} nats per label, micro F1 {final['validation/micro_f1']:.4f}, "
        f"macro F1 {final['validation/macro_f1']:.4f}\n"
    ) in out
    assert read_json(result.folder / "summary.json")["task"] == "classification"


def test_a_column_of_labels_that_is_not_there_exits_with_2_and_names_those_there_are(load, capsys):
    file = load("wrong", ADAMW)
    code = guarded(run_app, [str(file.path), "--set", 'data.labels="kinds"', "--out", "runs"])
    assert code == 2
    err = capsys.readouterr().err
    assert "acts.jsonl:1: no key 'kinds'; its keys are text, labels, split: set labels to one" in err


def test_a_label_beyond_the_last_exits_with_2(load, capsys):
    file = load("wrong", ADAMW)
    assert guarded(run_app, [str(file.path), "--set", "data.label_count=2", "--out", "runs"]) == 2
    assert re.search(
        "document [0-9]+ of train has the label 2; the 2 labels are 0 to 1", capsys.readouterr().err
    )
