"""Monitors and policies as they must be in a run."""

from __future__ import annotations

from typing import Any

import torch

from altgrad_core.cells import FAILED
from altgrad_core.deciding import READ_IN_EVERY_STEP
from altgrad_core.hookspecs import Monitor, Policy
from altgrad_core.registry import Registered, Registry, UsageError
from altgrad_core.step_seen import STEP_EXTRAS
from altgrad_core.testing.components import built, table_of
from altgrad_core.testing.expect import fail
from altgrad_core.testing.small_runs import STEPS, SmallRun, in_file, trained
from altgrad_core.watched import Watched
from altgrad_core.watching import EPOCH_SUMMARIES
from altgrad_core.wording import listed

RUN = f"a run of {STEPS} steps"
RESUMED = f"{RUN}, resumed after {STEPS // 2}"


def check_monitor(entry: Registered, registry: Registry) -> None:
    """a monitor stays in a small run to its end, and leaves its weights alone."""
    watched = _watched(entry, registry, Monitor, "needs and observe")
    if unknown := sorted(set(watched.needs()) - {*STEP_EXTRAS}):
        expected, fix = f"any of {', '.join(STEP_EXTRAS)}", "see altgrad_core.hookspecs.Step"
        fail(entry.name, "needs must be known", given="needs", expected=expected, seen=unknown, fix=fix)
    provides = getattr(watched.plugin, "provides", None) or {}
    if odd := {quantity: how for quantity, how in provides.items() if how not in EPOCH_SUMMARIES}:
        rule, fix = "provides must say how an epoch sums up", "see altgrad_core.hookspecs.Monitor"
        expected = f"any of {listed(map(repr, EPOCH_SUMMARIES))}"
        fail(entry.name, rule, given="provides", expected=expected, seen=odd, fix=fix)
    (seen, resumed), (alone, _) = (
        _trained(entry, registry, tables) for tables in (in_file("[[monitor]]", table_of(entry)), "")
    )
    for given, run in ((RUN, seen), (RESUMED, resumed)):
        if dropped := [one for one in run.warnings if one.startswith(f"{entry.name} of {entry.owner}")]:
            rule, fix = "a monitor must stay in the run", "what is seen names the method"
            fail(entry.name, rule, given=given, expected="no reason to drop it", seen=dropped[0], fix=fix)
    _expect_the_same(entry, _reported(entry, seen), _reported(entry, resumed))
    if not _alike(seen, alone):
        rule, fix = (
            "a monitor must leave the run alone",
            "clone what you change; draw from your own generator",
        )
        fail(entry.name, rule, given=RUN, expected="the weights without it", seen="others", fix=fix)


def check_fallback(entry: Registered, registry: Registry) -> None:
    """a policy lets a healthy run come to its end, and changes it by its answers alone."""
    watched = _watched(entry, registry, Policy, "needs and decide")
    needs = {*watched.needs()} - {*READ_IN_EVERY_STEP}
    names = sorted({need.partition("/")[0] for need in needs})
    monitors = "".join(in_file("[[monitor]]", {"plugin": one}) for one in names)
    seen, resumed = _trained(entry, registry, monitors + in_file("[[fallback]]", table_of(entry)))
    for given, run in ((RUN, seen), (RESUMED, resumed)):
        if run.outcome != "finished":
            rule, fix = (
                "a healthy run must come to its end",
                "act on what is wrong only, or raise the defaults",
            )
            fail(entry.name, rule, given=given, expected="finished", seen=run.outcome, fix=fix)
    if seen.actions != resumed.actions:
        rule, fix = "a policy must answer alike after a pause", "give state_dict() what it remembers"
        fail(entry.name, rule, given=RESUMED, expected=seen.actions, seen=resumed.actions, fix=fix)
    alone, _ = _trained(entry, registry, monitors)
    if not seen.actions and not _alike(seen, alone):
        rule, fix = "a policy must act by its answers alone", "answer with an action instead"
        fail(
            entry.name,
            rule,
            given=f"{RUN}, no answer",
            expected="the weights without it",
            seen="others",
            fix=fix,
        )


def _alike(one: SmallRun, other: SmallRun) -> bool:
    """Whether two runs have the same weights, bit for bit."""
    return all(torch.equal(value, other.weights[name]) for name, value in one.weights.items())


def _reported(entry: Registered, run: SmallRun) -> dict[str, Any]:
    """Return what a monitor has reported, by step and name."""
    return {
        f"{name} in step {line['step']}": value
        for line in run.metrics
        for name, value in line.items()
        if name.startswith(f"{entry.name}/")
    }


def _expect_the_same(entry: Registered, seen: dict[str, Any], resumed: dict[str, Any]) -> None:
    """Fail where a monitor says other things in a run that goes on from a checkpoint."""
    for name in seen.keys() | resumed.keys():
        first, again = seen.get(name), resumed.get(name)
        if first != again:
            rule = "a monitor must go on from a checkpoint as if there had been no pause"
            fix = "give state_dict() what it remembers, and take it up in load_state_dict()"
            fail(entry.name, rule, given=f"{name}, {RESUMED}", expected=first, seen=again, fix=fix)


def _watched(entry: Registered, registry: Registry, protocol: Any, methods: str) -> Watched:
    """Return a monitor or policy that has what the core asks of it before a run."""
    plugin, fix = built(entry, registry), f"see altgrad_core.hookspecs.{protocol.__name__}"
    if not isinstance(plugin, protocol):
        seen = type(plugin).__name__
        fail(entry.name, f"it must have {methods}", given="", expected=methods, seen=seen, fix=fix)
    try:
        return Watched(entry.name, entry.owner, plugin)
    except UsageError as error:
        rule = "every and needs must be what the contract says"
        fail(entry.name, rule, given="", expected="a whole number; names", seen=error, fix=fix)


def _trained(entry: Registered, registry: Registry, tables: str) -> tuple[SmallRun, SmallRun]:
    try:
        return trained(registry, tables)
    except FAILED as error:
        rule, fix = "nothing that a run calls may fail in a healthy one", "what is seen names the method"
        fail(entry.name, rule, given=RUN, expected="a run to its end", seen=error, fix=fix)
