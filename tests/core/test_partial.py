"""What is right of options that have mistakes."""

import attrs
import pytest

from altgrad_core.partial import UNKNOWN, UnknownError, as_far_as_right
from altgrad_core.registry import discover
from altgrad_core.structuring import structure


@attrs.frozen(kw_only=True)
class Between:
    low: float = 0.0
    high: float = 1.0
    steps: int = 1

    def __attrs_post_init__(self):
        if self.low > self.high:
            raise ValueError(f"low is {self.low}, above high")
        if not -1e9 < abs(self.steps) < 1e9:
            raise ValueError(f"steps is {self.steps}")


def found(table):
    """Return what is wrong with a table: a path and a message each."""
    registry = discover()
    _, problems = structure(table, Between, registry)
    _, every = as_far_as_right(table, Between, problems, registry)
    return [(one.path, one.message.partition(",")[0]) for one in every]


def test_a_contradiction_without_a_field_to_blame_is_said_beside_a_mistake():
    said = found({"low": 2.0, "high": 1.0, "steps": "3"})
    assert [path for path, _ in said] == [("steps",), ()]
    assert said[1] == ((), "low is 2.0")


def test_a_check_ends_without_a_word_where_it_needs_what_is_wrong():
    assert [path for path, _ in found({"steps": "3"})] == [("steps",)]
    assert [path for path, _ in found({"low": "2", "high": 1.0})] == [("low",)]


@pytest.mark.parametrize(
    "look", [abs, float, int, str, repr, hash, len, list, bool, round, lambda x: f"{x}", lambda x: x + 1]
)
def test_what_is_not_known_cannot_be_looked_at(look):
    with pytest.raises(UnknownError):
        look(UNKNOWN)
