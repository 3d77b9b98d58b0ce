"""Four steps of training, for what can only be seen in a run: monitors and policies.

The last two are taken twice: once straight on, once by a run that goes on from a checkpoint.

Data, format and optimizer are the kit's own, so that no other plugin is needed.
"""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy
import torch
from torch import Tensor

from altgrad_core import checkpoint, commands
from altgrad_core.cells import RunResult
from altgrad_core.experiment_file import load_experiment
from altgrad_core.hookspecs import Component, NoOptions, OptimizerInputs
from altgrad_core.options import written
from altgrad_core.preparing import SPLITS
from altgrad_core.record import CHECKPOINTS, EVENTS, METRICS, SUMMARY, read_lines
from altgrad_core.registry import CORE_DISTRIBUTION, Registered, Registry
from altgrad_core.testing import optimizer_training

STEPS = 4

EXPERIMENT = f"""
name = "conformance"
steps = {STEPS}
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
checkpoint_every = {STEPS // 2}
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
    actions: list[tuple[int, str]]
    """Of policies: the steps, and the kinds."""
    weights: Mapping[str, Tensor]
    metrics: list[dict[str, Any]]
    """The lines of metrics.jsonl."""


def trained(registry: Registry, tables: str) -> tuple[SmallRun, SmallRun]:
    """Train, with more tables in the file; return that run, and the same resumed after half of the steps."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "experiment.toml")
        path.write_text(EXPERIMENT + tables)
        file = load_experiment(path, registry=equipped(registry))
        straight = commands.run(file, scratch, quiet=True)
        seen = _read(straight)
        (straight.folder / SUMMARY).unlink(missing_ok=True)
        shutil.rmtree(straight.folder / CHECKPOINTS / checkpoint.step_name(STEPS), ignore_errors=True)
        return seen, _read(commands.run(file, scratch, quiet=True))


def _read(result: RunResult) -> SmallRun:
    saved, _ = checkpoint.newest(result.folder / CHECKPOINTS)
    events = list(read_lines(result.folder / EVENTS))
    return SmallRun(
        outcome=result.outcome,
        warnings=[one["message"] for one in events if one["event"] == "warning"],
        actions=[(one["step"], one["action"]) for one in events if one["event"] == "policy"],
        weights=saved.model if saved is not None else {},
        metrics=list(read_lines(result.folder / METRICS)),
    )


def in_file(heading: str, table: Mapping[str, Any]) -> str:
    """Return a table as an experiment file has it, under its heading."""
    return "\n".join([heading, *(f"{key} = {written(value)}" for key, value in table.items()), ""])
