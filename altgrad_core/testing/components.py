"""Installed components, built from their default options to be checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from altgrad_core.options import Choice
from altgrad_core.registry import REFUSALS, Registered, Registry
from altgrad_core.structuring import structure
from altgrad_core.testing.expect import fail

CHOICES: Mapping[str, type[Choice]] = {one.kind: one for one in Choice.__subclasses__()}


class NotCheckedError(Exception):
    """Why a component cannot be checked as it is; no fault of its own."""


def _examples(entry: Registered) -> dict[str, Any]:
    """Return the example of each option that a component must be given; None where it has none."""
    fields = attrs.fields(entry.component.options)
    return {one.name: one.metadata.get("example") for one in fields if one.default is attrs.NOTHING}


def table_of(entry: Registered) -> dict[str, Any]:
    """Return a component as a file names it, with its example of each option that must be given.

    Raises NotCheckedError for an option without.
    """
    given = _examples(entry)
    if missing := [name for name, example in given.items() if example is None]:
        raise NotCheckedError(f"{', '.join(missing)} must be given, and has no `example`")
    return {"plugin": f"{entry.distribution}:{entry.name}", **given}


def built(entry: Registered, registry: Registry, *inputs: Any) -> Any:
    """Build a component from the options that `table_of` gives.

    Raises ConformanceError for options that are refused, NotCheckedError for what its kind may refuse a user.
    """
    choice, problems = structure(table_of(entry), CHOICES[entry.kind], registry)
    if problems:
        said = "; ".join(problem.message for problem in problems)
        fix = "give options a default, or an example, that their validators take"
        fail(entry.name, "its default options must be right", given="", expected="", seen=said, fix=fix)
    try:
        return choice.build(registry, *inputs)
    except REFUSALS.get(entry.kind, ()) as error:
        raise NotCheckedError(str(error)) from error
