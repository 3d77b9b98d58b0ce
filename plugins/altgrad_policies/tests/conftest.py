"""A run as policies see it, made by hand, and formats to look up: no other plugin is needed."""

import functools
import math
from types import SimpleNamespace

import attrs
import pytest
import torch

from altgrad_core.format import Format
from altgrad_core.hookspecs import Component
from altgrad_core.options import MonitorChoice
from altgrad_core.quantizer import WeightQuantizer
from altgrad_core.recipe import Recipe
from altgrad_core.registry import Registered, Registry

ENDS = {
    "E5M2": (57344.0, 2.0**-16),
    "E3M4": (124.0, 2.0**-4),
    "E4M3": (448.0, 2.0**-9),
    "E7M0": (2.0**63, 2.0**-63),
    "BF16": (2.0**127, 2.0**-126),
}
"""Format to its largest and its smallest positive value: all of it that policies look at."""

MODULE = """
from altgrad_core.format import Format

def of(name, largest, smallest):
    globals()[name] = Format(name=name, bits=8, values=[-largest, -smallest, 0.0, smallest, largest])
"""


@pytest.fixture
def registry(tmp_path, monkeypatch):
    """A registry of these formats."""
    lines = [f"of({name!r}, {largest!r}, {smallest!r})" for name, (largest, smallest) in ENDS.items()]
    (tmp_path / "formats_of_policies.py").write_text("\n".join([MODULE, *lines]))
    monkeypatch.syspath_prepend(str(tmp_path))
    components = [Component(name=name, summary="", target=f"formats_of_policies:{name}") for name in ENDS]
    return Registry(
        registered=tuple(
            Registered(kind="format", component=one, distribution="formats", version="1")
            for one in components
        )
    )


@attrs.define
class HandMadeRun:
    """Layers and their formats; a switch is an assignment."""

    formats: dict[str, str | None]
    registry: Registry
    step: int = 0
    model: torch.nn.Module = attrs.field(factory=lambda: torch.nn.Linear(1, 1))
    warnings: list[str] = attrs.field(factory=list)
    monitors: dict[str, dict[str, str]] = attrs.field(factory=dict)
    """Options of its monitors, by name."""
    steps: int = 1000
    min_lr_ratio: float = 1.0
    lr_factor: float = 1.0
    optimizer: SimpleNamespace = attrs.field(
        factory=lambda: SimpleNamespace(param_groups=[{"lr": 1.0, "initial_lr": 1.0}])
    )

    @property
    def experiment(self):
        choices = [MonitorChoice(name, SimpleNamespace(**options)) for name, options in self.monitors.items()]
        train = SimpleNamespace(warmup_steps=0, min_lr_ratio=self.min_lr_ratio)
        return SimpleNamespace(monitor=choices, steps=self.steps, train=train)

    @property
    def layers(self):
        return {f"{layer}.weight": layer for layer in self.formats}

    @property
    def trained(self):
        return {f"{layer}.weight": weight_in(name) for layer, name in self.formats.items()}

    def warn(self, message):
        self.warnings.append(message)


def weight_in(name):
    weight = torch.nn.Parameter(torch.ones(1))
    if name is not None:
        WeightQuantizer(Recipe(format=ends(name))).attach(weight)
    return weight


@functools.cache
def ends(name):
    largest, smallest = ENDS[name]
    return Format(name=name, bits=8, values=[-largest, -smallest, 0.0, smallest, largest])


@pytest.fixture
def table():
    """Return a function from a name to a format with the true ends and nothing in between."""
    return ends


@pytest.fixture
def run_of(registry):
    """Return a function from `{layer: format}` to a run whose `formats` a test may change.

    monitors: name to options. Others have their defaults.
    """
    return lambda formats, **monitors: HandMadeRun(
        formats=dict(formats), registry=registry, monitors=monitors
    )


@pytest.fixture
def read():
    """Return a function that gives what `decide` reads in one step: healthy, unless told otherwise."""

    def read(loss=1.0, norm=1.0, **others):
        return {
            "train/loss": loss,
            "train/gradient_norm": norm,
            "train/loss_finite": float(math.isfinite(loss)),
            "train/gradient_finite": float(math.isfinite(norm)),
            **others,
        }

    return read
