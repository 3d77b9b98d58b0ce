"""The kit against what a distribution has installed: every component, by what its kind must keep.

A component is built from its default options, and from the `example` of an option that has none. Formats,
formulas and optimizers go through the kit's checks. Monitors and policies are in a small run, which must come
to its end, with the weights of a run without the monitor. A data set must say the same each time, an executor
must return a result for each cell.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import attrs
import torch

from altgrad_core.format import Format
from altgrad_core.hookspecs import OptimizerInputs, Stiffness
from altgrad_core.registry import PluginError, Registered, Registry, UsageError
from altgrad_core.testing import ConformanceError
from altgrad_core.testing.components import NotCheckedError, built
from altgrad_core.testing.expect import fail
from altgrad_core.testing.formats import check_format
from altgrad_core.testing.optimizers import check_optimizer
from altgrad_core.testing.sources import check_dataset, check_executor
from altgrad_core.testing.stiffness import FORMATS, WeightUnits, check_stiffness
from altgrad_core.testing.watchers import check_fallback, check_monitor
from altgrad_core.wording import described

SHRINKS_TO = 0.9
"""Of a loss in a hundred steps: a default learning rate is right for larger models than the kit's."""

UNITS: Mapping[WeightUnits, str] = {
    "everywhere": "",
    "off zero": "in weight units but at 0",
    "nowhere": "a pure number, not in weight units",
}


@attrs.frozen(kw_only=True)
class Verdict:
    """What became of one component."""

    component: Registered
    outcome: Literal["ok", "failed", "not checked"]
    message: str = ""

    def __str__(self) -> str:
        line = f"{self.outcome:>11}  {self.component.kind} {self.component.name}"
        return f"{line}: {self.message}" if self.message else line


def check_plugin(distribution: str, registry: Registry) -> Iterator[Verdict]:
    """Check every component of an installed distribution, one after another.

    Raises UsageError where no usable plugin of that name is installed.
    """
    for entry in registry.of_distribution(distribution):
        yield _verdict(entry, registry)


def _verdict(entry: Registered, registry: Registry) -> Verdict:
    try:
        said = _CHECKS[entry.kind](entry, registry) or ""
    except (ConformanceError, PluginError) as error:
        return Verdict(component=entry, outcome="failed", message=str(error))
    except (NotCheckedError, UsageError) as error:
        return Verdict(component=entry, outcome="not checked", message=str(error))
    except Exception as error:  # noqa: BLE001 - whatever one component raises, the others are checked
        raised = described(error, entry.component.target)
        return Verdict(component=entry, outcome="failed", message=f"{entry.name}: raised {raised}")
    return Verdict(component=entry, outcome="ok", message=said)


def _format(entry: Registered, registry: Registry) -> None:
    format = built(entry, registry)
    if not isinstance(format, Format):
        fix = "see altgrad_core.hookspecs: what the target of each kind is"
        seen = type(format).__name__
        fail(entry.name, "it must be a format", given="", expected="a Format", seen=seen, fix=fix)
    check_format(format)


def _stiffness(entry: Registered, registry: Registry) -> str:
    """Check a formula on formats that it takes; returns its units, where they are not the weight's."""
    formula = built(entry, registry)
    takes = (one for one in (*FORMATS, *_installed_formats(registry)) if _takes(formula, one))
    formats = list(itertools.islice(takes, len(FORMATS)))
    if not formats:
        raise NotCheckedError("takes no format of the kit, nor one that is installed and has 8 bits or fewer")
    errors = []
    for units, said in UNITS.items():
        try:
            check_stiffness(formula, formats, weight_units=units)
        except ConformanceError as error:
            errors.append(error)
        else:
            return said
    raise errors[0]


def _installed_formats(registry: Registry) -> Iterator[Format]:
    """Yield the installed formats of up to 8 bits that can be built without options, lazily."""
    for entry in registry.of_kind("format"):
        if (entry.component.bits or 8) <= 8:
            with contextlib.suppress(NotCheckedError, ConformanceError, PluginError):
                yield built(entry, registry)


def _takes(formula: Stiffness, format: Format) -> bool:
    try:
        formula(torch.ones(1), format, 1.0)
    except ValueError:
        return False
    return True


def _optimizer(entry: Registered, registry: Registry) -> None:
    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        generator = torch.Generator().manual_seed(0)
        inputs = OptimizerInputs(groups=groups, generator=generator, registry=registry)
        optimizer: torch.optim.Optimizer = built(entry, registry, inputs)
        return optimizer

    make.__name__ = entry.name
    check_optimizer(make, shrinks_to=SHRINKS_TO)


_CHECKS: Mapping[str, Callable[[Registered, Registry], str | None]] = {
    "format": _format,
    "stiffness": _stiffness,
    "optimizer": _optimizer,
    "monitor": check_monitor,
    "fallback": check_fallback,
    "dataset": check_dataset,
    "executor": check_executor,
}
