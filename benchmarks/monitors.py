"""What watching costs: each installed monitor as a share of a training step, and beside fused AdamW.

    python benchmarks/monitors.py [--device cuda] [--only flip stall] [--format E4M3] [--json]

Training steps: the 10 M model of the [model] table, weights on the grid, tokens of a Markov chain. A run with
one monitor and a run without any take the same steps, in turns whose order alternates, and the monitor is due
in each of them. What its step takes longer, divided by the monitor's default interval and by the other run's
step, is its share; where it has the optimizer keep something, what the steps between take longer is added.
Every installed monitor is tried; one that cannot start is a row that says so. Last comes a run with all of
them that could be measured, each at its default interval: what its steps take longer, by which of them are
due, in the shares that such steps have. The step before one that is timed is taken too: what is kept from a
step to the next is at hand.

The rows of optimizer steps are told of in monitor_steps.py.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import math
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import peers
import torch
from monitor_steps import Ratio, multiples
from race import physical_cores, ratios, reuse_pages, wall_seconds
from rich import box
from rich.console import Console
from rich.table import Table

import altgrad_core as altgrad
from altgrad_core import loop
from altgrad_core.assemble import assemble
from altgrad_core.cells import placed
from altgrad_core.hookspecs import Component
from altgrad_core.record import RunFolder
from altgrad_core.registry import PluginError, Registry, UsageError, discover
from altgrad_core.run_state import Run
from altgrad_core.terminal import Terminal
from altgrad_core.watched import PluginFailure
from altgrad_core.watching import call_each

STEPS = 10_000  # of the run that is taken a few steps of: kernels compile where so many are worth it
WARM_UP_STEPS = 2
TARGET_SHARE = 0.10  # of a training step, all default monitors together

EXPERIMENT = """
name = "watched"
steps = {steps}
[data]
plugin = "markov"
tokens = 100_000
[model]
n_layer = {n_layer}
n_embd = {n_embd}
block_size = {block_size}
[train]
batch_size = {batch_size}
device = "{device}"
[quantize]
format = "{format}"
storage = "grid"
storage_rounding = "stochastic"
[optimizer]
plugin = "ManifoldAdamW"
{options}
{monitors}
"""


@attrs.frozen(kw_only=True)
class Share:
    """What one monitor costs in training."""

    monitor: str
    every: int
    milliseconds: float | None
    """Added to a step in which it is due."""
    share: float | None
    """Of a training step, spread over its interval."""
    quartiles: tuple[float, float] | None
    missing: str = ""
    """Why there is no number."""


# --- shares of a training step -----------------------------------------------------------------------


def toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else json.dumps(value)


def text_of(components: Sequence[Component], arguments: argparse.Namespace) -> str:
    """Return the experiment with these monitors."""
    needed: dict[str, Any] = {}
    for component in components:
        needed |= getattr(component.options, "optimizer_options", {})
    return EXPERIMENT.format(
        steps=STEPS,
        options="\n".join(f"{name} = {toml(value)}" for name, value in needed.items()),
        monitors="\n".join(f'[[monitor]]\nplugin = "{component.name}"' for component in components),
        **{name: getattr(arguments, name) for name in SIZES},
        device=arguments.device,
        format=arguments.format,
    )


@contextlib.contextmanager
def assembled(
    components: Sequence[Component], arguments: argparse.Namespace, registry: Registry
) -> Iterator[Run]:
    """Yield a run that has started. Raises UsageError or PluginError where it cannot."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "experiment.toml")
        path.write_text(text_of(components, arguments))
        ((cell, device),) = placed(altgrad.load_experiment(path, registry=registry), arguments.device)
        terminal = Terminal(quiet=True, console=Console(stderr=True))  # stdout is for the results
        run = assemble(cell, registry, RunFolder(Path(scratch, "run")), terminal, device)
        wanted = len(run.monitors)
        with loop._seeded(run):
            call_each(run, "start", run)
            if len(run.monitors) < wanted:
                raise UsageError("it was dropped at its start")
            yield run
            call_each(run, "end", run, "finished")


def step_of(run: Run, index: int) -> Callable[[], None]:
    """Return what takes the step of this number."""

    def step() -> None:
        run.step = index - 1
        loop._one_step(run)

    return step


def share_of(
    plain: Run, watched: Run, turns: int, device: str, between: bool
) -> tuple[float, list[float], int]:
    """Return the seconds a monitor adds to a step it is due in, its shares by turn, and its interval.

    between: it costs something in the steps between, too.
    """
    (monitor,) = watched.monitors
    every = getattr(monitor.plugin, "every", 1)
    if every > STEPS:
        raise UsageError("it observes no step")
    index = max(every, -(-plain.step // every) * every) + every
    indices = [index + turn * every for turn in range(WARM_UP_STEPS + turns)]
    pairs = both(plain, watched, indices, device)[WARM_UP_STEPS:]
    others = both(plain, watched, [index + 1 for index in indices], device) if between and every > 1 else []
    kept = (every - 1) * statistics.median(longer - shorter for shorter, longer in others) if others else 0.0
    shares = [(longer - shorter + kept) / shorter / every for shorter, longer in pairs]
    return statistics.median(longer - shorter for shorter, longer in pairs), shares, every


def both(plain: Run, watched: Run, indices: Sequence[int], device: str) -> list[tuple[float, float]]:
    """Return the seconds of these steps in the run without monitors and in that with them, in turns."""
    found, count, last = [], len(watched.monitors), 0
    for turn, index in enumerate(indices):
        if index - 1 != last:
            for run in (plain, watched):
                step_of(run, index - 1)()
        last = index
        pair = [step_of(run, index) for run in (plain, watched)]
        times = {run: wall_seconds(pair[run], device) for run in ((0, 1) if turn % 2 else (1, 0))}
        if len(watched.monitors) < count:
            raise UsageError("it was dropped in its first step: run it in an experiment, which says why")
        found.append((times[0], times[1]))
    return found


def all_together(plain: Run, watched: Run, turns: int, device: str) -> float:
    """Return the share of a run's steps that its monitors take, each at its interval."""
    intervals = {getattr(monitor.plugin, "every", 1) for monitor in watched.monitors}
    period = math.lcm(*intervals)
    due = [frozenset(every for every in intervals if index % every == 0) for index in range(1, period + 1)]
    shorter = longer = 0.0
    for kind, steps in collections.Counter(due).items():
        index = due.index(kind) + 1
        indices = [index + (turn + 1) * period for turn in range(WARM_UP_STEPS + turns)]
        pairs = both(plain, watched, indices, device)[WARM_UP_STEPS:]
        shorter += steps * statistics.median(one for one, _ in pairs)
        longer += steps * statistics.median(one for _, one in pairs)
    return longer / shorter - 1


def shares(arguments: argparse.Namespace, registry: Registry) -> tuple[list[Share], float]:
    """Measure every installed monitor, in turns with a run that has none; and all of them together."""
    found, measured = [], []
    with assembled([], arguments, registry) as plain:
        for registered in registry.of_kind("monitor"):
            component = registered.component
            if arguments.only and component.name not in arguments.only:
                continue
            try:
                between = bool(getattr(component.options, "optimizer_options", {}))
                with assembled([component], arguments, registry) as watched:
                    seconds, each, every = share_of(
                        plain, watched, arguments.turns, arguments.device, between
                    )
                low, middle, high = ratios(each, [1.0] * len(each))
                facts = {"milliseconds": 1000 * seconds, "share": middle, "quartiles": (low, high)}
                found.append(Share(monitor=component.name, every=every, **facts))
                measured.append(component)
            except (UsageError, PluginError, PluginFailure) as error:
                nothing = {"every": 0, "milliseconds": None, "share": None, "quartiles": None}
                reason = str(error).strip().splitlines()[-1]
                found.append(Share(monitor=component.name, **nothing, missing=reason))
        if not measured:
            return found, 0.0
        with assembled(measured, arguments, registry) as watched:
            return found, all_together(plain, watched, arguments.turns, arguments.device)


# --- the command -------------------------------------------------------------------------------------


def show(machine: dict[str, Any], found: list[Share], together: float, raced: list[Ratio]) -> None:
    console = Console(width=130, markup=False, highlight=False)
    table = Table("monitor", "every", "ms when due", "share of a training step", "quartiles", box=box.SIMPLE)
    for one in found:
        if one.share is None or one.quartiles is None:
            table.add_row(one.monitor, "", "", one.missing, "")
            continue
        low, high = one.quartiles
        numbers = f"{one.milliseconds:.1f}", f"{one.share:.2%}", f"{low:.2%} to {high:.2%}"
        table.add_row(one.monitor, str(one.every), *numbers)
    table.add_row("all together", "", "", f"{together:.2%}", f"target {TARGET_SHARE:.0%}")
    console.print(table)
    table = Table(
        "added to AdamW's step", "weights", "times AdamW", "quartiles", "ms", "target", box=box.SIMPLE
    )
    for row in raced:
        low, high = row.quartiles
        numbers = f"{row.ratio:.2f}", f"{low:.2f} to {high:.2f}", f"{row.milliseconds:.2f}"
        table.add_row(row.who, row.storage, *numbers, "" if row.target is None else f"{row.target:g}")
    console.print(table)
    console.print("  ".join(f"{name} {value}" for name, value in machine.items()))


SIZES = ("n_layer", "n_embd", "block_size", "batch_size")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--format", default="E4M3", metavar="FORMAT")
    parser.add_argument("--only", nargs="*", default=[], help="names of the monitors to measure in training")
    parser.add_argument("--turns", type=int, default=5, help="training steps of each monitor; 0: none")
    parser.add_argument("--n-layer", type=int, default=6)
    parser.add_argument("--n-embd", type=int, default=384)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--parameters", type=int, default=10_000_000, help="of the model of 50 weights")
    parser.add_argument("--step-turns", type=int, default=25, help="optimizer steps of each; 0: none")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: physical cores")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    sizes = {name: getattr(arguments, name) for name in (*SIZES, "parameters", "threads", "format")}
    machine = {**peers.machine(), **sizes}
    raced = multiples(arguments) if arguments.step_turns else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a monitor that cannot start says is its row
        found, together = shares(arguments, discover()) if arguments.turns else ([], 0.0)
    if arguments.json:
        rows = {
            "shares": [attrs.asdict(one) for one in found],
            "multiples": [attrs.asdict(one) for one in raced],
        }
        print(json.dumps({"machine": machine, **rows, "share_together": together}))
    else:
        show(machine, found, together, raced)


if __name__ == "__main__":
    reuse_pages()
    main()
