"""Overrides of an experiment file: where they come from, how they apply, how to point at them.

Precedence: file < `[on.*]` < grid cell < `--set`. An override that changes a `plugin` drops the old
plugin's options. A table under `[on.*]` is merged key by key; a table as a value of a grid axis or of
`--set` replaces the whole table.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
import tomli

from altgrad_core.experiment import DATA_KEYS
from altgrad_core.options import Path
from altgrad_core.registry import UsageError
from altgrad_core.structuring import Problem
from altgrad_core.wording import shown

DEEPEST = 20
"""Tables and lists inside of one another that an experiment may have; real ones have four."""

_BARE_WORD = re.compile(r"[\w.:+/\\-]+")


@attrs.frozen
class Origin:
    """Where a value was written: a path in the file, or the text of a `--set`."""

    path: Path = ()
    flag: str = ""


@attrs.frozen
class Override:
    """One value to put at one path, and where it was written."""

    path: Path
    value: Any
    origin: Origin


@attrs.define
class Tree:
    """An experiment's raw tables, and the origins of the paths that were overridden.

    Tables are shared with other trees and with whom they come from, and never changed: an override puts a
    copy of those on its way in their places.
    """

    data: dict[str, Any]
    origins: dict[Path, Origin] = attrs.field(factory=dict)
    problems: list[Problem] = attrs.field(factory=list)

    def copy(self) -> Tree:
        return Tree(self.data, dict(self.origins), list(self.problems))

    def apply(self, overrides: Iterable[Override]) -> None:
        """Put the values in place; within one call, whole tables and changes of a `plugin` go first."""
        for override in sorted(overrides, key=lambda one: (len(one.path), one.path[-1] != "plugin")):
            self._put(override)

    def origin(self, path: Path) -> Origin:
        """Return where the value at `path` was written."""
        for length in range(len(path), 0, -1):
            if found := self.origins.get(path[:length]):
                return attrs.evolve(found, path=found.path + path[length:]) if not found.flag else found
        return Origin(path)

    def _put(self, override: Override) -> None:
        path: Path = ()
        table: Any = {**self.data}
        self.data = table
        for step in override.path[:-1]:
            path = (*path, _own(step, table))
            if isinstance(table, dict) and path[-1] not in table:
                table[path[-1]] = {}
                self.origins[path] = override.origin
            inner = _entered(table, path[-1])
            if inner is None:
                self._refuse(override, f"{spelled(path)} is no table or list element of the file")
                return
            table[path[-1]] = copy.copy(inner)
            table = table[path[-1]]
        last = _own(override.path[-1], table)
        if isinstance(table, list) and not (isinstance(last, int) and last < len(table)):
            self._refuse(override, f"the list has {len(table)} elements, counted from 0")
            return
        if path and last == "plugin" and table.get("plugin") != override.value:
            self._drop_options(path, table, override.origin)
        self._forget((*path, last))
        self.origins[(*path, last)] = override.origin
        table[last] = override.value

    def _drop_options(self, path: Path, table: dict[str, Any], origin: Origin) -> None:
        """Empty the table of a plugin that is replaced, but for the core's own keys in [data]."""
        kept = [key for key in DATA_KEYS if path == ("data",) and key in table]
        origins = {(*path, key): self.origin((*path, key)) for key in kept}
        values = {key: table[key] for key in kept}
        self._forget(path)
        self.origins |= {path: origin, **origins}
        table.clear()
        table.update(values)

    def _refuse(self, override: Override, reason: str) -> None:
        self.problems.append(Problem(override.path, f"cannot be set: {reason}"))
        self.origins[override.path] = override.origin

    def _forget(self, path: Path) -> None:
        """Drop the origin of `path`, and of everything below it."""
        self.origins = {known: origin for known, origin in self.origins.items() if known[: len(path)] != path}


def _own(step: str | int, table: Any) -> str | int:
    """Return a step as the table or list knows it: digits are a position only in a list."""
    return str(step) if isinstance(table, dict) else step


def _entered(table: Any, step: str | int) -> Any:
    """Return the table or list under `step`; None where something else is."""
    if isinstance(table, list):
        inner = table[step] if isinstance(step, int) and step < len(table) else None
    else:
        inner = table[step]
    return inner if isinstance(inner, dict | list) else None


def from_table(table: Mapping[str, Any], at: Path) -> Iterator[Override]:
    """Yield the overrides of an `[on.*]` table; nested tables are merged key by key."""
    for key, value in table.items():
        yield from _merged(split(key), value, (*at, key))


def _merged(path: Path, value: Any, at: Path) -> Iterator[Override]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _merged((*path, key), inner, (*at, key))
    else:
        yield Override(path, value, Origin(at))


def from_flag(text: str) -> Override:
    """Read one `key=value` of `--set`; the value is TOML, or a bare word such as E5M2."""
    key, equals, written = text.partition("=")
    flag = f"--set {text}"
    if not equals or not key.strip():
        raise UsageError(f"{flag}: expected key=value, such as steps=20 or quantize.format=E5M2")
    try:
        return Override(split(key.strip()), _value(written.strip()), Origin(flag=flag))
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error


def _value(written: str) -> Any:
    try:
        table = tomli.loads(f"value = {written}")
    except (ValueError, RecursionError):  # ValueError: also what Python says to an integer of 5000 digits
        table = {}
    if list(table) == ["value"]:
        if is_deep(table):
            raise ValueError(f"the value is nested more than {DEEPEST} levels deep")
        return table["value"]
    if not _BARE_WORD.fullmatch(written):
        raise ValueError(f"{shown(written)} is neither a TOML value nor a bare word; put text in quotes")
    return written


def is_deep(value: Any, levels: int = DEEPEST) -> bool:
    """Whether tables and lists are nested more than so many levels deep."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        return False
    return levels == 0 or any(is_deep(one, levels - 1) for one in inner)


def split(key: str) -> Path:
    """Split a dotted key as TOML does: `a."b.c".0` gives ("a", "b.c", 0). Raises ValueError."""
    parts = re.findall(r'"([^"]*)"|\'([^\']*)\'|([\w-]+)|(\.)|(.)', key, re.DOTALL)
    steps = [double or single or bare for double, single, bare, dot, _ in parts if not dot]
    well_formed = all(bool(part[3]) == bool(index % 2) for index, part in enumerate(parts))
    if not all(steps) or len(parts) % 2 == 0 or not well_formed or any(part[4] for part in parts):
        raise ValueError(f"{shown(key)} is no dotted key")
    if len(steps) > DEEPEST:
        raise ValueError(f"{shown(key)} has more than {DEEPEST} steps")
    return tuple(int(step) if re.fullmatch(r"[0-9]{1,9}", step) else step for step in steps)


def spelled(path: Path) -> str:
    """Write a path for a person: `quantize.rule[0].format`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            word = step if re.fullmatch(r"[\w-]+", step) else json.dumps(step, ensure_ascii=False)
            text += f".{word}" if text else word
    return text
