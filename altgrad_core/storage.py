"""Weights that live on their format's grid, behind any torch optimizer.

`store_on_grid(optimizer)` snaps the quantized weights once and adds a hook after each step: scale, round,
bound. There is no float32 master then: an update below half a spacing is lost under `nearest_even`, and
arrives on average under `stochastic`. Two more ways round to nearest and give the residual back:
`error_feedback` keeps it and adds it before the next step, `eco` puts it into the optimizer's first moment.
`GridScales` is the part that GridOptim shares, which lands on the grid by itself.

Rounding draws are a pure function of (seed, step, tensor, element): see `random_bits`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from altgrad_core import native_landing, scaling
from altgrad_core.error_compensation import ErrorCompensation
from altgrad_core.error_feedback import ErrorFeedback
from altgrad_core.format import Format
from altgrad_core.grid_scales import OF_THE_WEIGHT, GridScales
from altgrad_core.grid_weights import first_grid_weights, grid_weights, quantizer_on_grid
from altgrad_core.kernels import not_compiled
from altgrad_core.landing_counts import LandingCounts
from altgrad_core.lookup import format_or_none
from altgrad_core.on_grids import OnGrids
from altgrad_core.quantizer import quantizer_of
from altgrad_core.random_bits import draw_seed, stream_key_table
from altgrad_core.recipe import refuse_off_grid
from altgrad_core.rows import among
from altgrad_core.storage_options import refuse_bad_options


class GridStorage:
    """Keeps an optimizer's quantized weights on their grids; made by `store_on_grid`.

    torch does not copy an optimizer's hooks: deepcopy or pickle model, optimizer and storage together, as
    one tuple, and the copy keeps its own weights on their grids. In a copy of the model alone nothing does:
    it is stored as master, and its forward pass quantizes.

    Weights that are loaded into the model are used as they are until the next step. Load them before
    `store_on_grid`, or call `snap()`; a checkpoint's are on their grids under the scales of its state.

    Quantized weights of a group that is added to the optimizer later are snapped before its next step.

    A weight whose format or scale is changed within `regridding` goes on on its new grid. Its bound stays the
    multiple of its initial rms that it was. Where a weight leaves, those after it draw from other streams.

    Attributes:
        weights: the Parameters on the grid, in the order of their random streams.
        scales: their `GridScales`; `scales.rescales` counts changes of scale.
        watched: set to a mapping from Parameter to its value before the step, and the next step leaves the
            update before rounding in `intended`, keyed alike. Residuals are no part of an update.
        onlookers: set to whom the next step is to tell of weights while they land, one mapping from Parameter
            to `Onlooker` for each that looks on; None for a weight of which none can be told.
        unrounded: weights of these of which nobody was told in the step, to copies of what they were before
            the rounding, with their scales then.
        feedback: the residuals that `error_feedback` keeps; None under other roundings.
        ranges: what counts what landing cuts off, while a monitor asks for it; None otherwise.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        rounding: str,
        seed: int,
        bound: float,
        scale_mode: str,
        residual_format: Format | str | None = "same",
    ) -> None:
        self.optimizer = optimizer
        self.rounding = rounding
        self.seed = seed
        self.counter = 0
        self.watched: dict[Tensor, Tensor] = {}
        self.intended: dict[Tensor, Tensor] = {}
        self.onlookers: Sequence[Mapping[Tensor, native_landing.Onlooker | None]] = ()
        self.unrounded: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self.ranges: LandingCounts | None = None
        self._bound, self._scale_mode, self._residual_format = bound, scale_mode, residual_format
        self._groups = len(optimizer.param_groups)
        self._take(first_grid_weights(optimizer))
        self.snap()
        self._claim()
        self._hook()

    def _take(self, weights: Sequence[nn.Parameter]) -> None:
        """Keep these weights from here on, by what their quantizers say now."""
        self.weights = list(weights)
        self._quantizers = [quantizer_on_grid(weight) for weight in self.weights]
        for quantizer in self._quantizers:
            refuse_off_grid(quantizer.recipe)
        self._formats = [quantizer.format for quantizer in self._quantizers]
        self.feedback = self._compensation = None
        if self.rounding == "error_feedback":
            self.feedback = ErrorFeedback(self.weights, self._formats, self._residual_format)
        elif self.rounding == "eco":
            self._compensation = ErrorCompensation(self.optimizer, self.weights, self._formats)

    def _newcomers(self) -> list[nn.Parameter]:
        """Return quantized weights of groups that were added to the optimizer since the last step."""
        if len(self.optimizer.param_groups) == self._groups:
            return []
        self._groups = len(self.optimizer.param_groups)
        known = {id(weight) for weight in self.weights}
        return [weight for weight in grid_weights(self.optimizer) if id(weight) not in known]

    def snap(self) -> None:
        """Round the weights to nearest, under scales and bounds fitted to them now, as at the beginning."""
        self._begun = False
        self.scales = self._fitted_scales()
        self._round("nearest_even", range(len(self.weights)), self.feedback or self._compensation)

    def _fitted_scales(self) -> GridScales:
        return GridScales(
            [weight.detach() for weight in self.weights],
            self._formats,
            [quantizer.scale for quantizer in self._quantizers],
            fitted=[quantizer.fitted for quantizer in self._quantizers],
            adaptive=[self._scale_mode == "adaptive"] * len(self._quantizers),
            bound=self._bound,
            margins=[quantizer.margin for quantizer in self._quantizers],
            shrink_early=self.rounding == "stochastic",
            adjustments=[quantizer.adjustment for quantizer in self._quantizers],
        )

    @contextlib.contextmanager
    def regridding(self, weights: Collection[Tensor]) -> Iterator[None]:
        """Have the formats and scales of these weights changed inside, and snap them to their new grids.

        Between steps. Weights may leave the grid, or come to it. What has another format gets a scale anew;
        what has not keeps its own, adjusted. Rounding is to nearest even. Residuals of error feedback are
        given back first, and those of the new rounding kept, so that nothing is lost but what their format
        does not hold; under `eco` the optimizer's moments stay as they are.
        """
        old, formats, scales, feedback = self.weights, self._formats, self.scales, self.feedback
        changed = {id(weight) for weight in weights}
        with torch.no_grad():
            if feedback is not None and not self._begun:
                self._on_grids().give_back(
                    feedback, [place for place, one in enumerate(old) if id(one) in changed]
                )
        yield
        self._take(grid_weights(self.optimizer))
        self.scales = self._fitted_scales()
        now = {id(weight): place for place, weight in enumerate(self.weights)}
        same = {place: now[id(weight)] for place, weight in enumerate(old) if id(weight) in now}
        self.scales.take_over(scales, same, OF_THE_WEIGHT)
        same = {theirs: mine for theirs, mine in same.items() if self._formats[mine] == formats[theirs]}
        self.scales.take_over(scales, same)
        if self.feedback is not None and feedback is not None:
            self.feedback.take_over(feedback, same)
        self._claim()
        self._round("nearest_even", [place for one, place in now.items() if one in changed], self.feedback)

    def _claim(self) -> None:
        """Have the forward pass use the weights as they are; a copy of a quantizer alone does not."""
        for quantizer in self._quantizers:
            quantizer.on_grid = True

    def _hook(self) -> None:
        self._hooks = (
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._claim()
        self._hook()

    @not_compiled
    @torch.no_grad()
    def _before_step(self, _: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Give the residuals back; once only, where a step has failed half way."""
        if self._released():
            return
        _refuse_closure(args, keywords)
        if newcomers := self._newcomers():
            with self.regridding(newcomers):
                pass
        if self.feedback is not None and not self._begun:
            self._on_grids().give_back(self.feedback, range(len(self.weights)))
            self._begun = True
            self.watched = {weight: weight.detach().clone() for weight in self.watched}

    @not_compiled
    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        """Scale, round, bound; nothing more once the model has been dequantized."""
        if self._released():
            for hook in self._hooks:
                hook.remove()
            return
        if self.feedback is not None and not self._begun:  # a step that calls its superclass's ends twice
            self._on_grids().give_back(self.feedback, range(len(self.weights)))
        self._begun = False
        unrounded = None if self.ranges is None else self.ranges.unrounded(self.weights)
        self._land("stochastic" if self.rounding == "stochastic" else "nearest_even")
        if self.ranges is not None and unrounded is not None:
            self.ranges.add(unrounded, self.weights, self.scales)
        self.counter += 1

    @property
    def rounds_at_once(self) -> bool:
        """Whether rounding leaves nothing behind, so that who looks on is told of weights as they land."""
        return self.feedback is None and self._compensation is None

    def _land(self, rounding: str) -> None:
        """Scale, round, bound: in C where it can be and no residual is asked for, else in torch."""
        landed: set[int] = set()
        self.intended, self.unrounded = {}, {}
        onlookers, self.onlookers = self.onlookers, ()  # their memory is there for this step
        if self.rounds_at_once:
            stream = (self.seed, self.counter) if rounding == "stochastic" else None
            told, untold = native_landing.agreed(onlookers)
            self._keep_unrounded(place for place, one in enumerate(self.weights) if untold and one in untold)
            landed, self.intended = native_landing.land(
                self.weights, self._formats, self.scales, stream, self.watched, told
            )
        unseen = [weight for weight in self.watched if weight not in self.intended]
        if unseen:
            moved = torch._foreach_sub(unseen, [self.watched[weight] for weight in unseen])
            self.intended |= dict(zip(unseen, moved, strict=True))
        left = [index for index in range(len(self.weights)) if index not in landed]
        looked_at = {weight for one in onlookers for weight in one} if left else ()
        self._keep_unrounded(index for index in left if self.weights[index] in looked_at)
        if left and self.scales.may_move:
            found = scaling.amax([self.weights[index].detach() for index in left])
            if landed:  # on a CPU, where a loop has read values already
                self.scales.adapt_some(dict(zip(left, found.tolist(), strict=True)))
            else:
                self.scales.adapt(among(len(self.weights), dict(zip(left, found.unbind(), strict=True))))
        self._round(rounding, left, self.feedback or self._compensation)

    def _keep_unrounded(self, places: Iterable[int]) -> None:
        """Keep copies of weights that are about to be rounded, and of their scales."""
        for place in places:
            weight = self.weights[place]
            self.unrounded[weight] = weight.detach().clone(), self.scales.scales[place].clone()

    def _released(self) -> bool:
        """Whether the model has been dequantized."""
        return any(quantizer_of(weight) is None for weight in self.weights)

    @torch.no_grad()
    def _round(
        self, rounding: str, places: Collection[int], keeper: ErrorFeedback | ErrorCompensation | None
    ) -> None:
        """Round weights to their grids and limit them there, and give their residuals to the keeper."""
        streams = self._streams(places) if rounding == "stochastic" and places else None
        self._on_grids().round(places, streams, keeper)

    def _on_grids(self) -> OnGrids:
        return OnGrids(self.weights, self._formats, self.scales)

    def _streams(self, places: Collection[int]) -> dict[int, Tensor]:
        """Return the keys of weights' random streams in this step, (2,), by place."""
        every = range(len(self.weights))
        numbers = every if len(places) == len(every) else list(places)  # a range is made on the device
        table = stream_key_table(self.seed, self.counter, numbers, self.weights[0].device)
        return dict(zip(numbers, table.unbind(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resume needs beside the weights."""
        state = {"scales": self.scales.state_dict(), "seed": self.seed, "counter": self.counter}
        return state if self.feedback is None else {**state, "residuals": self.feedback.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; the weights themselves are loaded with the model.

        Raises ValueError for a state of other weights, or of other residuals.
        """
        if ("residuals" in state) != (self.feedback is not None):
            saved = "has residuals" if "residuals" in state else "has no residuals"
            raise ValueError(f"the saved state {saved}, storage rounding here is {self.rounding!r}")
        self.scales.load_state_dict(state["scales"])
        if self.feedback is not None:
            self.feedback.load_state_dict(state["residuals"])
        self.seed, self.counter = state["seed"], state["counter"]
        self._begun = False


def store_on_grid(
    optimizer: torch.optim.Optimizer,
    rounding: str = "nearest_even",
    generator: torch.Generator | None = None,
    *,
    bound: float = 0.0,
    scale_mode: str = "adaptive",
    residual_format: Any = "same",
) -> GridStorage:
    """Keep the optimizer's quantized weights on their grids from here on, and return what keeps them.

    The weights are snapped now, always to nearest even, under a scale fitted to them. After each step they
    are rounded by `rounding` under a scale that follows them ("adaptive") or stays ("initial"), and limited
    to `bound` times their initial rms (0: not at all). Other parameters, and weights whose rule says
    storage="master", are left alone.

    rounding: "nearest_even"; "stochastic"; "error_feedback": nearest, the residual is added back before the
        next step; "eco": nearest, the residual goes into the first moment of Adam, AdamW, SGD with momentum,
        or an optimizer that has `momentum_of` (see `error_compensation.Momentum`).
    residual_format: what error feedback stores residuals in: "same" (each as its weight), a format by name,
        table or itself, or "FP32", which makes the run that of float32 masters.
    generator: one seed is drawn from it now; None means seed 0. Steps with a closure are refused.
    Raises ValueError: no quantized weight, an unknown rounding or scale mode, an optimizer that lands on the
    grid by itself or has no moment for "eco", weights stored already, a granularity or scale rule that a grid
    cannot have.
    """
    refuse_bad_options(rounding, bound, scale_mode)
    same = isinstance(residual_format, str) and residual_format == "same"
    if not same and rounding != "error_feedback":
        raise ValueError(f"residual_format is for rounding='error_feedback', not {rounding!r}; leave it out")
    if getattr(optimizer, "stores_on_grid", False):
        raise ValueError(
            f"{type(optimizer).__name__} keeps its weights on the grid by itself; leave this out"
        )
    chosen = "same" if same else format_or_none(residual_format)
    return GridStorage(
        optimizer,
        rounding=rounding,
        seed=draw_seed(generator),
        bound=bound,
        scale_mode=scale_mode,
        residual_format=chosen,
    )


def _refuse_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(given is not None for given in (*args[1:], kwargs.get("closure"))):  # args[0] is the optimizer
        raise ValueError(
            "grid storage works after the whole step, a closure would see unrounded weights: "
            "call loss.backward() and then step() without a closure"
        )
