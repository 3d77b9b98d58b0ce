"""Cells that are plain functions, on two nodes: what comes back, what is tried again, what is shared."""

import ast
import functools

import pytest

pytest.importorskip("ray", reason="the executor's tests run in an environment of their own: nox -s isolated")

from altgrad_core.registry import UsageError
from altgrad_ray import RayOptions
from altgrad_ray.executor import RayExecutor


@pytest.fixture
def run(cluster):
    """Return a function that runs cells on the cluster."""

    def run(cells, run_cell, jobs=1, **options):
        return RayExecutor(RayOptions(address=cluster.address, **options)).run(cells, run_cell, jobs)

    return run


def outcomes(results):
    return [(result.cell, result.outcome) for result in results]


def test_a_cell_that_raises_fails_and_the_others_finish_in_order(run, tiny):
    results = run(["a", "b", "c"], tiny.raises_at_b)
    assert outcomes(results) == [("a", "finished"), ("b", "failed"), ("c", "finished")]
    assert "b it is" in results[1].message


def test_a_cell_begins_in_the_folder_of_the_command(run, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(["a"], tiny.finished)[0].message == str(tmp_path)


def test_a_killed_process_is_tried_again(run, tiny, tmp_path, capfd):
    results = run(["a", "b"], functools.partial(tiny.dies, 1, tmp_path), retries=1)
    assert outcomes(results) == [("a", "finished"), ("b", "finished")]
    assert "a: lost in 1 of 2 tries" in capfd.readouterr().out


def test_a_cell_whose_processes_are_all_killed_fails(run, tiny, tmp_path):
    (result,) = run(["a"], functools.partial(tiny.dies, 9, tmp_path), retries=1)
    assert result.outcome == "failed"
    assert result.message.startswith("its process was lost in 2 of 2 tries: ")
    assert (tmp_path / "a").read_text() == ".."


def test_a_cell_that_its_node_stopped_is_tried_again(run, tiny, tmp_path):
    (result,) = run(["a"], functools.partial(tiny.told_to_stop, tmp_path))
    assert result.outcome == "finished"


def test_a_further_try_waits_for_the_lock_of_the_lost_one(run, tiny, tmp_path):
    (result,) = run(["a"], functools.partial(tiny.dies_and_is_busy, tmp_path), retries=1)
    assert result.outcome == "finished"


def test_a_first_try_leaves_a_cell_that_another_command_runs(run, tiny, tmp_path):
    (result,) = run(["a"], functools.partial(tiny.busy, tmp_path))
    assert (result.outcome, (tmp_path / "a").read_text()) == ("busy", ".")


def test_two_cells_share_one_gpu(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("ALTGRAD_TEST", "carried")
    share = functools.partial(tiny.share, tmp_path)
    results = run(["a", "b"], share, cpus_per_cell=0.5, gpus_per_cell=0.5)
    (one, *given, first), (other, *also, second) = (ast.literal_eval(result.message) for result in results)
    assert (one, other) == (2, 2)
    assert given == also == ["0", "1", "carried"]
    assert first != second


def test_where_there_are_gpus_a_cell_takes_a_whole_one(run, tiny, tmp_path):
    results = run(["a", "b"], functools.partial(tiny.at_once, tmp_path), cpus_per_cell=0.5)
    assert [result.message.split()[0] for result in results] == ["1", "1"]


def test_without_jobs_the_cluster_sets_how_many_run_at_once(run, tiny, tmp_path):
    results = run(["a", "b"], functools.partial(tiny.share, tmp_path), gpus_per_cell=0.0)
    assert [ast.literal_eval(result.message)[0] for result in results] == [2, 2]


def test_jobs_limits_how_many_run_at_once_each_in_a_process_of_its_own(run, tiny, tmp_path):
    at_once = functools.partial(tiny.at_once, tmp_path)
    results = run(["a", "b", "c", "d"], at_once, 2, cpus_per_cell=0.25, gpus_per_cell=0.0)
    together, processes = zip(*(result.message.split() for result in results), strict=True)
    assert set(together) <= {"1", "2"}
    assert len(set(processes)) == 4


def test_no_room_on_a_cluster_of_ones_own_is_an_error(tiny):
    executor = RayExecutor(RayOptions(cpus_per_cell=4096))
    with pytest.raises(
        UsageError, match=r"takes 4096 CPUs and 0 GPUs, and no node has that .*lower cpus_per"
    ):
        executor.run(["a"], tiny.finished, 1)
