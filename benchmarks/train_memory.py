"""How much memory a training step holds, and how much more a quantized one: rows of train.py.

Counted, not sampled: the most bytes of tensors that a run has held at a time in its first steps, by the
allocator's own events on a CPU, by its peak on a GPU. What the operating system shows beside that (the
interpreter, libraries, pages not given back) is left out.

The batch is one sequence, so that what follows from the parameters is not hidden by what follows from the
tokens; a second row per arm is of the first batch size asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
from collections.abc import Iterator, Mapping

import attrs
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile
from training_runs import ARMS, SIZES, STORED, WEIGHTS, assembled, one_step
from upstream import VOCABULARY

from altgrad_core import shapes
from altgrad_core.model_options import ModelOptions
from altgrad_core.run_state import Run

FLIPS = '[[monitor]]\nplugin = "flip"\n'
MEASURED: Mapping[str, str] = {
    **ARMS,
    "weights, flips": WEIGHTS + FLIPS,
    "weights on the grid, flips": STORED + FLIPS,
}
WARM_UP_STEPS = 2  # after them the optimizer has its state, and loops are compiled
TARGETS = {"weights": 4.0, "weights on the grid": 4.0, "weights, activations, gradients": 4.0}
FLIP_TARGET = 5.0  # bytes per parameter: one more


@attrs.frozen(kw_only=True)
class Memory:
    """What one kind of run holds at its peak."""

    who: str
    batch_size: int
    parameters: int
    bytes: int
    extra_per_parameter: float | None
    """Bytes more than the unquantized run's; None for that one itself."""
    target: float | None
    met: bool | None


def rows(arguments: argparse.Namespace) -> list[Memory]:
    """Measure every arm with one sequence a step, and with the first batch size."""
    sizes = dict.fromkeys((1, *arguments.batch_sizes[:1]))
    return [row for batch_size in sizes for row in _of_batch_size(batch_size, arguments)]


def _of_batch_size(batch_size: int, arguments: argparse.Namespace) -> list[Memory]:
    options = ModelOptions(**{name: getattr(arguments, name) for name in SIZES})
    parameters = shapes.parameter_count(shapes.Architecture(options, VOCABULARY), embeddings=True)
    found: list[Memory] = []
    for who, tables in MEASURED.items():
        peak = peak_bytes(tables, batch_size, arguments)
        extra = (peak - found[0].bytes) / parameters if found else None
        target = FLIP_TARGET if "flips" in who else TARGETS.get(who)
        judged = batch_size == 1 and target is not None and extra is not None
        found.append(
            Memory(
                who=who,
                batch_size=batch_size,
                parameters=parameters,
                bytes=peak,
                extra_per_parameter=extra,
                target=target if judged else None,
                met=extra <= target if judged and extra is not None and target is not None else None,
            )
        )
    return found


def peak_bytes(tables: str, batch_size: int, arguments: argparse.Namespace) -> int:
    """Return the bytes of a run's tensors at the peak of its steps."""
    gc.collect()  # what the run before has left would be freed, and counted, in this one
    if arguments.device == "cuda":
        return _peak_on_cuda(tables, batch_size, arguments)
    with silent_profiler() as profiled, assembled(tables, batch_size, arguments) as run:
        take_steps(run, WARM_UP_STEPS + 1)
    return most_held(profiled)


@contextlib.contextmanager
def silent_profiler() -> Iterator[profile]:
    """Record memory events; the profiler's own lines, which go past sys.stderr, are left out."""
    stderr = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            yield profiled
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _peak_on_cuda(tables: str, batch_size: int, arguments: argparse.Namespace) -> int:
    before = torch.cuda.memory_allocated()
    with assembled(tables, batch_size, arguments) as run:
        take_steps(run, WARM_UP_STEPS)
        torch.cuda.reset_peak_memory_stats()
        take_steps(run, 1)
        return torch.cuda.max_memory_allocated() - before


def take_steps(run: Run, count: int) -> None:
    step = one_step(run)
    for _ in range(count):
        step()


def most_held(profiled: profile) -> int:
    """Return the most bytes that were allocated and not yet freed, from the profiler's memory events."""
    results = profiled.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = most = 0
    for _, change in events:
        held += change
        most = max(most, held)
    return most


def show(found: list[Memory], console: Console) -> None:
    table = Table(
        "memory", "batch", "MB at the peak", "more, bytes per parameter", "target", "met", box=box.SIMPLE
    )
    for row in found:
        extra = "" if row.extra_per_parameter is None else f"{row.extra_per_parameter:.2f}"
        target = "" if row.target is None else f"≤ {row.target:g}"
        met = "" if row.met is None else "yes" if row.met else "no"
        table.add_row(row.who, str(row.batch_size), f"{row.bytes / 1e6:.1f}", extra, target, met)
    console.print(table)
