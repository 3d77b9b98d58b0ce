"""What a checkpoint holds of a run, and how a run assembled anew takes it up.

A state has three parts: what was run (versions, options, data; it must be the same here), what the next
step follows from, and what has been counted and reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from altgrad_core import actions, checkpoint
from altgrad_core.groups import geometry_kept, without_geometry
from altgrad_core.intervals import Epoch, Interval
from altgrad_core.observed import Observed
from altgrad_core.provenance import versions_in_use
from altgrad_core.record import differences
from altgrad_core.registry import UsageError
from altgrad_core.run_state import Run
from altgrad_core.state_tree import pack
from altgrad_core.surgery import quantized_flows
from altgrad_core.watched import PluginFailure


def save(run: Run, name: str | None = None) -> None:
    """Write a checkpoint of this moment; unnamed ones are numbered by step and pruned.

    Raises WriteError where it cannot be written, PluginFailure for a policy that cannot be saved.
    """
    plugins = _plugin_states(run)  # the first of all: a monitor that fails here takes its metrics with it
    state = {**_identity(run), **_training(run), **_progress(run), "plugins": plugins}
    folder, name = run.folder.checkpoints, name or checkpoint.step_name(run.step)
    checkpoint.save(folder, name, run.model.state_dict(), state)
    checkpoint.prune(folder, run.experiment.train.keep_checkpoints)


def load(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Take up a checkpoint of the same experiment. Raises CheckpointError where it is another's."""
    state = saved.state
    _refuse_another(run, saved)
    _load_training(run, saved)
    _load_progress(run, state)
    _load_plugin_states(run, state["plugins"])
    checkpoint.set_random_state(state["random"])  # the last of all: what loads may draw
    if changed := differences(state["machine"], _machine(run)):
        run.warn(f"{'; '.join(changed)}: results may differ in bits from a run without a pause")


def _identity(run: Run) -> dict[str, Any]:
    return {
        "versions": versions_in_use(run.experiment, run.registry),
        "options": run.experiment.plain(),
        "data": run.tokens.fingerprint,
        "tokenizer": run.tokens.tokenizer,
        "machine": _machine(run),
    }


def _machine(run: Run) -> dict[str, Any]:
    """Return what the bits of a result hang on, beside the options."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "device": run.device.type}


def _refuse_another(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Raise CheckpointError for one under other plugins, options, data or shapes, naming what differs."""
    state = saved.state
    versions = versions_in_use(run.experiment, run.registry)
    if changed := differences(state.get("versions", {}), versions):
        raise checkpoint.CheckpointError(
            f"{run.folder.path}: its checkpoint was written by other versions: {'; '.join(changed)}; "
            "install those again, or start anew with --out"
        )
    if changed := differences(state["options"], run.experiment.plain()):
        raise checkpoint.CheckpointError(
            f"{run.folder.path}: its checkpoint was written with other options: {'; '.join(changed)}; "
            "put them back, or start anew with --out"
        )
    if state["data"] != run.tokens.fingerprint:
        raise checkpoint.CheckpointError(
            f"{run.folder.path}: the data have changed since the checkpoint was written; "
            "put them back, or start anew with --out"
        )
    if changed := differences(_shapes(saved.model), _shapes(run.model.state_dict())):
        raise checkpoint.CheckpointError(
            f"{run.folder.path}: its checkpoint is of another model: {'; '.join(changed)}; start anew with "
            "--out"
        )


def _shapes(model: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(one.shape) for name, one in model.items()}


def _training(run: Run) -> dict[str, Any]:
    return {
        "optimizer": _optimizer_state(run),
        "storage": run.storage.state_dict() if run.storage else None,
        "master_bound": run.master_bound.state_dict() if run.master_bound else None,
        "scales": {name: quantizer.scale for name, quantizer in run.quantizers()},
        "adjustments": {name: quantizer.adjustment for name, quantizer in run.quantizers()},
        "flows": {name: flow.state_dict() for name, flow in quantized_flows(run.model).items()},
        "switches": list(run.switches),
        "lr_factor": run.lr_factor,
        "random": checkpoint.random_state(),
    }


def _optimizer_state(run: Run) -> dict[str, Any]:
    """Return what the optimizer saves. Raises PluginFailure where it fails, or no checkpoint can hold it."""
    try:
        state = without_geometry(run.optimizer.state_dict())
        pack(state)
    except Exception as error:
        title = run.experiment.optimizer.title(run.registry)
        raise PluginFailure(f"{title}: state_dict raised {type(error).__name__}: {error}") from error
    return state


def _load_training(run: Run, saved: checkpoint.Checkpoint) -> None:
    """Take up what the next step follows from, but for the random streams."""
    state = saved.state
    actions.repeat(run, state["switches"], state["adjustments"])
    run.model.load_state_dict(saved.model)
    with geometry_kept(run.optimizer):
        run.optimizer.load_state_dict(state["optimizer"])
    if run.storage:
        run.storage.load_state_dict(state["storage"])
    if run.master_bound:
        run.master_bound.load_state_dict(state["master_bound"])
    for name, quantizer in run.quantizers():
        quantizer.scale.copy_(state["scales"][name])
    for name, flow in quantized_flows(run.model).items():
        flow.load_state_dict(state["flows"][name])
    run.lr_factor = state["lr_factor"]


def _progress(run: Run) -> dict[str, Any]:
    return {
        "step": run.step,
        "seconds": run.seconds,
        "best": run.best,
        "last": run.last,
        "was_finite": run.was_finite,
        "message": run.message,
        "action_counts": run.action_counts,
        "looked": [watched.name for watched in run.monitors if watched.looked],
        "reported": {watched.name: watched.reported for watched in run.monitors},
        **run.observed.state_dict(),
        "epoch": run.epoch.state_dict(),
        "interval": run.interval.state_dict(),
    }


def _load_progress(run: Run, state: Mapping[str, Any]) -> None:
    run.step, run.seconds = state["step"], state["seconds"]
    run.best, run.last, run.was_finite = state["best"], state["last"], state["was_finite"]
    run.message = state["message"]
    if run.message:
        run.outcome = "stopped"
    run.action_counts = {policy: dict(kinds) for policy, kinds in state["action_counts"].items()}
    run.observed = Observed.of(state, run.device)
    run.epoch = Epoch.of(state["epoch"], run.device)
    run.interval = Interval.of(state["interval"], run.device)
    run.monitors = [one for one in run.monitors if one.name in state["plugins"]]  # one was dropped
    for watched in run.monitors:
        watched.looked, watched.reported = watched.name in state["looked"], state["reported"][watched.name]
        watched.known = {name for name in run.observed if name.startswith(f"{watched.name}/")}


def _plugin_states(run: Run) -> dict[str, Any]:
    """Return what monitors and policies save; a monitor that fails at it is dropped."""
    states = {}
    for watched in (*run.monitors, *run.policies):
        save = getattr(watched.plugin, "state_dict", None)
        try:
            found = save() if save is not None else None
            pack(found)  # raises for what no checkpoint can hold
            states[watched.name] = found
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it is the plugin's, and named
            run.fail(watched, "state_dict", error)
    return states


def _load_plugin_states(run: Run, states: Mapping[str, Any]) -> None:
    for watched in (*run.monitors, *run.policies):
        load = getattr(watched.plugin, "load_state_dict", None)
        if load is not None and states.get(watched.name) is not None:
            try:
                load(states[watched.name])
            except UsageError:
                raise
            except (Exception, SystemExit) as error:  # noqa: BLE001 - it is the plugin's, and named
                run.fail(watched, "load_state_dict", error)
