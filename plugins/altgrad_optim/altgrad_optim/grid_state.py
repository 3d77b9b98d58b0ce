"""What GridOptim keeps of each weight: its names, what outlives a change of grid, and what may be loaded."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from altgrad_optim.members import Member

RUNG_COORDINATE = "rung_coordinate"
"""The master of a weight under storage="master": its real rung, float32 whatever the weight's dtype."""


def moment_names(group: dict[str, Any]) -> tuple[str, ...]:
    """Return what the state of a weight that moves in rungs holds beside its steps."""
    return ("velocity",) if group["normalize"] == "none" else ("exp_avg", "exp_avg_sq")


def carry_over(state: dict[str, Any], group: dict[str, Any], *, in_rungs: bool) -> None:
    """Keep of a weight's state what its update needs further; begin anew where a moment is missing.

    in_rungs: whether the weight moves in rungs from now on.
    """
    needed = moment_names(group) if in_rungs else ("exp_avg", "exp_avg_sq")
    kept = {RUNG_COORDINATE} if in_rungs else set()
    if all(name in state for name in needed):
        kept |= {*needed, "step"}
    for name in state.keys() - kept:
        del state[name]


def refuse_other_storage(saved: dict[Any, dict[str, Any]], members: Iterable[Member]) -> None:
    """Raise ValueError where the saved weights are on the grid and here masters, or vice versa.

    saved: the state of a state dict, by parameter.
    """
    kept = [one for one in saved.values() if "step" in one]
    masters = any(RUNG_COORDINATE in one for one in kept)
    if kept and masters != any(member.master for member in members):
        names = ("grid", "master")
        raise ValueError(
            f"loaded state dict is that of storage={names[masters]!r}, this is "
            f"storage={names[not masters]!r}: make the optimizer with the other"
        )
