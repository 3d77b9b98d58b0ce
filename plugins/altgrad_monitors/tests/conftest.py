"""A small run for monitors that take passes of their own; formats are tables, no other plugin is needed."""

import types

import attrs
import ml_dtypes
import numpy as np
import pytest
import torch

import altgrad_core as altgrad
from altgrad_core.experiment import Experiment, TrainOptions
from altgrad_core.format import Format
from altgrad_core.hookspecs import Step
from altgrad_core.model import GPT
from altgrad_core.model_options import ModelOptions
from altgrad_core.registry import discover
from altgrad_core.run_state import Run
from altgrad_core.tasks import LanguageModelling

MODEL = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "tie_weights": False}
TRAINING = {"batch_size": 3, "gradient_accumulation": 2}


def _table(name, dtype):
    codes = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    return Format(name=name, bits=8, values=np.unique(codes[np.isfinite(codes)]).tolist())


FORMATS = {
    "E4M3": _table("E4M3", ml_dtypes.float8_e4m3fn),
    "E5M2": _table("E5M2", ml_dtypes.float8_e5m2),
    "UNIFORM": Format(name="UNIFORM", bits=8, values=[rung / 128 for rung in range(-127, 128)]),
}


@pytest.fixture(scope="session")
def formats():
    """A few formats by name: E4M3, E5M2, and a uniform grid."""
    return FORMATS


@pytest.fixture
def run_of():
    """Return a function that makes a run around a model: random tokens of 24 kinds, no optimizer, no folder.

    weights, activations, gradients: names of formats; `model` and `train` change options of these tables.
    """

    def make(weights=None, activations=None, gradients=None, model=(), train=(), autocast=False, **recipe):
        options = ModelOptions(**MODEL | dict(model))
        gpt = GPT(options, 24, torch.Generator().manual_seed(1))
        if weights:
            flows = {"activations": FORMATS.get(activations), "gradients": FORMATS.get(gradients)}
            altgrad.quantize_model(gpt, FORMATS[weights], **flows, **recipe)
        experiment = Experiment(
            name="small", seed=3, model=options, train=TrainOptions(**TRAINING | dict(train))
        )
        text = np.random.default_rng(0).integers(0, 24, 500).astype(np.uint8)
        tokens = types.SimpleNamespace(train=text, validation=text)
        given = {
            "experiment": experiment,
            "cell": "run",
            "model": gpt,
            "device": torch.device("cpu"),
            "tokens": tokens,
            "task": LanguageModelling(experiment, tokens),
            "autocast": autocast,
            "layers": {name: name.rpartition(".")[0] for name, _ in gpt.named_parameters()},
            "registry": discover(),
        }
        absent = {field.name: None for field in attrs.fields(Run) if field.default is attrs.NOTHING}
        return Run(**absent | given)

    return make


@pytest.fixture
def step_of():
    """Return a function that gives the step which a run has just taken, without gradients."""

    def make(run, index=1):
        none = {"gradients": {}, "before": {}, "intended": {}}
        return Step(index=index, loss=torch.tensor(0.0), weights=run.weights(), **none)

    return make


@pytest.fixture
def observed(step_of):
    """Return a function that starts a monitor in a run, has it observe one step, and returns the numbers."""

    @torch.no_grad()
    def observe(monitor, run, index=1):
        monitor.start(run)
        metrics = monitor.observe(step_of(run, index))
        assert all(isinstance(value, torch.Tensor) and value.dim() == 0 for value in metrics.values())
        return {name: float(value) for name, value in metrics.items()}

    return observe
