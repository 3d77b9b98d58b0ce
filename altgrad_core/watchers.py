"""The monitors and policies of an experiment, built, with what they need checked before the run begins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import attrs

from altgrad_core.deciding import READ_IN_EVERY_STEP
from altgrad_core.experiment import Experiment
from altgrad_core.options import Choice
from altgrad_core.registry import PluginError, Registry, UsageError
from altgrad_core.run_state import Run
from altgrad_core.step_seen import STEP_EXTRAS
from altgrad_core.watched import Watched
from altgrad_core.watching import EPOCH_SUMMARIES
from altgrad_core.wording import listed, suggestion


def built(
    experiment: Experiment, registry: Registry, layers: Collection[str]
) -> tuple[list[Watched], list[Watched]]:
    """Return monitors and policies; layers: the module paths that metrics may name.

    Raises UsageError for what no step, and no monitor of the experiment, can give them; PluginError for a
    policy that cannot be built. A monitor that cannot be is dropped as the training begins.
    """
    monitors = [_watched(choice, registry, _or_dropped) for choice in experiment.monitor]
    policies = [_watched(choice, registry, Choice.build) for choice in experiment.fallback]
    for watched in monitors:
        _check_monitor(watched)
    metrics = _Metrics(
        monitors={watched.name: watched.plugin for watched in monitors},
        layers=layers,
        grouped=_grouped(experiment),
        registry=registry,
    )
    for watched in policies:
        metrics.check(watched)
    return monitors, policies


def _watched(choice: Choice, registry: Registry, build: Callable[[Choice, Registry], Any]) -> Watched:
    owner = registry.find(choice.kind, choice.plugin).owner
    return Watched(choice.bare_name, owner, build(choice, registry))


def _or_dropped(choice: Choice, registry: Registry) -> Any:
    """Return a monitor, or in the place of one that cannot be had what is dropped as the training begins."""
    try:
        return choice.build(registry)
    except PluginError as error:
        return _Unbuilt(error)


@attrs.frozen
class _Unbuilt:
    """A monitor that cannot be loaded or built, so that it fails where it can be told of and dropped."""

    error: PluginError
    needs: tuple[str, ...] = ()

    def start(self, run: Run) -> None:
        raise self.error


def _grouped(experiment: Experiment) -> set[str]:
    """Return the monitors that were told to report by groups of layers."""
    return {
        choice.bare_name
        for choice in experiment.monitor
        if getattr(choice.options, "per", "layer") != "layer"
    }


def _check_monitor(watched: Watched) -> None:
    """Refuse a monitor that asks for what a step does not have, or sums up as nobody can."""
    if unknown := sorted(set(watched.needs()) - set(STEP_EXTRAS)):
        raise UsageError(
            f"the monitor {watched.name!r} of {watched.owner} needs {unknown[0]!r}; "
            f"a step can carry: {', '.join(STEP_EXTRAS)}"
        )
    for quantity, how in (getattr(watched.plugin, "provides", None) or {}).items():
        if how not in EPOCH_SUMMARIES:
            raise UsageError(
                f"the monitor {watched.name!r} of {watched.owner} has an epoch sum up {quantity!r} by "
                f"{how!r}; there are: {', '.join(map(repr, EPOCH_SUMMARIES))}"
            )


@attrs.frozen(kw_only=True)
class _Metrics:
    """What may be reported in a run, and so be read by its policies."""

    monitors: Mapping[str, Any]
    """By name."""
    layers: Collection[str]
    """The module paths that metrics may name."""
    grouped: Collection[str]
    """Monitors that report by groups of layers, under names of their own."""
    registry: Registry

    def check(self, policy: Watched) -> None:
        """Refuse a policy that no monitor serves."""
        for need in policy.needs():
            if need not in READ_IN_EVERY_STEP and (problem := self._unserved(need)):
                raise UsageError(f"the policy {policy.name!r} needs the metric {need!r}; {problem}")

    def _unserved(self, need: str) -> str | None:
        """Return why no monitor of the experiment reports a metric, and the way out; None where one does."""
        monitor, quantity, layer, *rest = [*need.split("/"), "", ""]
        if monitor not in self.monitors:
            return self._absent(monitor) + suggestion(need, READ_IN_EVERY_STEP)
        if rest != ["", ""] or not layer:
            return "a metric is named <monitor>/<quantity>/<layer>, with total for the whole model"
        provides = getattr(self.monitors[monitor], "provides", None)
        if provides is not None and quantity not in provides:
            hint = suggestion(quantity, provides)
            return f"{monitor!r} provides: {listed(provides)}{hint}"
        if layer != "total" and monitor not in self.grouped and layer not in self.layers:
            return f"the model has no layer {layer!r}{suggestion(layer, self.layers) or '; or ask for total'}"
        return None

    def _absent(self, monitor: str) -> str:
        """Return how an experiment comes by a monitor that it does not have."""
        try:
            self.registry.find("monitor", monitor)
        except UsageError as error:
            return str(error)
        return f"add [[monitor]] plugin = {monitor!r}"
