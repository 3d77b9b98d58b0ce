"""What adds up in training: between two log lines, and in one pass over the training tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor


def now() -> float:
    """Return seconds on a clock that is never set back."""
    return time.perf_counter()


@attrs.define(eq=False)
class Interval:
    """What adds up between two log lines; tensors stay on the device."""

    losses: list[Tensor] = attrs.field(factory=list)
    norms: list[Tensor] = attrs.field(factory=list)
    clipped: list[Tensor] = attrs.field(factory=list)
    totals: dict[str, list[Tensor | float]] = attrs.field(factory=dict)
    """`<monitor>/<quantity>` to its totals in the steps observed, of quantities that an epoch sums up."""
    counted: int = 0
    """How many of the losses the running epoch has in its sum already; of the totals it has none."""
    timed: int = 0
    """Steps whose time is known: those in which the process was not stopped."""
    seconds: float = 0.0
    """Of these steps."""
    since: float | None = None
    """When the step began whose time is being taken."""

    def begin_step(self) -> None:
        self.since = now()

    def end_step(self) -> None:
        since, self.since = self.since, None
        if since is not None:
            self.seconds += now() - since
            self.timed += 1

    def lose_time(self) -> None:
        """Leave the time of the step out: nobody knows how much of it was a pause."""
        self.since = None

    def state_dict(self) -> dict[str, Any]:
        lists = {"losses": self.losses, "norms": self.norms, "clipped": self.clipped}
        stacked = {name: torch.stack(one) for name, one in lists.items() if one}
        times = {"timed": self.timed, "seconds": self.seconds}
        return {**times, "counted": self.counted, "totals": self.totals, **stacked}

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> Interval:
        """Return the interval that `state_dict` described."""
        losses, norms, clipped = (
            list(state[name].to(device).unbind()) if name in state else []
            for name in ("losses", "norms", "clipped")
        )
        totals = {
            name: [value.to(device) if isinstance(value, Tensor) else value for value in values]
            for name, values in state["totals"].items()
        }
        counts = {name: state[name] for name in ("counted", "timed", "seconds")}
        return cls(losses, norms, clipped, totals, **counts)


@attrs.define(eq=False)
class Epoch:
    """What adds up in one pass over the training tokens; on the device."""

    loss: Tensor | None = None
    steps: int = 0
    totals: dict[str, tuple[Tensor, Tensor]] = attrs.field(factory=dict)
    """`<monitor>/<quantity>` to the float64 sum of its totals, and the number of observations in it."""

    def add(self, interval: Interval, may_be_undefined: Callable[[str], bool], sick: Tensor | bool) -> None:
        """Add what is new in an interval; where a quantity may be undefined, NaN is no observation.

        sick: whether a weight is not finite: NaN then says just that.
        """
        losses = torch.stack(interval.losses[interval.counted :]).double().sum()
        self.loss = losses if self.loss is None else self.loss + losses
        self.steps += len(interval.losses) - interval.counted
        for name, values in interval.totals.items():
            found = _stacked(values, losses.device)
            there = (
                (~found.isnan() | sick)
                if may_be_undefined(name)
                else torch.ones_like(found, dtype=torch.bool)
            )
            both = torch.where(there, found, 0.0).sum(), there.sum()
            before = self.totals.get(name)
            self.totals[name] = both if before is None else (before[0] + both[0], before[1] + both[1])
        interval.counted, interval.totals = len(interval.losses), {}

    def forget(self, monitor: str) -> None:
        """Leave out a monitor that is dropped: what it saw is not the epoch."""
        self.totals = {
            name: found for name, found in self.totals.items() if not name.startswith(f"{monitor}/")
        }

    def state_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "steps": self.steps, "totals": self.totals}

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> Epoch:
        """Return the epoch that `state_dict` described."""
        loss = state["loss"] if state["loss"] is None else state["loss"].to(device)
        totals = {name: (one.to(device), count.to(device)) for name, (one, count) in state["totals"].items()}
        return cls(loss=loss, steps=state["steps"], totals=totals)


def _stacked(values: list[Tensor | float], device: torch.device) -> Tensor:
    """Return numbers, some of them 0-d tensors, as one float64 tensor."""
    return torch.stack(
        [torch.as_tensor(value, dtype=torch.float64, device=device).reshape(()) for value in values]
    )
