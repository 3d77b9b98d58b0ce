"""A step as monitors see it: what is kept of the moment before it, and the `Step` that is made of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from altgrad_core.hookspecs import Step
from altgrad_core.quantizer import WeightQuantizer, quantizer_of
from altgrad_core.record import now
from altgrad_core.run_state import Run, Watched, scale_seen
from altgrad_core.untouched import together
from altgrad_core.updates import Updates

STEP_EXTRAS = ("before", "intended")
"""What a monitor's `needs` may ask of a step."""


def keep_scales(run: Run, due: Collection[Watched]) -> None:
    """Keep the weights' scales as a step begins, where a monitor that is due needs what was before it."""
    begun, run.scales_before = now(), {}
    due = [watched for watched in due if "before" in watched.needs()]
    if due:
        _keep_scales(run, _chosen(run, due), anew=True)
        charge(due, now() - begun)


def watch(run: Run, due: Collection[Watched]) -> dict[str, Tensor]:
    """Keep what the due monitors need of the moment before the step: quantised weights, by name."""
    begun, needs = now(), needs_of(due)
    before = _copied(run, _chosen(run, due)) if needs else {}
    if run.storage is not None:
        recorded = before if "intended" in needs else {}
        on_grid = set(run.storage.weights) if recorded else ()
        weights = {run.trained[name]: copy for name, copy in recorded.items()}
        run.storage.watched = {weight: copy for weight, copy in weights.items() if weight in on_grid}
    if hasattr(run.optimizer, "watch"):
        run.optimizer.watch = "intended" in needs
    _keep_scales(run, before, anew=False)
    charge([watched for watched in due if watched.needs()], now() - begun)
    return before


def _chosen(run: Run, due: Collection[Watched]) -> dict[str, nn.Parameter]:
    """Return the quantised weights of the layers that those monitors look at which need what was before."""
    patterns = {watched.layers for watched in due if watched.needs()}
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


def needs_of(due: Collection[Watched]) -> set[str]:
    """Return what the step must carry for any of these monitors."""
    return {need for watched in due for need in watched.needs()}


def charge(due: Collection[Watched], seconds: float) -> None:
    """Share the time of what the core does for monitors among them."""
    for watched in due:
        watched.seconds += seconds / len(due)


def seen(run: Run, loss: Tensor, before: Mapping[str, Tensor], needs: set[str]) -> Step:
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
