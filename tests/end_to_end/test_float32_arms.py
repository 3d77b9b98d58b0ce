"""Runs on float32 weights differ from quantized ones in how the same weights are stored, and nothing else."""

import pytest
import torch

ONE_STEP = """
name = "tiny"
seed = 7
steps = 1
[data]
plugin = "markov"
tokens = 4000
[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
tie_weights = false
[train]
batch_size = 4
device = "cpu"
warmup_steps = 0
eval_every = 0
eval_batches = 1
checkpoint_every = 0
[[quantize.rule]]
layers = "lm_head"
format = "FP32"
"""
MANIFOLD = "plugin = 'ManifoldAdamW', weight_decay = 0.0"
ARMS = {
    "AdamW": "plugin = 'AdamW', weight_decay = 0.0",
    "geometry": f"{MANIFOLD}, stiffness = {{plugin = 'grid', of_format = 'E5M2'}}",
    "without": MANIFOLD,
}


@pytest.fixture
def trained(run, last_checkpoint, write, tmp_path):
    """Return a function that runs one step and returns the weights: the covered ones, and the others."""
    path = write(ONE_STEP)

    def trained(arm, *, format="FP32", lr=1e-3, other_lr=1e-3, more=()):
        optimizer = f"optimizer={{{ARMS[arm]}, lr = {lr!r}, other_lr = {other_lr!r}}}"
        flags = (f"quantize.format={format}", optimizer, *more)
        folder = f"{arm}-{format}-{lr}-{other_lr}-{len(more)}"
        weights = last_checkpoint(run(path, tmp_path / folder, *flags)).model
        covered = {name for name in weights if ".h." in name and weights[name].dim() == 2}
        assert len(covered) == 4
        return (
            {name: weights[name] for name in covered},
            {name: weights[name] for name in weights.keys() - covered},
        )

    return trained


def equal(one, other):
    """Return whether all tensors are alike, or none; some is neither."""
    found = {torch.equal(one[name], other[name]) for name in one}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("arm", ["AdamW", "geometry"])
@pytest.mark.parametrize("format", ["FP32", "E5M2"])
def test_lr_is_that_of_the_covered_weights_and_other_lr_of_the_others(trained, arm, format):
    first, faster, others = (
        trained(arm, format=format, lr=lr, other_lr=other_lr)
        for lr, other_lr in ((1e-3, 1e-3), (4e-3, 1e-3), (1e-3, 4e-3))
    )
    assert [equal(*pair) for pair in zip(first, faster, strict=True)] == [False, True]
    assert [equal(*pair) for pair in zip(first, others, strict=True)] == [True, False]


def test_a_geometry_on_float32_moves_the_covered_weights_alone(trained):
    covered, others = trained("geometry", lr=4e-3)
    plain, plain_others = trained("AdamW", lr=4e-3)
    assert not equal(covered, plain)
    assert "lm_head.weight" in others
    assert equal(others, plain_others)


def test_without_a_geometry_on_float32_the_covered_weights_train_at_other_lr(trained):
    one, other = trained("without", lr=7.0, other_lr=4e-3), trained("AdamW", lr=4e-3, other_lr=4e-3)
    assert [equal(*pair) for pair in zip(one, other, strict=True)] == [True, True]


def test_the_bound_holds_on_float32_for_the_covered_weights(trained):
    start, _ = trained("AdamW", lr=0.0)
    bounded, _ = trained("AdamW", lr=0.5, more=("quantize.bound=2.0",))
    for name, weight in bounded.items():
        limit = 2 * start[name].double().square().mean().sqrt().item()
        assert weight.abs().max().item() == pytest.approx(limit, rel=1e-6), name


def test_a_rule_names_the_geometry_that_its_weights_take_on_float32(trained):
    rule = "quantize.rule=[{layers = 'lm_head', format = 'FP32'}, {layers = '.*c_fc', of_format = 'E0M7'}]"
    with_rule, _ = trained("geometry", more=(rule,))
    without, _ = trained("geometry")
    uniform, _ = trained("AdamW")  # to one step, the even spacing of E0M7 is a learning rate
    for name, weight in with_rule.items():
        assert torch.equal(weight, without[name]) == ("c_fc" not in name), name
        assert ("c_fc" in name) == torch.allclose(weight, uniform[name], rtol=1e-6, atol=1e-9), name
