"""The run that a file names as its baseline: what the summary says of it."""

import json

import pytest

import altgrad_core as altgrad
from altgrad_core import baseline
from altgrad_core.apps import guarded, run_app
from altgrad_core.baseline import Baseline
from altgrad_core.registry import UsageError

TASK = "language_modelling"
TEXT = """
name = "tiny"
steps = 2
{top}
[data]
plugin = "markov"
tokens = 4000
[model]
n_layer = 1
n_head = 1
n_embd = 16
block_size = 16
[train]
batch_size = 2
device = "cpu"
eval_batches = 1
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command into a folder: exit code, lines of output, errors."""
    monkeypatch.chdir(tmp_path)

    def command(out, *flags, top=""):
        (tmp_path / "e.toml").write_text(TEXT.format(top=top))
        code = guarded(run_app, ["e.toml", "--out", out, *flags])
        found = capsys.readouterr()
        return code, found.out.splitlines(), found.err

    return command


def summary(out):
    return json.loads(open(f"{out}/tiny/run/summary.json").read())


def test_the_summary_compares_with_the_baseline_and_ends_with_the_command_that_shows_both(run):
    run("one")
    code, lines, _ = run("other", "--set", "optimizer.lr=0.1", top="baseline = 'one/tiny/run'")
    ours, theirs = (summary(out)["final"]["validation/loss"] for out in ("other", "one"))
    assert code == 0
    assert summary("other")["baseline"] == {
        "folder": "one/tiny/run",
        "more": {"validation/loss": ours - theirs},
    }
    (line,) = [line for line in lines if line.startswith("  baseline")]
    word = "more" if ours > theirs else "less"
    assert line.split(maxsplit=1)[1] == (
        f"one/tiny/run: {theirs:.4f} nats per token, {abs(ours - theirs):.4f} {word} here"
    )
    runs = "other/tiny/run one/tiny/run"
    shown_by = lines[-1].split(maxsplit=1)[1]
    assert shown_by in (f"altgrad diff {runs}", f"altgrad-report {runs} -o comparison.html")


def test_a_baseline_that_is_none_is_refused_before_the_training(run):
    code, _, errors = run("one", top="baseline = 'nowhere'")
    assert (code, errors) == (
        2,
        "baseline: nowhere is no run folder, it has no summary.json; name the folder of a run that has, such "
        "as 'runs/my_experiment/run'\n",
    )
    assert run("one")[0] == 0  # nothing of the kind is left in the folder


def test_a_baseline_is_no_option_of_the_run(run):
    run("one")
    assert run("other")[0] == 0
    code, lines, _ = run("other", top="baseline = 'one/tiny/run'")
    assert (code, lines) == (0, ["other/tiny/run: finished already, nothing to do"])


def test_a_baseline_must_be_text_and_may_be_given_by_a_flag(run, tmp_path):
    code, _, errors = run("one", top="baseline = 3")
    assert (code, errors) == (2, "e.toml:4: baseline: expected text in quotes, got 3\n")
    (tmp_path / "e.toml").write_text(TEXT.format(top=""))
    assert altgrad.load_experiment("e.toml", ["baseline='a/b'"]).baseline == "a/b"


def test_a_run_that_has_not_ended_is_no_baseline(tmp_path):
    (tmp_path / "resolved.json").write_text("{}")
    with pytest.raises(UsageError, match=r"has not ended, it has no summary.json"):
        baseline.read(str(tmp_path), TASK)


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (2.0, "2.0000 nats per token, the same here"),
        (1.5, "2.0000 nats per token, 0.5000 less here"),
        (float("nan"), "2.0000 nats per token, NaN here"),
        (None, "has no validation loss to compare with"),
    ],
)
def test_a_difference_in_words(tmp_path, ours, said):
    final = {} if ours is None else {"validation/loss": ours}
    ((_, text),) = baseline.rows(final, Baseline(tmp_path, TASK, {"validation/loss": 2.0}))
    assert text == f"{tmp_path}: {said}"


def test_text_is_compared_in_bits_per_byte_too(tmp_path):
    theirs = Baseline(tmp_path, TASK, {"validation/loss": 2.0, "validation/bits_per_byte": 3.0})
    ((_, text),) = baseline.rows({"validation/loss": 2.5, "validation/bits_per_byte": 3.5}, theirs)
    assert text.endswith("2.0000 nats per token, 0.5000 more here; 3.0000 bits per byte, 0.5000 more here")
