"""What is installed: discovery of plugins, look-up of their components, collisions, broken plugins.

pluggy validates and calls the hooks. Finding the entry points is done here, because pluggy's own loader
stops at the first broken plugin without naming it and drops one of two entry points of the same name.
No torch is imported: a component's target is resolved only by `Registered.load`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.metadata
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import attrs
import pluggy

from altgrad_core import builtin
from altgrad_core.hookspecs import KINDS, PROJECT, Component, Hooks

ENTRY_POINT_GROUP = "altgrad"
WITHOUT_VARIABLE = "ALTGRAD_WITHOUT"
CORE_DISTRIBUTION = "altgrad-core"

_NAME = re.compile(r"[^\s:/]+")
_TARGET = re.compile(r"[\w.]+:\w+")


class UsageError(ValueError):
    """A mistake of the user's: printed without a traceback, exit code 2."""


class NotFoundError(UsageError):
    """No installed component has the name that was asked for."""


class ConflictError(UsageError):
    """Two distributions own the name that was asked for."""


class PluginError(RuntimeError):
    """An exception raised inside a plugin, with the plugin's name, distribution and version."""


@attrs.frozen(kw_only=True)
class Registered:
    """A component and the distribution that owns it."""

    kind: str
    component: Component
    distribution: str
    version: str

    @property
    def name(self) -> str:
        return self.component.name

    @property
    def owner(self) -> str:
        return f"{self.distribution} {self.version}"

    def load(self) -> Any:
        """Import and return the component's target. Raises PluginError naming the owner."""
        module, _, attribute = self.component.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:
            raise PluginError(
                f"{self.kind} {self.name!r} of {self.owner}: its target {self.component.target!r} "
                f"cannot be loaded: {type(error).__name__}: {error}"
            ) from error

    def build(self, options: Any, *inputs: Any) -> Any:
        """Load the target and call it. Raises PluginError naming the owner; UsageError passes through."""
        target = self.load()
        if not callable(target):
            return target
        try:
            return target(options, *inputs)
        except UsageError:
            raise
        except Exception as error:
            raise PluginError(
                f"{self.kind} {self.name!r} of {self.owner} cannot be built: {type(error).__name__}: {error}"
            ) from error


@attrs.frozen(kw_only=True)
class Broken:
    """A plugin that is installed and cannot be used."""

    distribution: str
    version: str
    reason: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.reason})"


@attrs.frozen(kw_only=True)
class Registry:
    """Every component of every usable plugin."""

    registered: tuple[Registered, ...] = ()
    broken: tuple[Broken, ...] = ()
    blocked: tuple[str, ...] = ()

    def of_kind(self, kind: str) -> list[Registered]:
        return [entry for entry in self.registered if entry.kind == kind]

    def conflicts(self) -> list[tuple[Registered, ...]]:
        """Return the groups of components that share kind and name."""
        by_name: dict[tuple[str, str], list[Registered]] = {}
        for entry in self.registered:
            by_name.setdefault((entry.kind, entry.name), []).append(entry)
        return [tuple(owners) for owners in by_name.values() if len(owners) > 1]

    def find(self, kind: str, name: str) -> Registered:
        """Return the one component of this kind called `name`, or `distribution:name`.

        Raises NotFoundError with suggestions and the broken plugins, ConflictError with both owners.
        """
        distribution, _, bare = name.rpartition(":")
        named = [entry for entry in self.of_kind(kind) if entry.name == bare]
        owners = (
            [entry for entry in named if _same(entry.distribution, distribution)] if distribution else named
        )
        if len(owners) == 1:
            return owners[0]
        if not owners:
            raise NotFoundError(self._not_found(kind, name))
        choices = " or ".join(f'plugin = "{entry.distribution}:{bare}"' for entry in owners)
        listed = " and ".join(entry.owner for entry in owners)
        raise ConflictError(f"{kind} {bare!r} is owned by {listed}; say which: {choices}")

    def _not_found(self, kind: str, name: str) -> str:
        names = sorted({entry.name for entry in self.of_kind(kind)})
        close = difflib.get_close_matches(name.rpartition(":")[2], names, n=1) or _same_letters(name, names)
        message = f"no {kind} named {name!r} is installed"
        message += f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(names) or 'none'}"
        if self.broken:
            message += f"; broken plugins, where it may be: {', '.join(map(str, self.broken))}"
        if self.blocked:
            message += f"; blocked: {', '.join(self.blocked)}"
        return message


def _same_letters(name: str, names: Sequence[str]) -> list[str]:
    return [known for known in names if known.lower() == name.lower()]


def _canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def _same(one: str, other: str) -> bool:
    return _canonical(one) == _canonical(other)


def discover(without: Iterable[str] = ()) -> Registry:
    """Find the installed plugins, except the distributions in `without` and $ALTGRAD_WITHOUT."""
    from_environment = os.environ.get(WITHOUT_VARIABLE, "").split(",")
    names = sorted({_canonical(name.strip()) for name in (*without, *from_environment) if name.strip()})
    return _discover(tuple(names))


@functools.lru_cache(maxsize=8)
def _discover(without: tuple[str, ...]) -> Registry:
    found = sorted(
        importlib.metadata.entry_points(group=ENTRY_POINT_GROUP),
        key=lambda point: (_owner(point), point.name),
    )
    installed = {_canonical(_owner(point)[0]) for point in found}
    if unknown := [name for name in without if name not in installed]:
        known = ", ".join(sorted(installed))
        raise UsageError(f"--without {unknown[0]!r}: no such plugin is installed; there are: {known}")
    registry = _collect(builtin, CORE_DISTRIBUTION, importlib.metadata.version(CORE_DISTRIBUTION))
    for point in found:
        if _canonical(_owner(point)[0]) in without:
            continue
        registry = _joined(registry, _load(point))
    return attrs.evolve(registry, blocked=without)


def _owner(point: importlib.metadata.EntryPoint) -> tuple[str, str]:
    distribution = point.dist
    return (distribution.name, distribution.version) if distribution else ("unknown distribution", "?")


def _joined(one: Registry, other: Registry) -> Registry:
    return Registry(registered=one.registered + other.registered, broken=one.broken + other.broken)


def _load(point: importlib.metadata.EntryPoint) -> Registry:
    distribution, version = _owner(point)
    try:
        return _collect(point.load(), distribution, version)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a plugin does, the others must work
        reason = f"{type(error).__name__}: {error}"
        return Registry(broken=(Broken(distribution=distribution, version=version, reason=reason),))


def _collect(module: object, distribution: str, version: str) -> Registry:
    """Validate a plugin module with pluggy and call its hooks."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    manager.register(module, name=distribution)
    manager.check_pending()  # a misspelt hook is an error, not silence
    entries = [
        Registered(kind=kind, component=_checked(component, hook), distribution=distribution, version=version)
        for kind, hook in KINDS.items()
        for components in getattr(manager.hook, hook)()
        for component in components
    ]
    names = [(entry.kind, entry.name) for entry in entries]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"registers the {repeated[0]} {repeated[1]!r} twice")
    return Registry(registered=tuple(entries))


def _checked(component: object, hook: str) -> Component:
    if not isinstance(component, Component):
        raise TypeError(f"{hook} must return a list of Component, it holds {component!r}")
    if not isinstance(component.name, str) or not _NAME.fullmatch(component.name):
        raise ValueError(f"{hook}: the name {component.name!r} must be text without spaces, ':' and '/'")
    if not (isinstance(component.options, type) and attrs.has(component.options)):
        raise TypeError(
            f"{hook}: options of {component.name!r} must be an attrs class, not {component.options!r}"
        )
    if not isinstance(component.target, str) or not _TARGET.fullmatch(component.target):
        raise ValueError(f"{hook}: target of {component.name!r} must be 'package.module:attribute'")
    return component
