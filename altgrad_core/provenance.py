"""Where a run comes from: its options in full, the versions of what it uses, the machine, the commit."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterator
from typing import Any

import attrs

from altgrad_core.experiment import Cell, Experiment
from altgrad_core.experiment_file import ExperimentFile
from altgrad_core.options import Choice, FormatChoice
from altgrad_core.registry import CORE_DISTRIBUTION, Registered, Registry


def resolved(file: ExperimentFile, cell: Cell, device: str) -> dict[str, Any]:
    """Return everything a reader needs to repeat the run: options, overrides, versions, device."""
    import torch

    options = cell.experiment.plain()
    return {
        "experiment": str(file.path),
        "cell": cell.name,
        "options": options,
        "options_hash": hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest(),
        "overrides": list(cell.in_force),
        "device": device,
        "device_name": torch.cuda.get_device_name()
        if device == "cuda"
        else platform.processor() or platform.machine(),
        "machine": platform.node(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "plugins": _versions(file),
        "commit": _commit(),
    }


def _versions(file: ExperimentFile) -> dict[str, str]:
    return {
        CORE_DISTRIBUTION: importlib.metadata.version(CORE_DISTRIBUTION),
        **{entry.distribution: entry.version for entry in file.registry.registered},
    }


def versions_in_use(experiment: Experiment, registry: Registry) -> dict[str, str]:
    """Return the versions of the core and of the distributions whose components an experiment names."""
    core = importlib.metadata.version(CORE_DISTRIBUTION)
    used = components_in_use(experiment, registry)
    return {CORE_DISTRIBUTION: core, **{entry.distribution: entry.version for entry in used}}


def components_in_use(experiment: Experiment, registry: Registry) -> list[Registered]:
    """Return the components that an experiment names, one twice where it does."""
    return [
        registry.find(choice.kind, choice.plugin)
        for choice in _choices(experiment)
        if not (isinstance(choice, FormatChoice) and choice.unquantized)
    ]


def _choices(options: Any) -> Iterator[Choice]:
    """Yield every component that options name, at any depth."""
    if isinstance(options, Choice):
        yield options
    inner = options if isinstance(options, list | tuple) else []
    if attrs.has(type(options)):
        inner = [getattr(options, field.name) for field in attrs.fields(type(options))]
    for one in inner:
        yield from _choices(one)


def _commit() -> str | None:
    """Return the git commit of the current folder, None outside of a checkout."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
