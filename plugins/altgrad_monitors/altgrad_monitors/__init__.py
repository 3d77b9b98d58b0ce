"""Monitors for AltGrad: their options, and their registration.

This module is light: the monitors themselves import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import attrs

from altgrad_core.hookspecs import Component, hookimpl
from altgrad_core.options import StiffnessChoice, at_least, between, option, regexes


@attrs.frozen(kw_only=True)
class MonitorOptions:
    """What every monitor can be told."""

    every: int = option("interval between observations", unit="steps", default=1, validator=at_least(1))
    layers: str = option(
        "regex over full module paths: the layers to observe", default=".*", validator=regexes
    )
    per: Literal["layer", "type"] = option(
        "one metric for each layer, or for each type of layer: attention, attention_output, mlp, "
        "classifier, embedding, other",
        default="layer",
    )


def _follows_the_weights(_: Any, field: Any, value: StiffnessChoice) -> None:
    if value.geometry.refresh != "step":
        raise ValueError("a monitor looks at the weights as they are; leave out refresh, or set it to 'step'")


@attrs.frozen(kw_only=True)
class FidelityOptions(MonitorOptions):
    """Two extra gradients of the whole step: the quantized one and the float32 reference."""

    every: int = option("interval between observations", unit="steps", default=100, validator=at_least(1))


@attrs.frozen(kw_only=True)
class FisherOptions(MonitorOptions):
    """The diagonal empirical Fisher beside the format's metric 1/S^2."""

    every: int = option("interval between observations", unit="steps", default=500, validator=at_least(1))
    batches: int = option("micro-batches whose gradients are squared", default=8, validator=at_least(1))
    formula: StiffnessChoice = option(
        "a stiffness formula, or a table with options: S",
        default=StiffnessChoice("grid"),
        validator=_follows_the_weights,
    )


@attrs.frozen(kw_only=True)
class KurtosisOptions(MonitorOptions):
    """Excess kurtosis of the Linears' inputs; `layers` are theirs."""

    every: int = option("interval between observations", unit="steps", default=100, validator=at_least(1))
    alert: float = option("excess kurtosis above which there is an alert", default=10.0)


@attrs.frozen(kw_only=True)
class AttentionEntropyOptions(MonitorOptions):
    """Mean entropy of causal attention; `layers` are its Linears, such as transformer.h.0.attn.c_attn."""

    every: int = option("interval between observations", unit="steps", default=100, validator=at_least(1))
    alert: float = option("mean entropy below which there is an alert", unit="nats", default=1.0)


@attrs.frozen(kw_only=True)
class WandbOptions:
    """Weights & Biases, beside the run folder; needs altgrad-monitors[wandb]."""

    every: int = option(
        "mirror the lines of metrics of steps that this divides",
        unit="steps",
        default=1,
        validator=at_least(1),
    )
    layers: str = option(
        "regex over full module paths: layers whose metrics are mirrored, beside those of no single layer",
        default=".*",
        validator=regexes,
    )
    mode: Literal["offline", "online", "disabled"] = option(
        "offline: into the run folder, for `wandb sync`; online: to the server as well; disabled: nothing",
        default="offline",
    )
    project: str = option("the W&B project", default="altgrad")
    entity: str | None = option("the W&B user or team; left out: your own default", default=None)
    patience: float = option(
        "how long the end of a run waits for W&B", unit="seconds", default=30.0, validator=at_least(0)
    )


@attrs.frozen(kw_only=True)
class RankOptions(MonitorOptions):
    """How often ranks are looked at, and what they are held against."""

    every: int = option("interval between checks", unit="steps", default=100, validator=at_least(1))
    baseline: str | None = option(
        "folder of a run whose rank averages are the reference for warnings; left out: this run's own after "
        "the warm-up",
        default=None,
    )
    warmup: int = option(
        "first step whose average may be the reference, without a baseline",
        unit="steps",
        default=100,
        validator=at_least(0),
    )


@attrs.frozen(kw_only=True)
class GradientOptions(MonitorOptions):
    """How often gradients are looked at, and when an element counts as dead."""

    every: int = option("interval between checks", unit="steps", default=10, validator=at_least(1))
    window: int = option(
        "an element is dead after so many checks in a row without a gradient",
        unit="checks",
        default=10,
        validator=between(1, 254),
    )


@attrs.frozen(kw_only=True)
class StiffnessOptions(MonitorOptions):
    """How often, and of which formula, the field is looked at."""

    every: int = option("interval between observations", unit="steps", default=100, validator=at_least(1))
    formula: StiffnessChoice = option(
        "a stiffness formula, or a table with options",
        default=StiffnessChoice("grid"),
        validator=_follows_the_weights,
    )


@attrs.frozen(kw_only=True)
class AlignmentOptions(MonitorOptions):
    """How the weights sit on their grids, which changes slowly."""

    every: int = option("interval between observations", unit="steps", default=100, validator=at_least(1))


@attrs.frozen(kw_only=True)
class MagnitudeOptions(MonitorOptions):
    """How large the weights are, which changes slowly."""

    every: int = option("interval between observations", unit="steps", default=100, validator=at_least(1))


@attrs.frozen(kw_only=True)
class UlpOptions(MonitorOptions):
    """As every monitor's; medians take their time."""

    every: int = option("interval between observations", unit="steps", default=100, validator=at_least(1))


@attrs.frozen(kw_only=True)
class PositionOptions(MonitorOptions):
    """As every monitor's; positions move slowly."""

    optimizer_options: ClassVar[Mapping[str, Any]] = {"track_position": True}
    """Options without which an optimizer keeps nothing to report."""

    every: int = option("interval between observations", unit="steps", default=100, validator=at_least(1))


@attrs.frozen(kw_only=True)
class RangeOptions(MonitorOptions):
    """How often roundings are counted, and how the averages of amax forget."""

    every: int = option("interval between observations", unit="steps", default=10, validator=at_least(1))
    alpha: float = option(
        "weight of the newest amax in its average over the observed steps",
        default=0.1,
        validator=between(0, 1),
    )


@hookimpl
def altgrad_monitors() -> list[Component]:
    return [
        Component(
            name="flip",
            summary="codes that changed in a step, and elements that had a gradient",
            options=MonitorOptions,
            target="altgrad_monitors.flip:Flip",
        ),
        Component(
            name="stall",
            summary="share of updates that changed no code, beside what chance predicts",
            options=MonitorOptions,
            target="altgrad_monitors.stall:Stall",
        ),
        Component(
            name="descent",
            summary="how much of the intended update arrives in the weights",
            options=MonitorOptions,
            target="altgrad_monitors.descent:Descent",
        ),
        Component(
            name="range",
            summary="overflow, underflow and non-finite elements wherever something is rounded",
            options=RangeOptions,
            target="altgrad_monitors.range:Range",
        ),
        Component(
            name="fidelity",
            summary="the quantized gradient beside a float32 one: cosine and SNR",
            options=FidelityOptions,
            target="altgrad_monitors.fidelity:Fidelity",
        ),
        Component(
            name="fisher",
            summary="rank correlation of the loss's empirical Fisher with the format's metric 1/S^2",
            options=FisherOptions,
            target="altgrad_monitors.fisher:Fisher",
        ),
        Component(
            name="kurtosis",
            summary="excess kurtosis of the activations, with an alert",
            options=KurtosisOptions,
            target="altgrad_monitors.kurtosis:Kurtosis",
        ),
        Component(
            name="attention_entropy",
            summary="mean entropy of attention, with an alert",
            options=AttentionEntropyOptions,
            target="altgrad_monitors.attention_entropy:AttentionEntropy",
            source="arXiv 2303.06296",
        ),
        Component(
            name="wandb",
            summary="mirrors every metric to Weights & Biases",
            options=WandbOptions,
            target="altgrad_monitors.wandb:Wandb",
        ),
        Component(
            name="rank",
            summary="stable and effective rank of the weight matrices, and a warning where they collapse",
            options=RankOptions,
            target="altgrad_monitors.rank:Rank",
            source="Rudelson & Vershynin 2007; Roy & Vetterli 2007",
        ),
        Component(
            name="gradient",
            summary="size of the gradients, their signal-to-noise ratio, and elements that do not move",
            options=GradientOptions,
            target="altgrad_monitors.gradient:Gradient",
        ),
        Component(
            name="stiffness",
            summary="distribution of the local spacing S, and its correlation with the gradients",
            options=StiffnessOptions,
            target="altgrad_monitors.stiffness:StiffnessField",
        ),
        Component(
            name="alignment",
            summary="distance of the weights to their grid, and how they use its codes",
            options=AlignmentOptions,
            target="altgrad_monitors.alignment:Alignment",
        ),
        Component(
            name="magnitude",
            summary="how large the weights are, and whether they run away or collapse",
            options=MagnitudeOptions,
            target="altgrad_monitors.magnitude:Magnitude",
        ),
        Component(
            name="ulp",
            summary="how far a step moves the weights, in spacings; rounding noise; sign changes",
            options=UlpOptions,
            target="altgrad_monitors.ulp:Ulp",
        ),
        Component(
            name="position",
            summary="how far weights have moved since the beginning, in spacings, and their rungs",
            options=PositionOptions,
            target="altgrad_monitors.position:Position",
        ),
        Component(
            name="oscillation",
            summary="share of weights that go back and forth between grid values",
            options=MonitorOptions,
            target="altgrad_monitors.oscillation:Oscillation",
            source="arXiv 2203.11086",
        ),
    ]
