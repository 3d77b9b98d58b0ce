"""A disk without room: a clear error, what was written before stays whole, and the run goes on from there.

On a small file system of its own, where mounting one is allowed; in any case under a limit on the size of
files, which the system tells of in other words.
"""

import contextlib
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import numpy
import pytest

from altgrad_core import checkpoint, tokenizers
from altgrad_core.apps import guarded, run_app
from altgrad_core.token_cache import build

TINY = """
name = "tiny"
seed = 7
steps = 24
[data]
plugin = "markov"
tokens = 4000
[model]
n_layer = 1
n_head = 2
n_embd = 16
block_size = 16
dropout = 0.2
[train]
batch_size = 4
device = "cpu"
eval_every = 9
eval_batches = 2
log_every = 7
checkpoint_every = {checkpoint_every}
keep_checkpoints = 2
[quantize]
format = "E4M3"
storage = "grid"
storage_rounding = "stochastic"
"""
SAVING = TINY.format(checkpoint_every=3)
LOGGING = TINY.format(checkpoint_every=9).replace("log_every = 7", "log_every = 1") + (
    "[[monitor]]\nplugin = 'flip'\n[[monitor]]\nplugin = 'stall'\n"
)


def saved_size(folder):
    return sum(path.stat().st_size for path in (folder / "checkpoints" / "step_00000009").iterdir())


def logged_size(folder):
    return (folder / "metrics.jsonl").stat().st_size


def ended(folder, out, path, capsys):
    """Run the command on what a full disk has; returns its one line of error."""
    code = guarded(run_app, [str(path), "--out", str(out), "--quiet"])
    (error,) = capsys.readouterr().err.splitlines()
    assert code == 1
    assert "cannot be written" in error
    assert not [found for found in folder.rglob(".*") if found.is_dir() or found.name != ".lock"]
    found, passed_over = checkpoint.newest(folder / "checkpoints")
    assert (found.state["step"], passed_over) == (9, [])
    return error


# --- a file system of its own ------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """A disk of 4 MiB; it is gone after the test, whatever becomes of that."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    done = subprocess.run(mount, capture_output=True, text=True) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip() if done else 'no mount'}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def filled(disk, room):
    """In here a disk has no more than `room` bytes left."""
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - room))
    yield
    filler.unlink()


@pytest.mark.parametrize(
    ("text", "room", "refused"),
    [
        (SAVING, lambda folder: 0.2 * saved_size(folder), "checkpoints/step_00000012"),
        (SAVING, lambda folder: 0.8 * saved_size(folder), "checkpoints/step_00000012"),
        (LOGGING, lambda folder: 4096, "metrics.jsonl"),
    ],
    ids=["early in a checkpoint", "late in a checkpoint", "metrics"],
)
def test_a_full_disk_keeps_what_was_there_and_a_run_goes_on_bit_for_bit(
    text, room, refused, disk, write, run, killed_at, lines, tmp_path, capsys
):
    path, folder = write(text), disk / "tiny" / "run"
    killed_at(path, disk, 9)
    with filled(disk, int(room(folder))):
        error = ended(folder, disk, path, capsys)
    assert refused in error
    assert "No space left on device" in error
    gone_on, whole = run(path, disk), run(path, tmp_path / "whole")
    assert gone_on.outcome == "finished"
    assert lines(gone_on.folder) == lines(whole.folder)
    last = [one.folder / "checkpoints" / "step_00000024" / checkpoint.MODEL for one in (gone_on, whole)]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_a_disk_without_any_room_lets_no_run_begin(disk, write, capsys):
    with filled(disk, 0):
        code = guarded(run_app, [str(write(SAVING)), "--out", str(disk), "--quiet"])
        assert [found.name for found in disk.rglob("*.*")] == [".lock"]
    (error,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert error.endswith("cannot be written: No space left on device; choose another folder with --out")


def test_output_that_goes_to_a_full_disk_ends_a_run_in_one_line(write, start, ended, tmp_path):
    with pathlib.Path("/dev/full").open("w") as full:
        code, _, error = ended(start(write(SAVING), "--out", tmp_path, stdout=full))
    assert (code, error) == (1, "failed: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", [["plugins"], ["formats"], ["show", "AdamW"], ["--help"]])
def test_a_command_whose_output_goes_to_a_full_disk_says_so_in_one_line(command, unbuffered):
    altgrad = pathlib.Path(sys.executable).with_name("altgrad")
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with pathlib.Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [altgrad, *command], stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False
        )
    assert (done.returncode, done.stderr) == (
        1,
        "the output cannot be written: No space left on device\n",
    )


@pytest.mark.parametrize("command", [["plugins"], ["formats"], ["show", "AdamW"], ["--help"]])
def test_a_command_whose_reader_has_gone_ends_in_silence(command):
    reading, writing = os.pipe()
    os.close(reading)
    altgrad = pathlib.Path(sys.executable).with_name("altgrad")
    done = subprocess.run([altgrad, *command], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.stderr == b""


def test_a_run_whose_reader_has_gone_ends_in_one_line(write, start, ended, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    code, _, error = ended(start(write(SAVING), "--out", tmp_path, stdout=writing))
    os.close(writing)
    assert (code, error) == (1, "failed: the output cannot be written: Broken pipe\n")


def test_a_full_disk_leaves_nothing_of_prepared_tokens(disk):
    def write(writer):
        (writer.folder / "tokens").write_bytes(bytes(2**20))

    with filled(disk, 2**16), pytest.raises(OSError, match=r"No space left.*set ALTGRAD_CACHE to a folder"):
        build(disk / "tokens", write)
    assert not list(disk.iterdir())


# --- a limit on the size of files --------------------------------------------------------------------


@contextlib.contextmanager
def starved(limit):
    """In here files end at `limit` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("text", "room", "refused"),
    [
        (SAVING, lambda folder: saved_size(folder) // 4, "checkpoints/"),
        (LOGGING, lambda folder: logged_size(folder) + 1500, "metrics.jsonl"),
    ],
    ids=["checkpoint", "metrics"],
)
def test_files_that_may_not_grow_keep_what_was_there(
    text, room, refused, write, run, killed_at, tmp_path, capsys
):
    path, folder = write(text), tmp_path / "tiny" / "run"
    killed_at(path, tmp_path, 9)
    with starved(room(folder)):
        assert refused in ended(folder, tmp_path, path, capsys)
    assert run(path, tmp_path).outcome == "finished"


@pytest.mark.parametrize("what", ["tokens", "merges"])
def test_prepared_tokens_that_may_not_grow_name_the_way_out(what, tmp_path):
    text = " ".join(map(str, range(2000)))

    def write(writer):
        if what == "tokens":
            writer.array("tokens", numpy.zeros(2**16, dtype="uint8"))
        else:
            writer.files(tokenizers.load("bpe:300", lambda: [text]).save(writer.folder))

    with starved(1000), pytest.raises(OSError, match=r"File too large.*set ALTGRAD_CACHE to a folder"):
        build(tmp_path / "tokens", write)
    assert not list(tmp_path.iterdir())
