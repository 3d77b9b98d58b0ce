"""A run proves of itself, after every step, that each weight stored on a grid is on it."""

import pytest

import altgrad_core as altgrad
from altgrad_core.record import read_lines

TINY = """
name = "tiny"
seed = 7
steps = 6
[data]
plugin = "markov"
tokens = 4000
[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
[train]
batch_size = 4
device = "cpu"
warmup_steps = 0
eval_batches = 1
log_every = 1
[[monitor]]
plugin = "alignment"
every = 1
[quantize]
bound = 4.0
"""

OPTIMIZERS = {
    "AdamW": "lr = 0.05",
    "ManifoldAdamW": "lr = 0.05",
    "GridOptim": "normalize = 'adam'\nstep_scale = 3.0",
    "Madam": "lr = 0.2",
}
COMPENSATED = [
    (name, rounding) for name in ("AdamW", "ManifoldAdamW") for rounding in ("error_feedback", "eco")
]
PLAIN = [(name, rounding) for name in OPTIMIZERS for rounding in ("nearest_even", "stochastic")]


@pytest.fixture
def shares(tmp_path):
    """Return the share of weights on the grid after each step, by layer."""

    def shares(optimizer: str, quantize: str):
        path = tmp_path / "tiny.toml"
        options = f'[optimizer]\nplugin = "{optimizer}"\n{OPTIMIZERS[optimizer]}\n'
        path.write_text(f"{TINY}{quantize}\n{options}")
        result = altgrad.run(altgrad.load_experiment(path), out=tmp_path / "runs", quiet=True)
        prefix = "alignment/on_grid_fraction/"
        lines = [line for line in read_lines(result.folder / "metrics.jsonl") if line["step"] > 0]
        return [
            {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}
            for line in lines
        ]

    return shares


@pytest.mark.parametrize("format", ["E5M2", "E7M0"])
@pytest.mark.parametrize(("optimizer", "rounding"), [*PLAIN, *COMPENSATED])
def test_after_every_step_each_weight_stored_on_a_grid_is_on_it(optimizer, rounding, format, shares):
    found = shares(optimizer, f"format = '{format}'\nstorage = 'grid'\nstorage_rounding = '{rounding}'")
    assert len(found) == 6
    assert all(len(layers) == 5 and set(layers.values()) == {1.0} for layers in found)


def test_float32_masters_leave_the_grid_and_are_seen_to(shares):
    found = shares("AdamW", "format = 'E5M2'")
    assert all(layers["total"] < 0.5 for layers in found)
