"""Taking turns: several that do one job, in one process, in an order that alternates.

Times of two functions measured one after the other differ by what else the machine did meanwhile; turns
share that, and the median over the turns of a ratio is free of it.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

# Without these glibc returns each output's pages, and page faults are measured instead.
PAGES_REUSED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
WARM_UP_CALLS = 4
FEWEST_TURNS = 3
CALLS_A_TURN = {"cpu": 1, "cuda": 20}  # on a GPU enough to hide the launches

Run = Callable[[], Any]


def reuse_pages() -> None:
    """Start this command again with memory kept between calls, unless it is."""
    if any(os.environ.get(name) != value for name, value in PAGES_REUSED.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **PAGES_REUSED})


def physical_cores() -> int:
    """Return the number of physical cores, or of logical ones where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    fields = [line.split(":", 1) for line in cpuinfo.read_text().splitlines()] if cpuinfo.is_file() else []
    ids = [f[1].strip() for f in fields if f[0].strip() in ("physical id", "core id")]
    return len(set(zip(ids[::2], ids[1::2], strict=False))) or os.cpu_count() or 1


def seconds(run: Run, device: str) -> float:
    """Return the time of one call: CUDA events around several, or the clock around one."""
    if device != "cuda":
        return wall_seconds(run, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(CALLS_A_TURN[device]):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / CALLS_A_TURN[device]


def wall_seconds(run: Run, device: str) -> float:
    """Return the time of one call by the clock, until its result is there."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def race(
    base: Run, runs: Mapping[str, Run], *, turns: int, budget: float, device: str
) -> tuple[list[float], dict[str, list[float]]]:
    """Return the times of the base and of each other one, turn by turn.

    One that has used up `budget` seconds leaves after FEWEST_TURNS; the base takes every turn.
    """
    for run in (base, *runs.values()):
        warm_up(run, budget)
    base_times: list[float] = []
    times: dict[str, list[float]] = {who: [] for who in runs}
    for turn in range(turns):
        base_times.append(seconds(base, device))
        for who in sorted(runs, reverse=bool(turn % 2)):
            spent = sum(times[who]) * CALLS_A_TURN[device]
            if turn < FEWEST_TURNS or spent < budget:
                times[who].append(seconds(runs[who], device))
    return base_times, times


def warm_up(run: Run, budget: float) -> None:
    """Call a few times, so that kernels compile; a slow one once."""
    began = time.perf_counter()
    for _ in range(WARM_UP_CALLS):
        run()
        if time.perf_counter() - began > budget:
            break


def ratios(times: list[float], base: list[float]) -> tuple[float, float, float]:
    """Return the quartiles of (time / the base's time in that turn): lower, median, upper."""
    each = [t / b for t, b in zip(times, base, strict=False)]
    low, middle, high = statistics.quantiles(each, n=4, method="inclusive")
    return low, middle, high
