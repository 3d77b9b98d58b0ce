"""Policies in a run: what they are shown between backward pass and step, and what they answer.

There the core reads from the device, once, and only where there are policies. A policy that fails ends the
run, with a message that names the plugin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from altgrad_core import checkpoint, run_checkpoint
from altgrad_core.actions import carry_out
from altgrad_core.hookspecs import Action, AdjustScale, SkipStep, Stop, SwitchFormat
from altgrad_core.run_state import Run
from altgrad_core.untouched import setting_changed, settings, streams_kept
from altgrad_core.watched import PluginFailure, Watched

READ_IN_EVERY_STEP = ("train/loss", "train/gradient_norm", "train/loss_finite", "train/gradient_finite")
"""What policies are always given."""


def decision(run: Run, loss: Tensor, norm: Tensor) -> Action | None:
    """Make the step's one host read and return the first action of a policy, None where all is well.

    Policies are shown what was observed in the step before: an older observation is not shown twice.
    """
    wanted = run.observed.take_fresh([need for policy in run.policies for need in policy.needs()])
    if not run.policies:
        return None
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
        action = _answer(run, watched, read)
        if action is not None:
            _record_action(run, watched, action, read, _carried_out(run, watched, action))
            return action
    return None


def _answer(run: Run, watched: Watched, read: Mapping[str, float]) -> Action | None:
    """Ask one policy, which gets a table of its own. Raises PluginFailure where it fails."""
    before = settings(run.device)
    try:
        with streams_kept(run.device):
            action: Action | None = watched.plugin.decide(run.step + 1, dict(read))
    except (Exception, SystemExit) as error:
        raise PluginFailure(watched.error("decide", error)) from error
    if (left := setting_changed(before, run.device)) is not None:
        raise PluginFailure(f"{watched.name} of {watched.owner} {left}: a policy answers by its action alone")
    return action


def _carried_out(run: Run, watched: Watched, action: Action) -> dict[str, Any]:
    """Carry out an action on formats and scales; return what an event tells of it beside its fields."""
    if not isinstance(action, Action):
        raise PluginFailure(
            f"{watched.name} of {watched.owner}: decide answered {action!r}; it must be an action of "
            "altgrad_core.hookspecs, or None"
        )
    try:
        return carry_out(run, action)
    except ValueError as error:
        raise PluginFailure(
            f"{watched.name} of {watched.owner}: {type(action).__name__} cannot be carried out: {error}"
        ) from error


def skips_update(run: Run, action: Action | None) -> bool:
    """Whether the optimizer does not step: a policy says so, or answers a step that is not finite otherwise.

    Gradients that are not finite come from the format, or the scale, that has just been given up.
    """
    if isinstance(action, SwitchFormat | AdjustScale):
        return not run.was_finite
    return isinstance(action, SkipStep | Stop)


def _keep_last_finite(run: Run) -> None:
    """Keep the state before the first step that is not finite, unless its weights are not finite either."""
    if all(bool(parameter.isfinite().all()) for parameter in run.model.parameters()):
        message, details = "the last finite state is kept", {"checkpoint": checkpoint.LAST_FINITE}
        run_checkpoint.save(run, checkpoint.LAST_FINITE)
    else:
        message, details = "the weights are not finite any more; an earlier checkpoint may be", {}
    run.folder.event(run.step + 1, "checkpoint", message, **details)


def _record_action(
    run: Run, watched: Watched, action: Action, read: Mapping[str, float], effects: Mapping[str, Any]
) -> None:
    counts = run.action_counts.setdefault(watched.name, {})
    counts[type(action).__name__] = counts.get(type(action).__name__, 0) + 1
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
        update="skipped" if skips_update(run, action) else "taken",
        **effects,
    )
    run.terminal.warning(f"step {run.step + 1}: {watched.name}: {kind}: {action.reason}")
    if isinstance(action, Stop):
        run.message = f"{watched.name}: {action.reason}"


def to_host(values: list[Tensor | float]) -> list[float]:
    """Return numbers from tensors of one element and floats, by one transfer from each device they are on."""
    away: dict[torch.device, list[Tensor]] = {}
    for value in values:
        if isinstance(value, Tensor):
            away.setdefault(value.device, []).append(value.detach().double().reshape(()))
    moved = {device: iter(torch.stack(found).tolist()) for device, found in away.items()}
    return [next(moved[value.device]) if isinstance(value, Tensor) else float(value) for value in values]
