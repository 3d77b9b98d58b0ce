"""The tables of one run, each structured by itself, so that one mistake hides no other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from altgrad_core.contradictions import COMPARED, contradictions
from altgrad_core.driver_tables import DRIVER_KEYS
from altgrad_core.experiment import Experiment, data_options
from altgrad_core.options import written
from altgrad_core.partial import UNKNOWN, as_far_as_right
from altgrad_core.registry import Registry
from altgrad_core.structuring import Problem, structure
from altgrad_core.wording import listed, suggestion


@attrs.define
class Sections:
    """Top-level keys of runs, each structured once: the cells of a grid have most of them in common."""

    registry: Registry
    made: dict[tuple[str, str], tuple[Any, list[Problem]]] = attrs.field(factory=dict)
    """Key and text of its value to section and problems."""
    seen: dict[tuple[str, int], tuple[Any, tuple[Any, list[Problem]]]] = attrs.field(factory=dict)
    """Key and identity of its value to the value, which keeps its identity so, and what was made of it."""
    checked: dict[tuple[int, ...], list[Problem]] = attrs.field(factory=dict)
    """Identities of sections to what contradicts what in them."""

    def structured(self, data: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
        """Return the sections of a run, defaults included, and what is wrong with them and between them.

        What is wrong of a section is UNKNOWN in it.
        """
        fields = attrs.fields_dict(attrs.resolve_types(Experiment))
        sections = {key: UNKNOWN if key == "name" else field.default for key, field in fields.items()}
        problems: list[Problem] = []
        for key, value in data.items():
            if key not in fields:
                problems.append(Problem((key,), _unknown(key, fields)))
                continue
            sections[key], wrong = self._section(fields[key], value)
            problems += wrong
        if "name" not in data:
            problems.append(Problem((), 'name: is required and missing; add name = "..." at the top'))
        return sections, [*problems, *self._contradictions(sections)]

    def _section(self, field: Any, value: Any) -> tuple[Any, list[Problem]]:
        if (field.name, id(value)) not in self.seen:
            known = (field.name, written(value))  # which tells true from 1, and 1 from 1.0, as == does not
            if known not in self.made:
                self.made[known] = _section(field, value, self.registry)
            self.seen[field.name, id(value)] = value, self.made[known]
        return self.seen[field.name, id(value)][1]

    def _contradictions(self, sections: Mapping[str, Any]) -> list[Problem]:
        same = tuple(id(sections[key]) for key in COMPARED)
        if same not in self.checked:
            self.checked[same] = list(contradictions(sections, self.registry))
        return self.checked[same]


def _section(field: Any, value: Any, registry: Registry) -> tuple[Any, list[Problem]]:
    value = data_options(value) if field.name == "data" else value
    section, wrong = structure(value, field.type, registry)
    if not wrong and field.validator is not None:
        wrong = _validated(field, section)
    if wrong:
        section, wrong = as_far_as_right(value, field.type, wrong, registry)
    return section, [_placed(field.name, problem) for problem in wrong]


def _validated(field: Any, value: Any) -> list[Problem]:
    try:
        field.validator(None, field, value)
    except ValueError as error:
        return [Problem((), str(error))]
    return []


def _placed(key: str, problem: Problem) -> Problem:
    """Return a problem of a section where a file has it, which does not write DataOptions' inner step."""
    inner = problem.path[1:] if (key, *problem.path[:1]) == ("data", "source") else problem.path
    return Problem((key, *inner), problem.message)


def _unknown(key: str, fields: Iterable[str]) -> str:
    if key in DRIVER_KEYS:
        return "is no option of a run; change it in the file"
    known = [*fields, *DRIVER_KEYS]
    return f"unknown key {key!r}{suggestion(key, known) or f'; the keys are: {listed(known)}'}"
