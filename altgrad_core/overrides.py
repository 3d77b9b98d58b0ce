"""Overrides of an experiment file: where they come from, how they apply, how to point at them.

Precedence: file < `[on.*]` < grid cell < `--set`. An override that changes a `plugin` drops the old
plugin's options. A table under `[on.*]` is merged key by key; a table as a value of a grid axis or of
`--set` replaces the whole table.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import attrs
import tomli

from altgrad_core.options import Path, Problem, shown
from altgrad_core.registry import UsageError

CORE_DATA_KEYS = ("tokenizer",)
"""Keys of [data] that are the core's own, and survive a change of the plugin."""

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
    """An experiment's raw tables, and the origins of the paths that were overridden."""

    data: dict[str, Any]
    origins: dict[Path, Origin] = attrs.field(factory=dict)
    problems: list[Problem] = attrs.field(factory=list)

    def copy(self) -> Tree:
        return Tree(copy.deepcopy(self.data), dict(self.origins), list(self.problems))

    def apply(self, overrides: Iterable[Override]) -> None:
        """Put the values in place; within one call, changes of a `plugin` go first."""
        for override in sorted(overrides, key=lambda one: one.path[-1] != "plugin"):
            self._put(override)

    def origin(self, path: Path) -> Origin:
        """Return where the value at `path` was written."""
        for length in range(len(path), 0, -1):
            if found := self.origins.get(path[:length]):
                return attrs.evolve(found, path=found.path + path[length:]) if not found.flag else found
        return Origin(path)

    def _put(self, override: Override) -> None:
        *parents, last = override.path
        table: Any = self.data
        for depth, step in enumerate(parents):
            table = _entered(table, step)
            if table is None:
                blocked = spelled(override.path[: depth + 1])
                message = f"cannot be set: {blocked} is no table or list element of the file"
                self.problems.append(Problem(override.path, message))
                self.origins[override.path] = override.origin
                return
        self.origins = {
            path: origin
            for path, origin in self.origins.items()
            if path[: len(override.path)] != override.path
        }
        self.origins[override.path] = override.origin
        if last == "plugin" and isinstance(table, dict) and table.get("plugin") != override.value:
            for key in [key for key in table if not (parents == ["data"] and key in CORE_DATA_KEYS)]:
                del table[key]
        if isinstance(table, list) and not (isinstance(last, int) and last < len(table)):
            self.problems.append(Problem(override.path, f"cannot be set: the list has {len(table)} elements"))
            return
        table[last] = copy.deepcopy(override.value)


def _entered(table: Any, step: str | int) -> Any:
    """Return the table or list under `step`, made where it is missing; None where something else is."""
    if isinstance(table, list):
        inner = table[step] if isinstance(step, int) and step < len(table) else None
    else:
        inner = table.setdefault(step, {})
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
        path = split(key.strip())
    except ValueError as error:
        raise UsageError(f"{flag}: {error}") from error
    try:
        value = tomli.loads(f"value = {written.strip()}")["value"]
    except tomli.TOMLDecodeError:
        if not _BARE_WORD.fullmatch(written.strip()):
            raise UsageError(f"{flag}: {shown(written)} is neither a TOML value nor a bare word") from None
        value = written.strip()
    return Override(path, value, Origin(flag=flag))


def split(key: str) -> Path:
    """Split a dotted key as TOML does: `a."b.c".0` gives ("a", "b.c", 0). Raises ValueError."""
    parts = re.findall(r'"([^"]*)"|\'([^\']*)\'|([\w-]+)|(\.)|(.)', key)
    steps = [double or single or bare for double, single, bare, dot, _ in parts if not dot]
    well_formed = all(bool(part[3]) == bool(index % 2) for index, part in enumerate(parts))
    if not steps or not well_formed or any(part[4] for part in parts):
        raise ValueError(f"{key!r} is no dotted key")
    return tuple(int(step) if step.isdigit() else step for step in steps)


def spelled(path: Path) -> str:
    """Write a path for a person: `quantize.rule[0].format`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            word = step if re.fullmatch(r"[\w-]+", step) else f'"{step}"'
            text += f".{word}" if text else word
    return text
