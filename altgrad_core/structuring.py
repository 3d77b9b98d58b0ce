"""From TOML values to frozen attrs classes, without coercion, with every mistake found at once.

One cattrs converter does the structuring. An int serves for a float; nothing else is converted: a bool is
never a number, `"false"` never a bool, 2.7 never an int, text never a list. A class that is written in
more than one way has a classmethod `from_plain(value)`, which returns an instance or the table form.

Attrs validators run per field while structuring, so that two bad values in one table give two problems. The
problems carry paths; where a path is written in a file is `altgrad_core.locator`'s business.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import AttributeValidationNote, IterableValidationNote
from cattrs.gen import make_dict_structure_fn, override

from altgrad_core.options import (
    UNQUANTIZED_NAMES,
    Choice,
    FieldError,
    FormatChoice,
    GeometryOptions,
    Path,
    StiffnessChoice,
)
from altgrad_core.registry import Registry, UsageError
from altgrad_core.wording import listed, shown, suggestion

_LARGEST_INTEGER = 2**63 - 1
"""TOML's integers have 64 bits; so have torch's."""


@attrs.frozen
class Problem:
    """One mistake in an experiment file: where, and what is wrong."""

    path: Path
    message: str


class _Problems(Exception):
    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(problem.message for problem in problems))
        self.problems = problems


def structure(
    value: Any, cls: Any, registry: Registry, path: Path = (), *, also_known: Sequence[str] = ()
) -> tuple[Any, list[Problem]]:
    """Return `value` as an instance of `cls` (None where that failed), and every problem found.

    also_known: keys that may stand beside those of `cls` in the file, for the message on an unknown one.
    """
    try:
        return converter(registry).structure(value, cls), []
    except Exception as error:  # noqa: BLE001 - every way a value can be wrong ends as a problem
        return None, _problems(error, path, also_known)


@functools.lru_cache(maxsize=4)
def converter(registry: Registry) -> cattrs.Converter:
    """Return the strict converter; `registry` supplies the options classes of chosen plugins."""
    strict = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    strict.register_structure_hook(str, _exactly(str, "text in quotes"))
    strict.register_structure_hook(bool, _exactly(bool, "true or false"))
    strict.register_structure_hook(int, _whole_number)
    strict.register_structure_hook(float, _number)
    strict.register_structure_hook_func(_is_of(Literal), _one_of)
    strict.register_structure_hook_factory(_is_of(typing.Union, types.UnionType), _union_hook)
    strict.register_structure_hook_factory(_is_of(tuple, list), _list_hook)
    strict.register_structure_hook_factory(_is_of(dict), _mapping_hook)
    strict.register_structure_hook_factory(attrs.has, _table_hook)
    strict.register_structure_hook_func(_is_choice, lambda value, cls: _choice(value, cls, registry))
    return strict


def _is_of(*origins: Any) -> Callable[[Any], bool]:
    return lambda cls: get_origin(cls) in origins


def _is_choice(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, Choice)


def _exactly(scalar: type, expected: str) -> Callable[[Any, Any], Any]:
    def hook(value: Any, _: Any) -> Any:
        if type(value) is not scalar:
            raise TypeError(f"expected {expected}, got {shown(value)}")
        return value

    return hook


def _whole_number(value: Any, _: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"expected a whole number, got {shown(value)}")
    if abs(value) > _LARGEST_INTEGER:
        raise ValueError(f"expected a whole number of 64 bits, got {shown(value)}")
    return value


def _number(value: Any, _: Any) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"expected a number, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"expected a finite number, got {shown(value)}")
    return number


def _one_of(value: Any, cls: Any) -> Any:
    allowed = get_args(cls)
    if not any(value == one and type(value) is type(one) for one in allowed):
        close = suggestion(value, filter(_is_text, allowed)) if _is_text(value) else ""
        raise ValueError(f"expected one of {listed(map(shown, allowed))}; got {shown(value)}{close}")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _union_hook(cls: Any, strict: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """Take the first member that fits; None stands only for a key that is left out."""
    members = [one for one in get_args(cls) if one is not type(None)]

    def hook(value: Any, _: Any) -> Any:
        wrong: list[Problem] = []
        for member in members:
            try:
                return strict.structure(value, member)
            except Exception as error:  # noqa: BLE001 - collected, for each member that does not fit
                wrong += _problems(error, ())
        if len(members) == 1:
            raise _Problems(wrong)
        raise TypeError("; or ".join(problem.message for problem in wrong))

    return hook


def _mapping_hook(cls: Any, strict: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """Structure a table of free keys, `dict[str, X]`."""
    inner = get_args(cls)[1]

    def hook(value: Any, _: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise TypeError(f"expected a table, got {shown(value)}")
        structured, found = {}, []
        for key, item in value.items():
            try:
                structured[key] = strict.structure(item, inner)
            except Exception as error:  # noqa: BLE001 - collected, with the key
                found += _problems(error, (key,))
        if found:
            raise _Problems(found)
        return structured

    return hook


def _list_hook(cls: Any, strict: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """Structure a TOML list as `tuple[X, ...]`, `tuple[X, Y]` or `list[X]`."""
    made, items = get_origin(cls), get_args(cls)
    any_length = made is list or (len(items) == 2 and items[1] is Ellipsis)

    def hook(value: Any, _: Any) -> Sequence[Any]:
        if not isinstance(value, list):
            hint = (
                "a table; write [[...]] for one element of a list"
                if isinstance(value, dict)
                else shown(value)
            )
            raise TypeError(f"expected a list, got {hint}")
        if not any_length and len(value) != len(items):
            raise ValueError(f"expected {len(items)} values, got {len(value)}")
        structured, found = [], []
        for index, item in enumerate(value):
            try:
                structured.append(strict.structure(item, items[0] if any_length else items[index]))
            except Exception as error:  # noqa: BLE001 - collected, with the index
                found += _problems(error, (index,))
        if found:
            raise _Problems(found)
        return typing.cast(Sequence[Any], made(structured))

    return hook


def _table_hook(cls: Any, strict: cattrs.Converter) -> Callable[[Any, Any], Any]:
    attrs.resolve_types(cls)
    hooks: dict[str, Any] = {
        field.name: override(struct_hook=_field_hook(field, strict))
        for field in attrs.fields(cls)
        if field.init
    }
    inner = make_dict_structure_fn(
        cls, strict, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=True, **hooks
    )
    from_plain = getattr(cls, "from_plain", lambda value: value)

    def hook(value: Any, of: Any) -> Any:
        value = from_plain(value)
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise TypeError(f"expected a table, got {shown(value)}")
        return inner(value, of)

    return hook


def _field_hook(field: Any, strict: cattrs.Converter) -> Callable[[Any, Any], Any]:
    """Structure and validate one field, so that each wrong one is a problem of its own.

    A validator that looks at `self` or at what a converter makes runs again with the whole object.
    """

    def hook(value: Any, _: Any) -> Any:
        structured = strict.structure(value, field.type)
        if field.validator is not None and field.converter is None:
            with contextlib.suppress(AttributeError):
                field.validator(None, field, structured)
        return structured

    return hook


def _choice(value: Any, cls: type[Choice], registry: Registry) -> Choice:
    if isinstance(value, cls):
        return value
    table = dict(value) if isinstance(value, dict) else {"plugin": value}
    if cls is FormatChoice:
        table.setdefault("plugin", "ExMy")
    if "plugin" not in table:
        names = listed(sorted({entry.name for entry in registry.of_kind(cls.kind)}))
        raise ValueError(f'the table names no plugin: add plugin = "..."; there are: {names}')
    name = table.pop("plugin")
    at: Path = ("plugin",) if isinstance(value, dict) and "plugin" in value else ()
    if not isinstance(name, str):
        expected = "a name" if at else "a name, or a table with plugin = ..."
        raise _Problems([Problem(at, f"expected {expected}, got {shown(name)}")])
    if cls is FormatChoice and name in UNQUANTIZED_NAMES:
        if table:
            raise _Problems([Problem((key,), f"unknown key {key!r}; {name} has no options") for key in table])
        return cls("FP32")
    try:
        found = registry.find(cls.kind, name)
    except UsageError as error:
        raise _Problems([Problem(at, str(error))]) from error
    if issubclass(cls, StiffnessChoice):
        return _stiffness(cls, name, table, found.component.options, registry)
    options, problems = structure(table, found.component.options, registry)
    if problems:
        raise _Problems(problems)
    return cls(name, options)


def _stiffness(
    cls: type[StiffnessChoice], name: str, table: dict[str, Any], own: type, registry: Registry
) -> StiffnessChoice:
    """Structure the options of a formula, and the core's beside them in the same table."""
    core = [field.name for field in attrs.fields(GeometryOptions)]
    if taken := [field.name for field in attrs.fields(own) if field.name in core]:
        raise ValueError(
            f"{name!r} has an option {taken[0]!r} of its own, a name that is the core's: mend its plugin"
        )
    shared = {key: table.pop(key) for key in core if key in table}
    options, problems = structure(table, own, registry, also_known=core)
    geometry, wrong = structure(shared, GeometryOptions, registry)
    if problems or wrong:
        raise _Problems([*problems, *wrong])
    return cls(name, options, geometry)


def _problems(error: BaseException, path: Path, also_known: Sequence[str] = ()) -> list[Problem]:
    if isinstance(error, _Problems):
        return [Problem(path + problem.path, problem.message) for problem in error.problems]
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [*(field.name for field in attrs.fields(error.cl)), *also_known]
        expected = f"; the keys are: {listed(known)}" if known else "; no keys are expected here"
        return [
            Problem((*path, key), f"unknown key {key!r}{suggestion(key, known) or expected}")
            for key in sorted(error.extra_fields)
        ]
    if isinstance(error, BaseExceptionGroup):
        return [
            problem
            for inner in error.exceptions
            for problem in _problems(inner, path + _step(inner), () if _step(inner) else also_known)
        ]
    if isinstance(error, FieldError):
        return [Problem(path + error.path, str(error))]
    if isinstance(error, KeyError) and error.args == _step(error):
        return [Problem(path, "is required and missing")]
    return [Problem(path, _message(error))]


def _message(error: BaseException) -> str:
    """Return what an exception says; attrs' validators pack the message with what it is about."""
    if len(error.args) > 1 and isinstance(error.args[0], str) and isinstance(error.args[1], attrs.Attribute):
        return error.args[0]
    kind = "" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: "
    return f"{kind}{error}" if str(error) else type(error).__name__


def _step(error: BaseException) -> Path:
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return (note.name,)
        if isinstance(note, IterableValidationNote):
            return (note.index,)
    return ()
