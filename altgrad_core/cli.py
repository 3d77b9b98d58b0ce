"""Where the commands `altgrad-run` and `altgrad` begin: with signals, before anything else is imported.

What the commands are is in `altgrad_core.apps`, whose imports take most of their first tenths of a second.
"""

from __future__ import annotations

import sys

from altgrad_core import interrupts


def altgrad_run() -> None:
    """Entry point of the command `altgrad-run`."""
    sys.exit(interrupts.answered(lambda: _command("run_app")))


def altgrad() -> None:
    """Entry point of the command `altgrad`."""
    sys.exit(interrupts.answered(lambda: _command("app")))


def _command(name: str) -> int:
    from altgrad_core import apps, output

    output.escape()
    return apps.guarded(getattr(apps, name))
