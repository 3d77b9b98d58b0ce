"""`altgrad diff` on real runs."""

import pytest

import altgrad_core as altgrad
from altgrad_core import diff

TEXT = """
name = "tiny"
steps = 4
[data]
plugin = "markov"
tokens = 4000
[model]
n_layer = 1
n_head = 1
n_embd = 16
block_size = 16
dropout = 0.2
[train]
batch_size = 2
device = "cpu"
warmup_steps = 0
eval_batches = 1
log_every = 1
checkpoint_every = 2
[quantize]
format = "E4M3"
storage = "grid"
storage_rounding = "error_feedback"
[quantize.activations]
format = "E4M3"
[optimizer]
plugin = "ManifoldAdamW"
[[monitor]]
plugin = "flip"
"""


@pytest.fixture
def folder(tmp_path):
    """Return a function that runs a tiny experiment with overrides, and gives its folder."""
    path = tmp_path / "e.toml"
    path.write_text(TEXT)

    def run(out, *overrides):
        file = altgrad.load_experiment(path, overrides)
        return altgrad.run(file, out=tmp_path / out, quiet=True).folder

    return run


def test_the_same_run_twice_is_equal_in_every_bit(folder):
    found = diff.compare(folder("one"), folder("other"))
    assert not found.differs
    assert (found.metrics.common, found.tensors.steps) == (5, (2, 4))
    assert found.outcomes == ("finished at step 4", "finished at step 4")


def test_another_step_size_shows_from_the_first_step_on(folder):
    found = diff.compare(folder("one"), folder("other", "optimizer.lr=2e-3"))
    assert [(one.path, one.first, one.second) for one in found.options] == [
        ("optimizer.lr", "0.001", "0.002")
    ]
    assert found.metrics.step == 1
    assert "train/loss" not in found.metrics.values  # before the first update they are alike
    assert (found.tensors.step, found.tensors.tensor) == (2, "transformer.wte.weight")


def test_what_only_watches_is_an_option_that_differs_and_no_tensor(folder):
    found = diff.compare(folder("one"), folder("other", "train.eval_every=1"))
    assert [one.path for one in found.options] == ["train.eval_every"]
    assert (found.metrics.step, found.tensors.step) == (None, None)
    assert found.metrics.names[0] == ()
    assert "validation/loss" in found.metrics.names[1]
