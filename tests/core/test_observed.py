"""What monitors said last: who is shown it, and how often."""

import pytest
import torch

from altgrad_core.observed import MetricTable, Observed

TABLE = MetricTable({"flip/count/a": 0, "flip/count/total": 1}, torch.tensor([2.0, 5.0]))


@pytest.fixture
def observed():
    found = Observed()
    found.keep("flip", TABLE)
    found.keep("rank", {"rank/warning/a": 1.0})
    return found


def test_a_table_is_a_mapping_of_its_names():
    assert dict(TABLE) == dict(TABLE.items()) == {"flip/count/a": 2.0, "flip/count/total": 5.0}


def test_a_line_shows_what_was_observed_since_the_last_one(observed):
    assert observed.take_unlogged() == {"flip/count/a": 2.0, "flip/count/total": 5.0, "rank/warning/a": 1.0}
    observed.keep("rank", {"rank/warning/b": 0.0})
    assert observed.take_unlogged() == {"rank/warning/b": 0.0}
    assert "rank/warning/a" not in observed


def test_policies_are_shown_nothing_twice(observed):
    needs = ["rank/warning/a", "flip/count/total", "flip/count/b", "stall/stall_ratio/total"]
    assert observed.take_fresh(needs) == {"rank/warning/a": 1.0, "flip/count/total": 5.0}
    assert observed.take_fresh(needs) == {}


def test_what_a_dropped_monitor_said_is_shown_to_nobody(observed):
    observed.forget("flip")
    assert "flip/count/a" not in observed
    assert observed.take_fresh(["flip/count/a"]) == {}
    assert observed.take_unlogged() == {"rank/warning/a": 1.0}


def test_a_saved_state_goes_on_where_it_was(observed):
    observed.take_fresh([])
    again = Observed.of(observed.state_dict(), torch.device("cpu"))
    assert sorted(again) == ["flip/count/a", "flip/count/total", "rank/warning/a"]
    assert again.take_fresh(["flip/count/a"]) == {}
    assert again.take_unlogged() == observed.take_unlogged()


def test_what_a_monitor_does_to_its_own_table_later_does_not_show():
    said, found = {"rank/warning/a": 1.0}, Observed()
    found.keep("rank", said)
    said["rank/warning/a"] = 2.0
    assert found.take_unlogged() == {"rank/warning/a": 1.0}
