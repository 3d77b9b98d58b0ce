"""Four steps of training, for what can only be seen in a run: monitors and policies.

Data, format and optimizer are the kit's own, so that no other plugin is needed.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy
import torch
from torch import Tensor

from altgrad_core import checkpoint, commands
from altgrad_core.experiment_file import load_experiment
from altgrad_core.hookspecs import Component, NoOptions, OptimizerInputs
from altgrad_core.options import written
from altgrad_core.record import CHECKPOINTS, EVENTS, read_lines
from altgrad_core.registry import CORE_DISTRIBUTION, Registered, Registry
from altgrad_core.testing import optimizer_training

SPLITS = ("train", "validation")

EXPERIMENT = """
name = "conformance"
steps = 4
[data]
plugin = "conformance"
[model]
n_layer = 1
n_head = 1
n_embd = 16
block_size = 16
[train]
batch_size = 2
device = "cpu"
eval_batches = 1
log_every = 1
[quantize]
format = "conformance"
storage = "grid"
storage_rounding = "stochastic"
[optimizer]
plugin = "conformance"
"""


class Tokens:
    """A `TokenSource` of few tokens, each the one before plus 0 to 2."""

    vocab_size = 32
    loss_floor = None

    def __init__(self, options: TokensOptions) -> None:
        pass

    def fingerprint(self) -> str:
        return "conformance 1"

    def tokens(self, split: str) -> numpy.ndarray:
        steps = numpy.random.default_rng(SPLITS.index(split)).integers(0, 3, 2000)
        return (steps.cumsum() % self.vocab_size).astype(numpy.uint8)


@attrs.frozen(kw_only=True)
class TokensOptions:
    """The vocabulary of `Tokens`."""

    vocab_size: int = 32


def adamw(options: NoOptions, inputs: OptimizerInputs) -> torch.optim.AdamW:
    """Return the optimizer of the small run."""
    return torch.optim.AdamW(inputs.groups, lr=1e-2)


def equipped(registry: Registry) -> Registry:
    """Return a registry in which the small run finds its data, its format and its optimizer."""
    here = functools.partial(Component, name="conformance", summary="of the kit")
    own = {
        "dataset": here(options=TokensOptions, target=f"{__name__}:Tokens"),
        "format": here(target=f"{optimizer_training.__name__}:FORMAT", bits=8),
        "optimizer": here(target=f"{__name__}:adamw"),
    }
    more = [
        Registered(kind=kind, component=component, distribution=CORE_DISTRIBUTION, version="")
        for kind, component in own.items()
    ]
    return attrs.evolve(registry, registered=(*registry.registered, *more))


@attrs.frozen(kw_only=True)
class SmallRun:
    """What came out."""

    outcome: str
    warnings: list[str]
    weights: Mapping[str, Tensor]


def trained(registry: Registry, tables: str) -> SmallRun:
    """Train, with more tables in the file."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "experiment.toml")
        path.write_text(EXPERIMENT + tables)
        result = commands.run(load_experiment(path, registry=equipped(registry)), scratch, quiet=True)
        warnings = [one["message"] for one in read_lines(result.folder / EVENTS) if one["event"] == "warning"]
        saved, _ = checkpoint.newest(result.folder / CHECKPOINTS)
        weights = saved.model if saved is not None else {}
    return SmallRun(outcome=result.outcome, warnings=warnings, weights=weights)


def in_file(heading: str, table: Mapping[str, Any]) -> str:
    return "\n".join([heading, *(f"{key} = {written(value)}" for key, value in table.items()), ""])
