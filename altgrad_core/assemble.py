"""From an experiment to a run: data, model, surgery, optimizer, storage, monitors, policies."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from altgrad_core import data_set, initial_weights, kernels, rules, shapes, watchers
from altgrad_core.actions import formats_of
from altgrad_core.experiment import Cell, Experiment
from altgrad_core.format import Format
from altgrad_core.groups import param_groups
from altgrad_core.hookspecs import OptimizerInputs
from altgrad_core.layer_recipes import LayerRecipes, refuse_inexact
from altgrad_core.lookup import format_or_none
from altgrad_core.master_bound import MasterBound
from altgrad_core.quantizer import quantizer_of
from altgrad_core.recipe import recipe_from
from altgrad_core.record import RunFolder
from altgrad_core.registry import PluginError, Registry, UsageError
from altgrad_core.run_state import Run
from altgrad_core.storage import GridStorage, store_on_grid
from altgrad_core.surgery import quantize_layers
from altgrad_core.tasks import task_for
from altgrad_core.terminal import Terminal


def device_for(experiment: Experiment, asked: str = "auto") -> str:
    """Return `cpu` or `cuda`. Raises UsageError where cuda is asked for and absent."""
    wanted = asked if asked != "auto" else experiment.train.device
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError('train.device = "cuda", but torch sees no CUDA device; use "cpu" or "auto"')
    return wanted


def derived_seed(seed: int, purpose: str) -> int:
    """Return a 63-bit seed for one purpose, so that streams never share draws."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def assemble(cell: Cell, registry: Registry, folder: RunFolder, terminal: Terminal, device: str) -> Run:
    """Build everything of one cell. Raises UsageError for what only shows now, PluginError for plugins."""
    experiment = cell.experiment
    if experiment.train.deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(experiment.train.deterministic)  # imports the compiler: a second
    on = torch.device(device)
    if experiment.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses to be exact without
    tokens = data_set.tokens(experiment.data, registry, terminal.say)
    task = task_for(experiment, tokens)
    model = task.model(_generator(experiment, "weights")).to(on)
    initial_weights.prepare(model, experiment, tokens.tokenizer, registry, folder, terminal)
    frozen = _freeze(model, experiment)
    covered = _quantize(model, experiment, registry, _autocast(experiment, device))
    kernels.enable(experiment.steps * sum(one.numel() for one in model.parameters() if quantizer_of(one)))
    optimizer = _optimizer(model, experiment, registry, covered)
    storage = _storage(model, optimizer, experiment, registry)
    monitors, policies = watchers.built(experiment, registry, dict(model.named_modules()))
    return Run(
        experiment=experiment,
        cell=cell.name,
        folder=folder,
        terminal=terminal,
        device=on,
        model=model,
        compiled=_compiled(model, experiment, device),
        optimizer=optimizer,
        storage=storage,
        master_bound=_master_bound(model, optimizer, experiment, covered),
        tokens=tokens,
        task=task,
        autocast=_autocast(experiment, device),
        layers=_layer_names(model),
        formats=formats_of(model),
        registry=registry,
        monitors=monitors,
        policies=policies,
        frozen=frozen,
    )


def _generator(experiment: Experiment, purpose: str) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(experiment.seed, purpose))


def _freeze(model: nn.Module, experiment: Experiment) -> int:
    """Stop the named parameters from training; returns how many numbers that are."""
    frozen = 0
    for name, parameter in model.named_parameters():
        if any(re.fullmatch(pattern, name) for pattern in experiment.train.freeze):
            parameter.requires_grad_(False)
            frozen += parameter.numel()
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("train.freeze leaves nothing to train; narrow its patterns")
    return frozen


def _autocast(experiment: Experiment, device: str) -> bool:
    return experiment.train.dtype == "bf16" or (experiment.train.dtype == "auto" and device == "cuda")


def _quantize(
    model: nn.Module, experiment: Experiment, registry: Registry, autocast: bool
) -> Mapping[nn.Parameter, Format | None]:
    """Quantize what [quantize] says; returns the weights that it covers, those with a format of FP32 too.

    With each, the format whose geometry it takes where it has none, as far as a rule says so.
    """
    quantize = experiment.quantize
    if quantize is None:
        return {}
    linears, tied = shapes.linear_shapes(experiment.architecture), rules.tied_layers(experiment.architecture)
    planned = rules.plan(quantize, linears, tied, registry)
    chosen = {
        layer: LayerRecipes(
            weights=recipe_from(quantize, plan.format, registry),
            storage=plan.storage,
            covered=plan.covered,
            activations=recipe_from(quantize.activations, plan.activations, registry),
            gradients=recipe_from(quantize.gradients, plan.gradients, registry),
        )
        for layer, plan in planned.items()
    }
    if autocast:
        for layer in chosen.values():
            for recipe in (layer.weights, layer.activations, layer.gradients):
                refuse_inexact(recipe)
    quantize_layers(model, chosen, derived_seed(experiment.seed, "gradients"))
    geometries = rules.geometries(quantize, linears)
    return {
        model.get_submodule(layer).get_parameter("weight"): format_or_none(geometries.get(layer), registry)
        for layer in rules.covered(quantize, linears, tied, registry)
    }


def _optimizer(
    model: nn.Module,
    experiment: Experiment,
    registry: Registry,
    covered: Mapping[nn.Parameter, Format | None],
) -> torch.optim.Optimizer:
    quantize = experiment.quantize
    inputs = OptimizerInputs(
        groups=param_groups(model, covered),
        generator=_generator(experiment, "optimizer"),
        registry=registry,
        storage=quantize.storage if quantize else "master",
        storage_rounding=quantize.storage_rounding if quantize else "nearest_even",
        bound=quantize.bound if quantize else 0.0,
        scale_mode=_scale_mode(experiment),
        covers=quantize is not None,
    )
    optimizer = experiment.optimizer.build(registry, inputs)
    if (lacking := _lacking(optimizer, model)) is not None:
        raise PluginError(f"{experiment.optimizer.title(registry)} {lacking}: mend its plugin")
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return cast(torch.optim.Optimizer, optimizer)


def _lacking(optimizer: Any, model: nn.Module) -> str | None:
    """Return what keeps a thing from being an optimizer of this model, None where nothing does."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return f"is no torch.optim.Optimizer but {type(optimizer).__name__}"
    if not all(isinstance(group.get("lr"), float | int | Tensor) for group in optimizer.param_groups):
        return "has a parameter group without lr, which the schedule sets"
    taken = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    if left := [name for name, one in trained.items() if id(one) not in taken]:
        return f"leaves out {len(left)} of the {len(trained)} parameters it was given, {left[0]} for one"
    return None


def _scale_mode(experiment: Experiment) -> str:
    """Return how the scales of the weights on the grid move; "initial" where nothing is asked there."""
    quantize = experiment.quantize
    if quantize is None or "grid" not in (quantize.storage, *(rule.storage for rule in quantize.rule)):
        return "initial"
    return "adaptive" if quantize.mode_in("grid") == "adaptive" else "initial"


def _storage(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    experiment: Experiment,
    registry: Registry,
) -> GridStorage | None:
    """Put the weights that the plan wants there on their grids, unless the optimizer does so itself.

    Raises UsageError where the optimizer has no moment for storage_rounding = "eco".
    """
    wanted = [
        parameter for parameter in model.parameters() if parameter.requires_grad and _wants_grid(parameter)
    ]
    if not wanted or experiment.quantize is None or getattr(optimizer, "stores_on_grid", False):
        return None
    residual = experiment.quantize.residual_format
    try:
        return store_on_grid(
            optimizer,
            rounding=experiment.quantize.storage_rounding,
            generator=_generator(experiment, "storage"),
            bound=experiment.quantize.bound,
            scale_mode=_scale_mode(experiment),
            residual_format=residual if isinstance(residual, str) else format_or_none(residual, registry),
        )
    except ValueError as error:
        raise UsageError(f"[quantize]: {error}") from error


def _wants_grid(parameter: nn.Parameter) -> bool:
    quantizer = quantizer_of(parameter)
    return quantizer is not None and quantizer.storage == "grid"


def _master_bound(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    experiment: Experiment,
    covered: Collection[nn.Parameter],
) -> MasterBound | None:
    quantize = experiment.quantize
    if quantize is None or not quantize.bound:
        return None
    taken = {id(parameter) for parameter in covered}
    masters = [
        parameter
        for parameter in model.parameters()
        if parameter.requires_grad
        and (id(parameter) in taken if (found := quantizer_of(parameter)) is None else not found.on_grid)
    ]
    if not masters:
        return None
    bound = MasterBound(optimizer, masters, quantize.bound)
    bound.follow_formats()
    return bound


def _compiled(model: nn.Module, experiment: Experiment, device: str) -> Any:
    wanted = experiment.train.compile
    return torch.compile(model) if wanted is True or (wanted == "auto" and device == "cuda") else model


def _layer_names(model: nn.Module) -> dict[str, str]:
    """Return parameter name to module path; a tied head's weight goes by `lm_head`."""
    names = {name: name.rpartition(".")[0] for name, _ in model.named_parameters()}
    heads = {
        id(module.weight): path for path, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    return {name: heads.get(id(model.get_parameter(name)), path) for name, path in names.items()}
