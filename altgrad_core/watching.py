"""Policies and monitors in a run: what they are shown, what they answer, and what happens when they fail.

Between backward pass and step the core reads from the device once, and only where there are policies. A
monitor that fails is dropped and training goes on; a policy that fails ends the run. Either way the message
names the plugin.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from altgrad_core import checkpoint
from altgrad_core.hookspecs import Step, Stop
from altgrad_core.record import now
from altgrad_core.run_state import PluginFailure, Run, Watched

READ_IN_EVERY_STEP = ("train/loss", "train/gradient_norm", "train/loss_finite", "train/gradient_finite")
"""What policies are always given."""

STEP_EXTRAS = ("before", "intended")
"""What a monitor's `needs` may ask of a step."""

# --- policies ----------------------------------------------------------------------------------------


def decision(run: Run, loss: Tensor, norm: Tensor) -> Any:
    """Make the step's one host read and return the first action of a policy, None where all is well."""
    if not run.policies:
        return None
    needs = [need for policy in run.policies for need in policy.plugin.needs]
    wanted = {need: run.observed[need] for need in needs if need in run.observed}
    read = dict(
        zip(
            ["train/loss", "train/gradient_norm", *wanted],
            to_host([loss, norm, *wanted.values()]),
            strict=True,
        )
    )
    finite = [math.isfinite(read["train/loss"]), math.isfinite(read["train/gradient_norm"])]
    read |= {"train/loss_finite": float(finite[0]), "train/gradient_finite": float(finite[1])}
    if not all(finite) and run.was_finite:
        _keep_last_finite(run)
    run.was_finite = all(finite)
    for watched in run.policies:
        try:
            action = watched.plugin.decide(run.step + 1, read)
        except Exception as error:
            raise PluginFailure(watched.error("decide", error)) from error
        if action is not None:
            _record_action(run, watched, action, read)
            return action
    return None


def _keep_last_finite(run: Run) -> None:
    """Keep the state before the first step that is not finite, unless its weights are not finite either."""
    if all(bool(parameter.isfinite().all()) for parameter in run.model.parameters()):
        message, details = "the last finite state is kept", {"checkpoint": checkpoint.LAST_FINITE}
        run.save(checkpoint.LAST_FINITE)
    else:
        message, details = "the weights are not finite any more; an earlier checkpoint may be", {}
    run.folder.event(run.step + 1, "checkpoint", message, **details)


def _record_action(run: Run, watched: Watched, action: Any, read: Mapping[str, float]) -> None:
    details = {key: value for key, value in attrs.asdict(action).items() if key != "reason"}
    kind = type(action).__name__
    run.folder.event(
        run.step + 1,
        "policy",
        action.reason,
        policy=watched.name,
        action=kind,
        details=details,
        metrics=dict(read),
    )
    run.terminal.warning(f"step {run.step + 1}: {watched.name}: {kind}: {action.reason}")
    if isinstance(action, Stop):
        run.message = f"{watched.name}: {action.reason}"


def to_host(values: list[Tensor | float]) -> list[float]:
    """Return numbers from tensors of one element and floats, by one transfer; some may be here already."""
    away = [isinstance(value, Tensor) and value.device.type != "cpu" for value in values]
    tensors = [value.detach().double().reshape(()) for value, far in zip(values, away, strict=True) if far]  # type: ignore[union-attr]
    moved = iter(torch.stack(tensors).tolist() if tensors else [])
    return [next(moved) if far else float(value) for value, far in zip(values, away, strict=True)]


# --- monitors ----------------------------------------------------------------------------------------


def due_monitors(run: Run, index: int) -> list[Watched]:
    """Return the monitors that observe this step: by their interval, or because a policy reads them."""
    wanted = {need.partition("/")[0] for policy in run.policies for need in policy.plugin.needs}
    return [
        watched
        for watched in run.monitors
        if index % getattr(watched.plugin, "every", 1) == 0 or watched.name in wanted
    ]


def watch(run: Run, due: Collection[Watched]) -> dict[str, Tensor]:
    """Keep what the due monitors need of the moment before the step: the quantised weights, by name."""
    needs = _needs(due)
    before = {name: parameter.detach().clone() for name, parameter in run.quantized.items()} if needs else {}
    if run.storage is not None:
        kept = before if "intended" in needs else {}
        on_grid = set(run.storage.weights) if kept else ()
        run.storage.watched = {
            run.quantized[name]: kept[name] for name in kept if run.quantized[name] in on_grid
        }
    if hasattr(run.optimizer, "watch"):
        run.optimizer.watch = "intended" in needs
    return before


def _needs(due: Collection[Watched]) -> set[str]:
    return {need for watched in due for need in watched.plugin.needs}


def observe_after(run: Run, due: list[Watched], loss: Tensor, before: Mapping[str, Tensor]) -> None:
    """Show the due monitors the step that has just been taken, and keep what they report on the device."""
    if not due:
        return
    step = _seen(run, loss, before, _needs(due))
    for watched in due:
        begun = now()
        try:
            with _looking_only(run, watched):
                metrics = _checked(watched, watched.plugin.observe(step))
            run.observed.update(metrics)
            run.unlogged.update(metrics)
        except PluginFailure:
            raise
        except Exception as error:  # noqa: BLE001 - a monitor that fails is dropped, training goes on
            drop(run, watched, "observe", error)
        watched.seconds += now() - begun


@contextlib.contextmanager
def _looking_only(run: Run, watched: Watched) -> Iterator[None]:
    """Give the global random streams back as they were; raise PluginFailure where a weight was written."""
    before = [parameter._version for parameter in run.trained.values()]
    try:
        with torch.no_grad(), torch.random.fork_rng([run.device] if run.device.type == "cuda" else []):
            yield
    finally:
        for version, (name, parameter) in zip(before, run.trained.items(), strict=True):
            if parameter._version != version:
                raise PluginFailure(
                    f"{watched.name} of {watched.owner} wrote to {name} in place; a monitor may only read: "
                    "clone first"
                )


def _seen(run: Run, loss: Tensor, before: Mapping[str, Tensor], needs: set[str]) -> Step:
    """Return the step as monitors see it."""
    gradients, intended, counts = {}, {}, {}
    own_counts = getattr(run.optimizer, "counts", {})
    stored = {**getattr(run.optimizer, "intended", {}), **(run.storage.intended if run.storage else {})}
    for name, parameter in run.trained.items():
        if parameter.grad is not None:
            gradients[name] = parameter.grad
        if parameter in own_counts:
            counts[name] = own_counts[parameter]
        if "intended" in needs and name in before:
            found = stored.get(parameter)
            intended[name] = parameter.detach() - before[name] if found is None else found
    return Step(
        index=run.step,
        loss=loss,
        weights=run.weights(),
        gradients=gradients,
        before=before if "before" in needs else {},
        intended=intended,
        intended_in_rungs=bool(getattr(run.optimizer, "intended_in_rungs", False)),
        counts=counts,
    )


def _checked(watched: Watched, metrics: Mapping[str, Tensor | float]) -> Mapping[str, Tensor | float]:
    for name, value in metrics.items():
        if name not in watched.known and not re.fullmatch(rf"{re.escape(watched.name)}/[^/]+/[^/]+", name):
            raise ValueError(f"the metric {name!r} must be named '{watched.name}/<quantity>/<layer>'")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"the metric {name!r} must be one number, it has the shape {tuple(value.shape)}")
        if not isinstance(value, Tensor | float | int):
            raise TypeError(f"the metric {name!r} must be a number, it is {value!r}")
    watched.known.update(metrics)
    return metrics


def drop(run: Run, watched: Watched, method: str, error: BaseException) -> None:
    run.monitors.remove(watched)
    run.warn(f"{watched.error(method, error)}; the monitor is dropped, training goes on")


def call_each(run: Run, method: str, *arguments: Any) -> None:
    """Call an optional method of every monitor and policy that has it."""
    for watched in (*run.monitors, *(run.policies if method == "start" else ())):
        call = getattr(watched.plugin, method, None)
        if call is None:
            continue
        try:
            with _looking_only(run, watched):
                call(*arguments)
        except PluginFailure:
            raise
        except Exception as error:
            if watched not in run.monitors:
                raise PluginFailure(watched.error(method, error)) from error
            drop(run, watched, method, error)
