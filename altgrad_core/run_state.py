"""One assembled training run: its parts and its progress."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from altgrad_core.experiment import Experiment
from altgrad_core.hookspecs import Weight
from altgrad_core.intervals import Epoch, Interval
from altgrad_core.master_bound import MasterBound
from altgrad_core.observed import Observed
from altgrad_core.preparing import TokenData
from altgrad_core.quantizer import WeightQuantizer, quantizer_of
from altgrad_core.record import RunFolder
from altgrad_core.registry import Registry
from altgrad_core.storage import GridStorage
from altgrad_core.tasks import Task
from altgrad_core.terminal import Terminal
from altgrad_core.watched import PluginFailure, Watched
from altgrad_core.weights_seen import WeightsSeen

EXIT_CODES = {"finished": 0, "stopped": 1, "failed": 1, "interrupted": 130, "terminated": 143}
"""Outcome of a run to the exit code of the command."""


@attrs.define(eq=False, kw_only=True)
class Run:
    """One assembled training run."""

    experiment: Experiment
    cell: str
    folder: RunFolder
    terminal: Terminal
    device: torch.device
    model: nn.Module
    compiled: Any
    optimizer: torch.optim.Optimizer
    storage: GridStorage | None
    master_bound: MasterBound | None
    tokens: TokenData
    task: Task
    autocast: bool
    layers: Mapping[str, str]
    """Parameter name to module path."""
    formats: dict[str, str]
    """Module path of every Linear with a quantized weight to that weight's format now."""
    registry: Registry
    frozen: int
    """Numbers in parameters that do not train."""
    monitors: list[Watched]
    policies: list[Watched]
    step: int = 0
    lr_factor: float = 1.0
    outcome: str = "running"
    asked: str = ""
    """The outcome that a signal has asked for, if one came; too late where it is not the run's."""
    switches: list[tuple[str, str]] = attrs.field(factory=list)
    """The `layers` and `to` of every SwitchFormat that was carried out."""
    action_counts: dict[str, dict[str, int]] = attrs.field(factory=dict)
    """How many actions of each kind each policy has answered with."""
    best: dict[str, float] = attrs.field(factory=dict)
    last: dict[str, float] = attrs.field(factory=dict)
    observed: Observed = attrs.field(factory=Observed)
    """What each monitor said when it last observed a step."""
    scales_before: dict[str, Tensor] = attrs.field(factory=dict)
    """The scale of each quantized weight as the step began, where a monitor needs them."""
    regridded: set[str] = attrs.field(factory=set)
    """Weights to which an action has given another format, or scale, since the step began."""
    weights_before: dict[str, Tensor] = attrs.field(factory=dict)
    """Memory for quantized weights as they were before the step, written anew where a monitor needs them."""
    seen: WeightsSeen = attrs.field(factory=WeightsSeen)
    """The weights as monitors saw them last."""
    interval: Interval = attrs.field(factory=Interval)
    message: str = ""
    """Why a policy stopped the run; empty unless one did."""
    seconds: float = 0.0
    epoch: Epoch = attrs.field(factory=Epoch)
    was_finite: bool = True
    summary: dict[str, Any] = attrs.field(factory=dict)

    @property
    def share_on_grid(self) -> float:
        """The share of the non-embedding parameters that live on a grid."""
        embeddings = {id(one.weight) for one in self.model.modules() if isinstance(one, nn.Embedding)}
        others = [one for one in self.model.parameters() if id(one) not in embeddings]
        on_grid = [one for one in others if (found := quantizer_of(one)) is not None and found.stored]
        return sum(one.numel() for one in on_grid) / sum(one.numel() for one in others)

    @property
    def passes(self) -> float:
        """Passes over the training split so far."""
        return self.step * self.task.per_step / self.task.epoch

    def fail(self, watched: Watched, method: str, error: BaseException) -> None:
        """Drop a monitor whose method raised. Raises PluginFailure for a policy's."""
        if watched not in self.monitors:
            raise PluginFailure(watched.error(method, error)) from error
        self.drop(watched, method, error)

    def drop(self, watched: Watched, method: str, error: BaseException) -> None:
        """Take a monitor out of the run, with everything that it has reported."""
        self.monitors.remove(watched)
        mine = f"{watched.name}/"
        self.observed.forget(watched.name)
        self.last = {name: one for name, one in self.last.items() if not watched.reports(name)}
        totals = self.interval.totals
        self.interval.totals = {name: one for name, one in totals.items() if not name.startswith(mine)}
        self.epoch.forget(watched.name)
        readers = [one.name for one in self.policies if any(need.startswith(mine) for need in one.needs())]
        without = f"; without its metrics: {', '.join(readers)}" if readers else ""
        self.warn(f"{watched.error(method, error)}; the monitor is dropped, training goes on{without}")

    def weights(self) -> Mapping[str, Weight]:
        """Return the parameters that train, as monitors see them, by name."""
        return self.seen.of(self.trained, self.layers)

    @functools.cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name; looked up once, for a run never exchanges them."""
        return {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }

    @functools.cached_property
    def modules(self) -> list[nn.Module]:
        """The model and all that is in it; looked up once, as they are."""
        return list(self.model.modules())

    @property
    def quantized(self) -> dict[str, nn.Parameter]:
        """Those of them that are quantized now."""
        return {
            name: parameter for name, parameter in self.trained.items() if quantizer_of(parameter) is not None
        }

    def warn(self, message: str) -> None:
        self.folder.event(self.step, "warning", message)
        self.terminal.warning(message)

    def quantizers(self) -> Iterator[tuple[str, WeightQuantizer]]:
        """Yield the quantizers of the weights by the names of their parameters, of frozen ones too."""
        for name, parameter in self.model.named_parameters():
            quantizer = quantizer_of(parameter)
            if quantizer is not None:
                yield name, quantizer
