"""Run folders: who may have them, and what is made of files that are damaged or another program's."""

import errno
import fcntl
import json
import os

import pytest

from altgrad_core import diff, locks
from altgrad_core.apps import app, guarded, run_app
from altgrad_core.experiment_file import load_experiment
from altgrad_core.grids import _held
from altgrad_core.record import BusyError, RunFolder, begun, read_lines
from altgrad_core.registry import UsageError

WHOLE = {"cell": "run", "options": {"name": "tiny"}}
DAMAGED = {
    "{}": "no cell and no options.name",
    '{"cell": "run"}': "no options.name",
    '{"cell": "run", "options": {}}': "no options.name",
    '{"cell": "run", "options": []}': "no options.name",
    '{"options": {"name": "tiny"}}': "no cell",
    '{"cell": 3, "options": {"name": "tiny"}}': "no cell",
    "[]": "no cell and no options.name",
    '{"cell": "r': "no cell and no options.name",
    "\0": "no cell and no options.name",
}
EXPERIMENT = 'name = "tiny"\nsteps = 1\n[data]\nplugin = "markov"\ntokens = 4000\n'


@pytest.fixture
def folder(tmp_path):
    """The folder of a run that has trained."""
    path = tmp_path / "tiny" / "run"
    (path / "checkpoints").mkdir(parents=True)
    (path / "resolved.json").write_text(json.dumps(WHOLE))
    return path


# --- locks -------------------------------------------------------------------------------------------


def test_a_lock_is_taken_once_and_again_when_its_file_is_closed(tmp_path):
    with (tmp_path / "lock").open("w") as first:
        assert locks.take(first)
        with (tmp_path / "lock").open() as second:
            assert not locks.take(second)
    with (tmp_path / "lock").open() as third:
        assert locks.take(third)


def test_a_lock_that_cannot_be_had_at_all_is_an_error(tmp_path):
    descriptor = os.open(tmp_path, os.O_PATH)  # which is for names alone
    try:
        with pytest.raises(OSError, match="Bad file descriptor"):
            locks.take(descriptor)
    finally:
        os.close(descriptor)


@pytest.fixture
def without_locks(monkeypatch):
    """A file system that has none."""

    def refuse(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_folder_that_another_has_is_busy_and_says_who_has_it(tmp_path):
    holder = RunFolder(tmp_path)
    assert _held(tmp_path)
    with pytest.raises(BusyError, match=rf"is being run by process {os.getpid()} on .*; wait for it, or use"):
        RunFolder(tmp_path)
    holder.close()
    assert not _held(tmp_path)


def test_a_file_system_without_locks_is_named_and_nobody_is_waited_for(tmp_path, without_locks):
    with pytest.raises(
        UsageError, match=r"cannot be locked: No locks available; .*another file system"
    ) as got:
        RunFolder(tmp_path)
    assert not isinstance(got.value, BusyError)
    assert not _held(tmp_path)


# --- what a run was begun with -----------------------------------------------------------------------


def test_what_a_run_was_begun_with_is_read_and_absent_where_nothing_was(folder, tmp_path):
    assert begun(folder) == WHOLE
    assert begun(tmp_path) is None


@pytest.mark.parametrize(("text", "lacking"), DAMAGED.items())
def test_a_damaged_record_of_the_options_is_refused_by_what_it_lacks(text, lacking, folder):
    (folder / "resolved.json").write_text(text)
    with pytest.raises(UsageError) as got:
        begun(folder)
    assert str(got.value) == (
        f"{folder / 'resolved.json'}: does not tell which run this is: it has {lacking}; put back the file "
        "that the run wrote, or remove it and run again: the checkpoints hold the options too"
    )


@pytest.mark.parametrize("text", DAMAGED)
@pytest.mark.parametrize("by", ["--resume", "--out", "diff"])
def test_every_command_says_so_in_one_line(by, text, folder, tmp_path, capsys):
    (folder / "resolved.json").write_text(text)
    path = tmp_path / "experiment.toml"
    path.write_text(EXPERIMENT)
    told = {"--resume": (run_app, path, by, folder), "--out": (run_app, path, by, tmp_path)}
    command, *tokens = told.get(by, (app, "diff", folder, folder))
    assert guarded(command, [str(token) for token in tokens]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{folder / 'resolved.json'}: does not tell which run this is")


def test_where_nothing_was_trained_a_damaged_record_is_written_anew(folder, tmp_path):
    (folder / "checkpoints").rmdir()
    (folder / "resolved.json").write_text("{}")
    (tmp_path / "experiment.toml").write_text(EXPERIMENT)
    file = load_experiment(tmp_path / "experiment.toml")
    run = RunFolder(folder)
    run.begin(file, file.cells_on["cpu"][0], WHOLE)
    run.close()
    assert begun(folder) == WHOLE


# --- lines -------------------------------------------------------------------------------------------


NO_RECORDS = ["{}", '{"step": true}', '{"step": 1.0}', '{"step": "1"}', "[1]", "3", "\0", "[" * 10**5]


@pytest.mark.parametrize("line", NO_RECORDS, ids=lambda line: line[:10])
def test_a_line_without_a_whole_step_is_no_record(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    assert [record["step"] for record in read_lines(path)] == [0, 2]
    assert list(read_lines(tmp_path)) == []  # no file at all


def test_runs_with_damaged_lines_are_compared_by_the_others(folder, tmp_path):
    (folder / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n{}\n{"step": true, "a/b": 1}\n')
    found = diff.compare(folder, folder)
    assert (found.metrics.common, found.outcomes[0]) == (1, "not ended, at step 1")


def test_a_resume_cuts_damaged_lines_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": true}\n{}\n{"step": 2}\n{"step": 3}\n')
    folder = RunFolder(tmp_path)
    folder.rewind(2)
    folder.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'
