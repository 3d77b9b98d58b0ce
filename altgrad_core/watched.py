"""A monitor or policy in a run: its contract checked, and what errors and checkpoints call it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import attrs

from altgrad_core.registry import PluginError, UsageError
from altgrad_core.wording import described

ALL_LAYERS = ".*"
"""What a monitor looks at that names no layers."""


@attrs.define(eq=False)
class Watched:
    """A monitor or policy in a run, with what errors and checkpoints call it."""

    name: str
    owner: str
    plugin: Any
    seconds: float = 0.0
    known: set[str] = attrs.field(factory=set)
    """Metrics whose names were found right."""
    places: Mapping[str, int] | None = None
    """The names of its last `MetricTable`, and where they are."""
    onlookers: Mapping[str, Any] = attrs.field(factory=dict)
    """What its `landing` returned last, found right."""
    onlookers_by_weight: Mapping[Any, Any] = attrs.field(factory=dict)
    """The same by Parameter."""
    looked: bool = False
    """Whether it has observed a step of this run."""
    reported: int = 0
    """The last step of which it has reported; 0: none."""

    def __attrs_post_init__(self) -> None:
        """Raise UsageError where `every`, `provides` or `needs` is not what the contract says."""
        every = getattr(self.plugin, "every", 1)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UsageError(
                f"{self.name} of {self.owner}: every is {every!r}; it must be a whole number from 1"
            )
        provides = getattr(self.plugin, "provides", None)
        if provides is not None and not isinstance(provides, Mapping):
            raise UsageError(
                f"{self.name} of {self.owner}: provides is {provides!r}; it must be a table of quantities"
            )
        self.needs()

    def needs(self) -> tuple[str, ...]:
        """Return the plugin's `needs` as of now. Raises UsageError where they are no names."""
        try:
            found = self.plugin.needs
        except (Exception, SystemExit) as error:
            raise UsageError(self.error("needs", error)) from error
        if isinstance(found, str) or not isinstance(found, Collection):
            raise UsageError(
                f"{self.name} of {self.owner}: needs is {found!r}; it must be a collection of names"
            )
        return tuple(found)

    @property
    def layers(self) -> str:
        """The regex over module paths of the layers that it looks at."""
        found = getattr(self.plugin, "layers", ALL_LAYERS)
        return found if isinstance(found, str) else ALL_LAYERS

    def reports(self, name: str) -> bool:
        """Whether a metric is its own, or what an epoch or the clock says of it."""
        return f"{name}/".startswith((f"{self.name}/", f"epoch/{self.name}/", f"cost/{self.name}/"))

    def error(self, method: str, error: BaseException) -> str:
        if isinstance(error, PluginError):
            return f"{self.name} of {self.owner}: {error}"  # which says what cannot be loaded or built
        raised = described(error, type(self.plugin).__module__)
        return f"{self.name} of {self.owner}: {method} raised {raised}"


class PluginFailure(RuntimeError):
    """A policy raised, or a monitor wrote: the run ends, and the message names the plugin."""
