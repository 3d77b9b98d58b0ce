"""What monitors said when they last observed a step: kept as they gave it, until a line or a policy asks."""

from __future__ import annotations

import collections
from collections.abc import Collection, ItemsView, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class MetricTable(Mapping[str, Tensor]):
    """Metrics that are one tensor: a monitor of many layers gives them in every step, and few are ever read.

    places: names to places in the values. Make it once and give the same object: it is checked once.
    values: (n,), which nobody writes afterwards.
    """

    def __init__(self, places: Mapping[str, int], values: Tensor) -> None:
        self.places, self.tensor = places, values

    def __getitem__(self, name: str) -> Tensor:
        return self.tensor[self.places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def items(self) -> ItemsView[str, Tensor]:
        rows = self.tensor.unbind()
        return {name: rows[place] for name, place in self.places.items()}.items()


class Observed:
    """The metrics of each monitor's last observation, and who has asked for them since."""

    def __init__(self) -> None:
        self._tables: dict[str, Mapping[str, Tensor | float]] = {}
        self._fresh: set[str] = set()
        self._unlogged: set[str] = set()

    def keep(self, monitor: str, metrics: Mapping[str, Tensor | float]) -> None:
        """Keep what a monitor said of the step; of what it said before and leaves out now nothing stays."""
        self._tables[monitor] = metrics if isinstance(metrics, MetricTable) else dict(metrics)
        self._fresh.add(monitor)
        self._unlogged.add(monitor)

    def forget(self, monitor: str) -> None:
        self._tables.pop(monitor, None)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._tables.get(_of(name), ())

    def __iter__(self) -> Iterator[str]:
        return (name for table in self._tables.values() for name in table)

    def take_fresh(self, needs: Collection[str]) -> dict[str, Tensor | float]:
        """Return those of the needs that were observed since this was called last."""
        fresh, self._fresh = self._fresh, set()
        tables = {need: self._tables[_of(need)] for need in needs if _of(need) in fresh & self._tables.keys()}
        return {need: table[need] for need, table in tables.items() if need in table}

    def take_unlogged(self) -> dict[str, Tensor | float]:
        """Return those that were observed since this was called last."""
        unlogged, self._unlogged = self._unlogged, set()
        chosen = [table for monitor, table in self._tables.items() if monitor in unlogged]
        return {name: value for table in chosen for name, value in table.items()}

    def state_dict(self) -> dict[str, Any]:
        values = {name: value for table in self._tables.values() for name, value in table.items()}
        return {"observed": values, "fresh": sorted(self._fresh), "unlogged": sorted(self._unlogged)}

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> Observed:
        """Return what `state_dict` described, on a device."""
        found, tables = cls(), collections.defaultdict[str, dict[str, Tensor | float]](dict)
        for name, value in state["observed"].items():
            tables[_of(name)][name] = value.to(device) if isinstance(value, Tensor) else value
        found._tables.update(tables)
        found._fresh, found._unlogged = set(state["fresh"]), set(state["unlogged"])
        return found


def _of(name: str) -> str:
    """Return the monitor of a metric's name."""
    return name.partition("/")[0]
