"""From TOML values to frozen attrs classes, without coercion, with every mistake found at once.

One cattrs converter does the structuring. An int serves for a float; nothing else is converted: a bool is
never a number, `"false"` never a bool, 2.7 never an int, text never a list. A class that is written in
more than one way has a classmethod `from_plain(value)`, which returns an instance or the table form.

Attrs validators run per field while structuring, so that two bad values in one table give two problems. The
problems carry paths; where a path is written in a file is `altgrad_core.locator`'s business.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, get_args, get_origin

import attrs
import cattrs
from cattrs.errors import AttributeValidationNote, IterableValidationNote
from cattrs.gen import make_dict_structure_fn, override

from altgrad_core.registry import Registry, UsageError

Path = tuple[str | int, ...]

UNQUANTISED = ("FP32", "none")
"""Format names that mean: leave it alone."""


@attrs.frozen
class Problem:
    """One mistake in an experiment file: where, and what is wrong."""

    path: Path
    message: str


class FieldError(ValueError):
    """Raised where options contradict one another; names the field to blame, or the path below here."""

    def __init__(self, field: str | Path, message: str) -> None:
        super().__init__(message)
        self.path: Path = (field,) if isinstance(field, str) else field


class _Problems(Exception):
    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(problem.message for problem in problems))
        self.problems = problems


# --- options that name a plugin ----------------------------------------------------------------------


@attrs.frozen
class Choice:
    """A component chosen by name, with its options. In a file: a name, or a table with `plugin`."""

    kind: ClassVar[str]
    plugin: str
    options: Any = None
    """An instance of the component's options class; None: all defaults."""

    def build(self, registry: Registry, *inputs: Any) -> Any:
        """Return what the component's target builds from the options."""
        found = registry.find(self.kind, self.plugin)
        return found.build(found.component.options() if self.options is None else self.options, *inputs)

    def plain(self) -> Any:
        """Return the choice as an experiment file would write it, with every default filled in."""
        return {"plugin": self.plugin, **self.plain_options()}

    def plain_options(self) -> dict[str, Any]:
        return {} if self.options is None else plain(self.options)


class StiffnessChoice(Choice):
    kind = "stiffness"


class OptimizerChoice(Choice):
    kind = "optimizer"


class MonitorChoice(Choice):
    kind = "monitor"


class FallbackChoice(Choice):
    kind = "fallback"


class DatasetChoice(Choice):
    kind = "dataset"


class FormatChoice(Choice):
    """A number format; a table without `plugin` is an ExMy format."""

    kind = "format"

    @property
    def unquantised(self) -> bool:
        return self.plugin in UNQUANTISED

    def plain(self) -> Any:
        options = self.plain_options()
        return {"plugin": self.plugin, **options} if options else self.plugin


# --- structuring -------------------------------------------------------------------------------------


def structure(value: Any, cls: Any, registry: Registry, path: Path = ()) -> tuple[Any, list[Problem]]:
    """Return `value` as an instance of `cls` (None where that failed), and every problem found."""
    try:
        return converter(registry).structure(value, cls), []
    except Exception as error:  # noqa: BLE001 - every way a value can be wrong ends as a problem
        return None, list(_problems(error, path))


def plain(options: Any) -> Any:
    """Return options as TOML-like values: tables, lists, text, numbers, bools."""
    if isinstance(options, Choice):
        return options.plain()
    if attrs.has(type(options)):
        return {
            field.name: plain(value)
            for field in attrs.fields(type(options))
            if (value := getattr(options, field.name)) is not None
        }
    if isinstance(options, list | tuple):
        return [plain(value) for value in options]
    return options


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or the empty text."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1) or [
        one for one in known if one.lower() == word.lower()
    ]
    return f"; did you mean {close[0]!r}?" if close else ""


@functools.lru_cache(maxsize=4)
def converter(registry: Registry) -> cattrs.Converter:
    """Return the strict converter; `registry` supplies the options classes of chosen plugins."""
    strict = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)
    for scalar, expected in ((str, "text in quotes"), (bool, "true or false"), (int, "a whole number")):
        strict.register_structure_hook(scalar, _exactly(scalar, expected))
    strict.register_structure_hook(float, _number)
    strict.register_structure_hook_func(lambda cls: get_origin(cls) is Literal, _one_of)
    strict.register_structure_hook_factory(_is_optional, lambda cls: _inner_hook(cls, strict))
    strict.register_structure_hook_factory(
        lambda cls: get_origin(cls) is tuple, lambda cls: _tuple_hook(cls, strict)
    )
    strict.register_structure_hook_factory(attrs.has, lambda cls: _table_hook(cls, strict))
    strict.register_structure_hook_func(
        lambda cls: hasattr(cls, "from_plain"),
        lambda value, cls: _table_hook(cls, strict)(cls.from_plain(value), cls),
    )
    strict.register_structure_hook_func(
        lambda cls: isinstance(cls, type) and issubclass(cls, Choice),
        lambda value, cls: _choice(value, cls, registry),
    )
    return strict


def _exactly(scalar: type, expected: str) -> Callable[[Any, Any], Any]:
    def hook(value: Any, _: Any) -> Any:
        if type(value) is not scalar:
            raise TypeError(f"expected {expected}, got {shown(value)}")
        return value

    return hook


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
        listed = ", ".join(repr(one) for one in allowed)
        close = (
            suggestion(value, [one for one in allowed if isinstance(one, str)])
            if isinstance(value, str)
            else ""
        )
        raise ValueError(f"expected one of {listed}; got {shown(value)}{close}")
    return value


def _is_optional(cls: Any) -> bool:
    return get_origin(cls) in (typing.Union, types.UnionType) and type(None) in get_args(cls)


def _inner_hook(cls: Any, strict: cattrs.Converter) -> Callable[[Any, Any], Any]:
    (inner,) = [one for one in get_args(cls) if one is not type(None)]
    return lambda value, _: strict.structure(value, inner)


def _tuple_hook(cls: Any, strict: cattrs.Converter) -> Callable[[Any, Any], Any]:
    items = get_args(cls)
    any_length = len(items) == 2 and items[1] is Ellipsis

    def hook(value: Any, _: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise TypeError(f"expected a list, got {shown(value)}")
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
        return tuple(structured)

    return hook


def _table_hook(cls: Any, strict: cattrs.Converter) -> Callable[[Any, Any], Any]:
    hooks = {field.name: override(struct_hook=_field_hook(field, strict)) for field in _fields(cls)}
    inner = make_dict_structure_fn(
        cls, strict, _cattrs_forbid_extra_keys=True, _cattrs_detailed_validation=True, **hooks
    )

    def hook(value: Any, of: Any) -> Any:
        if isinstance(value, cls):
            return value
        if not isinstance(value, dict):
            raise TypeError(f"expected a table, got {shown(value)}")
        return inner(value, of)

    return hook


def _fields(cls: Any) -> list[Any]:
    attrs.resolve_types(cls)
    return list(attrs.fields(cls))


def _field_hook(field: Any, strict: cattrs.Converter) -> Callable[[Any, Any], Any]:
    def hook(value: Any, _: Any) -> Any:
        structured = strict.structure(value, field.type)
        if field.validator is not None:
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
        raise _Problems(
            [Problem((), f'the table names no plugin: add plugin = "..."{_first_name(cls, registry)}')]
        )
    name = table.pop("plugin")
    if not isinstance(name, str):
        raise TypeError(f"expected the name of a {cls.kind}, got {shown(name)}")
    if cls is FormatChoice and name in UNQUANTISED and not table:
        return cls("FP32")
    at = ("plugin",) if isinstance(value, dict) and "plugin" in value else ()
    try:
        found = registry.find(cls.kind, name)
    except UsageError as error:
        known = {"format": UNQUANTISED}.get(cls.kind, ())
        raise _Problems([Problem(at, f"{error}{suggestion(name, known)}")]) from error
    options, problems = structure(table, found.component.options, registry)
    if problems:
        raise _Problems(problems)
    return cls(name, options)


def _first_name(cls: type[Choice], registry: Registry) -> str:
    names = sorted({entry.name for entry in registry.of_kind(cls.kind)})
    return f" (there are: {', '.join(names)})" if names else ""


# --- from exceptions to problems ---------------------------------------------------------------------


def _problems(error: BaseException, path: Path) -> Iterable[Problem]:
    if isinstance(error, _Problems):
        return [Problem(path + problem.path, problem.message) for problem in error.problems]
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        known = [field.name for field in attrs.fields(error.cl)]
        return [
            Problem((*path, key), f"unknown key {key!r}{suggestion(key, known) or _known(known)}")
            for key in sorted(error.extra_fields)
        ]
    if isinstance(error, BaseExceptionGroup):
        return [problem for inner in error.exceptions for problem in _problems(inner, path + _step(inner))]
    if isinstance(error, FieldError):
        return [Problem(path + error.path, str(error))]
    if isinstance(error, KeyError) and _step(error):
        return [Problem(path, "is required and missing")]
    return [Problem(path, str(error) or type(error).__name__)]


def _known(names: list[str]) -> str:
    return f"; the keys are: {', '.join(names)}" if names else "; no keys are expected here"


def _step(error: BaseException) -> Path:
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, AttributeValidationNote):
            return (note.name,)
        if isinstance(note, IterableValidationNote):
            return (note.index,)
    return ()


def shown(value: Any) -> str:
    """Return a value for an error message, short whatever it is."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- validators that say what they want --------------------------------------------------------------


def at_least(lowest: float) -> Callable[[Any, Any, Any], None]:
    """Return an attrs validator: the value is `lowest` or more."""

    def validate(_: Any, field: Any, value: Any) -> None:
        if value < lowest:
            raise ValueError(f"expected {lowest} or more, got {shown(value)}")

    return validate


def above(limit: float) -> Callable[[Any, Any, Any], None]:
    """Return an attrs validator: the value is greater than `limit`."""

    def validate(_: Any, field: Any, value: Any) -> None:
        if not value > limit:
            raise ValueError(f"expected more than {limit}, got {shown(value)}")

    return validate


def within(lowest: float, below: float) -> Callable[[Any, Any, Any], None]:
    """Return an attrs validator: `lowest` <= the value (or each of them) < `below`."""

    def validate(_: Any, field: Any, value: Any) -> None:
        for one in value if isinstance(value, tuple) else (value,):
            if not lowest <= one < below:
                raise ValueError(f"expected {lowest} <= value < {below}, got {shown(one)}")

    return validate


def regexes(_: Any, field: Any, value: str | tuple[str, ...]) -> None:
    """Attrs validator: the value (or each of them) is a regular expression."""
    for pattern in (value,) if isinstance(value, str) else value:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


def option(help: str, *, unit: str = "", default: Any = attrs.NOTHING, validator: Any = None) -> Any:
    """Return an attrs field for an options class: its help, its unit, its default, its validator."""
    metadata: Mapping[str, str] = {"help": help, "unit": unit}
    return attrs.field(default=default, validator=validator, metadata=metadata)
