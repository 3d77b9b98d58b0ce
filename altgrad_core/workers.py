"""The cells of a grid in processes of their own: one that dies takes no other with it.

Ctrl-C and SIGTERM go to the command; it passes them on as SIGTERM, which every run answers with a checkpoint,
starts no further cell, and leaves no process behind; nor does a command that is killed. Workers ignore SIGINT
until their run answers it, for a terminal sends it to the whole group.
"""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import attrs

from altgrad_core import interrupts, output
from altgrad_core.hookspecs import CellResult

_Running = dict[Connection, tuple[str, Any]]
"""The reading end of a worker's pipe to its cell and process."""


def run_in_processes(
    cells: Sequence[str],
    run_cell: Callable[[str], CellResult],
    jobs: int,
    ended: Callable[[CellResult], None],
) -> list[CellResult]:
    """Run every cell in a process of its own, `jobs` at a time; returns the results in the cells' order."""
    waiting, results = collections.deque(cells), {}
    running: _Running = {}
    with _stopping(running) as asked:
        while running or (waiting and not asked):
            while waiting and len(running) < jobs and not asked:
                _start(waiting.popleft(), run_cell, running)
            if asked:
                _terminate(running)  # also what was being started when the signal came
            for connection in multiprocessing.connection.wait(list(running)):
                assert isinstance(connection, Connection)
                cell, process = running[connection]
                results[cell] = _result(connection, cell, process, asked)
                del running[connection]
                ended(results[cell])
    return [results[cell] for cell in cells if cell in results]


def _start(cell: str, run_cell: Callable[[str], CellResult], running: _Running) -> None:
    context = multiprocessing.get_context("spawn")
    reading, writing = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(run_cell, cell, writing))
    with interrupts.handling({signal.SIGINT: signal.SIG_IGN}):  # until it asks for it
        process.start()
    writing.close()  # the worker's copy is the only one: its death ends the pipe
    running[reading] = (cell, process)


def _work(run_cell: Callable[[str], CellResult], cell: str, writing: Connection) -> None:
    threading.Thread(target=_outlive_no_command, daemon=True).start()
    output.escape()
    result = run_cell(cell)
    with contextlib.suppress(BrokenPipeError):  # nobody is left to read it
        writing.send(result)


def _outlive_no_command() -> None:
    """Have this process end as on SIGTERM, with a checkpoint, when the command's own is gone."""
    command = multiprocessing.parent_process()
    assert command is not None
    multiprocessing.connection.wait([command.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


def _result(connection: Connection, cell: str, process: Any, asked: Sequence[str]) -> CellResult:
    try:
        result: CellResult = connection.recv()
    except (EOFError, OSError):
        process.join()
        message = f"its process died with exit code {process.exitcode}; run the same command to go on"
        result = CellResult(cell=cell, outcome="terminated" if asked else "failed", message=message)
    connection.close()
    process.join()
    if asked and result.outcome in interrupts.ASKED:
        return attrs.evolve(result, outcome=asked[0])
    return result


def _terminate(running: _Running) -> None:
    for _, process in running.values():
        process.terminate()


@contextlib.contextmanager
def _stopping(running: _Running) -> Iterator[list[str]]:
    """Collect SIGINT and SIGTERM and pass them on; whatever happens, no worker is left behind."""
    with interrupts.collected(lambda: _terminate(running)) as asked:
        try:
            yield asked
        except BaseException:
            for _, process in running.values():
                process.kill()
            raise
