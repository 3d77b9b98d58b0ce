"""What monitors add to an optimizer step, as a multiple of torch's fused AdamW: rows of monitors.py.

50 equal weights, 10 M parameters together, as in optimizers.py. What is added is all there is to it, from the
copies before the step to the metrics after it. The founding tracker quantizes every weight twice in a step,
before and after; it is the reference.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import optimizers
import torch
from race import race, ratios
from torch import Tensor

import altgrad_core as altgrad
from altgrad_core.quantizer import quantizer_of
from altgrad_core.registry import discover
from altgrad_core.run_state import Run
from altgrad_core.step_seen import watch
from altgrad_core.watched import Watched
from altgrad_core.watching import call_each, observe_after

TARGETS = {"cpu": 1.0, "cuda": 0.5}  # flip + stall, at most so many times torch.optim.AdamW(fused=True)

CASES: Mapping[str, tuple[str, ...]] = {
    "flip": ("flip",),
    "flip + stall": ("flip", "stall"),
    "flip + stall + descent": ("flip", "stall", "descent"),
}
"""Monitors that are raced together."""


@attrs.frozen(kw_only=True)
class Ratio:
    """What monitors add to an optimizer step."""

    who: str
    storage: str
    milliseconds: float
    ratio: float
    quartiles: tuple[float, float]
    target: float | None
    met: bool | None


class Steps:
    """An AdamW with monitors around its steps, as the training loop has them, and nothing else."""

    def __init__(self, storage: str, names: tuple[str, ...], arguments: argparse.Namespace) -> None:
        self.model = optimizers.model_of(arguments.parameters, arguments.device, arguments.format)
        optimizer = optimizers.adamw(altgrad.param_groups(self.model))
        keeper = None
        if storage == "grid":
            generator = torch.Generator().manual_seed(0)
            keeper = altgrad.store_on_grid(optimizer, "stochastic", generator, bound=8.0)
        absent = {field.name: None for field in attrs.fields(Run) if field.default is attrs.NOTHING}
        parameters = [name for name, _ in self.model.named_parameters()]
        given = {
            "model": self.model,
            "optimizer": optimizer,
            "storage": keeper,
            "device": torch.device(arguments.device),
            "layers": {name: name.rpartition(".")[0] for name in parameters},
            "monitors": [],
            "policies": [],
        }
        self.run = Run(**absent | given)
        registry = discover()
        for name in names:
            found = registry.find("monitor", name)
            plugin = found.build(found.component.options())
            self.run.monitors.append(Watched(name=name, owner=found.owner, plugin=plugin))
        call_each(self.run, "start", self.run)
        self.loss = torch.zeros((), device=arguments.device)

    def __call__(self) -> None:
        before = watch(self.run, self.run.monitors)
        self.run.optimizer.step()
        self.run.step += 1
        observe_after(self.run, self.run.monitors, self.loss, before)
        self.run.interval.totals.clear()


class FoundingTracker:
    """Flips as the founding code counted them: every weight is quantized before the step and after it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model = optimizers.model_of(arguments.parameters, arguments.device, arguments.format)
        self.optimizer = optimizers.adamw(altgrad.param_groups(self.model))

    def _quantized(self) -> list[Tensor]:
        found = ((weight, quantizer_of(weight)) for weight in self.model.parameters())
        return [quantizer.quantize(weight.detach()) for weight, quantizer in found if quantizer is not None]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        before = self._quantized()
        self.optimizer.step()
        flips = [(one != other).sum() for one, other in zip(before, self._quantized(), strict=True)]
        updates = [(weight.grad != 0).sum() for weight in self.model.parameters()]
        return torch.stack(flips).sum() / torch.stack(updates).sum()


def multiples(arguments: argparse.Namespace) -> list[Ratio]:
    """Race AdamW with monitors around it, and the same without, beside fused AdamW."""
    base = optimizers.adamw(
        optimizers.model_of(arguments.parameters, arguments.device, None).parameters()
    ).step
    found = []
    for storage in ("master", "grid"):
        runs: dict[str, Callable[[], Any]] = {
            who: Steps(storage, names, arguments) for who, names in {"": (), **CASES}.items()
        }
        if storage == "master":
            runs["founding tracker: quantizes twice"] = FoundingTracker(arguments)
        base_times, times = race(base, runs, turns=arguments.step_turns, budget=60.0, device=arguments.device)
        alone = times.pop("")
        for who, own in times.items():
            added = [t - a for t, a in zip(own, alone, strict=False)]
            low, middle, high = ratios(added, base_times)
            target = TARGETS[arguments.device] if who == "flip + stall" else None
            facts = {
                "milliseconds": 1000 * statistics.median(added),
                "ratio": middle,
                "quartiles": (low, high),
            }
            met = None if target is None else middle <= target
            found.append(Ratio(who=who, storage=storage, **facts, target=target, met=met))
    return found
