"""Monitors in a run: which are due, what becomes of what they report, and what happens when they fail.

A monitor that fails is dropped and training goes on; one that writes to what it is shown ends the run. Either
way the message names the plugin.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad_core.intervals import now
from altgrad_core.observed import MetricTable
from altgrad_core.registry import UsageError
from altgrad_core.run_state import Run
from altgrad_core.step_seen import charge, needs_of, seen
from altgrad_core.untouched import Untouched, streams_kept
from altgrad_core.watched import ALL_LAYERS, PluginFailure, Watched

EPOCH_SUMMARIES = ("sum", "mean", "")
"""How a monitor's `provides` may have an epoch sum up a quantity; empty: not at all."""


def due_monitors(run: Run, index: int) -> list[Watched]:
    """Return the monitors that observe this step: by their interval, or because a policy reads them.

    A policy reads them in every step, or in every so many, where it has an attribute `every` that says so.
    """
    wanted = {
        need.partition("/")[0]
        for policy in run.policies
        if index % getattr(policy.plugin, "every", 1) == 0
        for need in policy.needs()
    }
    return [
        watched
        for watched in run.monitors
        if index % getattr(watched.plugin, "every", 1) == 0 or watched.name in wanted
    ]


def looking(run: Run, index: int) -> list[Watched]:
    """Return the due monitors that can say what they need; the others are dropped."""
    return _sure_of_needs(run, due_monitors(run, index))


def _sure_of_needs(run: Run, due: list[Watched]) -> list[Watched]:
    found = []
    for watched in due:
        try:
            watched.needs()
        except UsageError as error:
            run.drop(watched, "needs", error.__cause__ or error)
        else:
            found.append(watched)
    return found


def observe_after(run: Run, due: list[Watched], loss: Tensor, before: Mapping[str, Tensor]) -> None:
    """Show the due monitors the step that has just been taken, and keep what they report on the device."""
    _observe(run, due, "observe", loss, before)
    run.scales_before = {}


def observe_skipped(run: Run, due: list[Watched], loss: Tensor) -> None:
    """Show a step whose update was skipped to those of the due monitors that have a method `skipped`."""
    _observe(run, [one for one in due if hasattr(one.plugin, "skipped")], "skipped", loss, {})


def _observe(run: Run, due: list[Watched], method: str, loss: Tensor, before: Mapping[str, Tensor]) -> None:
    due = _sure_of_needs(run, [watched for watched in due if watched in run.monitors])  # saving may drop one
    if not due:
        return
    begun = now()
    step = seen(run, loss, before, needs_of(due) if method == "observe" else set())
    held = Untouched(run, step)
    charge(due, now() - begun)
    first = [watched for watched in due if not watched.looked]
    with streams_kept(run.device):
        for watched in due:
            begun = now()
            try:
                with _looking_only(watched, held):
                    metrics = _checked(watched, getattr(watched.plugin, method)(step))
                _keep(run, watched, metrics)
                watched.looked |= method == "observe"
            except PluginFailure:
                raise
            except (Exception, SystemExit) as error:  # noqa: BLE001 - a monitor that fails is dropped, training goes on
                run.drop(watched, method, error)
            watched.seconds += now() - begun
    _warn_of_silent(run, first)


def _warn_of_silent(run: Run, first: list[Watched]) -> None:
    """Warn of monitors that had nothing to report of the first step that they saw, unless they never have."""
    silent = [
        watched.name + ("" if watched.layers == ALL_LAYERS else f" (layers = {watched.layers!r})")
        for watched in first
        if watched.looked and not watched.known and getattr(watched.plugin, "provides", True)
    ]
    if silent:
        run.warn(f"nothing to report: {', '.join(silent)}; no layer that matches has what is measured")


def _keep(run: Run, watched: Watched, metrics: Mapping[str, Tensor | float]) -> None:
    """Keep what a monitor said of the step."""
    run.observed.keep(watched.name, metrics)
    if metrics:
        watched.reported = run.step
    _keep_totals(run, watched, metrics)


def _keep_totals(run: Run, watched: Watched, metrics: Mapping[str, Tensor | float]) -> None:
    """Keep what the epoch sums up of a monitor: the totals of the quantities that it declares."""
    stays = isinstance(metrics, MetricTable)  # any other tensor may be a buffer of the monitor's
    for quantity, how in (getattr(watched.plugin, "provides", None) or {}).items():
        total = metrics.get(f"{watched.name}/{quantity}/total") if how else None
        if total is not None:
            own = total.clone() if isinstance(total, Tensor) and not stays else total
            run.interval.totals.setdefault(f"{watched.name}/{quantity}", []).append(own)


@contextlib.contextmanager
def _looking_only(watched: Watched, held: Untouched) -> Iterator[None]:
    """Keep no graph; raise PluginFailure where something was changed."""
    try:
        with torch.no_grad():
            yield
    finally:
        if (what := held.changed()) is not None:
            raise PluginFailure(f"{watched.name} of {watched.owner} {what}")


def _checked(watched: Watched, metrics: Mapping[str, Tensor | float]) -> Mapping[str, Tensor | float]:
    """Return the metrics. Raises ValueError or TypeError where one is not as the contract says."""
    if not isinstance(metrics, Mapping):
        raise TypeError(f"it must return a table of metrics, not {type(metrics).__name__}")
    if isinstance(metrics, MetricTable) and metrics.places is watched.places:
        return metrics  # whose names and kind of numbers were found right
    for name in metrics.keys() - watched.known:
        _check_name(watched, name)
    for name, value in metrics.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"the metric {name!r} must be one number, its shape is {tuple(value.shape)}")
            if value.is_complex() or value.is_meta:
                raise TypeError(f"the metric {name!r} must be a real number, it is {value!r}")
        elif not isinstance(value, (float, int)):
            raise TypeError(f"the metric {name!r} must be a number, it is {value!r}")
        else:
            float(value)  # raises for an int beyond all floats
    watched.known.update(metrics)
    watched.places = metrics.places if isinstance(metrics, MetricTable) else None
    return metrics


def _check_name(watched: Watched, name: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(rf"{re.escape(watched.name)}/[^/]+/[^/]+", name):
        raise ValueError(f"the metric {name!r} must be named '{watched.name}/<quantity>/<layer>'")
    provides = getattr(watched.plugin, "provides", None)
    if provides is not None and name.split("/")[1] not in provides:
        raise ValueError(f"the metric {name!r} is not in its `provides`: {', '.join(provides)}")


def call_each(run: Run, method: str, *arguments: Any) -> None:
    """Call an optional method of every monitor and policy that has it.

    A UsageError, such as a monitor's whose run lacks what it watches, ends the run: it is the user's to mend.
    """
    for watched in (*run.monitors, *(run.policies if method == "start" else ())):
        call = getattr(watched.plugin, method, None)
        if call is None:
            continue
        try:
            with streams_kept(run.device), _looking_only(watched, Untouched(run)):
                call(*arguments)
        except (PluginFailure, UsageError):
            raise
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it is the plugin's, and named
            run.fail(watched, method, error)
