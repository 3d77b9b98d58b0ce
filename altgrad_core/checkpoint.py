"""Checkpoints: exact, atomic, checksummed; no pickle.

A checkpoint is a folder: `model.safetensors` (plain parameter names), `state.safetensors` and `state.json`
(everything else), and `manifest.json` with the SHA-256 of each file. It is written under another name,
synced and renamed, so that a crash leaves the one before whole. What does not match its manifest is never
loaded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from altgrad_core import interrupts
from altgrad_core.durable import WriteError, sync
from altgrad_core.registry import UsageError
from altgrad_core.state_tree import pack, unpack
from altgrad_core.step_folders import PREFIX, of_steps

MODEL, TENSORS, TREE, MANIFEST = "model.safetensors", "state.safetensors", "state.json", "manifest.json"
BEST, LAST_FINITE = "best", "last_finite"
_APART = {BEST: "", LAST_FINITE: " (kept in the middle of a step, so not to go on bit for bit)"}
"""Checkpoints that are kept beside those of steps, with what is to be known of them."""
_UNFINISHED = ".unfinished-"
_ASIDE = f"{_UNFINISHED}old-"
_DAMAGED = "damaged_"


class CheckpointError(UsageError):
    """A checkpoint that cannot be used, and why."""


@attrs.frozen(kw_only=True)
class Checkpoint:
    """What was read from a checkpoint folder."""

    model: dict[str, Tensor]
    state: dict[str, Any]


def step_name(step: int) -> str:
    """Return what the folder of a step's checkpoint is called."""
    return f"{PREFIX}{step:08d}"


def save(folder: Path, name: str, model: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write a checkpoint as `folder/name`, replacing one of that name only once the new one is whole.

    Raises WriteError where it cannot be written; what was there is whole then.
    """
    scratch = folder / f"{_UNFINISHED}{name}"
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        _write(scratch, model, state)
        _replace(scratch, folder / name)
        sync(folder)
    except BaseException as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            reason = f"the checkpoint cannot be written: {error}; those written before are whole"
            raise WriteError(f"{folder / name}: {reason}") from error
        raise
    return folder / name


def _write(scratch: Path, model: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    tree, tensors = pack(state)
    for file, content in ((MODEL, model), (TENSORS, tensors)):
        own = {key: value.detach().contiguous().clone() for key, value in content.items()}
        with interrupts.held():  # safetensors calls torch, and takes a KeyboardInterrupt there for bad data
            save_file(own, scratch / file)
    (scratch / TREE).write_text(json.dumps(tree))
    manifest = {file: _digest(scratch / file) for file in (MODEL, TENSORS, TREE)}
    text = json.dumps(manifest, separators=(",", ":"))  # no byte of it is without meaning
    (scratch / MANIFEST).write_text(text)
    for file in (*manifest, MANIFEST):
        sync(scratch / file)
    sync(scratch)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after checking it against its manifest. Raises CheckpointError with the reason."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: its manifest cannot be read: {error}") from error
    if not isinstance(manifest, dict):
        raise CheckpointError(f"{path}: its manifest is not a table; the file is damaged")
    for file in (MODEL, TENSORS, TREE):
        if not (path / file).is_file() or _digest(path / file) != manifest.get(file):
            raise CheckpointError(f"{path}: {file} is not what its manifest says; the file is damaged")
    try:
        with interrupts.held():  # see `_write`
            model, tensors = load_file(path / MODEL), load_file(path / TENSORS)
        state = unpack(json.loads((path / TREE).read_text()), tensors)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: cannot be read: its {TREE} is no table")
    return Checkpoint(model=model, state=state)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest whole checkpoint of a run (None: none), and why newer ones were passed over.

    Where none of a step is whole, it is the newer one of `best` and `last_finite`.
    """
    reasons: list[str] = []
    for path in reversed(of_steps(folder).values()):
        if saved := _whole(path, reasons):
            return saved, reasons
    kept = {path: _whole(path, reasons) for name in _APART if (path := folder / name).exists()}
    steps = {path: saved.state["step"] for path, saved in kept.items() if saved}
    if not steps:
        return None, reasons
    path = max(steps, key=lambda path: steps[path])
    if reasons:
        reasons.append(f"{path} is taken, of step {steps[path]}{_APART[path.name]}; none of a step is whole")
    return kept[path], reasons


def _whole(path: Path, reasons: list[str]) -> Checkpoint | None:
    """Return a checkpoint, None where it is damaged, and a reason more."""
    try:
        return load(path)
    except CheckpointError as error:
        reasons.append(str(error))
        return None


def recover(folder: Path) -> None:
    """Clear what a killed save left behind; one that died while replacing gives the older one back."""
    for aside in folder.glob(f"{_ASIDE}*"):
        final = folder / aside.name.removeprefix(_ASIDE)
        if not final.exists():
            aside.rename(final)
    for path in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which are damaged: none is kept in a whole one's place."""
    for number, path in of_steps(folder).items():
        if number > step:
            shutil.rmtree(folder / f"{_DAMAGED}{path.name}", ignore_errors=True)
            path.rename(folder / f"{_DAMAGED}{path.name}")


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what a killed save left behind."""
    recover(folder)
    for path in [*of_steps(folder).values()][:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def _replace(scratch: Path, final: Path) -> None:
    """Rename scratch to final; an older folder of that name steps aside first, see `recover`."""
    aside = final.with_name(f"{_ASIDE}{final.name}")
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
    scratch.rename(final)
    shutil.rmtree(aside, ignore_errors=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def random_state() -> dict[str, Any]:
    """Return the states of the global generators: Python, NumPy, torch CPU and CUDA."""
    import random

    import numpy

    kind, keys, *rest = numpy.random.get_state(legacy=True)
    words = torch.from_numpy(numpy.asarray(keys, dtype="int64"))
    return {
        "python": random.getstate(),
        "numpy": [kind, words, *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Take up the states that `random_state` returned; CUDA's only where the device count matches."""
    import random

    import numpy

    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
