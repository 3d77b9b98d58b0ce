"""Where a run's checkpoints of steps are: `step_00000500` and the like, and no copy that a person made."""

from __future__ import annotations

import re
from pathlib import Path

PREFIX = "step_"

_NAME = re.compile(rf"{PREFIX}([0-9]+)")


def of_steps(checkpoints: Path) -> dict[int, Path]:
    """Return step to folder of the checkpoints in a run's folder of them, the earliest first."""
    found = ((_NAME.fullmatch(path.name), path) for path in checkpoints.glob(f"{PREFIX}*"))
    return dict(sorted((int(name[1]), path) for name, path in found if name))
