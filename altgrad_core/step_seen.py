"""A step as monitors see it: what is kept of the moment before it, and the `Step` that is made of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from altgrad_core.hookspecs import Step
from altgrad_core.intervals import now
from altgrad_core.native_landing import Onlooker
from altgrad_core.quantizer import quantizer_of
from altgrad_core.run_state import Run
from altgrad_core.untouched import together
from altgrad_core.updates import Updates
from altgrad_core.watched import Watched
from altgrad_core.weights_seen import scale_seen

COPIES = ("before", "intended")
"""What is kept of the moment before a step: copies, and updates before rounding."""

STEP_EXTRAS = (*COPIES, "landing")
"""What a monitor's `needs` may ask of a step."""


def keep_scales(run: Run, due: Collection[Watched]) -> None:
    """Keep the weights' scales as a step begins, where a monitor that is due needs what was before it."""
    begun, run.scales_before, run.regridded = now(), {}, set()
    due = [watched for watched in due if "before" in watched.needs()]
    if due:
        _keep_scales(run, _chosen(run, due))
        charge(due, now() - begun)


def watch(run: Run, due: Collection[Watched]) -> dict[str, Tensor]:
    """Keep what the due monitors need of the moment before the step: quantized weights, by name."""
    begun, needs = now(), needs_of(due)
    before = _copied(run, _chosen(run, due)) if needs.intersection(COPIES) else {}
    if run.storage is not None:
        lands = "landing" in needs and run.storage.rounds_at_once
        run.storage.onlookers = _onlookers(run, due) if lands else []
        recorded = before if "intended" in needs else {}
        on_grid = set(run.storage.weights) if recorded else ()
        weights = {run.trained[name]: copy for name, copy in recorded.items()}
        run.storage.watched = {weight: copy for weight, copy in weights.items() if weight in on_grid}
    if hasattr(run.optimizer, "watch"):
        run.optimizer.watch = "intended" in needs
    _keep_scales(run, before)
    charge([watched for watched in due if watched.needs()], now() - begun)
    return before


def _onlookers(run: Run, due: Collection[Watched]) -> list[Mapping[Tensor, Onlooker | None]]:
    """Return what the due monitors that look on as weights land want these to be told to."""
    looking: dict[int, list[Watched]] = {}
    for watched in (watched for watched in due if "landing" in watched.needs()):
        looking.setdefault(id(getattr(watched.plugin, "landing", None)), []).append(watched)
    gradients = {
        name: gradient
        for name, parameter in run.trained.items()
        if (gradient := parameter.grad) is not None and (one := quantizer_of(parameter)) and one.stored
    }
    found: list[Mapping[Tensor, Onlooker | None]] = []
    for sharing in looking.values():
        try:
            wanted = sharing[0].plugin.landing.onlookers(gradients)
            found.append(_by_weight(run, sharing[0], wanted))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a monitor that fails is dropped, training goes on
            for watched in sharing:
                run.drop(watched, "onlookers", error)
    return found


def _by_weight(
    run: Run, watched: Watched, wanted: Mapping[str, Onlooker | None]
) -> Mapping[Tensor, Onlooker | None]:
    """Return the same by Parameter. Raises TypeError for what is no pair of addresses."""
    if wanted != watched.onlookers:
        for name, one in wanted.items():
            if one is not None and not (
                isinstance(one, tuple) and [type(part) for part in one] == [int, int]
            ):
                raise TypeError(
                    f"of {name} it must return a function's address and its context's, not {one!r}"
                )
        watched.onlookers = dict(wanted)
        watched.onlookers_by_weight = {run.trained[name]: one for name, one in wanted.items()}
    return watched.onlookers_by_weight


def _chosen(run: Run, due: Collection[Watched]) -> dict[str, nn.Parameter]:
    """Return the quantized weights of the layers that those monitors look at which need what was before."""
    patterns = {watched.layers for watched in due if not {*COPIES}.isdisjoint(watched.needs())}
    return {
        name: parameter
        for name, parameter in run.quantized.items()
        if any(re.fullmatch(pattern, run.layers[name]) for pattern in patterns)
    }


@torch.no_grad()
def _copied(run: Run, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return copies, in the memory of those of earlier steps: fresh pages cost more than copying does."""
    for name, parameter in parameters.items():
        if name not in run.weights_before:
            run.weights_before[name] = torch.empty_like(parameter)
    copies = {name: run.weights_before[name] for name in parameters}
    if copies:
        torch._foreach_copy_(list(copies.values()), list(parameters.values()))
    return copies


def _keep_scales(run: Run, names: Collection[str]) -> None:
    """Keep the scales of those of these weights of which none is kept, or is not what it was any more."""
    missing = [name for name in names if name not in run.scales_before or name in run.regridded]
    quantizers = {name: quantizer_of(run.trained[name]) for name in missing}
    scales = {name: one.scale for name, one in quantizers.items() if one is not None}
    run.scales_before |= zip(scales, together([*scales.values()]), strict=True)


def _untold(run: Run) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the weights that landed with nobody told of it, as they were, and their scales then."""
    found = {} if run.storage is None else run.storage.unrounded
    return {name: found[weight] for name, weight in run.trained.items() if weight in found} if found else {}


def needs_of(due: Collection[Watched]) -> set[str]:
    """Return what the step must carry for any of these monitors."""
    return {need for watched in due for need in watched.needs()}


def charge(due: Collection[Watched], seconds: float) -> None:
    """Share the time of what the core does for monitors among them."""
    for watched in due:
        watched.seconds += seconds / len(due)


def seen(run: Run, loss: Tensor, before: Mapping[str, Tensor], needs: set[str]) -> Step:
    """Return the step as monitors see it."""
    gradients = {
        name: gradient for name, parameter in run.trained.items() if (gradient := parameter.grad) is not None
    }
    own_counts = getattr(run.optimizer, "counts", {})
    counted = run.trained.items() if own_counts else ()
    counts = {name: own_counts[parameter] for name, parameter in counted if parameter in own_counts}
    stored = {**getattr(run.optimizer, "intended", {}), **(run.storage.intended if run.storage else {})}
    recorded = {name: stored[run.trained[name]] for name in before if run.trained[name] in stored}
    intended = Updates(recorded, run.trained, before) if "intended" in needs else {}
    scales_then = {name: scale_seen(run.scales_before[name], run.trained[name]) for name in before}
    untold = _untold(run)
    scales = (scales_then if "before" in needs else {}) | {name: scale for name, (_, scale) in untold.items()}
    return Step(
        index=run.step,
        loss=loss,
        weights=run.weights(),
        gradients=MappingProxyType(gradients),
        before=MappingProxyType(before if "before" in needs else {}),
        intended=intended,
        scales_before=MappingProxyType(scales),
        unrounded=MappingProxyType({name: one for name, (one, _) in untold.items()}),
        intended_in_rungs=bool(getattr(run.optimizer, "intended_in_rungs", False)),
        counts=MappingProxyType(counts),
    )
