"""The `[quantize]` tables: formats and scales of weights, input activations and output gradients. No torch.

What one option cannot know of another is in `conflicts`, as problems at their own place, so that a file is
told all of them at once; `altgrad_core.recipe` refuses the same combinations in Python.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias

import attrs

from altgrad_core.options import FieldError, FormatChoice, above, at_least, between, option, regexes
from altgrad_core.partial import known

UNQUANTIZED = FormatChoice("FP32")

FLOWS = ("activations", "gradients")
"""What is quantized on its way through a layer, as tables, rules and actions call it."""

_WeightMode: TypeAlias = Literal["adaptive", "current", "initial", "static"]

_WEIGHT_MODES: Mapping[str, tuple[_WeightMode, ...]] = {
    "grid": ("adaptive", "initial", "static"),
    "master": ("current", "initial", "static"),
}
"""Storage to the scale modes that go with it, the default first: how a scale follows its weight there."""

ON_GRID: Mapping[str, tuple[tuple[object, ...], str, str]] = {
    "granularity": (("none", "tensor"), "keeps one scale per weight", '"tensor"'),
    "scale_rule": (("fit",), "keeps scales that are fitted powers of two", '"fit"'),
    "clip_gradient": ((False,), "uses the weights as they are, so that none saturates", "false"),
}
"""Option to its values that go with grid storage, why no other does, and the value to use."""

_LONGEST_HISTORY = 65536
"""Steps; every flow of every layer keeps one number for each."""


@attrs.frozen(kw_only=True)
class ScaleOptions:
    """How a tensor is mapped onto a format's range: what weights, activations and gradients share."""

    granularity: Literal["none", "tensor", "channel", "block"] = option(
        "one scale per tensor, channel (row along the last dimension) or block of it; none: scale 1",
        default="tensor",
    )
    block: Literal[16, 32] = option('block length under granularity = "block"', unit="elements", default=32)
    block_scale: FormatChoice = option(
        "format of the blocks' scales, over one scale per tensor; E4M3 over blocks of 16 is NVFP4's",
        default=UNQUANTIZED,
    )
    scale_rule: Literal["fit", "ocp", "exact"] = option(
        "fit: the largest power of two that never saturates; ocp: that of OCP MX; exact: no power of two",
        default="fit",
    )
    amax: float = option(
        'magnitude that maps to the largest value; scale_mode = "static" only',
        default=0.0,
        validator=at_least(0),
    )
    margin: float = option("head room: amax is multiplied by it", default=1.0, validator=above(0))
    overflow: Literal["saturate", "ieee"] = option(
        "what happens beyond the largest value", default="saturate"
    )

    def _conflicts(self, scale_mode: str) -> Iterator[FieldError]:
        return conflicts(
            granularity=self.granularity,
            block_scale=None if self.block_scale.unquantized else self.block_scale.plugin,
            scale_rule=self.scale_rule,
            scale_mode=scale_mode,
            amax=self.amax,
            margin=self.margin,
        )


@attrs.frozen(kw_only=True)
class _FlowOptions(ScaleOptions):
    """What the two tables of flows, activations and gradients, share."""

    format: FormatChoice = option(
        "a name, or {exponent_bits, mantissa_bits, bias, specials}", default=UNQUANTIZED
    )
    scale_mode: Literal["delayed", "current", "static"] = option(
        "amax of the last steps, of this tensor, or given; default: delayed, current for channel and block",
        default=attrs.Factory(
            lambda table: "delayed" if table.granularity == "tensor" else "current", takes_self=True
        ),
    )
    amax_history: int = option(
        "how many steps' amax the delayed scale looks back on",
        unit="steps",
        default=16,
        validator=between(1, _LONGEST_HISTORY),
    )

    def conflicts(self) -> Iterator[FieldError]:
        """Yield what contradicts what within the table."""
        return self._conflicts(self.scale_mode)


@attrs.frozen(kw_only=True)
class ActivationOptions(_FlowOptions):
    """`[quantize.activations]`: the inputs of the quantized Linears."""

    rounding: Literal["nearest_even", "nearest_away", "toward_zero", "up", "down"] = option(
        "rounding in the forward pass", default="nearest_even"
    )
    clip_gradient: bool = option("elements that saturated get zero gradient", default=False)


@attrs.frozen(kw_only=True)
class GradientOptions(_FlowOptions):
    """`[quantize.gradients]`: the gradients of the quantized Linears' outputs."""

    rounding: Literal["nearest_even", "nearest_away", "toward_zero", "up", "down", "stochastic"] = option(
        "rounding in the backward pass", default="nearest_even"
    )


@attrs.frozen(kw_only=True)
class RuleOptions:
    """`[[quantize.rule]]`: what to do with the layers a regular expression matches."""

    layers: str = option("regex over full module paths", validator=regexes)
    format: FormatChoice | None = option("weights' format; default: that of [quantize]", default=None)
    storage: Literal["master", "grid"] | None = option("where the weights live", default=None)
    of_format: FormatChoice | None = option(
        "format whose geometry the weights take under quantize.format = FP32; default: the of_format of the "
        "optimizer's stiffness",
        default=None,
    )
    activations: FormatChoice | None = option(
        "inputs' format; default: that of [quantize.activations]", default=None
    )
    gradients: FormatChoice | None = option(
        "output gradients' format; default: that of [quantize.gradients]", default=None
    )

    def matches(self, layer: str) -> bool:
        return re.fullmatch(self.layers, layer) is not None


@attrs.frozen(kw_only=True)
class QuantizeOptions(ScaleOptions):
    """`[quantize]`: the weights of every Linear that no rule excludes."""

    format: FormatChoice = option(
        "a name, or {exponent_bits, mantissa_bits, bias, specials}; FP32: the weights stay as they are, and "
        "train at the optimizer's lr as quantized ones would"
    )
    storage: Literal["master", "grid"] = option(
        "master: float32 weights, quantized in the forward pass; grid: weights live on the grid",
        default="master",
    )
    storage_rounding: Literal["nearest_even", "stochastic", "error_feedback", "eco"] = option(
        "how grid weights are rounded after a step; error_feedback: to nearest, the residual is added before "
        "the next; eco: to nearest, the residual goes into the first moment",
        default="nearest_even",
    )
    residual_format: Literal["same"] | FormatChoice = option(
        "format of the residuals, in spacings of their weight; same: the weight's own; error_feedback only",
        default="same",
    )
    bound: float = option(
        "limit on |w| as a multiple of its initial rms, FP32 or not; 0: none",
        default=0.0,
        validator=at_least(0),
    )
    scale_mode: _WeightMode = option(
        "when the scale moves; grid: adaptive (default), initial or static; master: current (default), "
        "initial or static; where a rule names the other storage, its own default stands for this one's",
        default=attrs.Factory(lambda table: _WEIGHT_MODES[table.storage][0], takes_self=True),
    )
    rounding: Literal["nearest_even", "nearest_away", "toward_zero", "up", "down"] = option(
        "rounding of Q(w) in the forward pass (master)", default="nearest_even"
    )
    clip_gradient: bool = option("weights that saturated get zero gradient (master)", default=False)
    activations: ActivationOptions = option("the Linears' inputs", default=ActivationOptions())
    gradients: GradientOptions = option("the Linears' output gradients", default=GradientOptions())
    rule: tuple[RuleOptions, ...] = option("exceptions; the first match wins", default=())

    def mode_in(self, storage: str) -> _WeightMode:
        """Return the scale mode of the weights that live there, by this table or by a rule."""
        modes = _WEIGHT_MODES[storage]
        return self.scale_mode if self.scale_mode in modes else modes[0]

    def conflicts(self) -> Iterator[FieldError]:
        """Yield what contradicts what within the table, with paths below it."""
        return known(
            self._storage_conflicts(),
            self._residual_conflicts(),
            self._geometry_conflicts(),
            self._conflicts(self.scale_mode),
            *(self._off_the_grid(name) for name in ON_GRID),
            *(self._flow_conflicts(name) for name in FLOWS),
        )

    def _storage_conflicts(self) -> Iterator[FieldError]:
        if self.scale_mode not in _WEIGHT_MODES[self.storage]:
            yield FieldError(
                "scale_mode",
                f'"{self.scale_mode}" does not go with storage = "{self.storage}"; leave it out, or use '
                '"initial"',
            )

    def _residual_conflicts(self) -> Iterator[FieldError]:
        if self.residual_format != "same" and self.storage_rounding != "error_feedback":
            yield FieldError(
                "residual_format",
                f'goes with storage_rounding = "error_feedback", not "{self.storage_rounding}"; set that, or '
                "leave it out",
            )

    def _geometry_conflicts(self) -> Iterator[FieldError]:
        for index, rule in enumerate(self.rule):
            if rule.of_format is not None and not (rule.format is None and self.format.unquantized):
                yield FieldError(
                    ("rule", index, "of_format"),
                    'is the geometry of weights that take quantize.format = "FP32"; leave it out',
                )

    def _flow_conflicts(self, name: str) -> Iterator[FieldError]:
        for problem in getattr(self, name).conflicts():
            yield FieldError((name, *problem.path), str(problem))

    def _off_the_grid(self, name: str) -> Iterator[FieldError]:
        """Yield that grid storage cannot do an option, there, or at the rule that asks for the grid."""
        allowed, reason, way_out = ON_GRID[name]
        value = getattr(self, name)
        if value in allowed:
            return
        given = "true" if value is True else f'"{value}"'
        if self.storage == "grid":
            yield FieldError(
                name,
                f'{given} does not go with storage = "grid", which {reason}; use {way_out}, '
                'or storage = "master"',
            )
            return
        for index in self._rules_onto_the_grid():
            yield FieldError(
                ("rule", index, "storage"),
                f'"grid" {reason}, and quantize.{name} is {given}; use {name} = {way_out}, '
                'or storage = "master"',
            )

    def _rules_onto_the_grid(self) -> Iterator[int]:
        return (index for index, rule in enumerate(self.rule) if self.is_onto_the_grid(rule))

    def is_onto_the_grid(self, rule: RuleOptions) -> bool:
        """Whether a rule asks for the grid itself, of weights that have a format."""
        return rule.storage == "grid" and not (rule.format or self.format).unquantized


def conflicts(
    *,
    granularity: str,
    block_scale: str | None,
    scale_rule: str,
    scale_mode: str,
    amax: float,
    margin: float,
) -> Iterator[FieldError]:
    """Yield which of these options contradict one another, each at the option to change."""
    if block_scale is not None and granularity != "block":
        yield FieldError(
            "block_scale",
            f'"{block_scale}" needs granularity = "block", not "{granularity}"; set it, or leave block_scale '
            "out",
        )
    if block_scale is not None and scale_rule != "fit":
        yield FieldError(
            "scale_rule",
            f'"{scale_rule}" does not go with block_scale, whose scales have a rule of their own; leave one '
            "of them out",
        )
    if scale_mode in ("delayed", "static") and granularity != "tensor":
        yield FieldError(
            "scale_mode",
            f'"{scale_mode}" needs granularity = "tensor", not "{granularity}"; leave it out',
        )
    if scale_mode == "static" and not amax:
        yield FieldError(
            "amax", 'is missing: scale_mode = "static" needs the magnitude that maps to the largest value'
        )
    if scale_mode != "static" and amax:
        yield FieldError(
            "amax",
            f'goes with scale_mode = "static", not "{scale_mode}"; set that, or leave amax out',
        )
    marginless = {
        "block_scale": block_scale is not None,
        'scale_rule = "ocp"': scale_rule == "ocp",
        'granularity = "none"': granularity == "none",
    }
    if margin != 1 and any(marginless.values()):
        rule = next(name for name, holds in marginless.items() if holds)
        yield FieldError("margin", f"{margin:g} has no effect under {rule}; leave it out")
