"""One component on a page: what it is, its options, and a snippet to paste. Imports no torch."""

from __future__ import annotations

import shlex
import shutil
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args, get_origin

import attrs

from altgrad_core.options import Choice, GeometryOptions, StiffnessChoice, fixed_default, written
from altgrad_core.registry import ConflictError, Registered, Registry

_HEADINGS = {
    "optimizer": "[optimizer]",
    "monitor": "[[monitor]]",
    "fallback": "[[fallback]]",
    "dataset": "[data]",
    "executor": "[executor]",
}
_SCALARS = {str: "text", bool: "true or false", int: "whole number", float: "number"}
_EXAMPLES = {str: "...", bool: False, int: 1, float: 1.0}
_NARROWEST_HELP = 40


def lines(entry: Registered, registry: Registry) -> Iterator[str]:
    """Yield the page of one component."""
    component = entry.component
    yield f"{entry.name}: {component.summary}"
    yield f"  kind    {entry.kind}"
    if component.bits:
        yield f"  bits    {component.bits}"
    yield f"  from    {entry.owner}, {component.target}"
    if component.source:
        yield f"  source  {component.source}"
    if entry.kind == "format":
        yield f"  values  altgrad formats {shlex.quote(format_spec(entry, registry))}"
    fields = attrs.fields(attrs.resolve_types(component.options))
    beside = attrs.fields(attrs.resolve_types(GeometryOptions)) if entry.kind == "stiffness" else ()
    if options := [_option(field) for field in (*fields, *beside)]:
        yield from ("", "options")
        yield from _table(options)
    if snippet := list(_snippet(entry, registry, fields)):
        yield from ("", "in an experiment file", "", *snippet)


def _option(field: attrs.Attribute[Any]) -> tuple[str, str, str, str]:
    unit = f" ({field.metadata['unit']})" if field.metadata.get("unit") else ""
    if field.default is attrs.NOTHING:
        default = "required"
    else:
        default = "left out" if fixed_default(field) is None else written(fixed_default(field))
    return field.name, type_name(field.type), default, field.metadata.get("help", "") + unit


def _table(rows: list[tuple[str, str, str, str]]) -> Iterator[str]:
    """Align name, type and default; wrap the help to the terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    indent = 2 + sum(width + 2 for width in widths[:3])
    room = max(_NARROWEST_HELP, shutil.get_terminal_size((110, 24)).columns - indent)
    for row in rows:
        cells = "  ".join(f"{cell:<{width}}" for cell, width in zip(row[:3], widths[:3], strict=True))
        first, *more = textwrap.wrap(row[3], room) or [""]
        yield f"  {cells}  {first}".rstrip()
        yield from (" " * indent + line for line in more)


def type_name(annotation: Any) -> str:
    """Return what an experiment file may write for a field, in words."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _either(map(written, inner))
    if origin in (typing.Union, types.UnionType):
        return _either(type_name(one) for one in inner if one is not type(None))
    if origin is tuple and inner[-1:] != (Ellipsis,):
        return "[" + ", ".join(map(type_name, inner)) + "]"
    if origin in (tuple, list):
        return f"list of {type_name(inner[0])}"
    if origin is dict:
        return f"table of {type_name(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, Choice):
        return annotation.kind
    if attrs.has(annotation):
        return "name or table" if hasattr(annotation, "from_plain") else "table"
    return _SCALARS.get(annotation, str(annotation))


def _either(names: Any) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else str(last)


def _snippet(entry: Registered, registry: Registry, fields: Any) -> Iterator[str]:
    """Yield TOML that can be pasted: required options have an example, the others their default."""
    name = _unambiguous(entry, registry)
    values = {field.name: _example(field) for field in fields}
    if entry.kind == "format":
        spec = format_spec(entry, registry)
        yield from ("[quantize]", f"format = {spec if values else written(spec)}")
    elif entry.kind == "stiffness":
        yield from _stiffness_snippet(_inline(name, values), registry)
    elif heading := _HEADINGS.get(entry.kind):
        yield from (heading, f"plugin = {written(name)}")
        for key, value in values.items():
            yield f"# {key} = ..." if value is None else f"{key} = {written(value)}"
        yield from _needed_of_the_optimizer(
            getattr(entry.component.options, "optimizer_options", {}), registry
        )


def format_spec(entry: Registered, registry: Registry) -> str:
    """Return how `altgrad formats` is asked for a format: by its name, or by a table if it has options."""
    name = _unambiguous(entry, registry)
    fields = attrs.fields(attrs.resolve_types(entry.component.options))
    return _inline(name, {field.name: _example(field) for field in fields}) if fields else name


def _unambiguous(entry: Registered, registry: Registry) -> str:
    try:
        return registry.find(entry.kind, entry.name).name
    except ConflictError:
        return f"{entry.distribution}:{entry.name}"


def _example(field: attrs.Attribute[Any]) -> Any:
    """Return a value to paste, None for an option that is better left out."""
    example = field.metadata.get("example")
    if example is not None or field.default is not attrs.NOTHING:
        return example if example is not None else fixed_default(field)
    if get_origin(field.type) is Literal:
        return get_args(field.type)[0]
    return _EXAMPLES.get(field.type)  # type: ignore[arg-type]


def _inline(name: str, values: Mapping[str, Any]) -> str:
    given = {key: value for key, value in values.items() if value is not None}
    return written({"plugin": name, **given})


def _stiffness_snippet(table: str, registry: Registry) -> Iterator[str]:
    """Yield the snippet for the first installed optimizer that takes a stiffness, if there is one."""
    for entry in registry.of_kind("optimizer"):
        for field in attrs.fields(attrs.resolve_types(entry.component.options)):
            if field.type is StiffnessChoice:
                optimizer = written(_unambiguous(entry, registry))
                yield from ("[optimizer]", f"plugin = {optimizer}", f"{field.name} = {table}")
                return


def _needed_of_the_optimizer(needed: Mapping[str, Any], registry: Registry) -> Iterator[str]:
    """Yield the first installed optimizer that has these options, with them."""
    for entry in registry.of_kind("optimizer") if needed else ():
        if needed.keys() <= {field.name for field in attrs.fields(entry.component.options)}:
            yield from ("", "[optimizer]", f"plugin = {written(_unambiguous(entry, registry))}")
            yield from (f"{key} = {written(value)}" for key, value in needed.items())
            return
