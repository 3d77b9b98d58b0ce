"""Evaluation, and the lines of metrics: everything on the device comes over in one transfer a line."""

from __future__ import annotations

import math
import resource
from collections.abc import Mapping

import torch
from torch import Tensor

from altgrad_core import checkpoint, not_finite, run_checkpoint
from altgrad_core.deciding import to_host
from altgrad_core.forward import autocast, evaluation_batches
from altgrad_core.intervals import Epoch, Interval
from altgrad_core.not_finite import Signs
from altgrad_core.run_state import Run
from altgrad_core.surgery import held_weights
from altgrad_core.untouched import streams_kept
from altgrad_core.validation_metrics import LOSS
from altgrad_core.watching import call_each


@torch.no_grad()
def evaluate(run: Run, batches: int | None = None) -> dict[str, float]:
    """Return what the task makes of the validation split, on batches that are the same in every run.

    batches: how many, 0 for the whole split; None: as the run's options say.
    """
    scores = run.task.scores()
    count = run.experiment.train.eval_batches if batches is None else batches
    run.model.eval()
    with streams_kept(run.device), held_weights(run.model):  # formats of others may draw from the streams
        for inputs, targets in evaluation_batches(run, count):
            with autocast(run):
                logits, loss = run.compiled(inputs, targets)
            scores.add(targets, logits, loss)
    run.model.train()
    return scores.metrics()


def last_evaluation(run: Run) -> dict[str, float]:
    """Return the metrics of a run's last evaluation, where that is not on the windows of every other."""
    batches = run.experiment.train.final_eval_batches
    if run.step < run.experiment.steps or batches == run.experiment.train.eval_batches:
        return {}
    return evaluate(run, batches)


def log(run: Run, evaluated: Mapping[str, float], last: Mapping[str, float] | None = None) -> None:
    """Write one line of metrics and begin a new interval; what a monitor reported is written once.

    last: stands in the line in place of `evaluated`, which alone tells whether the run was never better: a
    loss compares with others on the same windows only.
    """
    interval, run.interval = run.interval, Interval()
    values: dict[str, Tensor | float] = {}
    signs = not_finite.signs_of(run, interval)
    if interval.losses:
        values["train/loss"] = torch.stack(interval.losses).mean()
        values["train/gradient_norm"] = interval.norms[-1]
        values["train/clipped_steps"] = torch.stack(interval.clipped).sum()
        values |= _epoch(run, interval, signs)
    values |= run.observed.take_unlogged()
    line = _read(run, values, signs)
    line |= {**evaluated, **(last or {})}
    if interval.losses:
        line["train/learning_rate"] = run.optimizer.param_groups[0]["lr"]
    line |= _timings(run, interval)
    run.last |= line
    loss = evaluated.get(LOSS, math.inf)
    improved = loss < run.best.get(LOSS, math.inf)
    if improved:
        run.best = {"step": run.step, **evaluated}
    run.folder.metrics(run.step, line)
    run.terminal.line(run.step, line)
    call_each(run, "logged", run.step, dict(line))
    if evaluated:
        call_each(run, "evaluated", run.step, line)
    if improved and run.step:
        run_checkpoint.save(run, checkpoint.BEST)  # the last of all, so that a run can go on from it too


def log_epoch(run: Run) -> None:
    """Write a line of the epoch that the step has ended, where no other line is due; the interval goes on."""
    signs = not_finite.signs_of(run, run.interval)
    line = _read(run, _epoch(run, run.interval, signs), signs)
    run.last |= line
    run.folder.metrics(run.step, line)
    call_each(run, "logged", run.step, dict(line))


def _read(run: Run, values: Mapping[str, Tensor | float], signs: Signs) -> dict[str, float]:
    """Read values from the device, and return those that are defined; monitors at fault are dropped.

    Of the last line what is not defined any more, or is not in its monitor's last observation, is forgotten.
    """
    found = to_host([*values.values(), *signs.values])
    read, sick = dict(zip(values, found, strict=False)), signs.read(run, found[len(values) :])
    for watched, why in not_finite.faults(run, read, sick).items():
        run.drop(watched, "observe", ValueError(why))
        read = {name: value for name, value in read.items() if not watched.reports(name)}
    undefined = not_finite.undefined(run, read, sick)
    monitors = {watched.name for watched in run.monitors}
    run.last = {
        name: value
        for name, value in run.last.items()
        if name not in undefined and (name.partition("/")[0] not in monitors or name in run.observed)
    }
    return {name: value for name, value in read.items() if name not in undefined}


def ends_epoch(run: Run) -> bool:
    """Whether the last step ended a pass over the training split (where it is longer than one: several)."""
    per_step, epoch = run.task.per_step, run.task.epoch
    return run.step * per_step // epoch > (run.step - 1) * per_step // epoch


def _epoch(run: Run, interval: Interval, signs: Signs) -> dict[str, Tensor | float]:
    """Add the interval to the running epoch; where it has ended, return its index, mean loss and counters.

    A counter is the sum, or the mean, of a monitor's total over the steps where it was observed and defined.
    """
    epoch = run.epoch
    sizes = [*signs.weights.values()]
    sick = ~torch.stack(sizes).isfinite().all() if sizes else False
    epoch.add(interval, lambda name: not_finite.may_be_undefined(run, name), sick)
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
    costs = {f"cost/{watched.name}": watched.seconds / steps * 1e3 for watched in run.monitors}
    for watched in run.monitors:
        watched.seconds = 0.0
    known = {name: cost for name, cost in costs.items() if not math.isnan(cost)}
    if not interval.timed:  # the process was stopped in each of the steps
        return {**memory, **known}
    seconds = interval.seconds / interval.timed
    run.seconds += seconds * steps
    speed = run.experiment.tokens_per_step / max(seconds, 1e-9)
    return {"time/step": seconds, "time/tokens_per_second": speed, **memory, **known}
