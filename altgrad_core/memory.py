"""Runs that ask for more memory than there is: one line that says what was asked for, and what to lower."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from altgrad_core import shapes
from altgrad_core.experiment import Experiment

_NO_CLASS = ("DefaultCPUAllocator", "Storage size calculation overflowed")
"""How torch's plain RuntimeErrors begin or go on where memory on the host is what lacks."""


class OutOfMemoryError(RuntimeError):
    """The machine has less memory than the run needs; the run ends."""


@contextlib.contextmanager
def told(experiment: Experiment) -> Iterator[None]:
    """Have what fails for want of memory raise OutOfMemoryError, which says what the experiment asks for."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_for_want_of_memory(error):
            raise
        raise OutOfMemoryError(f"out of memory: {_asked(experiment)} ({_first_line(error)})") from error


def _is_for_want_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in _NO_CLASS
    )


def _asked(experiment: Experiment) -> str:
    parameters = shapes.parameter_count(experiment.architecture, embeddings=True)
    micro_batch = experiment.tokens_per_step // experiment.train.gradient_accumulation
    return (
        f"the model has {parameters:,} parameters and reads {micro_batch:,} tokens at once; lower "
        "model.n_embd, model.n_layer or model.block_size, or train.batch_size, which a higher "
        "train.gradient_accumulation makes up for"
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
