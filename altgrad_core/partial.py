"""What is right of options that have mistakes, so that one mistake hides no other.

A table with a mistake becomes an instance of its class all the same: the fields that are right have their
values, and what is wrong is `UNKNOWN`, which raises UnknownError as soon as anybody looks at it. So a check
of options against one another says what it can: one that needs a value that is wrong ends there, without a
word, and the others go on.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar, get_args, get_origin

import attrs

from altgrad_core.options import Choice, FieldError, Path, StiffnessChoice, default_of
from altgrad_core.registry import Registry
from altgrad_core.structuring import Problem, structure

T = TypeVar("T")


class UnknownError(Exception):
    """A value is not known, since what the file says of it is wrong."""


def _looked_at(*_: Any) -> Any:
    raise UnknownError


_OPERATORS = (
    "getattr call bool hash str repr format len iter contains getitem eq ne lt le gt ge "
    "index int float complex abs neg pos invert round trunc floor ceil "
    "add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod divmod rdivmod pow rpow "
    "matmul rmatmul and rand or ror xor rxor lshift rlshift rshift rrshift"
)
_Unknown: Any = type("_Unknown", (), {f"__{name}__": _looked_at for name in _OPERATORS.split()})

UNKNOWN: Any = _Unknown()
"""Stands where a value is wrong."""


def known(*found: Iterable[T]) -> Iterator[T]:
    """Yield what several checks find, each as far as it comes before it needs a value that is wrong."""
    for one in found:
        with contextlib.suppress(UnknownError):
            yield from one


def is_whole(options: Any) -> bool:
    """Whether no field of an options object is UNKNOWN."""
    return all(getattr(options, field.name) is not UNKNOWN for field in attrs.fields(type(options)))


def as_far_as_right(
    value: Any, cls: Any, problems: Sequence[Problem], registry: Registry
) -> tuple[Any, list[Problem]]:
    """Return `value` as an instance of `cls`, UNKNOWN where it is wrong, and every problem.

    problems: what structuring has found; fields that contradict one another beside those are found here.
    """
    reading = _Reading(registry)
    return reading.read(value, cls, problems, ()), [*problems, *reading.more]


@attrs.define
class _Reading:
    """Values with problems on their way to options."""

    registry: Registry
    more: list[Problem] = attrs.field(factory=list)

    def read(self, value: Any, cls: Any, problems: Sequence[Problem], at: Path) -> Any:
        """Return a value, whose problems' paths begin below it; `at` is where it is itself."""
        if not problems:
            return structure(value, cls, self.registry)[0]
        if any(not problem.path for problem in problems):
            return UNKNOWN
        cls = _only(cls)
        if get_origin(cls) is tuple and isinstance(value, list):
            element = get_args(cls)[0]
            return tuple(
                self.read(one, element, _below(problems, index), (*at, index))
                for index, one in enumerate(value)
            )
        if not isinstance(value, dict):
            return UNKNOWN
        if isinstance(cls, type) and issubclass(cls, Choice):
            return self._choice(value, cls, problems, at)
        return self._table(value, cls, problems, at) if attrs.has(cls) else UNKNOWN

    def _choice(self, value: dict[str, Any], cls: type[Choice], problems: Sequence[Problem], at: Path) -> Any:
        """Return a chosen plugin, where its name is right and all beside it is for its own options."""
        if issubclass(cls, StiffnessChoice) or "plugin" not in value or _below(problems, "plugin"):
            return UNKNOWN
        name = value["plugin"]
        own = self.registry.find(cls.kind, name).component.options
        table = {key: inner for key, inner in value.items() if key != "plugin"}
        return cls(name, self._table(table, own, problems, at))

    def _table(self, value: dict[str, Any], cls: Any, problems: Sequence[Problem], at: Path) -> Any:
        made = object.__new__(cls)
        for field in attrs.fields(attrs.resolve_types(cls)):
            object.__setattr__(made, field.name, UNKNOWN)
            with contextlib.suppress(UnknownError):
                object.__setattr__(made, field.name, self._field(field, value, made, problems, at))
        self.more += _contradictions(made, at)
        return made

    def _field(
        self, field: Any, value: dict[str, Any], made: Any, problems: Sequence[Problem], at: Path
    ) -> Any:
        if field.name in value:
            below = _below(problems, field.name)
            return self.read(value[field.name], field.type, below, (*at, field.name))
        return UNKNOWN if field.default is attrs.NOTHING else default_of(field, made)


def _contradictions(made: Any, at: Path) -> list[Problem]:
    """Return what the options' own check of the whole finds before it needs a value that is wrong."""
    check = getattr(made, "__attrs_post_init__", lambda: None)
    try:
        check()
    except UnknownError:
        return []
    except FieldError as error:
        return [Problem((*at, *error.path), str(error))]
    except (ValueError, TypeError) as error:
        return [Problem(at, str(error))]
    return []


def _only(cls: Any) -> Any:
    """Return X of `X | None`, whose None stands for a key that is left out."""
    members = [one for one in get_args(cls) if one is not type(None)]
    return members[0] if isinstance(cls, types.UnionType) and len(members) == 1 else cls


def _below(problems: Sequence[Problem], step: str | int) -> list[Problem]:
    return [attrs.evolve(one, path=one.path[1:]) for one in problems if one.path[:1] == (step,)]
