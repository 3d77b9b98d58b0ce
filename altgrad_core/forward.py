"""A run's batches on its device, and the arithmetic of its passes: the same in training and beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from altgrad_core.run_state import Run
from altgrad_core.tasks import Batch


def micro_batches(run: Run, step: int, count: int | None = None) -> Iterator[Batch]:
    """Yield the micro-batches that training reads after `step` steps, on the run's device.

    count: how many; None: as many as a step has. Those beyond are further draws from the same split.
    """
    for index in range(run.experiment.train.gradient_accumulation if count is None else count):
        yield _moved(run.task.training_batch(step, index), run.device)


def evaluation_batches(run: Run, count: int) -> Iterator[Batch]:
    """Yield batches of the validation split, the same in every run, on the run's device; 0: all there are."""
    return (_moved(batch, run.device) for batch in run.task.evaluation_batches(count))


def autocast(run: Run) -> contextlib.AbstractContextManager[Any]:
    """Return the context of a run's forward passes: bfloat16 autocast, or none."""
    if run.autocast:
        return torch.autocast(run.device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _moved(batch: Batch, device: torch.device) -> Batch:
    def moved(tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    inputs, targets = batch
    return moved(inputs), moved(targets)
