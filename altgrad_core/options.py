"""What options classes are made of: fields with help, validators, and choices of plugins.

Every component has one frozen attrs class of options, whose fields are made by `option`. A field whose type
is a `Choice` names another component. `altgrad_core.structuring` reads these classes from TOML.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import attrs

from altgrad_core import patterns
from altgrad_core.plugin_contract import RESERVED
from altgrad_core.registry import PluginError, Registry
from altgrad_core.wording import shown

Path = tuple[str | int, ...]
"""Of an option; keys are strings, positions in lists integers: `("quantize", "rule", 0, "format")`."""

UNQUANTIZED_NAMES = RESERVED["format"]
"""Format names that mean: leave it alone."""


class FieldError(ValueError):
    """Raised where options contradict one another; names the field to blame, or the path below here."""

    def __init__(self, field: str | Path, message: str) -> None:
        super().__init__(message)
        self.path: Path = (field,) if isinstance(field, str) else field


def option(
    help: str, *, unit: str = "", default: Any = attrs.NOTHING, validator: Any = None, example: Any = None
) -> Any:
    """Return an attrs field for an options class: its help, its unit, its default, its validator.

    example: a value for the snippet that `altgrad show` prints; for options without a default.
    """
    metadata: Mapping[str, Any] = {"help": help, "unit": unit, "example": example}
    return attrs.field(default=default, validator=validator, metadata=metadata)


def fixed_default(field: attrs.Attribute[Any]) -> Any:
    """Return the default of an option; None where it has none, or one that follows from other options."""
    default: Any = field.default
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return None if default.takes_self else default.factory()
    return None if default is attrs.NOTHING else default


def default_of(field: attrs.Attribute[Any], options: Any) -> Any:
    """Return the default of an option beside the others of `options`, which it may follow from."""
    default: Any = field.default
    if isinstance(default, attrs.Factory):  # type: ignore[arg-type]
        return default.factory(options) if default.takes_self else default.factory()
    return default


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


def written(value: Any) -> str:
    """Return options, or any value of theirs, as TOML writes it on one line."""
    value = plain(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {written(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, str | bool):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int) and value.bit_length() > 64:
        return hex(value)  # in decimal Python refuses thousands of digits
    return str(value)


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

    @property
    def bare_name(self) -> str:
        """The name without the distribution that may stand in front of it: metrics go by this one."""
        return self.plugin.rpartition(":")[2]

    def title(self, registry: Registry) -> str:
        """Return what errors call the component."""
        return registry.find(self.kind, self.plugin).title

    def plain(self) -> Any:
        """Return the choice as an experiment file would write it, with every default filled in."""
        return {"plugin": self.plugin, **self.plain_options()}

    def plain_options(self) -> dict[str, Any]:
        return {} if self.options is None else plain(self.options)


class OptimizerChoice(Choice):
    """What moves the weights."""

    kind = "optimizer"


class MonitorChoice(Choice):
    """What watches a run."""

    kind = "monitor"


class FallbackChoice(Choice):
    """What decides when something is wrong."""

    kind = "fallback"


class DatasetChoice(Choice):
    """What is read."""

    kind = "dataset"


class ExecutorChoice(Choice):
    """How the cells of a grid are run."""

    kind = "executor"


class FormatChoice(Choice):
    """A number format; a table without `plugin` is an ExMy format."""

    kind = "format"

    @property
    def unquantized(self) -> bool:
        return self.plugin in UNQUANTIZED_NAMES

    def plain(self) -> Any:
        options = self.plain_options()
        return {"plugin": self.plugin, **options} if options else self.plugin


def _has_a_grid(_: Any, field: Any, value: FormatChoice | None) -> None:
    if value is not None and value.unquantized:
        raise ValueError(f"{value.plugin} has no grid to take a geometry from; name a format of 3 to 16 bits")


@attrs.frozen(kw_only=True)
class GeometryOptions:
    """What the core offers with every stiffness formula, in one table with the formula's own options."""

    of_format: FormatChoice | None = option(
        "take this format's geometry, at its own fit scale of the weight; left out: the weight's own format",
        default=None,
        validator=_has_a_grid,
    )
    refresh: Literal["step", "never"] = option(
        "step: S follows the weight; never: S stays that of the initial weight", default="step"
    )


@attrs.frozen
class StiffnessChoice(Choice):
    """A stiffness formula, with its options and the core's."""

    kind = "stiffness"
    geometry: GeometryOptions = GeometryOptions()

    def build(self, registry: Registry, *inputs: Any) -> Any:
        """Return the formula; where the core's options ask for it, inside of a `Geometry`.

        Raises PluginError for what is none.
        """
        formula = super().build(registry, *inputs)
        if not callable(formula):
            kind = type(formula).__name__
            raise PluginError(f"{self.title(registry)} is no formula but {kind}: mend its plugin")
        if self.geometry == GeometryOptions():
            return formula
        from altgrad_core.lookup import format_or_none  # these import torch
        from altgrad_core.stiffness import Geometry

        of_format = format_or_none(self.geometry.of_format, registry)
        return Geometry(formula, of_format, self.geometry.refresh)

    def plain_options(self) -> dict[str, Any]:
        return {**super().plain_options(), **plain(self.geometry)}


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


def between(lowest: float, highest: float) -> Callable[[Any, Any, Any], None]:
    """Return an attrs validator: `lowest` <= the value <= `highest`."""

    def validate(_: Any, field: Any, value: Any) -> None:
        if not lowest <= value <= highest:
            raise ValueError(f"expected {lowest} to {highest}, got {shown(value)}")

    return validate


def within(lowest: float, below: float) -> Callable[[Any, Any, Any], None]:
    """Return an attrs validator: `lowest` <= the value (or each of them) < `below`."""

    def validate(_: Any, field: Any, value: Any) -> None:
        for one in value if isinstance(value, tuple) else (value,):
            if not lowest <= one < below:
                raise ValueError(f"expected {lowest} <= value < {below}, got {shown(one)}")

    return validate


def regexes(_: Any, field: Any, value: str | tuple[str, ...]) -> None:
    """Attrs validator: the value (or each of them) is a regular expression, one that can be matched."""
    for pattern in (value,) if isinstance(value, str) else value:
        if problem := patterns.problem(pattern):
            raise ValueError(f"{shown(pattern)} {problem}")
