"""What a file says of how its runs are run: [compare], [executor], baseline; no option of a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from altgrad_core.compare import CompareOptions
from altgrad_core.options import ExecutorChoice
from altgrad_core.overrides import Override, Tree
from altgrad_core.partial import as_far_as_right
from altgrad_core.registry import Registry
from altgrad_core.structuring import Problem, structure

DRIVER_TABLES: Mapping[str, Any] = {"compare": CompareOptions, "executor": ExecutorChoice, "baseline": str}
"""Top-level key to its type."""
DRIVER_KEYS = ("on", "grid", *DRIVER_TABLES)
"""Top-level keys that shape the runs and are no option of a run."""


def driver_tables(
    raw: Mapping[str, Any], flags: Iterable[Override], registry: Registry
) -> tuple[dict[str, Any], list[Problem], Tree]:
    """Return what the keys hold as instances of their types, the problems, and where each value was written.

    What `--set` changes is in them; a key that is not there holds None, what is wrong is UNKNOWN.
    """
    tree = Tree({key: _as_table(key, raw[key]) for key in DRIVER_TABLES if key in raw})
    tree.apply(
        attrs.evolve(flag, value=_as_table(*flag.path, flag.value)) if len(flag.path) == 1 else flag
        for flag in flags
        if flag.path[0] in DRIVER_TABLES
    )
    found: dict[str, Any] = dict.fromkeys(DRIVER_TABLES)
    problems = list(tree.problems)
    for key, value in tree.data.items():
        found[key], wrong = structure(value, DRIVER_TABLES[key], registry)
        if wrong:
            found[key], wrong = as_far_as_right(value, DRIVER_TABLES[key], wrong, registry)
        problems += [attrs.evolve(one, path=(key, *one.path)) for one in wrong]
    return found, problems, tree


def _as_table(key: Any, value: Any) -> Any:
    """Return an executor's name as the table that `--set executor.option=...` goes into."""
    return {"plugin": value} if key == "executor" and isinstance(value, str) else value
