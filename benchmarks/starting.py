"""How soon the commands answer, and how soon a run is at its first step: rows of train.py.

Processes of their own, in turns, by the clock. The first step is that of `altgrad-run`, from the start of the
process to the log line of step 1, the evaluation before the first step included. A run goes ahead of those
that count, so that tokens are prepared and loops compiled: what counts is the second run.
"""

from __future__ import annotations

import argparse
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import attrs
from rich import box
from rich.console import Console
from rich.table import Table

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart.toml"
TARGETS = {
    "altgrad plugins": {"cpu": 0.4, "cuda": 0.4},
    "altgrad-run --check": {"cpu": 0.4, "cuda": 0.4},
    "altgrad-run, to the first step": {"cpu": 6.0, "cuda": 15.0},
}


@attrs.frozen(kw_only=True)
class Start:
    """How long one command takes."""

    command: str
    seconds: float
    quartiles: tuple[float, float]
    cpu_seconds: float | None
    """Of all threads; what a machine that does other things too tells best. None: more is done than timed."""
    target: float
    met: bool


def entry(name: str) -> list[str]:
    """Return what starts a command of the core by the interpreter that runs this."""
    return [sys.executable, "-c", f"from altgrad_core.cli import {name}; {name}()"]


def rows(arguments: argparse.Namespace) -> list[Start]:
    """Measure every command, in turns, after one of each that does not count."""
    experiment, device = arguments.experiment, arguments.device
    commands: dict[str, Callable[[], tuple[float, float | None]]] = {
        "altgrad plugins": lambda: seconds_of([*entry("altgrad"), "plugins"]),
        "altgrad-run --check": lambda: seconds_of([*entry("altgrad_run"), str(experiment), "--check"]),
        "altgrad-run, to the first step": lambda: (seconds_to_first_step(experiment, device), None),
    }
    times: dict[str, list[tuple[float, float | None]]] = {command: [] for command in commands}
    for turn in range(1 + max(2, arguments.turns)):
        for command in sorted(commands, reverse=bool(turn % 2)):
            taken = commands[command]()
            if turn:
                times[command].append(taken)
    return [start(command, each, device) for command, each in times.items()]


def start(command: str, times: list[tuple[float, float | None]], device: str) -> Start:
    """Return the medians of (seconds, CPU seconds)."""
    low, middle, high = statistics.quantiles([wall for wall, _ in times], n=4, method="inclusive")
    on_cpu = [cpu for _, cpu in times if cpu is not None]
    target = TARGETS[command][device]
    return Start(
        command=command,
        seconds=middle,
        quartiles=(low, high),
        cpu_seconds=statistics.median(on_cpu) if on_cpu else None,
        target=target,
        met=middle <= target,
    )


def seconds_of(command: list[str]) -> tuple[float, float]:
    """Return how long a command runs, and its CPU seconds. Raises CalledProcessError where it fails."""
    began, used = time.perf_counter(), cpu_seconds_of_children()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began, cpu_seconds_of_children() - used


def cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def seconds_to_first_step(experiment: Path, device: str) -> float:
    """Return the seconds from the start of altgrad-run to its log line of step 1; then end it."""
    with tempfile.TemporaryDirectory() as out:
        flags = ["--out", out, "--device", device, "--set", "train.log_every=1"]
        command = [*entry("altgrad_run"), str(experiment), *flags]
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        try:
            return _until_step_1(process, began)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate()


def _until_step_1(process: subprocess.Popen[str], began: float) -> float:
    lines = []
    for line in process.stdout or ():
        if line.split()[:2] == ["step", "1"]:
            return time.perf_counter() - began
        lines.append(line)
    raise SystemExit(f"altgrad-run ended before its first step:\n{''.join(lines)}")


def show(found: list[Start], console: Console) -> None:
    table = Table("command", "seconds", "quartiles", "CPU seconds", "target", "met", box=box.SIMPLE)
    for row in found:
        low, high = row.quartiles
        on_cpu = "" if row.cpu_seconds is None else f"{row.cpu_seconds:.2f}"
        numbers = f"{row.seconds:.2f}", f"{low:.2f} to {high:.2f}", on_cpu, f"≤ {row.target:g}"
        table.add_row(row.command, *numbers, "yes" if row.met else "no")
    console.print(table)
