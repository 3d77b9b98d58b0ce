import json
import os
import pickle
import shutil
import signal
import time

import pytest
import torch
from safetensors import SafetensorError

from altgrad_core import checkpoint
from altgrad_core.checkpoint import CheckpointError
from altgrad_core.durable import WriteError
from altgrad_core.state_tree import pack
from altgrad_core.step_folders import of_steps

STATE = {
    "step": 3,
    "nested": {"pair": (1, 2.5), "list": [None, True, "text"], 7: torch.arange(4)},
    "scalar": torch.tensor(2.0),
}


def save(folder, step=3):
    return checkpoint.save(folder, checkpoint.step_name(step), {"w": torch.eye(2)}, {**STATE, "step": step})


def vouched_for(path, file):
    """Have a checkpoint's manifest say what a file is now."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest[file] = checkpoint._digest(path / file)
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def test_a_tree_of_state_comes_back_as_it_was(tmp_path):
    found = checkpoint.load(save(tmp_path))
    assert found.state["nested"]["pair"] == (1, 2.5)
    assert found.state["nested"]["list"] == [None, True, "text"]
    assert torch.equal(found.state["nested"][7], torch.arange(4))
    assert torch.equal(found.model["w"], torch.eye(2))


def test_tensors_that_share_memory_are_each_saved_whole(tmp_path):
    shared = torch.arange(6.0).reshape(2, 3)
    path = checkpoint.save(tmp_path, "step_1", {"a": shared, "b": shared.t()}, {})
    assert torch.equal(checkpoint.load(path).model["b"], shared.t())


@pytest.mark.parametrize("file", [checkpoint.MODEL, checkpoint.TENSORS, checkpoint.TREE])
@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b[:-1], lambda b: b[:9] + b"!" + b[10:]]
)
def test_a_damaged_file_is_refused_by_name(file, damage, tmp_path):
    path = save(tmp_path)
    (path / file).write_bytes(damage((path / file).read_bytes()))
    with pytest.raises(CheckpointError, match=file):
        checkpoint.load(path)


@pytest.mark.parametrize("other", [b" ", b"\n", b"0", b"}", b"\xff"])
def test_no_byte_of_the_manifest_may_be_another(other, tmp_path):
    manifest = save(tmp_path) / checkpoint.MANIFEST
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        if whole[place : place + 1] != other:
            manifest.write_bytes(whole[:place] + other + whole[place + 1 :])
            with pytest.raises(CheckpointError):
                checkpoint.load(manifest.parent)


def test_the_newest_whole_checkpoint_is_found_and_the_damage_told(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / checkpoint.MANIFEST).write_text("{")
    found, reasons = checkpoint.newest(tmp_path)
    assert found.state["step"] == 1
    assert len(reasons) == 1


def kept_apart(folder, name, step):
    return checkpoint.save(folder, name, {"w": torch.eye(2)}, {**STATE, "step": step})


def damaged(path):
    (path / checkpoint.MODEL).write_bytes(b"")


@pytest.mark.parametrize(
    ("best", "finite", "taken"), [(2, 5, "last_finite"), (5, 2, "best"), (2, None, "best")]
)
def test_where_none_of_a_step_is_whole_the_newer_one_kept_apart_is_taken_and_told(
    tmp_path, best, finite, taken
):
    damaged(save(tmp_path, 9))
    kept_apart(tmp_path, checkpoint.BEST, best)
    if finite:
        kept_apart(tmp_path, checkpoint.LAST_FINITE, finite)
    found, (damage, told) = checkpoint.newest(tmp_path)
    assert found.state["step"] == max(best, finite or 0)
    assert "step_00000009: model.safetensors is not what its manifest says" in damage
    assert told.startswith(f"{tmp_path / taken} is taken, of step {found.state['step']}")
    assert ("not to go on bit for bit" in told) == (taken == "last_finite")


def test_one_of_a_step_that_is_whole_goes_before_one_kept_apart(tmp_path):
    save(tmp_path, 3)
    damaged(save(tmp_path, 9))
    kept_apart(tmp_path, checkpoint.BEST, 5)
    assert checkpoint.newest(tmp_path)[0].state["step"] == 3


def test_a_damaged_one_kept_apart_is_passed_over_too(tmp_path):
    damaged(kept_apart(tmp_path, checkpoint.LAST_FINITE, 5))
    assert checkpoint.newest(tmp_path)[0] is None
    kept_apart(tmp_path, checkpoint.BEST, 2)
    assert checkpoint.newest(tmp_path)[0].state["step"] == 2


def test_a_copy_of_the_users_is_no_checkpoint_of_a_step(tmp_path):
    whole = [save(tmp_path, step) for step in (9, 18)]
    for name in ("step_keep", "step_00000018.bak", "step_", "mystep_00000018", "step_-1", "step_9_9"):
        shutil.copytree(whole[0], tmp_path / name)
    assert checkpoint.newest(tmp_path)[0].state["step"] == 18
    checkpoint.set_aside(tmp_path, 9)
    checkpoint.prune(tmp_path, keep=1)
    names = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(("step_0", "damaged")))
    assert names == ["damaged_step_00000018", "step_00000009", "step_00000018.bak"]
    assert (tmp_path / "step_keep").exists()


def test_steps_are_in_the_order_of_their_numbers(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step)
    assert list(of_steps(tmp_path)) == [5, 99_999_999, 100_000_000]
    assert checkpoint.newest(tmp_path)[0].state["step"] == 100_000_000
    checkpoint.prune(tmp_path, keep=2)
    assert list(of_steps(tmp_path)) == [99_999_999, 100_000_000]


def test_a_folder_that_was_not_renamed_is_never_selected(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / ".unfinished-step_00000002")
    found, _ = checkpoint.newest(tmp_path)
    assert found.state["step"] == 1
    checkpoint.prune(tmp_path, keep=3)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.step_name(1)]


def test_pruning_keeps_the_newest_and_the_named(tmp_path):
    for step in range(5):
        save(tmp_path, step)
    checkpoint.save(tmp_path, checkpoint.BEST, {"w": torch.eye(2)}, STATE)
    checkpoint.prune(tmp_path, keep=2)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {checkpoint.step_name(3), checkpoint.step_name(4), checkpoint.BEST}


def test_a_save_that_fails_leaves_the_one_before_and_no_scratch(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(TypeError, match="/callback: state must be tensors"):
        checkpoint.save(tmp_path, checkpoint.step_name(1), {"w": torch.eye(2)}, {"callback": print})
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.step_name(1)]
    assert checkpoint.load(tmp_path / checkpoint.step_name(1)).state["step"] == 1


def test_a_key_that_would_come_back_as_another_is_refused():
    with pytest.raises(TypeError, match=r"/counts: keys of state must be numbers or text, not \('a', 1\)"):
        pack({"counts": {("a", 1): 2}})


def test_a_pickle_is_refused_and_does_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = save(tmp_path)
    (path / checkpoint.TENSORS).write_bytes(pickle.dumps(Payload()))
    vouched_for(path, checkpoint.TENSORS)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "tree", ["5", "[]", '"text"', '{"table": 5}', '{"list": null}', '{"tensor": "/gone"}', "{}"]
)
def test_a_tree_that_is_not_one_of_ours_is_refused_whatever_its_manifest_says(tree, tmp_path):
    path = save(tmp_path)
    (path / checkpoint.TREE).write_text(tree)
    vouched_for(path, checkpoint.TREE)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(path)


@pytest.mark.parametrize("name", ["load_file", "save_file"])
def test_a_signal_while_safetensors_works_is_not_taken_for_bad_data(name, tmp_path, monkeypatch):
    """It calls torch, and makes an error of its own of whatever is raised there."""
    path, whole = save(tmp_path), getattr(checkpoint, name)

    def deaf(*arguments):
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        except BaseException as error:
            raise SafetensorError("the data are bad") from error
        return whole(*arguments)

    monkeypatch.setattr(checkpoint, name, deaf)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.load(path) if name == "load_file" else save(tmp_path, 4)
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_the_global_generators_come_back(tmp_path):
    import random

    import numpy

    path = checkpoint.save(tmp_path, "step_1", {}, {"random": checkpoint.random_state()})
    state = checkpoint.load(path).state
    drawn = random.random(), numpy.random.rand(), torch.rand(1)
    checkpoint.set_random_state(state["random"])
    assert drawn == (random.random(), numpy.random.rand(), torch.rand(1))


def test_a_save_killed_while_replacing_gives_the_older_one_back(tmp_path):
    checkpoint.save(tmp_path, checkpoint.BEST, {"w": torch.eye(2)}, STATE)
    (tmp_path / checkpoint.BEST).rename(tmp_path / f".unfinished-old-{checkpoint.BEST}")
    checkpoint.recover(tmp_path)
    assert torch.equal(checkpoint.load(tmp_path / checkpoint.BEST).model["w"], torch.eye(2))


def test_a_damaged_newer_checkpoint_is_not_kept_in_a_whole_ones_place(tmp_path):
    save(tmp_path, 1)
    (save(tmp_path, 9) / checkpoint.MODEL).write_bytes(b"")
    checkpoint.set_aside(tmp_path, 1)
    save(tmp_path, 2)
    checkpoint.prune(tmp_path, keep=1)
    found, reasons = checkpoint.newest(tmp_path)
    assert (found.state["step"], reasons) == (2, [])


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_whole(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="cannot be written"):
        save(tmp_path / "file", 2)
    assert checkpoint.newest(tmp_path)[0].state["step"] == 1
