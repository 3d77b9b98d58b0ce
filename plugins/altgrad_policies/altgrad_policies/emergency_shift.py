"""`emergency_shift`: where training does not go on in a format, its layers move to the next one of a chain.

Two signs, each with its own count:

not finite  `nan_patience` losses or gradients in a row that are not finite. The steps before the last of
            them are skipped, so that the weights stay finite; the last one moves the layers.
stall       the average over the last `patience` steps that have one is above `stall_threshold`. NaN means
            that a step has none (nothing was to be updated): it is neither healthy nor stalled.

With `measure = "descent"` the stall is 1 - descent/delivered, the share of the intended update that neither
arrives nor is kept for later: near 1 where rounding to nearest loses the updates; near 0 under float32
masters, stochastic rounding, error feedback, ECO and GridOptim, however few codes change.
With "ratio" it is 1 - flips/updates, AltGrad's founding rule: near 1 in every healthy run whose steps are
smaller than the format's spacing. It is there to be compared with.

It is not looked at in steps at less than `schedule_floor` of the schedule's highest learning rate: at the end
of a schedule the steps are meant to be small, and what a grid then loses of them is no emergency. The
founding rule looks at every step.

A model with one format is judged by the `total`, one with several by the mean over the layers of each. A
stalled format takes all its layers along; its count, and that of the format they come to, start again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from altgrad_core.hookspecs import Action, SkipStep, Stop, SwitchFormat
from altgrad_core.loop import learning_rate_factor
from altgrad_policies import STOP, EmergencyShiftOptions
from altgrad_policies.nan_guard import not_finite
from altgrad_policies.quantized_layers import (
    by_format,
    looked_up,
    named,
    of_layers,
    refuse_types,
    refuse_unwatched,
    watched,
)

_METRICS = {"descent": "descent/delivered", "ratio": "stall/stall_ratio"}


class EmergencyShift:
    """Counts non-finite steps, and averages the stall of each format; see the module's text."""

    def __init__(self, options: EmergencyShiftOptions) -> None:
        self.options = options
        self.metric = _METRICS[options.measure]
        self.consecutive = 0
        self.stalls: dict[str, list[float]] = {}
        """Format to its newest stalls, at most `patience` of them."""
        self.layers: dict[str, list[str]] = {}
        """Format to its layers, as of the last step that was looked at."""
        self.told_apart = False
        """Whether a metric of a single layer has ever come in."""
        self._run: Any = None

    @property
    def needs(self) -> tuple[str, ...]:
        """The total; from the start of a run with several formats on, each of their layers too."""
        formats = by_format(self._run) if self._run is not None else {}
        layers = [layer for one in formats.values() for layer in one] if len(formats) > 1 else []
        return tuple(f"{self.metric}/{layer}" for layer in ("total", *layers))

    def start(self, run: Any) -> None:
        """Look up every format that the chain may come to.

        Raises UsageError for an unknown one, and for a monitor that tells nothing of the layers.
        """
        self._run = run
        if run.step == 0:
            self._check_monitor(run)
        for name in by_format(run):
            passed = {name}
            while (following := self._after(name)) is not None and following not in passed:
                passed.add(following)
                name = looked_up(run, following, "emergency_shift: chain")

    def _check_monitor(self, run: Any) -> None:
        """Refuse what would never be decided, and warn of what is not looked at."""
        formats, monitor = by_format(run), self.metric.partition("/")[0]
        layers = [layer for one in formats.values() for layer in one]
        refuse_unwatched(run, "emergency_shift", monitor, layers, each=len(formats) > 1)
        for name, one in formats.items():
            if not watched(run, monitor, one):
                run.warn(f"emergency_shift does not judge {name}: {monitor!r} observes none of its layers")
        if not formats:
            run.warn("emergency_shift has no format to move: no weights are quantized")
        elif (judged := self._judged(run)) < self.options.patience:
            run.warn(
                f"emergency_shift will not judge the stall: {judged} steps of the run are looked at, "
                f"patience is {self.options.patience}; lower it, warmup or schedule_floor"
            )

    def _judged(self, run: Any) -> int:
        """Return how many steps of the run are looked at; no more than `patience` are counted."""
        options, train = self.options, run.experiment.train
        floor = options.schedule_floor if options.measure == "descent" else 0.0
        steps = (
            step
            for step in range(options.warmup + 1, run.experiment.steps)  # read as the next one begins
            if learning_rate_factor(step, run.experiment.steps, train.warmup_steps, train.min_lr_ratio)
            >= floor
        )
        return sum(1 for _ in itertools.islice(steps, options.patience))

    def decide(self, step: int, metrics: Mapping[str, float]) -> Action | None:
        """Return SwitchFormat for the layers of one format, Stop at the chain's end, or None."""
        formats = by_format(self._run)
        if not (metrics["train/loss_finite"] and metrics["train/gradient_finite"]):
            return self._not_finite(formats, metrics)
        self.consecutive = 0
        self._remember(step, formats, metrics)
        for name in formats:
            stall = self._average(name)
            if stall is not None and stall > self.options.stall_threshold:
                return self._shift(name, formats[name], self._stalled(name, stall))
        return None

    def _not_finite(self, formats: Mapping[str, list[str]], metrics: Mapping[str, float]) -> Action:
        self.consecutive += 1
        what, value = not_finite(metrics)
        patience = self.options.nan_patience
        if self.consecutive < patience:
            return SkipStep(
                reason=f"the {what} is not finite ({value}), {self.consecutive} of {patience} in a row"
            )
        self.consecutive = 0
        why = f"the {what} was not finite ({value}) for {patience} steps in a row"
        if not formats:
            return Stop(reason=f"{why}, and no weights are quantized")
        name = next((one for one in formats if self._after(one) is not None), next(iter(formats)))
        return self._shift(name, formats[name], why)

    def _remember(self, step: int, formats: Mapping[str, list[str]], metrics: Mapping[str, float]) -> None:
        """Add what the step before has reported; a format whose layers have changed starts again."""
        same = {name for name in formats if formats[name] == self.layers.get(name)}
        self.stalls = {name: self.stalls.get(name, []) if name in same else [] for name in formats}
        self.layers = {name: list(layers) for name, layers in formats.items()}
        if step - 1 <= self.options.warmup or (self.options.measure == "descent" and self._winding_down()):
            return
        self._check_layers(metrics)
        for name in formats:
            stall = self._stall(name, metrics)
            if math.isfinite(stall):
                self.stalls[name] = [*self.stalls[name], stall][-self.options.patience :]

    def _winding_down(self) -> bool:
        """Whether the schedule has brought the learning rate below the share that is looked at."""
        group = self._run.optimizer.param_groups[0]
        highest: float = group["initial_lr"] * self._run.lr_factor
        return bool(group["lr"] < self.options.schedule_floor * highest)

    def _check_layers(self, metrics: Mapping[str, float]) -> None:
        """Raise ValueError where several formats are in use and no layer has ever reported."""
        if len(self.layers) > 1 and not self.told_apart:
            layers = [layer for one in self.layers.values() for layer in one]
            refuse_types(self.metric, layers, metrics)
            self.told_apart = bool(of_layers(self.metric, layers, metrics))

    def _stall(self, name: str, metrics: Mapping[str, float]) -> float:
        """Return the format's stall in the step before, NaN where it is not defined."""
        if len(self.layers) == 1:
            value = metrics.get(f"{self.metric}/total", math.nan)
        else:
            found = of_layers(self.metric, self.layers[name], metrics).values()
            values = [value for value in found if math.isfinite(value)]
            value = math.fsum(values) / len(values) if values else math.nan
        return 1 - value if self.options.measure == "descent" else value

    def _average(self, name: str) -> float | None:
        stalls = self.stalls[name]
        return math.fsum(stalls) / len(stalls) if len(stalls) == self.options.patience else None

    def _stalled(self, name: str, stall: float) -> str:
        what = "1 - descent/delivered" if self.options.measure == "descent" else "the stall ratio"
        return (
            f"{what} of {name} was {stall:.3g} on average over {self.options.patience} steps, "
            f"above {self.options.stall_threshold:g}"
        )

    def _after(self, name: str) -> str | None:
        """Return the format that follows, None at the chain's end."""
        following = self.options.chain.get(name, STOP)
        return None if following == STOP else following

    def _shift(self, name: str, layers: list[str], why: str) -> Action:
        following = self._after(name)
        if following is None:
            return Stop(reason=f"{why}, and no format follows {name} in the chain")
        return SwitchFormat(layers=named(layers), to=following, reason=f"{why}; {name} -> {following}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "consecutive": self.consecutive,
            "stalls": self.stalls,
            "layers": self.layers,
            "told_apart": self.told_apart,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.consecutive, self.told_apart = state["consecutive"], state["told_apart"]
        self.stalls, self.layers = dict(state["stalls"]), dict(state["layers"])
