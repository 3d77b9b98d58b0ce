"""Evaluation, and the lines of metrics: everything on the device comes over in one transfer a line."""

from __future__ import annotations

import math
import resource
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from altgrad_core import checkpoint
from altgrad_core.deciding import to_host
from altgrad_core.forward import autocast, evaluation_batches
from altgrad_core.run_state import Epoch, Interval, Run
from altgrad_core.surgery import held_weights
from altgrad_core.watching import call_each


@torch.no_grad()
def evaluate(run: Run, batches: int | None = None) -> dict[str, float]:
    """Return what the task makes of the validation split, on batches that are the same in every run.

    batches: how many, 0 for the whole split; None: as the run's options say.
    """
    scores = run.task.scores()
    count = run.experiment.train.eval_batches if batches is None else batches
    run.model.eval()
    with held_weights(run.model):
        for inputs, targets in evaluation_batches(run, count):
            with autocast(run):
                logits, loss = run.compiled(inputs, targets)
            scores.add(targets, logits, loss)
    run.model.train()
    return scores.metrics()


def last_evaluation(run: Run) -> dict[str, float]:
    """Return the metrics of a run's last evaluation, where that is not on the windows of every other."""
    batches = run.experiment.train.final_eval_batches
    if run.step < run.experiment.steps or batches in (None, run.experiment.train.eval_batches):
        return {}
    return evaluate(run, batches)


def log(run: Run, evaluated: Mapping[str, float], last: Mapping[str, float] | None = None) -> None:
    """Write one line of metrics and begin a new interval; what a monitor reported is written once.

    last: stands in the line in place of `evaluated`, which alone tells whether the run was never better: a
    loss compares with others on the same windows only.
    """
    interval, run.interval = run.interval, Interval()
    values: dict[str, Tensor | float] = {}
    sizes = _sizes(run)
    if interval.losses:
        values["train/loss"] = torch.stack(interval.losses).mean()
        values["train/gradient_norm"] = interval.norms[-1]
        values["train/clipped_steps"] = torch.stack(interval.clipped).sum()
        values |= _epoch(run, interval, sizes)
    values |= {name: value for name, value in run.observed.items() if name in run.unlogged}
    run.unlogged.clear()
    line = _read(run, values, sizes)
    line |= {**evaluated, **(last or {})}
    if interval.losses:
        line["train/learning_rate"] = run.optimizer.param_groups[0]["lr"]
    line |= _timings(run, interval)
    run.last |= line
    loss = evaluated.get("validation/loss", math.inf)
    improved = loss < run.best.get("validation/loss", math.inf)
    if improved:
        run.best = {"step": run.step, **evaluated}
    run.folder.metrics(run.step, line)
    run.terminal.line(run.step, line)
    call_each(run, "logged", run.step, dict(line))
    if evaluated:
        call_each(run, "evaluated", run.step, line)
    if improved and run.step:
        run.save(checkpoint.BEST)  # the last of all, so that a run can go on from it too


def log_epoch(run: Run) -> None:
    """Write a line of the epoch that the step has ended, where no other line is due; the interval goes on."""
    sizes = _sizes(run)
    line = _read(run, _epoch(run, run.interval, sizes), sizes)
    run.last |= line
    run.folder.metrics(run.step, line)
    call_each(run, "logged", run.step, dict(line))


def _sizes(run: Run) -> dict[str, Tensor]:
    """Return the largest magnitude in each trained parameter, NaN where one is: nothing where nobody asks."""
    if not any(getattr(watched.plugin, "undefined_is_nan", False) for watched in run.monitors):
        return {}
    extremes = {name: parameter.detach().aminmax() for name, parameter in run.trained.items()}
    return {name: torch.maximum(-low, high) for name, (low, high) in extremes.items()}


def _read(run: Run, values: Mapping[str, Tensor | float], sizes: Mapping[str, Tensor]) -> dict[str, float]:
    """Read values from the device, and return those that are defined.

    Of the last line what is not defined any more, or is not in its monitor's last observation, is forgotten.
    """
    found = to_host([*values.values(), *sizes.values()])
    dead = {
        run.layers[name]
        for name, size in zip(sizes, found[len(values) :], strict=True)
        if not math.isfinite(size)
    }
    read = dict(zip(values, found, strict=False))
    undefined = {name for name, value in read.items() if math.isnan(value) and _undefined(run, name, dead)}
    monitors = {watched.name for watched in run.monitors}
    run.last = {
        name: value
        for name, value in run.last.items()
        if name not in undefined and (name.partition("/")[0] not in monitors or name in run.observed)
    }
    return {name: value for name, value in read.items() if name not in undefined}


def _undefined(run: Run, name: str, dead: Collection[str]) -> bool:
    """Whether a NaN means that the quantity is not defined in this step, as its monitor declares.

    It does not where the weights are to blame. dead: the layers with one that is not finite.
    """
    layer = "total" if name.startswith("epoch/") else name.rpartition("/")[2]
    to_blame = layer in dead if layer in run.layers.values() else bool(dead)
    return not to_blame and _may_be_undefined(run, name.removeprefix("epoch/"))


def _may_be_undefined(run: Run, name: str) -> bool:
    return any(
        getattr(watched.plugin, "undefined_is_nan", False) and name.startswith(f"{watched.name}/")
        for watched in run.monitors
    )


def ends_epoch(run: Run) -> bool:
    """Whether the last step ended a pass over the training split (where it is longer than one: several)."""
    per_step, epoch = run.task.per_step, run.task.epoch
    return run.step * per_step // epoch > (run.step - 1) * per_step // epoch


def _epoch(run: Run, interval: Interval, sizes: Mapping[str, Tensor]) -> dict[str, Tensor | float]:
    """Add the interval to the running epoch; where it has ended, return its index, mean loss and counters.

    A counter is the sum, or the mean, of a monitor's total over the steps where it was observed and defined.
    """
    epoch = run.epoch
    dead = ~torch.stack(list(sizes.values())).isfinite().all() if sizes else False
    epoch.add(interval, lambda name: _may_be_undefined(run, name), dead)
    if not ends_epoch(run) or epoch.loss is None:
        return {}
    passes = run.step * run.task.per_step // run.task.epoch
    run.epoch = Epoch()
    sums_up = {
        f"{watched.name}/{quantity}": how
        for watched in run.monitors
        for quantity, how in (getattr(watched.plugin, "provides", None) or {}).items()
    }
    counters = {
        f"epoch/{name}": total / count if sums_up[name] == "mean" else torch.where(count > 0, total, math.nan)
        for name, (total, count) in epoch.totals.items()
    }
    return {"epoch/index": float(passes), "epoch/train_loss": epoch.loss / epoch.steps, **counters}


def _timings(run: Run, interval: Interval) -> dict[str, float]:
    steps = len(interval.losses)
    if not steps:
        return {}
    if run.device.type == "cuda":
        memory = {"memory/peak_bytes": float(torch.cuda.max_memory_allocated())}
    else:
        memory = {"memory/peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0}
    run.seconds += interval.seconds
    costs = {f"cost/{watched.name}": watched.seconds / steps * 1e3 for watched in run.monitors}
    for watched in run.monitors:
        watched.seconds = 0.0
    tokens = steps * run.experiment.tokens_per_step
    return {
        "time/step": interval.seconds / steps,
        "time/tokens_per_second": tokens / max(interval.seconds, 1e-9),
        **memory,
        **costs,
    }
