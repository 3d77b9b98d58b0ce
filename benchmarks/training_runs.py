"""The training runs that train.py measures: one model, quantized in several ways, and a step of the loop."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from rich.console import Console
from upstream import VOCABULARY

import altgrad_core as altgrad
from altgrad_core import loop
from altgrad_core.assemble import assemble
from altgrad_core.cells import placed
from altgrad_core.intervals import Interval
from altgrad_core.record import RunFolder
from altgrad_core.run_state import Run
from altgrad_core.terminal import Terminal
from altgrad_core.watching import call_each

STEPS = 10_000  # of the run that is taken a few steps of: kernels compile where so many are worth it
SIZES = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256}  # the 10 M model

WEIGHTS = '[quantize]\nformat = "E4M3"\n'
STORED = WEIGHTS + 'storage = "grid"\nstorage_rounding = "stochastic"\n'
FLOWS = '[quantize.activations]\nformat = "E4M3"\n[quantize.gradients]\nformat = "E5M2"\n'

ARMS: Mapping[str, str] = {
    "unquantized": "",
    "weights": WEIGHTS,
    "weights on the grid": STORED,
    "weights, activations, gradients": WEIGHTS + FLOWS,
}
"""What is quantized, and the tables that say so."""

EXPERIMENT = """
name = "trained"
steps = {steps}
[data]
plugin = "markov"
order = 1
vocab_size = {vocabulary}
tokens = 200_000
[model]
n_layer = {n_layer}
n_head = {n_head}
n_embd = {n_embd}
block_size = {block_size}
[train]
batch_size = {batch_size}
{tables}
"""


@contextlib.contextmanager
def assembled(tables: str, batch_size: int, arguments: argparse.Namespace) -> Iterator[Run]:
    """Yield a run that is about to take its first step."""
    sizes = {name: getattr(arguments, name) for name in SIZES}
    text = EXPERIMENT.format(
        steps=STEPS, vocabulary=VOCABULARY, batch_size=batch_size, tables=tables, **sizes
    )
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "experiment.toml")
        path.write_text(text)
        file = altgrad.load_experiment(path)
        ((cell, device),) = placed(file, arguments.device)
        terminal = Terminal(quiet=True, console=Console(stderr=True))  # stdout is for the results
        folder = RunFolder(Path(scratch, "run"))
        run = assemble(cell, file.registry, folder, terminal, device)
        with loop._seeded(run):
            call_each(run, "start", run)
            yield run
        folder.close()


def one_step(run: Run) -> Callable[[], None]:
    """Return what takes the run's next step."""

    def step() -> None:
        loop._one_step(run)
        run.interval = Interval()  # no log line is due, which would empty it

    return step
