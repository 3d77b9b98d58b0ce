"""Whoever watches changes nothing: the same run with every installed monitor and with none, bit for bit."""

import attrs
import pytest
import torch

import altgrad_core as altgrad
from altgrad_core import checkpoint
from altgrad_core.record import read_lines
from altgrad_core.registry import discover

TINY = """
name = "tiny"
seed = 11
steps = 6

[data]
plugin = "markov"
tokens = 3000

[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
dropout = 0.2

[train]
batch_size = 2
gradient_accumulation = 2
device = "cpu"
warmup_steps = 1
eval_every = 3
eval_batches = 1
log_every = 2
"""

STORED = """
[quantize]
format = "E4M3"
storage = "grid"
storage_rounding = "stochastic"
bound = 4.0
"""

FLOWS = """
[quantize]
format = "E4M3"
[quantize.activations]
format = "E4M3"
amax_history = 3
scale_mode = "delayed"
[quantize.gradients]
format = "E5M2"
rounding = "stochastic"
"""

TRACKED = "[optimizer]\nplugin = 'ManifoldAdamW'\nlr = 1e-2\ntrack_position = true\n"

ARMS = {
    "AdamW on the grid": STORED + "[optimizer]\nplugin = 'AdamW'\nlr = 1e-2\n",
    "ManifoldAdamW": "[quantize]\nformat = 'E4M3'\n" + TRACKED,
    "GridOptim": STORED + "[optimizer]\nplugin = 'GridOptim'\nnormalize = 'adam'\nstep_scale = 0.3\n",
    "flows": FLOWS + "[optimizer]\nplugin = 'AdamW'\nlr = 1e-2\n",
}
OUTSIDE = {"wandb"}
"""Monitors that talk to a service."""
TRAJECTORY = ("optimizer", "storage", "master_bound", "scales", "flows", "random", "lr_factor", "step")
"""What a checkpoint holds of the training itself."""
LOSSES = ("train/loss", "train/gradient_norm", "validation/loss")


def monitors(text):
    """Return the tables of every installed monitor that can watch such a run, at every step."""
    tables = []
    for found in discover().of_kind("monitor"):
        options = {field.name for field in attrs.fields(found.component.options)}
        needed = getattr(found.component.options, "optimizer_options", {})
        if found.name not in OUTSIDE and all(option in text for option in needed):
            tables.append(f"[[monitor]]\nplugin = '{found.name}'\n" + "every = 1\n" * ("every" in options))
    return tables


@pytest.fixture
def trained(tmp_path):
    """Return a function that trains by the text of a file, and returns the finished run."""

    def train(text, name):
        path = tmp_path / f"{name}.toml"
        path.write_text(text)
        return altgrad.run(altgrad.load_experiment(path), out=tmp_path / name, quiet=True)

    return train


def last(result):
    found, _ = checkpoint.newest(result.folder / "checkpoints")
    return found


def differing(one, other, at="state"):
    """Return where two nested states differ by a bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        alike = one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()
        return [] if alike else [at]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [place for key in one for place in differing(one[key], other[key], f"{at}.{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return [place for index, pair in pairs for place in differing(*pair, f"{at}.{index}")]
    return [] if one == other else [at]


def losses(result):
    lines = read_lines(result.folder / "metrics.jsonl")
    return [{name: line[name] for name in LOSSES if name in line} for line in lines]


@pytest.fixture(params=ARMS)
def text(request):
    return TINY + ARMS[request.param]


def test_a_watched_run_is_the_unwatched_one_bit_for_bit(trained, text):
    alone, watched = trained(text, "alone"), trained(text + "".join(monitors(text)), "watched")
    one, other = last(alone), last(watched)
    assert differing(one.model, other.model, "model") == []
    assert [place for key in TRAJECTORY for place in differing(one.state[key], other.state[key], key)] == []
    assert losses(alone) == losses(watched)
    reporting = {
        name.partition("/")[0] for line in read_lines(watched.folder / "metrics.jsonl") for name in line
    }
    asked_for = {table.split("'")[1] for table in monitors(text)}
    assert asked_for - reporting == set(), "these have reported nothing"
    warnings = [
        event for event in read_lines(watched.folder / "events.jsonl") if "dropped" in event["message"]
    ]
    assert warnings == []


def test_the_comparison_sees_one_bit():
    weight = torch.tensor([0.0, 1.0])
    assert differing({"a": [weight]}, {"a": [weight.clone()]}) == []
    assert differing({"a": [weight]}, {"a": [torch.tensor([-0.0, 1.0])]}) == ["state.a.0"]


def test_only_the_positions_need_an_optimizer_that_keeps_them():
    with_them, without = (len(monitors(TINY + ARMS[arm])) for arm in ("ManifoldAdamW", "GridOptim"))
    assert with_them == without + 1
