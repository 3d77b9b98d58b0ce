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
from altgrad_core.actions import carry_out
from altgrad_core.hookspecs import Action, AdjustScale, SkipStep, Step, Stop, SwitchFormat
from altgrad_core.quantizer import WeightQuantizer, quantizer_of
from altgrad_core.record import now
from altgrad_core.registry import UsageError
from altgrad_core.run_state import PluginFailure, Run, Watched, scale_seen
from altgrad_core.untouched import Untouched, streams_kept, together

READ_IN_EVERY_STEP = ("train/loss", "train/gradient_norm", "train/loss_finite", "train/gradient_finite")
"""What policies are always given."""

STEP_EXTRAS = ("before", "intended")
"""What a monitor's `needs` may ask of a step."""

EPOCH_SUMMARIES = ("sum", "mean", "")
"""How a monitor's `provides` may have an epoch sum up a quantity; empty: not at all."""

# --- policies ----------------------------------------------------------------------------------------


def decision(run: Run, loss: Tensor, norm: Tensor) -> Any:
    """Make the step's one host read and return the first action of a policy, None where all is well.

    Policies are shown what was observed in the step before: an older observation is not shown twice.
    """
    fresh, run.fresh = run.fresh, set()
    if not run.policies:
        return None
    needs = [need for policy in run.policies for need in policy.needs()]
    wanted = {need: run.observed[need] for need in needs if need in fresh}
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
            _record_action(run, watched, action, read, _carried_out(run, watched, action))
            return action
    return None


def _carried_out(run: Run, watched: Watched, action: Any) -> dict[str, Any]:
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


def skips_update(run: Run, action: Any) -> bool:
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
        run.save(checkpoint.LAST_FINITE)
    else:
        message, details = "the weights are not finite any more; an earlier checkpoint may be", {}
    run.folder.event(run.step + 1, "checkpoint", message, **details)


def _record_action(
    run: Run, watched: Watched, action: Any, read: Mapping[str, float], effects: Mapping[str, Any]
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


# --- monitors ----------------------------------------------------------------------------------------


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


def watch(run: Run, due: Collection[Watched]) -> dict[str, Tensor]:
    """Keep what the due monitors need of the moment before the step: the quantised weights, by name."""
    begun, needs = now(), _needs(due)
    before = {name: parameter.detach().clone() for name, parameter in run.quantized.items()} if needs else {}
    if run.storage is not None:
        kept = before if "intended" in needs else {}
        on_grid = set(run.storage.weights) if kept else ()
        run.storage.watched = {
            run.quantized[name]: kept[name] for name in kept if run.quantized[name] in on_grid
        }
    if hasattr(run.optimizer, "watch"):
        run.optimizer.watch = "intended" in needs
    _keep_scales(run, before, anew=False)
    _charge([watched for watched in due if watched.needs()], now() - begun)
    return before


def keep_scales(run: Run) -> None:
    """Keep the weights' scales as a step begins, where a monitor that is due needs what was before it."""
    begun, run.scales_before = now(), {}
    due = [watched for watched in due_monitors(run, run.step + 1) if "before" in watched.needs()]
    if due:
        _keep_scales(run, run.quantized, anew=True)
        _charge(due, now() - begun)


def _keep_scales(run: Run, names: Collection[str], *, anew: bool) -> None:
    """Keep scales beside their formats; unless anew, of weights alone whose format has changed since."""
    quantizers = {name: quantizer_of(run.trained[name]) for name in names}
    wanted = {
        name: quantizer
        for name, quantizer in quantizers.items()
        if quantizer is not None and (anew or not _as_kept(run, name, quantizer))
    }
    copies = together([quantizer.scale for quantizer in wanted.values()])
    for (name, quantizer), scale in zip(wanted.items(), copies, strict=True):
        run.scales_before[name] = quantizer.format, scale


def _as_kept(run: Run, name: str, quantizer: WeightQuantizer) -> bool:
    """Whether a weight has the format, and the shape of scale, that it had when its scale was kept."""
    if name not in run.scales_before:
        return False
    format, scale = run.scales_before[name]
    same = format is quantizer.format or format == quantizer.format
    return same and scale.shape == quantizer.scale.shape


def _needs(due: Collection[Watched]) -> set[str]:
    return {need for watched in due for need in watched.needs()}


def _charge(due: Collection[Watched], seconds: float) -> None:
    """Share the time of what the core does for monitors among them."""
    for watched in due:
        watched.seconds += seconds / len(due)


def observe_after(run: Run, due: list[Watched], loss: Tensor, before: Mapping[str, Tensor]) -> None:
    """Show the due monitors the step that has just been taken, and keep what they report on the device."""
    _observe(run, due, "observe", loss, before)
    run.scales_before = {}


def observe_skipped(run: Run, loss: Tensor) -> None:
    """Show a step whose update was skipped to the due monitors that have a method `skipped`."""
    due = [one for one in due_monitors(run, run.step) if hasattr(one.plugin, "skipped")]
    _observe(run, due, "skipped", loss, {})


def _observe(run: Run, due: list[Watched], method: str, loss: Tensor, before: Mapping[str, Tensor]) -> None:
    if not due:
        return
    begun = now()
    step, held = _seen(run, loss, before, _needs(due) if method == "observe" else set()), Untouched(run)
    _charge(due, now() - begun)
    first = [watched for watched in due if not watched.looked]
    for watched in due:
        begun = now()
        try:
            with _looking_only(run, watched, held):
                metrics = _checked(watched, getattr(watched.plugin, method)(step))
            _keep(run, watched, metrics)
            watched.looked |= method == "observe"
        except PluginFailure:
            raise
        except Exception as error:  # noqa: BLE001 - a monitor that fails is dropped, training goes on
            run.drop(watched, method, error)
        watched.seconds += now() - begun
    _warn_of_silent(run, first)


def _warn_of_silent(run: Run, first: list[Watched]) -> None:
    """Warn of monitors that had nothing to report of the first step that they saw, unless they never have."""
    silent = [
        watched.name + _chosen(watched)
        for watched in first
        if watched.looked and not watched.known and getattr(watched.plugin, "provides", True)
    ]
    if silent:
        run.warn(f"nothing to report: {', '.join(silent)}; no layer that matches has what is measured")


def _keep(run: Run, watched: Watched, metrics: Mapping[str, Tensor | float]) -> None:
    """Keep what a monitor said of the step; of what it said before and leaves out now nothing stays."""
    for name in watched.known.difference(metrics):
        run.observed.pop(name, None)
        run.unlogged.discard(name)
    run.observed.update(metrics)
    run.unlogged.update(metrics)
    run.fresh.update(metrics)
    _keep_totals(run, watched, metrics)


def _chosen(watched: Watched) -> str:
    """Return what a warning says of the layers that a monitor was told to watch."""
    own = (getattr(watched.plugin, name, None) for name in ("options", "_options"))
    for holder in (watched.plugin, *own):
        if isinstance(layers := getattr(holder, "layers", None), str):
            return f" (layers = {layers!r})"
    return ""


def _keep_totals(run: Run, watched: Watched, metrics: Mapping[str, Tensor | float]) -> None:
    """Keep what the epoch sums up of a monitor: the totals of the quantities that it declares."""
    for quantity, how in (getattr(watched.plugin, "provides", None) or {}).items():
        total = metrics.get(f"{watched.name}/{quantity}/total")
        if how and total is not None:
            own = total.clone() if isinstance(total, Tensor) else total  # it may be a buffer of the monitor's
            run.interval.totals.setdefault(f"{watched.name}/{quantity}", []).append(own)


@contextlib.contextmanager
def _looking_only(run: Run, watched: Watched, held: Untouched) -> Iterator[None]:
    """Give the global random streams back as they were; raise PluginFailure where something was written."""
    try:
        with torch.no_grad(), streams_kept(run.device):
            yield
    finally:
        if (what := held.written()) is not None:
            raise PluginFailure(
                f"{watched.name} of {watched.owner} wrote to {what} in place; a monitor may only read: "
                "clone first"
            )


def _seen(run: Run, loss: Tensor, before: Mapping[str, Tensor], needs: set[str]) -> Step:
    """Return the step as monitors see it."""
    gradients, counts = {}, {}
    own_counts = getattr(run.optimizer, "counts", {})
    stored = {**getattr(run.optimizer, "intended", {}), **(run.storage.intended if run.storage else {})}
    for name, parameter in run.trained.items():
        if parameter.grad is not None:
            gradients[name] = parameter.grad
        if parameter in own_counts:
            counts[name] = own_counts[parameter]
    recorded = {name: stored[run.trained[name]] for name in before if run.trained[name] in stored}
    intended = Updates(recorded, run.trained, before) if "intended" in needs else {}
    scales = {name: scale_seen(run.scales_before[name][1], run.trained[name]) for name in before}
    return Step(
        index=run.step,
        loss=loss,
        weights=run.weights(),
        gradients=gradients,
        before=before if "before" in needs else {},
        intended=intended,
        scales_before=scales if "before" in needs else {},
        intended_in_rungs=bool(getattr(run.optimizer, "intended_in_rungs", False)),
        counts=counts,
    )


class Updates(Mapping[str, Tensor]):
    """The intended updates by parameter name: as recorded, else the actual one, made when it is asked for."""

    def __init__(
        self, recorded: Mapping[str, Tensor], after: Mapping[str, Tensor], before: Mapping[str, Tensor]
    ) -> None:
        self._recorded, self._after, self._before = recorded, after, before

    def recorded(self, name: str) -> Tensor | None:
        """Return the update that somebody kept before rounding; None where it is the actual one."""
        return self._recorded.get(name)

    def __getitem__(self, name: str) -> Tensor:
        found = self._recorded.get(name)
        return self._after[name].detach() - self._before[name] if found is None else found

    def __contains__(self, name: object) -> bool:
        return name in self._before  # Mapping's own would make the difference

    def __iter__(self) -> Iterator[str]:
        return iter(self._before)

    def __len__(self) -> int:
        return len(self._before)


def _checked(watched: Watched, metrics: Mapping[str, Tensor | float]) -> Mapping[str, Tensor | float]:
    provides = getattr(watched.plugin, "provides", None)
    for name, value in metrics.items():
        if name not in watched.known and not re.fullmatch(rf"{re.escape(watched.name)}/[^/]+/[^/]+", name):
            raise ValueError(f"the metric {name!r} must be named '{watched.name}/<quantity>/<layer>'")
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"the metric {name!r} must be one number, it has the shape {tuple(value.shape)}")
        if not isinstance(value, Tensor | float | int):
            raise TypeError(f"the metric {name!r} must be a number, it is {value!r}")
        if name not in watched.known and provides is not None and name.split("/")[1] not in provides:
            raise ValueError(f"the metric {name!r} is not in its `provides`: {', '.join(provides)}")
    watched.known.update(metrics)
    return metrics


def call_each(run: Run, method: str, *arguments: Any) -> None:
    """Call an optional method of every monitor and policy that has it.

    A UsageError, such as a monitor's whose run lacks what it watches, ends the run: it is the user's to mend.
    """
    for watched in (*run.monitors, *(run.policies if method == "start" else ())):
        call = getattr(watched.plugin, method, None)
        if call is None:
            continue
        try:
            with _looking_only(run, watched, Untouched(run)):
                call(*arguments)
        except (PluginFailure, UsageError):
            raise
        except Exception as error:
            if watched not in run.monitors:
                raise PluginFailure(watched.error(method, error)) from error
            run.drop(watched, method, error)
