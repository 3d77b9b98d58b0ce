"""The executor: one Ray task per cell, in a process of its own; what is lost is sent out again.

Nothing but the run folder, which all nodes share, carries a cell over: its lock falls with the process, its
newest checkpoint is where the next try resumes, and a resumed run is bit-equal to one that was never broken
off. So a lost node costs time and changes no result. Ray's own retries are off, for they happen unseen, and a
second try has to know that it is one: it waits for the lock of a first that may still be dying.

Ctrl-C and SIGTERM reach every run as Ray's cancellation, which is a SIGINT: they finish their step and write
a checkpoint. A second Ctrl-C ends them at once. A SIGTERM that a manager of jobs sends to Ray's own processes
as well may end the cells before that: they go on from the checkpoint they had.
"""

from __future__ import annotations

import collections
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs

from altgrad_core import interrupts
from altgrad_core.hookspecs import CellResult
from altgrad_core.registry import UsageError
from altgrad_ray import RayOptions, cluster
from altgrad_ray.task import Surroundings, attempt

POLL = 0.5
"""Seconds between looks at whether somebody wants to stop."""

LEASE = 120.0
"""Seconds a further try waits for the lock of a lost one; NFS keeps a dead machine's locks for 90."""


class RayExecutor:
    """Runs the cells of a grid on a Ray cluster."""

    def __init__(self, options: RayOptions) -> None:
        self._options = options

    def run(self, cells: Sequence[str], run_cell: Callable[[str], CellResult], jobs: int) -> list[CellResult]:
        """Run every cell once; `jobs` above 1 limits how many run at once, else the cluster's room does.

        Cells that were never begun when somebody stopped the command have no result.
        """
        options = self._options
        with cluster.joined(options.address) as ray, interrupts.collected() as asked:
            taken = cluster.resources(ray, options)
            if (lacking := cluster.shortage(ray, taken)) and not options.address:
                raise UsageError(f"executor 'ray': {lacking}; lower cpus_per_cell or gpus_per_cell")
            # max_calls: a process per cell, so that its memory on the GPU and its lock go when it ends
            task = ray.remote(max_calls=1, max_retries=0, **taken)(attempt)
            grid = _Grid(ray=ray, task=task, run_cell=run_cell, retries=options.retries, asked=asked)
            return grid.run(cells, jobs if jobs > 1 else len(cells), lambda: cluster.shortage(ray, taken))


class _LostError(Exception):
    """A cell's process is gone, and nobody asked it to go."""


@attrs.define(kw_only=True)
class _Grid:
    """The cells on their way: waiting, running, and over."""

    ray: Any
    task: Any
    run_cell: Callable[[str], CellResult]
    retries: int
    asked: list[str]
    """The outcome that a signal asks for, once there was one."""
    surroundings: Surroundings = attrs.field(factory=Surroundings.here)
    tries: collections.Counter[str] = attrs.field(factory=collections.Counter)
    running: dict[Any, str] = attrs.field(factory=dict)
    """A task's reference to its cell."""
    cancelled: bool = False

    def run(self, cells: Sequence[str], limit: int, shortage: Callable[[], str]) -> list[CellResult]:
        """Run the cells, at most `limit` at once; returns the results in the cells' order."""
        waiting, results, count = collections.deque(cells), {}, itertools.count(1)
        _warn(shortage())
        try:
            while self.running or (waiting and not self.asked):
                while waiting and len(self.running) < limit and not self.asked:
                    self._send(waiting.popleft())
                for cell, result in self._ended():
                    if result is not None:
                        results[cell] = result
                        print(f"{cell}: {result.outcome}  ({next(count)} of {len(cells)})", flush=True)
                    elif not self.asked:
                        waiting.append(cell)
                        _warn(shortage())
        except BaseException:
            self._cancel(force=True)
            raise
        return [results[cell] for cell in cells if cell in results]

    def _send(self, cell: str) -> None:
        patience = LEASE if self.tries[cell] else 0.0
        self.tries[cell] += 1
        self.running[self.task.remote(self.run_cell, cell, self.surroundings, patience)] = cell

    def _ended(self) -> Iterator[tuple[str, CellResult | None]]:
        """Wait a moment; yield the cells that ended: None for one to be sent out again, or never begun."""
        if self.asked and not self.cancelled:  # once: a second SIGINT would end a run without its checkpoint
            self._cancel(force=False)
            self.cancelled = True
        ready = self.ray.wait(list(self.running), timeout=POLL)[0] if self.running else []
        for reference in ready:
            cell = self.running.pop(reference)
            try:
                yield cell, self._result(reference, cell)
            except _LostError as error:
                yield cell, self._lost(cell, str(error))

    def _result(self, reference: Any, cell: str) -> CellResult | None:
        errors = self.ray.exceptions
        try:
            result: CellResult = self.ray.get(reference)
        except errors.TaskCancelledError:
            return None
        except errors.RayTaskError as error:  # raised on the node: the next one would raise it too
            return CellResult(cell=cell, outcome="failed", message=str(error))
        except errors.RayError as error:
            raise _LostError(str(error).partition("\n")[0]) from error
        if result.outcome not in interrupts.ASKED:
            return result
        if not self.asked:
            raise _LostError(f"its node had it {result.outcome}")
        return attrs.evolve(result, outcome=self.asked[0])

    def _lost(self, cell: str, reason: str) -> CellResult | None:
        """Return the result of a cell that is given up, None for one to be tried again."""
        if self.asked:
            return CellResult(cell=cell, outcome=self.asked[0], message=reason)
        tries = f"{self.tries[cell]} of {self.retries + 1} tries"
        if self.tries[cell] > self.retries:
            message = f"its process was lost in {tries}: {reason}; run the same command to go on"
            return CellResult(cell=cell, outcome="failed", message=message)
        print(f"{cell}: lost in {tries}, goes on from its checkpoint: {reason}", flush=True)
        return None

    def _cancel(self, *, force: bool) -> None:
        for reference in self.running:
            self.ray.cancel(reference, force=force)


def _warn(shortage: str) -> None:
    if shortage:
        print(f"warning: executor 'ray' waits: {shortage}", file=sys.stderr, flush=True)
