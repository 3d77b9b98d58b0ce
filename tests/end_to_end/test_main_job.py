"""The shipped experiments on the embedded license texts: shortly by default, whole where marked slow."""

import math
import pathlib

import pytest
import tomli
import torch

import altgrad_core as altgrad
from altgrad_core import checkpoint

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
EMBEDDINGS = ("transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight")  # the head is tied


def run(name, out, *overrides):
    file = altgrad.load_experiment(EXPERIMENTS / f"{name}.toml", overrides)
    return altgrad.run(file, out=out, device="cpu", quiet=True)


def share_of_powers_of_two(result):
    """Read the newest checkpoint: the share of non-embedding parameters that are 0 or a power of two."""
    saved, _ = checkpoint.newest(result.folder / "checkpoints")
    on_grid = total = 0
    for name, tensor in saved.model.items():
        if name not in EMBEDDINGS:
            total += tensor.numel()
            mantissa = torch.frexp(tensor)[0].abs()
            if bool(((mantissa == 0.5) | (mantissa == 0)).all()) and tensor.dim() == 2:
                on_grid += tensor.numel()
    return on_grid / total


def test_the_main_jobs_weights_are_on_the_e7m0_grid_after_a_few_steps(tmp_path):
    result = run("e7m0_grid", tmp_path, "steps=3", "train.eval_batches=1")
    assert result.outcome == "finished"
    assert share_of_powers_of_two(result) >= 0.9
    assert result.summary["share_on_grid"] >= 0.9


def skip_without_its_data(path):
    """Skip an experiment that reads a file beside the checkout, where there is none."""
    data = tomli.loads(path.read_text()).get("data", {})
    if not pathlib.Path(data.get("path", ".")).exists():
        pytest.skip(f"there is no {data['path']} beside this checkout")


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_runs_a_step(path, tmp_path, monkeypatch):
    monkeypatch.chdir(EXPERIMENTS.parent)
    skip_without_its_data(path)
    small = [
        "data.tokenizer=bytes",
        "model.n_layer=1",
        "model.n_head=2",
        "model.n_embd=16",
        "model.block_size=16",
    ]
    file = altgrad.load_experiment(path, ["steps=1", "train.batch_size=2", "train.eval_batches=1", *small])
    for result in altgrad.run_all(file, out=tmp_path, device="cpu", quiet=True):
        assert result.outcome == "finished"
        assert math.isfinite(result.summary["final"]["validation/loss"])


@pytest.mark.slow
def test_the_main_job_learns_far_below_the_frozen_control(tmp_path):
    result = run("e7m0_grid", tmp_path)
    assert share_of_powers_of_two(result) >= 0.9
    assert result.summary["final"]["validation/bits_per_byte"] < 2.5


@pytest.mark.slow
def test_the_bf16_baseline_trains(tmp_path):
    assert run("bf16_baseline", tmp_path).summary["final"]["validation/bits_per_byte"] < 2.3


@pytest.mark.slow
def test_the_frozen_control_stays_on_its_plateau(tmp_path):
    assert 3.0 < run("frozen_control", tmp_path).summary["final"]["validation/bits_per_byte"] < 4.2
