"""The training loop: one optimizer step after another.

The order of a step: micro-batches forward and backward, gradients ready, policies decide, optimizer step and
storage, monitors observe; at the log interval, one transfer from the device. Evaluation and monitors never
touch the training trajectory.
"""

from __future__ import annotations

import contextlib
import math
import random
import signal
from collections.abc import Iterator
from types import FrameType

import numpy
import torch
from torch import Tensor

from altgrad_core import checkpoint, interrupts, run_checkpoint
from altgrad_core.deciding import decision, skips_update
from altgrad_core.forward import autocast, micro_batches
from altgrad_core.hookspecs import ClipGradients, ScaleLearningRate, Stop
from altgrad_core.measuring import ends_epoch, evaluate, last_evaluation, log, log_epoch
from altgrad_core.quantizer import quantizer_of
from altgrad_core.run_state import Run
from altgrad_core.step_seen import keep_scales, watch
from altgrad_core.surgery import held_weights
from altgrad_core.watched import Watched
from altgrad_core.watching import call_each, looking, observe_after, observe_skipped


def train(run: Run) -> str:
    """Train to the last step, and return the outcome: finished, stopped, interrupted or terminated."""
    options = run.experiment.train
    with _signals(run) as asked, _seeded(run):
        call_each(run, "start", run)
        if run.step == 0:
            log(run, *_evaluated(run))
        while run.step < run.experiment.steps and run.outcome == "running":
            run.interval.begin_step()
            _one_step(run)
            run.terminal.advance(run.step)
            last = run.step == run.experiment.steps or run.outcome != "running"
            evaluated = _due(options.eval_every, run.step) or run.step == run.experiment.steps
            logged = evaluated or last or _due(options.log_every, run.step)
            _end_step(run, settled=logged or ends_epoch(run))
            if logged:
                log(run, *(_evaluated(run) if evaluated else ({}, {})))
            elif ends_epoch(run):
                log_epoch(run)
            if asked and not last:  # read here alone: a later signal waits for the next step
                run.outcome = asked[0]
            if last or run.outcome != "running" or _due(options.checkpoint_every, run.step):
                _checkpoint(run)
        if run.outcome == "running":
            run.outcome = "finished"
        call_each(run, "end", run, run.outcome)
        run.asked = asked[0] if asked else ""
    return run.outcome


def _evaluated(run: Run) -> tuple[dict[str, float], dict[str, float]]:
    """Return an evaluation, and the last one's where that is another.

    The scales that follow their weights are given back: a checkpoint holds those of its step, by which
    monitors have coded the weights, evaluated or not.
    """
    quantizers = [found for weight in run.quantized.values() if (found := quantizer_of(weight)) is not None]
    before = [quantizer.scale.clone() for quantizer in quantizers]
    metrics = evaluate(run), last_evaluation(run)
    for quantizer, scale in zip(quantizers, before, strict=True):
        quantizer.scale.copy_(scale)
    return metrics


def _end_step(run: Run, *, settled: bool) -> None:
    """Stop the step's clock; settled: only once the device has done what it was asked."""
    if settled and run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    run.interval.end_step()


def _due(every: int, step: int) -> bool:
    return bool(every) and step % every == 0


def _one_step(run: Run) -> None:
    options = run.experiment.train
    due = looking(run, run.step + 1)
    keep_scales(run, due)
    with held_weights(run.model):
        loss = _forward_backward(run)
    parameters = [parameter for parameter in run.trained.values() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(parameter.grad for parameter in parameters)  # type: ignore[misc]
    _set_learning_rate(run)
    limit = options.grad_clip or math.inf
    action = decision(run, loss, norm)
    if isinstance(action, ClipGradients):
        limit = min(limit, action.norm)
    if isinstance(action, ScaleLearningRate):
        run.lr_factor *= action.factor
        _set_learning_rate(run)
    if isinstance(action, Stop):
        run.outcome = "stopped"
    if not skips_update(run, action):
        if math.isfinite(limit):
            torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        _update(run, due, loss)
    else:
        run.step += 1
        observe_skipped(run, due, loss)
    run.optimizer.zero_grad(set_to_none=True)
    run.interval.losses.append(loss)
    run.interval.norms.append(norm)
    run.interval.clipped.append(norm > limit)


def _forward_backward(run: Run) -> Tensor:
    """Accumulate the gradients of one step's micro-batches; returns the mean loss, 0-d, detached."""
    options, total = run.experiment.train, torch.zeros((), device=run.device)
    for inputs, targets in micro_batches(run, run.step):
        with autocast(run):
            _, loss = run.compiled(inputs, targets)
        loss = loss / options.gradient_accumulation
        loss.backward()
        total += loss.detach()
    return total


def _update(run: Run, due: list[Watched], loss: Tensor) -> None:
    """The optimizer's step and the storage's rounding, then the monitors that are due."""
    before = watch(run, due)
    try:
        run.optimizer.step()
    except (Exception, SystemExit) as error:
        error.add_note(f"in a step of {run.experiment.optimizer.title(run.registry)}")
        raise
    run.step += 1
    observe_after(run, due, loss, before)


def learning_rate_factor(step: int, steps: int, warmup: int, floor: float) -> float:
    """Return nanoGPT's schedule for the step after `step` others: linear warm-up, then cosine to `floor`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return floor + 0.5 * (1 + math.cos(math.pi * progress)) * (1 - floor)


def _set_learning_rate(run: Run) -> None:
    options = run.experiment.train
    factor = learning_rate_factor(run.step, run.experiment.steps, options.warmup_steps, options.min_lr_ratio)
    for group in run.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor * run.lr_factor


def _checkpoint(run: Run) -> None:
    """Write a checkpoint; its event goes first, so that no kill leaves a checkpoint without one."""
    run.folder.event(
        run.step, "checkpoint", "a checkpoint of this step", checkpoint=checkpoint.step_name(run.step)
    )
    run_checkpoint.save(run)


@contextlib.contextmanager
def _seeded(run: Run) -> Iterator[None]:
    """Dropout draws from the global generators: seed them for the run, and give them back afterwards."""
    before = checkpoint.random_state()
    if not run.step:  # a resume has set them
        random.seed(run.experiment.seed)
        numpy.random.seed(run.experiment.seed % 2**32)
        torch.manual_seed(run.experiment.seed)
    try:
        yield
    finally:
        checkpoint.set_random_state(before)


@contextlib.contextmanager
def _signals(run: Run) -> Iterator[list[str]]:
    """Collect SIGINT and SIGTERM, so that the step can finish; a second SIGINT ends at once.

    How long a step takes in which the process is stopped is not known: it is left out of all times.
    """

    def go_on(_: int, frame: FrameType | None) -> None:
        run.interval.lose_time()
        for watched in run.monitors:
            watched.seconds = math.nan

    with interrupts.handling({signal.SIGCONT: go_on}), interrupts.collected() as asked:
        yield asked
