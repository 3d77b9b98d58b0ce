"""`wandb`: every line of metrics once more, in Weights & Biases.

metrics.jsonl stays the record; this is a mirror of it. The W&B run's group is the experiment, its job type
the cell, its config every option, its steps the training steps, said with each line. What W&B writes lies in
the run folder (`wandb/`), from where `wandb sync` sends offline runs to a server.

W&B never stops or slows the training. All calls of it are made by a thread of their own, which takes the
lines from a queue; a step hands over a dictionary and goes on. What fails (no package, no network, an error
inside W&B, a queue that is full because W&B hangs) is reported once, and nothing is mirrored from then on.
At the end the run waits for W&B, `patience` seconds at most.

A resumed run goes on under the same W&B id, which checkpoints hold. A run that was killed trains its last
steps again, bit for bit, and hands their lines over again; W&B's server takes no step twice. Offline each
start leaves a folder of its own, all of one id.
"""

from __future__ import annotations

import importlib.util
import queue
import re
import secrets
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from altgrad_core.hookspecs import Step
from altgrad_core.run_state import EXIT_CODES
from altgrad_monitors import WandbOptions

QUEUE_LINES = 1000
"""Lines of metrics that may wait for W&B: hours of a long run, some megabytes."""

NO_PACKAGE = (
    "wandb is not installed, metrics go to the run folder alone: pip install 'altgrad-monitors[wandb]'"
)


class Wandb:
    """Mirrors every line of metrics; see the module's text."""

    needs = ()
    provides: Mapping[str, str] = {}
    every = sys.maxsize  # nothing to observe in a step

    def __init__(self, options: WandbOptions) -> None:
        self._options = options
        self._left_out: set[str] = set()
        self._id = secrets.token_hex(8)
        self._run: Any = None
        self._mirror: Mirror | None = None
        self._reported = False

    def start(self, run: Any) -> None:
        """Begin the W&B run, in the background."""
        self._run = run
        if self._options.mode == "disabled":
            return
        self._left_out = {one for one in run.layers.values() if not re.fullmatch(self._options.layers, one)}
        if not _installed():
            run.warn(NO_PACKAGE)
            return
        self._mirror = Mirror(self._arguments(run))
        weakref.finalize(self, self._mirror.close, "failed")  # a run that fails has no `end`

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return nothing: there is no metric of its own."""
        return {}

    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand one line over."""
        if self._mirror is not None and not self._mirror.trouble and step % self._options.every == 0:
            self._mirror.add(step, self._chosen(metrics))
        self._report()

    def end(self, run: Any, outcome: str) -> None:
        """End the W&B run, and wait for it within reason."""
        if self._mirror is not None:
            self._mirror.close(outcome, self._options.patience)
            self._report()

    def state_dict(self) -> dict[str, Any]:
        return {"id": self._id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._id = state["id"]

    def _chosen(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics but for those of layers that are left out."""
        return {name: one for name, one in metrics.items() if name.rpartition("/")[2] not in self._left_out}

    def _report(self) -> None:
        """Say what went wrong, once."""
        if self._mirror is not None and self._mirror.trouble and not self._reported:
            self._run.warn(f"Weights & Biases: {self._mirror.trouble}; metrics go to the run folder alone")
            self._reported = True

    def _arguments(self, run: Any) -> dict[str, Any]:
        """Return what `wandb.init` is given."""
        online = self._options.mode == "online"
        return {
            "project": self._options.project,
            "entity": self._options.entity,
            "mode": self._options.mode,
            "dir": str(run.folder.path),
            "id": self._id,
            "resume": "allow" if online else None,  # offline it is `wandb sync` that joins runs of one id
            "group": run.experiment.name,
            "job_type": run.cell,
            "name": f"{run.experiment.name}/{run.cell}",
            "config": run.experiment.plain(),
            "reinit": "create_new",  # whatever W&B run the process has besides
        }


class Mirror:
    """The thread that makes all calls of W&B, and the queue before it.

    Attributes:
        trouble: what went wrong; empty while nothing has.
    """

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        self.trouble = ""
        self._lines: queue.SimpleQueue[tuple[int, dict[str, float]] | str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, args=(arguments,), name="wandb", daemon=True)
        self._thread.start()

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Queue one line; never waits."""
        if self._lines.qsize() >= QUEUE_LINES:
            self.trouble = self.trouble or f"{QUEUE_LINES} lines wait for it at step {step}, it hangs"
        else:
            self._lines.put((step, metrics))

    def close(self, outcome: str, patience: float = 0.0) -> None:
        """Have the thread end the W&B run, and wait for that for `patience` seconds."""
        self._lines.put(outcome)
        self._thread.join(patience)
        if self._thread.is_alive():
            self.trouble = self.trouble or f"it had not taken everything {patience:g} s after the run's end"

    def _work(self, arguments: Mapping[str, Any]) -> None:
        try:
            import wandb

            run = wandb.init(**arguments, settings=wandb.Settings(console="off", silent=True))
            while not isinstance(line := self._lines.get(), str):
                run.log(line[1], step=line[0])
            run.summary["outcome"] = line
            run.finish(exit_code=EXIT_CODES.get(line, 1))
        except BaseException as error:  # noqa: BLE001 - reported by the training's own thread
            self.trouble = f"{type(error).__name__}: {error}"


def _installed() -> bool:
    """Whether there is a wandb package; a folder of that name, as W&B itself leaves them, is none."""
    found = importlib.util.find_spec("wandb")
    return found is not None and found.origin is not None
