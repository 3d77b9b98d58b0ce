"""What is installed: discovery of plugins, look-up of their components, collisions, broken plugins.

`altgrad_core.plugin_contract` validates and calls the hooks. Finding the entry points is done here,
because pluggy's own loader stops at the first broken plugin without naming it and drops one of two entry
points of the same name.
No torch is imported: a component's target is resolved only by `Registered.load`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs

from altgrad_core import builtin, plugin_contract
from altgrad_core.columns import aligned
from altgrad_core.hookspecs import KINDS, Component
from altgrad_core.plugin_contract import RESERVED, ContractError
from altgrad_core.wording import described, listed, shown, suggestion

ENTRY_POINT_GROUP = "altgrad"
WITHOUT_VARIABLE = "ALTGRAD_WITHOUT"
CORE_DISTRIBUTION = "altgrad-core"

REFUSALS: Mapping[str, tuple[type[Exception], ...]] = {"dataset": (ValueError, OSError)}
"""Kind to the errors by which its components refuse what a user gave them, data that are absent or odd."""


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
                f"{self.title}: its target {self.component.target!r} cannot be loaded: "
                f"{described(error, module)}"
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
            reason = described(error, self.component.target)
            raise PluginError(f"{self.title} cannot be built: {reason}") from error


@attrs.frozen(kw_only=True)
class Broken:
    """A plugin that is installed and cannot be used."""

    distribution: str
    version: str
    reason: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.reason})"


@attrs.frozen(kw_only=True, cache_hash=True, repr=False)
class Registry:
    """Every component of every usable plugin; in a notebook, what `altgrad plugins` prints of them."""

    registered: tuple[Registered, ...] = ()
    broken: tuple[Broken, ...] = ()
    blocked: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Registered]:
        return iter(self.registered)

    def __len__(self) -> int:
        return len(self.registered)

    def __repr__(self) -> str:
        return "\n".join(self.lines())

    def lines(self, kind: str | None = None) -> Iterator[str]:
        """Yield what is installed, of one kind or all; what is broken, in conflict or left out with why."""
        entries = self._in_order(kind)
        rows = [(entry.kind, entry.name, entry.owner, entry.component.summary) for entry in entries]
        yield from aligned(rows, indent="")
        if not entries:
            yield f"no {kind or 'plugin'} is installed"
        for broken in self.broken:
            yield f"\nbroken: {broken}"
        for owners in self.conflicts():
            what = f"{owners[0].kind} {owners[0].name!r}"
            yield f"\nconflict: {what} is owned by {_choices(owners)}"
        if self.blocked:
            yield f"\nleft out: {listed(self.blocked)}"

    def plain(self, kind: str | None = None) -> dict[str, Any]:
        """Return what `lines` tells, for JSON."""
        return {
            "components": [
                {
                    "kind": entry.kind,
                    "name": entry.name,
                    "summary": entry.component.summary,
                    "distribution": entry.distribution,
                    "version": entry.version,
                }
                for entry in self._in_order(kind)
            ],
            "broken": [attrs.asdict(broken) for broken in self.broken],
            "conflicts": [
                {
                    "kind": owners[0].kind,
                    "name": owners[0].name,
                    "distributions": [entry.distribution for entry in owners],
                }
                for owners in self.conflicts()
            ],
            "left_out": list(self.blocked),
        }

    def _in_order(self, kind: str | None) -> list[Registered]:
        """Return the components of one kind or all, kind by kind."""
        return [entry for one in KINDS if kind in (None, one) for entry in self.of_kind(one)]

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
        raise ConflictError(f"{kind} {bare!r} is owned by {_choices(owners)}")

    def find_of_any_kind(self, name: str) -> list[Registered]:
        """Return the components called `name`, or `distribution:name`: one of each kind that has it.

        Raises NotFoundError where none has, ConflictError as `find` does.
        """
        found = []
        for kind in KINDS:
            with contextlib.suppress(NotFoundError):
                found.append(self.find(kind, name))
        if found:
            return found
        known = {entry.name for entry in self.registered}
        hint = suggestion(name, sorted(known)) or "; `altgrad plugins` lists what there is"
        broken = f"; broken plugins, where it may be: {listed(map(str, self.broken))}" if self.broken else ""
        raise NotFoundError(f"nothing named {name!r} is installed{hint}{broken}")

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


def _choices(owners: Sequence[Registered]) -> str:
    """Return the owners of one name, and how to say which of them is meant."""
    both = " and ".join(entry.owner for entry in owners)
    choices = " or ".join(f'plugin = "{entry.distribution}:{entry.name}"' for entry in owners)
    return f"{both}; say which: {choices}"


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
    core = _collected(builtin, CORE_DISTRIBUTION, importlib.metadata.version(CORE_DISTRIBUTION))
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
    module = ""
    try:
        point = _entry_point(plugin)
        module = point.module
        return _collected(point.load(), distribution, version)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a plugin does, the others must work
        reason = str(error) if isinstance(error, ContractError) else described(error, module)
        one_line = " ".join(reason.split())
        return Registry(broken=(Broken(distribution=distribution, version=version, reason=one_line),))


def _entry_point(plugin: importlib.metadata.Distribution) -> importlib.metadata.EntryPoint:
    try:
        points = list(plugin.entry_points.select(group=ENTRY_POINT_GROUP))
    except (TypeError, ValueError) as error:
        raise ContractError(f"its entry_points.txt is malformed: {error}") from error
    if len(points) != 1:
        raise ContractError(f"has {len(points)} entry points in the group {ENTRY_POINT_GROUP!r}, not one")
    return points[0]


def _collected(module: object, distribution: str, version: str) -> Registry:
    found = plugin_contract.components(module, distribution)
    return Registry(
        registered=tuple(
            Registered(kind=kind, component=component, distribution=distribution, version=version)
            for kind, component in found
        )
    )
