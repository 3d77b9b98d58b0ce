"""What a person sees of a run: a header, log lines, a live progress line, a summary.

On a terminal the progress line is live; into a pipe there are plain lines. Everything but the live line goes
to the run's log.txt too.
"""

from __future__ import annotations

import math
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import rich.console
import rich.markup
import rich.progress

from altgrad_core.durable import WriteError
from altgrad_core.validation_metrics import HEADINGS


class _Console(rich.console.Console):
    """Into a pipe that nobody reads, an error: rich's own would end the process in silence."""

    def on_broken_pipe(self) -> NoReturn:
        raise  # the BrokenPipeError that rich has caught


class Terminal:
    """The output of one run; `quiet` keeps everything but warnings and errors to the log."""

    def __init__(self, *, quiet: bool = False, console: rich.console.Console | None = None) -> None:
        self.quiet = quiet
        self.console = console or _Console(highlight=False, soft_wrap=True)
        self.log: Callable[[str], None] = lambda line: None
        self._progress: rich.progress.Progress | None = None
        self._task: Any = None

    def say(self, line: str, style: str = "") -> None:
        """Print one line, and log it."""
        self.log(line)
        if not self.quiet:
            self._print(line, style)

    def warning(self, line: str) -> None:
        """Print a warning, even when quiet."""
        self.log(f"warning: {line}")
        self._print(f"warning: {line}", "yellow")

    def _print(self, line: str, style: str) -> None:
        try:
            self.console.print(rich.markup.escape(line), style=style or None)
        except OSError as error:  # into a file on a full disk, into a pipe whose reader has gone
            raise WriteError(f"the output cannot be written: {error.strerror}") from error

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print aligned pairs of name and text; on a terminal, long texts are folded under themselves."""
        width = max(len(name) for name, _ in rows)
        room = max(30, self.console.width - width - 4) if self.console.is_terminal else sys.maxsize
        for name, text in rows:
            lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
            for label, line in zip([name, *[""] * len(lines)], lines or [""], strict=False):
                self.say(f"  {label:<{width}}  {line}")

    def begin(self, step: int, steps: int) -> None:
        """Start the live progress line, where the output is a terminal."""
        if self.quiet or not self.console.is_terminal:
            return
        self._progress = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            rich.progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self._task = self._progress.add_task("step", total=steps, completed=step, numbers="")
        self._progress.start()

    def line(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print one log line, and move the progress line."""
        parts = [f"step {step:>6}"]
        parts += [
            f"{label} {metrics[name]:{form}}"
            for name, label, form in (
                ("train/loss", "loss", ".4f"),
                ("train/gradient_norm", "norm", ".2f"),
                ("train/learning_rate", "lr", ".2e"),
                ("time/tokens_per_second", "tokens/s", ",.0f"),
                *((name, heading, ".4f") for name, heading in HEADINGS.items()),
            )
            if name in metrics
        ]
        self.say("  ".join(parts))
        if self._progress is not None and "train/loss" in metrics:
            speed = metrics.get("time/tokens_per_second", math.nan)
            numbers = f"loss {metrics['train/loss']:.3f}, {speed:,.0f} tokens/s"
            self._progress.update(self._task, completed=step, numbers=numbers)

    def advance(self, step: int) -> None:
        """Move the progress line between log lines."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def end(self) -> None:
        """Take the progress line away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
