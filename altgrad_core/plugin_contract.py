"""What a plugin's module must be like: validated by pluggy, and where pluggy passes over in silence, here."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping

import attrs
import pluggy

from altgrad_core.hookspecs import KINDS, PROJECT, Component, Hooks
from altgrad_core.wording import listed, shown, suggestion

RESERVED: Mapping[str, tuple[str, ...]] = {"format": ("FP32", "none")}
"""Kind to the names that mean no component: the formats "FP32" and "none" say `leave it alone`."""

_NAME = re.compile(r"[^\s:/]+")
_TARGET = re.compile(r"[\w.]+:\w+")


class ContractError(Exception):
    """A plugin module that breaks the contract in hookspecs.py."""


def components(module: object, distribution: str) -> list[tuple[str, Component]]:
    """Return what a plugin's module offers, with its kinds. Raises ContractError."""
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    manager.register(module, name=distribution)
    _check_hooks(manager, module)
    found = [
        (kind, _checked(component, kind))
        for kind, hook in KINDS.items()
        for component in _components(getattr(manager.hook, hook))
    ]
    names = [(kind, component.name) for kind, component in found]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise ContractError(f"registers the {repeated[0]} {repeated[1]!r} twice")
    return found


def _check_hooks(manager: pluggy.PluginManager, module: object) -> None:
    """Refuse what pluggy passes over in silence: a misspelt, unmarked or missing hook."""
    callers = manager.get_hookcallers(module) or []
    for caller in callers:
        if not caller.has_spec():
            raise ContractError(f"unknown hook {caller.name!r}{suggestion(caller.name, KINDS.values())}")
    marked = {caller.name for caller in callers}
    for hook in KINDS.values():
        if hook not in marked and callable(getattr(module, hook, None)):
            raise ContractError(f"{hook} is not marked with altgrad_core.hookspecs.hookimpl")
    if not callers:
        raise ContractError(f"implements no hook; the hooks are: {listed(KINDS.values())}")


def _components(hook: pluggy.HookCaller) -> Iterator[object]:
    """Yield what the hook returns; pluggy drops a None, and a wrapper's components, in silence."""
    results = hook()
    if len(results) < len(hook.get_hookimpls()):
        raise ContractError(f"{hook.name} must return a list of Component, it returns None")
    for components in results:
        if not isinstance(components, Iterable):
            raise ContractError(f"{hook.name} must return a list of Component, not {shown(components)}")
        yield from components


def _checked(component: object, kind: str) -> Component:
    hook = KINDS[kind]
    if not isinstance(component, Component):
        raise ContractError(f"{hook} must return a list of Component, it holds {shown(component)}")
    name, options, target = component.name, component.options, component.target
    if not isinstance(name, str) or not _NAME.fullmatch(name) or not name.isprintable():
        raise ContractError(f"{hook}: the name {name!r} must be text without spaces, ':' and '/'")
    if name in RESERVED.get(kind, ()):
        raise ContractError(f"{hook}: the name {name!r} means 'leave it alone'; choose another")
    if not isinstance(component.summary, str) or not component.summary.isprintable():
        raise ContractError(f"{hook}: the summary of {name!r} must be one line of text")
    if not (isinstance(options, type) and attrs.has(options) and issubclass(options, Hashable)):
        raise ContractError(f"{hook}: options of {name!r} must be a frozen attrs class, not {shown(options)}")
    if not isinstance(target, str) or not _TARGET.fullmatch(target):
        raise ContractError(f"{hook}: target of {name!r} must be 'package.module:attribute', not {target!r}")
    return component
