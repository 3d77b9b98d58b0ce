"""The whole plugin contract, in one file.

A plugin is a Python distribution with one entry point in the group `altgrad`, whose value is a light
module (no torch). The module implements any of the hooks at the end of this file; each hook takes no
arguments and returns `Component` records. A component names its `target`, an object in another module
that may import torch; the core resolves it only when a run is assembled.

What the target of each kind is:

=============  =====================================================================================
kind           target
=============  =====================================================================================
`format`       a `Format`, or a callable `(options) -> Format`
`stiffness`    callable `(options) -> Stiffness`
`optimizer`    callable `(options, OptimizerInputs) -> torch.optim.Optimizer`
`monitor`      callable `(options) -> Monitor`
`fallback`     callable `(options) -> Policy`
`dataset`      callable `(options) -> TextSource | TokenSource`
`executor`     callable `(options) -> Executor`
=============  =====================================================================================

`options` is always an instance of the component's own frozen attrs class, already validated.

This module imports no torch, so that plugins can be listed in the blink of an eye.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import attrs
import pluggy

if TYPE_CHECKING:
    import numpy
    import torch
    from torch import Tensor

    from altgrad_core.format import Format
    from altgrad_core.registry import Registry

PROJECT = "altgrad"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@attrs.frozen(kw_only=True)
class NoOptions:
    """The options class of a component that has none."""


@attrs.frozen(kw_only=True)
class Component:
    """One thing a plugin offers: a format, an optimizer, a monitor, ..."""

    name: str
    """What an experiment file writes. Unique per kind; no colon, no slash."""
    summary: str
    """One line for `altgrad plugins`."""
    options: type = NoOptions
    """The frozen attrs class of the component's options; each field has `help` in its metadata."""
    target: str
    """`package.module:attribute`; imported only when a run is assembled."""
    source: str = ""
    """Where it comes from: a paper, a standard, a library."""
    bits: int | None = None
    """Formats: the width of a code. None: unknown before the target is loaded, taken as 8 or fewer."""


@attrs.frozen(kw_only=True)
class Weight:
    """One trained parameter after this step's update. Read it; never write it."""

    value: Tensor
    """The parameter's values, in its own shape and dtype. Under grid storage exactly on the grid."""
    layer: str
    """The module path the metric names use, such as `transformer.h.0.attn.c_attn`."""
    format: Format | None = None
    """None: not quantized."""
    scale: Tensor | None = None
    """0-d float32; the grid in weight units is `format.values / scale`."""
    storage: str = "master"
    """`master` or `grid`."""


@attrs.frozen(kw_only=True)
class Step:
    """One finished optimizer step, as monitors see it. Mappings are keyed by parameter name."""

    index: int
    """Optimizer steps completed, this one included: the first is 1."""
    loss: Tensor
    """0-d float32, mean over the micro-batches, in nats per token, or per label in classification."""
    weights: Mapping[str, Weight]
    gradients: Mapping[str, Tensor]
    """This step's gradients after clipping; parameters without one are absent."""
    before: Mapping[str, Tensor]
    """Quantized weights before the step; empty unless a monitor's `needs` lists `before`."""
    intended: Mapping[str, Tensor]
    """The update of quantized weights before rounding; empty unless a `needs` lists `intended`.
    This memory, and that of `before`, is written anew for the next step: clone what is to stay."""
    scales_before: Mapping[str, Tensor] = attrs.field(factory=dict)
    """The scales of the weights in `before` as the step began, before its forward pass: shaped as
    `Weight.scale`. Of a weight to which an action has given another format or scale since, that of `before`:
    what an action does is not the optimizer's step."""
    unrounded: Mapping[str, Tensor] = attrs.field(factory=dict)
    """Weights that a monitor looks on at as they land (`Onlooking`), but was not told of: what they were
    before they were rounded to their grids. Their scales then are among `scales_before`."""
    intended_in_rungs: bool = False
    """True where the optimizer moves whole rungs (GridOptim): `intended` is then in rungs."""
    counts: Mapping[str, tuple[Tensor, Tensor]] = attrs.field(factory=dict)
    """(flips, updates) that the optimizer counted itself, 0-d, by parameter name; usually empty."""


@runtime_checkable
class Monitor(Protocol):
    """Watches a run and reports numbers; changes nothing.

    Optional methods, called where they exist: `start(run)`, where a UsageError ends the run with its text;
    `logged(step, metrics)` after each line of metrics, with all of it; `evaluated(step, metrics)` after an
    evaluation, `end(run, outcome)`, and `state_dict()` / `load_state_dict(state)` for checkpoints;
    `skipped(step)`, in place of `observe` where the optimizer did not step, for what can be told without an
    update: it returns metrics as `observe` does. What raises costs the monitor its place in the run, and
    nothing else.

    Optional attributes: `every` (steps between observations, a whole number, default 1); `layers` (a regex
    over module paths, default all: what `needs` lists is kept of these alone); `undefined_is_nan` and
    `may_be_infinite` (see below); `provides`, a mapping of every quantity the monitor may report to how an
    epoch sums it up: `sum` or `mean` over the steps in which its `total` was observed and defined, unobserved
    steps counting for nothing, or an empty string: not at all. By it the needs of policies are checked before
    a run begins; where it is empty, the monitor reports nothing of its own.

    Numbers that are not finite: where the model is not (a weight of the metric's layer, or for any other name
    of the model, or the loss or the gradient of the step), they are logged as they are, and say so. Elsewhere
    NaN of a monitor with `undefined_is_nan = True` means that the quantity is not defined in this step: it is
    not logged. Infinity is logged of the quantities in `may_be_infinite`, a collection of names. Any other is
    a fault: as the line of metrics is written it costs the monitor its place.

    What an observation leaves out is not defined in that step: the summary holds what the last one said.
    A monitor that has nothing to report of the first step it sees is warned of.
    `cost/<monitor>` is the time of its methods, with its share of what the core prepares for monitors
    (`before`, the `Step`, the addresses for `landing`); what the optimizer or the storage does to keep
    `intended`, and what is counted while weights land, is part of the optimizer's step.
    """

    @property
    def needs(self) -> Collection[str]:
        """Any of `before`, `intended`: what `Step` must carry for this monitor.

        Or `landing`: the monitor has an attribute `landing`, an `Onlooking`. It is asked in runs whose
        weights land on their grids after the optimizer's step and leave no residual
        (`GridStorage.rounds_at_once`).
        """
        ...

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return metrics named `<monitor>/<quantity>/<layer>`, as 0-d device tensors or floats.

        Or as an `altgrad_core.observed.MetricTable`: one tensor for all, which costs less where there are
        many in every step.

        `<layer>` is a `Weight.layer`, or `total` for the whole model. Keep tensors on their device:
        the loop moves them to the host at the log interval, all monitors' in one transfer.
        """
        ...


class Onlooking(Protocol):
    """Wants to be told of weights while they land on their grids, and are in the processor's cache.

    What can be counted there costs no copy of the weights before the step, nor of their updates.
    """

    def onlookers(self, gradients: Mapping[str, Tensor]) -> Mapping[str, tuple[int, int] | None]:
        """Return, by parameter name, a C function of the type Look in loops.h and its context: addresses.

        Before the optimizer's step; gradients: of the weights on a grid, by name. Of a weight for which there
        is no function (None), and one that is not rounded in C, nobody is told: it is in `Step.unrounded`.
        """
        ...


@runtime_checkable
class Policy(Protocol):
    """Decides, between backward pass and optimizer step, whether something must be done.

    Optional methods, called where they exist: `start(run)`, `state_dict()`, `load_state_dict(state)`.
    Optional attribute `every`: `needs` are observed in every so many steps only, and in `metrics` in the step
    after each of those.
    """

    @property
    def needs(self) -> Collection[str]:
        """Names of monitor metrics that `decide` reads; they are then computed in every step.

        They are checked before the run begins, and read anew in every step: `start` may add to them. What was
        not observed in the step before is absent from `metrics`, whatever older value there is: after a step
        that was skipped, in the steps between two of `every`, and where the monitor left it out. So no
        observation is seen twice.
        """
        ...

    def decide(self, step: int, metrics: Mapping[str, float]) -> Action | None:
        """Return an action, or None to leave the decision to the next policy.

        `step` is the index the step will have. `metrics` holds `train/loss` and
        `train/gradient_norm` of this step (NaN and inf included), `train/loss_finite` and
        `train/gradient_finite` (0.0 or 1.0), and what `needs` lists, as observed after the step before.
        """
        ...


@attrs.frozen(kw_only=True)
class Action:
    """What a policy asks the loop to do; `reason` goes into the event log."""

    reason: str


@attrs.frozen(kw_only=True)
class SkipStep(Action):
    """Leave weights and optimizer as they are; the step counts, the learning-rate schedule moves on."""


@attrs.frozen(kw_only=True)
class ScaleLearningRate(Action):
    """Multiply every learning rate by `factor`, a finite number above 0, from this step on."""

    factor: float


@attrs.frozen(kw_only=True)
class ClipGradients(Action):
    """Clip this step's gradients to the global L2 `norm`, above 0, before the optimizer sees them."""

    norm: float


@attrs.frozen(kw_only=True)
class AdjustScale(Action):
    """Multiply the scale of some quantizers by `factor`, on top of what their scaling rule finds.

    Factors multiply up over a run; they are saved with it. Those of a weight end when its format is switched.
    In a step whose loss or gradient is not finite the optimizer does not step, as under SkipStep.
    """

    layers: str
    """Regex over full module paths of quantized Linears."""
    factor: float
    """A power of two, so that the grid stays the same up to its exponent."""
    of: str = "gradients"
    """Which tensors of these layers: `weights`, `activations` or `gradients`."""


@attrs.frozen(kw_only=True)
class SwitchFormat(Action):
    """Quantize the weights of some layers in another format from this step on.

    Scales are derived anew, weights stored on a grid are snapped to the new one (nearest even), the
    optimizer's moments stay as they are. An optimizer that lands on grids by itself has a method
    `regrid(weights)` for it, called after the change. Formats of more than 8 bits are stored as master. In a
    step whose loss or gradient is not finite the optimizer does not step, as under SkipStep.
    """

    layers: str
    """Regex over full module paths of quantized Linears."""
    to: str
    """The name of a registered format, or `none`: high precision."""


@attrs.frozen(kw_only=True)
class Stop(Action):
    """End the run after writing what there is; its outcome is `stopped`."""


@attrs.frozen(kw_only=True)
class OptimizerInputs:
    """Everything an optimizer plugin is built from, beside its own options."""

    groups: Sequence[dict[str, Any]]
    """As `altgrad_core.param_groups` returns them: `lr` is for the `covered` ones, AdamW for the others."""
    generator: torch.Generator
    """Seeds the optimizer's own random draws; drawn from once, at construction."""
    registry: Registry
    """Where other components, such as a stiffness formula, are looked up."""
    storage: str = "master"
    """Where quantized weights live: `master` or `grid`."""
    storage_rounding: str = "nearest_even"
    bound: float = 0.0
    """Limit on |w| as a multiple of the tensor's initial rms; 0: none."""
    scale_mode: str = "adaptive"
    covers: bool = True
    """Whether anything says which weights `lr` is for, trained or frozen: there is a [quantize]."""


class Stiffness(Protocol):
    """The local spacing of a format seen as a geometry, dw/du, in weight units, strictly positive.

    A formula is stateless. Its options class has no `of_format` and no `refresh`: in a file these two stand
    beside every formula's options and are the core's (`options.GeometryOptions`). Where they are used, an
    optimizer is handed an `altgrad_core.stiffness.Geometry` around the formula. That sees to `of_format`;
    its attribute `refresh` is the optimizer's to honor: `never` means to call it once per weight, before the
    first update, and to keep the result in the state that is saved.
    """

    def __call__(self, weight: Tensor, format: Format, scale: Tensor | float) -> Tensor:
        """Return the stiffness at `weight`, of its shape and dtype; the grid there is values/scale."""
        ...


@attrs.frozen
class Document:
    """One text of a data set, with the indices of its labels (empty where there are none)."""

    text: str
    labels: tuple[int, ...] = ()


@runtime_checkable
class TextSource(Protocol):
    """A data set of documents; the core tokenizes, caches and batches them.

    One whose documents have labels may have an int `label_count`: how many there are, whatever the largest
    index that occurs; 0 where that is not known. For classification its options class has it too, as a field,
    a property or a class variable: the size of the model follows from it before a document is read.

    It may have `refuse_absent()`, which raises within a second, and reads no document, where they cannot be
    had (a hub that does not answer): it is asked before torch is imported, where no cache has the tokens.
    """

    def fingerprint(self) -> str:
        """Identify the content: equal fingerprints mean equal documents, cheaply told."""
        ...

    def documents(self, split: str) -> Iterator[Document]:
        """Yield the documents of `train` or `validation`, in an order that never changes."""
        ...


@runtime_checkable
class TokenSource(Protocol):
    """A data set that is tokens already. Its options class has a `vocab_size` too."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def loss_floor(self) -> float | None:
        """The exact entropy of the source in nats per token, where it is known."""
        ...

    def fingerprint(self) -> str: ...

    def tokens(self, split: str) -> numpy.ndarray:
        """Return the 1-d unsigned tokens of `train` or `validation`."""
        ...


@attrs.frozen(kw_only=True)
class CellResult:
    """How one cell of a grid ended."""

    cell: str
    outcome: str
    """`finished`, `skipped` (was finished before), `busy` (another process runs it), `stopped`,
    `failed`, `interrupted` or `terminated`."""
    message: str = ""


class Executor(Protocol):
    """Runs the cells of a grid."""

    def run(self, cells: Sequence[str], run_cell: Callable[[str], CellResult], jobs: int) -> list[CellResult]:
        """Run every cell once and return one result each; a failing cell never stops the others.

        `run_cell` is picklable and may be called in another process.
        """
        ...


class Hooks:
    """What a plugin module may implement, each marked with `@hookimpl`."""

    @hookspec
    def altgrad_formats(self) -> list[Component]:  # type: ignore[empty-body]
        """Number formats."""

    @hookspec
    def altgrad_stiffness(self) -> list[Component]:  # type: ignore[empty-body]
        """Stiffness formulas."""

    @hookspec
    def altgrad_optimizers(self) -> list[Component]:  # type: ignore[empty-body]
        """Optimizers."""

    @hookspec
    def altgrad_monitors(self) -> list[Component]:  # type: ignore[empty-body]
        """Monitors."""

    @hookspec
    def altgrad_fallbacks(self) -> list[Component]:  # type: ignore[empty-body]
        """Fallback policies."""

    @hookspec
    def altgrad_datasets(self) -> list[Component]:  # type: ignore[empty-body]
        """Data sets."""

    @hookspec
    def altgrad_executors(self) -> list[Component]:  # type: ignore[empty-body]
        """Ways to run the cells of a grid."""


KINDS: Mapping[str, str] = {
    "format": "altgrad_formats",
    "stiffness": "altgrad_stiffness",
    "optimizer": "altgrad_optimizers",
    "monitor": "altgrad_monitors",
    "fallback": "altgrad_fallbacks",
    "dataset": "altgrad_datasets",
    "executor": "altgrad_executors",
}
"""Kind of component to the hook that registers it."""
