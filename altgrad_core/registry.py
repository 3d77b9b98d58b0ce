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
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import attrs
import pluggy

from altgrad_core import builtin
from altgrad_core.hookspecs import KINDS, PROJECT, Component, Hooks

ENTRY_POINT_GROUP = "altgrad"
WITHOUT_VARIABLE = "ALTGRAD_WITHOUT"
CORE_DISTRIBUTION = "altgrad-core"

RESERVED: Mapping[str, tuple[str, ...]] = {"format": ("FP32", "none")}
"""Kind to the names that mean no component: the formats "FP32" and "none" say `leave it alone`."""

REFUSALS: Mapping[str, tuple[type[Exception], ...]] = {"dataset": (ValueError, OSError)}
"""Kind to the errors by which its components refuse what a user gave them, data that are absent or odd."""

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


class _ContractError(Exception):
    """A plugin module that breaks the contract in hookspecs.py."""


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

    @property
    def title(self) -> str:
        """What errors call it."""
        return f"{self.kind} {self.name!r} of {self.owner}"

    def load(self) -> Any:
        """Import and return the component's target. Raises PluginError naming the owner."""
        module, _, attribute = self.component.target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (Exception, SystemExit) as error:
            raise PluginError(
                f"{self.title}: its target {self.component.target!r} cannot be loaded: {_described(error)}"
            ) from error

    def build(self, options: Any, *inputs: Any) -> Any:
        """Load the target and call it. Raises PluginError naming the owner, or that of a part that it builds.

        UsageError passes through, and what components of its kind refuse a user's input by.
        """
        target = self.load()
        if not callable(target):
            return target
        passing: tuple[type[Exception], ...] = (UsageError, PluginError, *REFUSALS.get(self.kind, ()))
        try:
            return target(options, *inputs)
        except passing:
            raise
        except (Exception, SystemExit) as error:
            raise PluginError(f"{self.title} cannot be built: {_described(error)}") from error


@attrs.frozen(kw_only=True)
class Broken:
    """A plugin that is installed and cannot be used."""

    distribution: str
    version: str
    reason: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.reason})"


@attrs.frozen(kw_only=True, cache_hash=True)
class Registry:
    """Every component of every usable plugin."""

    registered: tuple[Registered, ...] = ()
    broken: tuple[Broken, ...] = ()
    blocked: tuple[str, ...] = ()

    def of_kind(self, kind: str) -> list[Registered]:
        return [entry for entry in self.registered if entry.kind == kind]

    def of_distribution(self, name: str) -> list[Registered]:
        """Return what a distribution offers. Raises NotFoundError where it offers nothing, and says why."""
        found = [entry for entry in self.registered if _same(entry.distribution, name)]
        if found:
            return found
        if broken := [one for one in self.broken if _same(one.distribution, name)]:
            raise NotFoundError(f"the plugin is broken: {broken[0]}")
        known = sorted({entry.distribution for entry in self.registered})
        hint = suggestion(name, known) or f"; there are: {listed(known)}"
        raise NotFoundError(f"no plugin of a distribution {shown(name)} is installed{hint}")

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
        both = " and ".join(entry.owner for entry in owners)
        raise ConflictError(f"{kind} {bare!r} is owned by {both}; say which: {choices}")

    def _not_found(self, kind: str, name: str) -> str:
        names = sorted({entry.name for entry in self.of_kind(kind)})
        bare = name.rpartition(":")[2]
        message = f"no {kind} named {shown(name)} is installed"
        message += suggestion(bare, [*names, *RESERVED.get(kind, ())]) or f"; there are: {listed(names)}"
        if others := sorted({entry.kind for entry in self.registered if entry.name == bare} - {kind}):
            message += f"; {bare!r} is the name of another kind of component: {listed(others)}"
        if self.broken:
            message += f"; broken plugins, where it may be: {listed(map(str, self.broken))}"
        if self.blocked:
            message += f"; left out by --without or ${WITHOUT_VARIABLE}: {listed(self.blocked)}"
        return message


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def shown(value: Any) -> str:
    """Return a value for an error message, short and on one line whatever it is."""
    try:
        text = repr(value).lower() if isinstance(value, bool) else repr(value)  # as TOML writes it
    except (ValueError, RecursionError):  # Python refuses to write out integers of thousands of digits
        text = f"a very long {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?`, or the empty text; case does not matter."""
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(word.lower(), by_lower)
    if not close:
        return ""
    given = word.lower()
    best = max(close, key=lambda one: (_likeness(one, given), one[0] == given[0]))
    return f"; did you mean {by_lower[best]!r}?"


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


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
    plugins = _plugins()
    if unknown := [name for name in without if name not in plugins]:
        hint = suggestion(unknown[0], plugins) or f"; there are: {listed(plugins)}"
        raise UsageError(
            f"--without (or ${WITHOUT_VARIABLE}) {unknown[0]!r}: no such plugin is installed{hint}"
        )
    core = _collect(builtin, CORE_DISTRIBUTION, importlib.metadata.version(CORE_DISTRIBUTION))
    loaded = [core, *(_load(plugin) for name, plugin in plugins.items() if name not in without)]
    return Registry(
        registered=tuple(entry for one in loaded for entry in one.registered),
        broken=tuple(broken for one in loaded for broken in one.broken),
        blocked=without,
    )


def _plugins() -> dict[str, importlib.metadata.Distribution]:
    """Return the distributions with an entry point of ours, by name; the first on sys.path wins.

    Files of other distributions are not parsed: a malformed one is none of our business.
    """
    found: dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        if f"[{ENTRY_POINT_GROUP}]" in (distribution.read_text("entry_points.txt") or ""):
            found.setdefault(_canonical(_metadata(distribution, "Name")), distribution)
    return dict(sorted(found.items()))


def _metadata(distribution: importlib.metadata.Distribution, key: str) -> str:
    """Return `Name` or `Version`; an interrupted installation leaves a folder without them."""
    try:
        return str(distribution.metadata[key] or "unknown")
    except (KeyError, TypeError, OSError):
        return "unknown"


def _load(plugin: importlib.metadata.Distribution) -> Registry:
    distribution, version = _metadata(plugin, "Name"), _metadata(plugin, "Version")
    try:
        return _collect(_entry_point(plugin).load(), distribution, version)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a plugin does, the others must work
        reason = str(error) if isinstance(error, _ContractError) else _described(error)
        one_line = " ".join(reason.split())
        return Registry(broken=(Broken(distribution=distribution, version=version, reason=one_line),))


def _entry_point(plugin: importlib.metadata.Distribution) -> importlib.metadata.EntryPoint:
    try:
        points = list(plugin.entry_points.select(group=ENTRY_POINT_GROUP))
    except (TypeError, ValueError) as error:
        raise _ContractError(f"its entry_points.txt is malformed: {error}") from error
    if len(points) != 1:
        raise _ContractError(f"has {len(points)} entry points in the group {ENTRY_POINT_GROUP!r}, not one")
    return points[0]


def _collect(module: object, distribution: str, version: str) -> Registry:
    """Validate a plugin module with pluggy and call its hooks."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    manager.register(module, name=distribution)
    _check_hooks(manager, module)
    entries = [
        Registered(kind=kind, component=_checked(component, kind), distribution=distribution, version=version)
        for kind, hook in KINDS.items()
        for component in _components(getattr(manager.hook, hook))
    ]
    names = [(entry.kind, entry.name) for entry in entries]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise _ContractError(f"registers the {repeated[0]} {repeated[1]!r} twice")
    return Registry(registered=tuple(entries))


def _check_hooks(manager: pluggy.PluginManager, module: object) -> None:
    """Refuse what pluggy passes over in silence: a misspelt, unmarked or missing hook."""
    callers = manager.get_hookcallers(module) or []
    for caller in callers:
        if not caller.has_spec():
            raise _ContractError(f"unknown hook {caller.name!r}{suggestion(caller.name, KINDS.values())}")
    marked = {caller.name for caller in callers}
    for hook in KINDS.values():
        if hook not in marked and callable(getattr(module, hook, None)):
            raise _ContractError(f"{hook} is not marked with altgrad_core.hookspecs.hookimpl")
    if not callers:
        raise _ContractError(f"implements no hook; the hooks are: {listed(KINDS.values())}")


def _components(hook: pluggy.HookCaller) -> Iterator[object]:
    """Yield what the hook returns; pluggy drops a None, and a wrapper's components, in silence."""
    results = hook()
    if len(results) < len(hook.get_hookimpls()):
        raise _ContractError(f"{hook.name} must return a list of Component, it returns None")
    for components in results:
        if not isinstance(components, Iterable):
            raise _ContractError(f"{hook.name} must return a list of Component, not {shown(components)}")
        yield from components


def _checked(component: object, kind: str) -> Component:
    hook = KINDS[kind]
    if not isinstance(component, Component):
        raise _ContractError(f"{hook} must return a list of Component, it holds {shown(component)}")
    name, options, target = component.name, component.options, component.target
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not name.isprintable():
        raise _ContractError(f"{hook}: the name {name!r} must be text without spaces, ':' and '/'")
    if name in RESERVED.get(kind, ()):
        raise _ContractError(f"{hook}: the name {name!r} means 'leave it alone'; choose another")
    if not isinstance(component.summary, str) or not component.summary.isprintable():
        raise _ContractError(f"{hook}: the summary of {name!r} must be one line of text")
    if not (isinstance(options, type) and attrs.has(options) and issubclass(options, Hashable)):
        raise _ContractError(
            f"{hook}: options of {name!r} must be a frozen attrs class, not {shown(options)}"
        )
    if not isinstance(target, str) or not _TARGET.fullmatch(target):
        raise _ContractError(f"{hook}: target of {name!r} must be 'package.module:attribute', not {target!r}")
    return component
