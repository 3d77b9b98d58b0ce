"""compare.json: what a command may write over, and what it leaves."""

import json
import multiprocessing

import pytest

from altgrad_core.comparison_record import ComparisonRecord
from altgrad_core.durable import WriteError


def told(hash="a", **factors):
    """Return what a command tells of groups, each with its factor."""
    return {"hash": hash, "groups": [{"name": name, "factor": factor} for name, factor in factors.items()]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs" / "compare.json"


def begun(path, told):
    record = ComparisonRecord(path)
    record.begin(told)
    return record


def found(path):
    content = json.loads(path.read_text())
    return content["hash"], {group["name"]: group["factor"] for group in content["groups"]}


def test_it_is_there_before_the_first_run(path):
    begun(path, told(arm=None))
    assert found(path) == ("a", {"arm": None})


def test_a_command_that_has_run_nothing_yet_leaves_what_it_finds(path):
    begun(path, told(arm=2.0))
    begun(path, told("b", arm=None))
    assert found(path) == ("a", {"arm": 2.0})


def test_what_has_come_out_replaces_what_was_found_and_the_hash_of_that_is_kept(path):
    begun(path, told(arm=2.0))
    begun(path, told("b", arm=None)).update(told("b", arm=4.0))
    assert found(path) == ("b", {"arm": 4.0})
    assert json.loads(path.read_text())["earlier_hashes"] == ["a"]


def test_a_choice_is_not_replaced_by_none_of_the_same_table(path):
    begun(path, told(arm=2.0, other=None))
    record = begun(path, told(arm=None, other=None))
    record.update(told(arm=None, other=1.0))
    assert found(path) == ("a", {"arm": 2.0, "other": None})
    assert record.kept == "it has the step size of arm, which this command has not come to"
    record.update(told(arm=4.0, other=1.0))
    assert (found(path), record.kept) == (("a", {"arm": 4.0, "other": 1.0}), "")


def test_a_group_that_the_file_has_no_more_is_dropped(path):
    begun(path, told(arm=2.0, gone=1.0)).update(told(arm=2.0))
    assert found(path) == ("a", {"arm": 2.0})


def test_a_table_that_appeared_since_the_command_began_stays(path):
    first = begun(path, told(arm=None))
    second = begun(path, told("b", arm=None))
    first.update(told(arm=1.0))
    second.update(told("b", arm=2.0))
    first.update(told(arm=3.0))
    assert found(path) == ("b", {"arm": 2.0})
    assert "another command has begun with another [compare] since" in first.kept
    second.update(told("b", arm=4.0))
    assert (found(path), second.kept) == (("b", {"arm": 4.0}), "")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"hash": "a"}', '{"hash": "a", "groups": [{}]}'])
def test_what_is_no_record_is_written_over(path, content):
    path.parent.mkdir()
    path.write_text(content)
    begun(path, told(arm=2.0))
    assert found(path) == ("a", {"arm": 2.0})


def test_a_folder_that_cannot_be_written_ends_the_command_by_name(path):
    path.parent.write_text("")
    with pytest.raises(WriteError, match=r"compare\.json: cannot be written: "):
        begun(path, told())


def _write_many(path, hash):
    record = begun(path, told(hash))
    for factor in range(50):
        record.update(told(hash, arm=factor))


def test_commands_that_write_at_once_leave_a_whole_file_of_one_of_them(path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_write_many, args=(path, hash)) for hash in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert found(path) in (("a", {"arm": 49}), ("b", {"arm": 49}))
    assert sorted(one.name for one in path.parent.iterdir()) == [".compare.lock", "compare.json"]
