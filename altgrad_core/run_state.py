"""One assembled training run: its parts, its progress, and what a checkpoint holds of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from altgrad_core import actions, checkpoint, data
from altgrad_core.experiment import Experiment
from altgrad_core.format import Format
from altgrad_core.groups import GEOMETRY_KEYS
from altgrad_core.hookspecs import Weight
from altgrad_core.master_bound import MasterBound
from altgrad_core.record import RunFolder, differences, now, versions_in_use
from altgrad_core.registry import PluginError, Registry, UsageError
from altgrad_core.state_tree import pack
from altgrad_core.storage import GridStorage
from altgrad_core.surgery import WeightQuantizer, quantized_flows, quantizer_of
from altgrad_core.tasks import Task
from altgrad_core.terminal import Terminal

EXIT_CODES = {"finished": 0, "stopped": 1, "failed": 1, "interrupted": 130, "terminated": 143}
"""Outcome of a run to the exit code of the command."""

ALL_LAYERS = ".*"
"""What a monitor looks at that names no layers."""


@attrs.define(eq=False)
class Watched:
    """A monitor or policy in a run, with what errors and checkpoints call it."""

    name: str
    owner: str
    plugin: Any
    seconds: float = 0.0
    known: set[str] = attrs.field(factory=set)
    """Metrics whose names were found right."""
    looked: bool = False
    """Whether it has observed a step of this run."""

    def __attrs_post_init__(self) -> None:
        """Raise UsageError where `every` or `needs` is not what the contract says."""
        every = getattr(self.plugin, "every", 1)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UsageError(
                f"{self.name} of {self.owner}: every is {every!r}; it must be a whole number from 1"
            )
        self.needs()

    def needs(self) -> tuple[str, ...]:
        """Return the plugin's `needs` as of now. Raises UsageError where they are no names."""
        try:
            found = self.plugin.needs
        except Exception as error:
            raise UsageError(self.error("needs", error)) from error
        if isinstance(found, str) or not isinstance(found, Collection):
            raise UsageError(
                f"{self.name} of {self.owner}: needs is {found!r}; it must be a collection of names"
            )
        return tuple(found)

    @property
    def layers(self) -> str:
        """The regex over module paths of the layers that it looks at."""
        found = getattr(self.plugin, "layers", ALL_LAYERS)
        return found if isinstance(found, str) else ALL_LAYERS

    def error(self, method: str, error: BaseException) -> str:
        if isinstance(error, PluginError):
            return f"{self.name} of {self.owner}: {error}"  # which says what cannot be loaded or built
        return f"{self.name} of {self.owner}: {method} raised {type(error).__name__}: {error}"


class PluginFailure(RuntimeError):
    """A policy raised, or a monitor wrote: the run ends, and the message names the plugin."""


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
    seconds: float = 0.0
    since: float | None = attrs.field(factory=now)

    def pause(self) -> None:
        if self.since is not None:
            self.seconds += now() - self.since
            self.since = None

    def resume(self) -> None:
        self.since = now()

    def state_dict(self) -> dict[str, Any]:
        lists = {"losses": self.losses, "norms": self.norms, "clipped": self.clipped}
        stacked = {name: torch.stack(one) for name, one in lists.items() if one}
        return {"seconds": self.seconds, "counted": self.counted, "totals": self.totals, **stacked}

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
        counted, seconds = state["counted"], state["seconds"]
        return cls(losses, norms, clipped, totals, counted=counted, seconds=seconds)


@attrs.define(eq=False)
class Epoch:
    """What adds up in one pass over the training tokens; on the device."""

    loss: Tensor | None = None
    steps: int = 0
    totals: dict[str, tuple[Tensor, Tensor]] = attrs.field(factory=dict)
    """`<monitor>/<quantity>` to the float64 sum of its totals, and the number of observations in it."""

    def add(self, interval: Interval, may_be_undefined: Callable[[str], bool], dead: Tensor | bool) -> None:
        """Add what is new in an interval; where a quantity may be undefined, NaN is no observation.

        dead: whether a weight is not finite: NaN then says just that.
        """
        losses = torch.stack(interval.losses[interval.counted :]).double().sum()
        self.loss = losses if self.loss is None else self.loss + losses
        self.steps += len(interval.losses) - interval.counted
        for name, values in interval.totals.items():
            found = _stacked(values, losses.device)
            there = (
                (~found.isnan() | dead)
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
    tokens: data.TokenData
    task: Task
    autocast: bool
    layers: Mapping[str, str]
    """Parameter name to module path."""
    formats: dict[str, str]
    """Module path of every Linear with a quantised weight to that weight's format now."""
    registry: Registry
    frozen: int
    """Numbers in parameters that do not train."""
    monitors: list[Watched]
    policies: list[Watched]
    step: int = 0
    lr_factor: float = 1.0
    outcome: str = "running"
    switches: list[tuple[str, str]] = attrs.field(factory=list)
    """The `layers` and `to` of every SwitchFormat that was carried out."""
    action_counts: dict[str, dict[str, int]] = attrs.field(factory=dict)
    """How many actions of each kind each policy has answered with."""
    best: dict[str, float] = attrs.field(factory=dict)
    last: dict[str, float] = attrs.field(factory=dict)
    observed: dict[str, Tensor | float] = attrs.field(factory=dict)
    """What each monitor said when it last observed a step."""
    fresh: set[str] = attrs.field(factory=set)
    """Those of `observed` that are of the step before: what policies are shown."""
    unlogged: set[str] = attrs.field(factory=set)
    """Those of `observed` that no line of metrics has shown."""
    scales_before: dict[str, tuple[Format, Tensor]] = attrs.field(factory=dict)
    """Format and scale of each quantised weight as the step began, where a monitor needs them."""
    weights_before: dict[str, Tensor] = attrs.field(factory=dict)
    """Memory for quantised weights as they were before the step, written anew where a monitor needs them."""
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

    # --- checkpoints ---------------------------------------------------------------------------------

    def save(self, name: str | None = None) -> None:
        """Write a checkpoint of this moment; unnamed ones are numbered by step and pruned."""
        plugins = self._plugin_states()
        optimizer = self.optimizer.state_dict()
        for group in optimizer["param_groups"]:
            for key in GEOMETRY_KEYS:
                group.pop(key, None)
        state = {
            "step": self.step,
            "versions": versions_in_use(self.experiment, self.registry),
            "options": self.experiment.plain(),
            "optimizer": optimizer,
            "storage": self.storage.state_dict() if self.storage else None,
            "master_bound": self.master_bound.state_dict() if self.master_bound else None,
            "scales": {name: quantizer.scale for name, quantizer in self._quantizers()},
            "flows": {name: flow.state_dict() for name, flow in quantized_flows(self.model).items()},
            "random": checkpoint.random_state(),
            "data": self.tokens.fingerprint,
            "tokenizer": self.tokens.tokenizer,
            "adjustments": {name: quantizer.adjustment for name, quantizer in self._quantizers()},
            "switches": list(self.switches),
            "action_counts": self.action_counts,
            "plugins": plugins,
            "looked": [watched.name for watched in self.monitors if watched.looked],
            "lr_factor": self.lr_factor,
            "best": self.best,
            "last": self.last,
            "seconds": self.seconds,
            "epoch": self.epoch.state_dict(),
            "was_finite": self.was_finite,
            "observed": self.observed,
            "fresh": sorted(self.fresh),
            "unlogged": sorted(self.unlogged),
            "interval": self.interval.state_dict(),
            "message": self.message,
            "machine": self._machine(),
        }
        checkpoint.save(
            self.folder.checkpoints, name or checkpoint.step_name(self.step), self.model.state_dict(), state
        )
        checkpoint.prune(self.folder.checkpoints, self.experiment.train.keep_checkpoints)

    def load(self, saved: checkpoint.Checkpoint) -> None:
        """Take up a checkpoint of the same experiment. Raises CheckpointError where it is another's."""
        state = saved.state
        self._refuse_another(state)
        actions.repeat(self, state["switches"], state["adjustments"])
        self.model.load_state_dict(saved.model)
        self._load_optimizer(state["optimizer"])
        if self.storage:
            self.storage.load_state_dict(state["storage"])
        if self.master_bound:
            self.master_bound.load_state_dict(state["master_bound"])
        for name, quantizer in self._quantizers():
            quantizer.scale.copy_(state["scales"][name])
        for name, flow in quantized_flows(self.model).items():
            flow.load_state_dict(state["flows"][name])
        self.monitors = [one for one in self.monitors if one.name in state["plugins"]]  # one was dropped
        self.step, self.lr_factor, self.seconds = state["step"], state["lr_factor"], state["seconds"]
        self.best, self.last, self.was_finite = state["best"], state["last"], state["was_finite"]
        self.observed = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in state["observed"].items()
        }
        self.epoch = Epoch.of(state["epoch"], self.device)
        self.action_counts = {policy: dict(kinds) for policy, kinds in state["action_counts"].items()}
        self.unlogged, self.interval = set(state["unlogged"]), Interval.of(state["interval"], self.device)
        self.fresh = set(state["fresh"])
        for watched in self.monitors:
            watched.looked = watched.name in state["looked"]
            watched.known = {name for name in self.observed if name.startswith(f"{watched.name}/")}
        self._load_plugin_states(state["plugins"])
        checkpoint.set_random_state(state["random"])
        self.message = state["message"]
        if self.message:
            self.outcome = "stopped"
        if changed := differences(state["machine"], self._machine()):
            self.warn(f"{'; '.join(changed)}: results may differ in bits from a run without a pause")

    def _refuse_another(self, state: Mapping[str, Any]) -> None:
        """Raise CheckpointError for a state under other plugins, options or data, naming what differs."""
        versions = versions_in_use(self.experiment, self.registry)
        if changed := differences(state.get("versions", {}), versions):
            raise checkpoint.CheckpointError(
                f"{self.folder.path}: its checkpoint was written by other versions: {'; '.join(changed)}; "
                "install those again, or start anew with --out"
            )
        if changed := differences(state["options"], self.experiment.plain()):
            raise checkpoint.CheckpointError(
                f"{self.folder.path}: its checkpoint was written with other options: {'; '.join(changed)}; "
                "put them back, or start anew with --out"
            )
        if state["data"] != self.tokens.fingerprint:
            raise checkpoint.CheckpointError(
                f"{self.folder.path}: the data have changed since the checkpoint was written; "
                "put them back, or start anew with --out"
            )

    def _plugin_states(self) -> dict[str, Any]:
        """Return what monitors and policies save; a monitor that fails at it is dropped."""
        states = {}
        for watched in (*self.monitors, *self.policies):
            save = getattr(watched.plugin, "state_dict", None)
            try:
                found = save() if save is not None else None
                pack(found)  # raises for what no checkpoint can hold
                states[watched.name] = found
            except Exception as error:  # noqa: BLE001 - it is the plugin's, and named
                self._failed(watched, "state_dict", error)
        return states

    def _load_plugin_states(self, states: Mapping[str, Any]) -> None:
        for watched in (*self.monitors, *self.policies):
            load = getattr(watched.plugin, "load_state_dict", None)
            if load is not None and states.get(watched.name) is not None:
                try:
                    load(states[watched.name])
                except UsageError:
                    raise
                except Exception as error:  # noqa: BLE001 - it is the plugin's, and named
                    self._failed(watched, "load_state_dict", error)

    def _failed(self, watched: Watched, method: str, error: Exception) -> None:
        """Drop a monitor whose method raised. Raises PluginFailure for a policy's."""
        if watched not in self.monitors:
            raise PluginFailure(watched.error(method, error)) from error
        self.drop(watched, method, error)

    def drop(self, watched: Watched, method: str, error: BaseException) -> None:
        """Take a monitor out of the run, with everything that it has reported."""
        self.monitors.remove(watched)
        mine = f"{watched.name}/"
        theirs = (mine, f"epoch/{mine}", f"cost/{watched.name}")
        self.observed = {name: one for name, one in self.observed.items() if not name.startswith(mine)}
        self.last = {name: one for name, one in self.last.items() if not f"{name}/".startswith(theirs)}
        self.unlogged &= self.observed.keys()
        self.fresh &= self.observed.keys()
        totals = self.interval.totals
        self.interval.totals = {name: one for name, one in totals.items() if not name.startswith(mine)}
        self.epoch.forget(watched.name)
        readers = [one.name for one in self.policies if any(need.startswith(mine) for need in one.needs())]
        without = f"; without its metrics: {', '.join(readers)}" if readers else ""
        self.warn(f"{watched.error(method, error)}; the monitor is dropped, training goes on{without}")

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Take up an optimizer's state; formats and scales stay the run's own."""
        kept = [
            {key: group[key] for key in GEOMETRY_KEYS if key in group}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state)
        for group, own in zip(self.optimizer.param_groups, kept, strict=True):
            group.update(own)

    def _machine(self) -> dict[str, Any]:
        """What the bits of a result hang on, beside the options."""
        return {
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "device": self.device.type,
        }

    # --- what monitors see ---------------------------------------------------------------------------

    def weights(self) -> dict[str, Weight]:
        """Return the parameters that train, as monitors see them, by name."""
        return {
            name: Weight(
                value=parameter.detach(),
                layer=self.layers[name],
                format=quantizer.format if quantizer else None,
                scale=scale_seen(quantizer.scale, parameter) if quantizer else None,
                storage="grid" if quantizer and quantizer.stored else "master",
            )
            for name, parameter in self.trained.items()
            for quantizer in [quantizer_of(parameter)]
        }

    @functools.cached_property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that train, by name; looked up once, for a run never exchanges them."""
        return {
            name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad
        }

    @property
    def quantized(self) -> dict[str, nn.Parameter]:
        """Those of them that are quantised now."""
        return {
            name: parameter for name, parameter in self.trained.items() if quantizer_of(parameter) is not None
        }

    def warn(self, message: str) -> None:
        self.folder.event(self.step, "warning", message)
        self.terminal.warning(message)

    def _quantizers(self) -> Iterator[tuple[str, WeightQuantizer]]:
        for name, parameter in self.model.named_parameters():
            quantizer = quantizer_of(parameter)
            if quantizer is not None:
                yield name, quantizer


def scale_seen(scale: Tensor, parameter: Tensor) -> Tensor:
    """Return a weight's scale as monitors see it: 0-d, or for channels and blocks of the weight's shape."""
    return scale.expand_as(parameter) if scale.dim() else scale
