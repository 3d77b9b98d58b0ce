"""What a run starts from: the last weights of another run, and the grid they are rounded to.

Both come before surgery, so that scales, bounds and the optimizer see the weights that training begins with.
A run that goes on needs neither: its checkpoint holds the weights, and the run it started from may be gone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from altgrad_core import checkpoint, rules, shapes
from altgrad_core.experiment import CLASSIFICATION, Experiment
from altgrad_core.quantize_options import QuantizeOptions
from altgrad_core.quantizer import WeightQuantizer
from altgrad_core.recipe import recipe_from
from altgrad_core.record import CHECKPOINTS, RunFolder, differences
from altgrad_core.registry import Registry, UsageError
from altgrad_core.step_folders import of_steps
from altgrad_core.terminal import Terminal
from altgrad_core.wording import listed

LABEL_OPTIONS = ("labels", "label_count")
"""Options of [data] that say, with the plugin, what a classifier's outputs mean."""


def prepare(
    model: nn.Module,
    experiment: Experiment,
    tokenizer: str,
    registry: Registry,
    folder: RunFolder,
    terminal: Terminal,
) -> None:
    """Make a model's weights those that the experiment starts from, in place.

    tokenizer: what tells one from another, see `TokenData`.
    Raises UsageError where `init_from` names no run, or one whose weights do not fit.
    """
    checkpoint.recover(folder.checkpoints)
    begun = bool(of_steps(folder.checkpoints))  # the run goes on from there, or not at all
    if experiment.init_from and not begun:
        take_weights(model, experiment, tokenizer, terminal)
    round_linears(model, experiment, registry)


def take_weights(model: nn.Module, experiment: Experiment, tokenizer: str, terminal: Terminal) -> None:
    """Load the newest whole checkpoint of the run `init_from`, whatever its formats were.

    The trunk must be the same. The head is taken too where it answers the same question; else it starts
    afresh, and that is said.
    """
    source = Path(os.path.expanduser(experiment.init_from))
    saved, passed_over = checkpoint.newest(source / CHECKPOINTS)
    for reason in passed_over:
        terminal.warning(reason)
    if saved is None:
        raise UsageError(f"init_from: {_no_weights(source, damaged=bool(passed_over))}")
    options, whole = saved.state["options"], _takes_head(experiment, saved.state["options"])
    given = saved.model if whole else _without_heads(saved.model)
    if problem := next(_misfits(model, experiment, given, options, whole=whole), None):
        raise UsageError(f"init_from: the weights of {source} do not fit: {problem}")
    if saved.state.get("tokenizer") != tokenizer:
        terminal.warning(f"init_from: {source} was trained on other tokens: {_tokens(options['data'])}")
    model.load_state_dict(given, strict=False)
    head = "" if whole else _head_left_out(experiment.architecture)
    terminal.say(f"starting from the weights of {source} at step {saved.state['step']}{head}")


def _no_weights(source: Path, *, damaged: bool) -> str:
    if damaged:
        return f"{source} has no whole checkpoint left"
    runs = sorted(found.parent for found in source.glob(f"*/{CHECKPOINTS}"))
    if runs:
        return f"{source} is no run folder, but has some in it: name one of {listed(map(str, runs))}"
    return f"{source} has no checkpoint; name the folder of a run, such as 'runs/my_experiment/run'"


def _takes_head(experiment: Experiment, theirs: Mapping[str, Any]) -> bool:
    """Whether the other run's head answers the same question: which token is next, or which of our labels."""
    own = experiment.plain()
    if theirs.get("task", own["task"]) != own["task"]:
        return False
    labels = [[data.get(key) for key in ("plugin", *LABEL_OPTIONS)] for data in (theirs["data"], own["data"])]
    return own["task"] != CLASSIFICATION or labels[0] == labels[1]


def _head_left_out(architecture: shapes.Architecture) -> str:
    own = "the token embedding" if architecture.ties_head else f"{architecture.head}, which starts afresh"
    return f"; its head is left out, the head here is {own}"


def _without_heads(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: one for name, one in weights.items() if name.rpartition(".")[0] not in shapes.HEADS}


def _misfits(
    model: nn.Module,
    experiment: Experiment,
    given: Mapping[str, Tensor],
    options: Mapping[str, Any],
    *,
    whole: bool,
) -> Iterator[str]:
    """Yield why another run's weights cannot be this model's, each with the tensor or option to blame.

    whole: whether they are to be all of the model's, or those of its trunk.
    """
    expected = model.state_dict() if whole else _without_heads(model.state_dict())
    changed = differences(options["model"], experiment.plain()["model"], "model")
    way_out = f"; its options are other ones: {'; '.join(changed)}" if changed else ""
    for name, own in expected.items():
        if name not in given:
            yield f"they have no {name}{way_out}"
        elif given[name].shape != own.shape:
            yield f"{name} is {tuple(given[name].shape)} there and {tuple(own.shape)} here{way_out}"
        elif not given[name].isfinite().all():
            yield f"{name} holds NaN or infinity; that run had diverged"
    for name in given:
        if name not in expected:
            yield f"they have {name}, which this model has not{way_out}"
    if options["model"]["n_head"] != experiment.model.n_head:
        yield f"no size tells the heads of attention apart; set model.n_head = {options['model']['n_head']}"
    names: dict[int, str] = {}
    for name, own in model.named_parameters(remove_duplicate=False):
        twin = names.setdefault(id(own), name)
        if name in given and not torch.equal(given[twin], given[name]):
            yield f"{twin} and {name} are one tensor here and two there; set model.tie_weights = false"


def _tokens(data: Mapping[str, Any]) -> str:
    return f"tokenizer {data['tokenizer']} on {data['plugin']}"


@torch.no_grad()
def round_linears(model: nn.Module, experiment: Experiment, registry: Registry) -> None:
    """Round Linear weights to the grid of `train.init_format`, to nearest even, as grid storage begins.

    The Linears are those that take the format of [quantize]: a tied head, and layers to which a rule gives a
    format of their own, stay as they are. So is the scale's rule that of [quantize], a fit per tensor where
    there is none.
    """
    choice = experiment.train.init_format
    options = experiment.quantize or QuantizeOptions(format=choice)
    recipe = recipe_from(options, choice, registry)
    if recipe is None:
        return
    for layer in _of_the_format(experiment, options):
        weight = model.get_submodule(layer).get_parameter("weight")
        quantizer = WeightQuantizer(attrs.evolve(recipe, rounding="nearest_even"))
        quantizer.fit(weight)
        weight.copy_(quantizer.quantize(weight))


def _of_the_format(experiment: Experiment, options: QuantizeOptions) -> Iterator[str]:
    tied = rules.tied_layers(experiment.architecture)
    for layer in shapes.linear_shapes(experiment.architecture):
        index = rules.first_match(options.rule, layer)
        if layer not in tied if index is None else options.rule[index].format is None:
            yield layer
