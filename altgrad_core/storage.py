"""Weights that live on their format's grid, behind any torch optimizer.

`store_on_grid(optimizer)` snaps the quantised weights once and adds a hook after each step: scale, round,
bound. There is no float32 master then: an update below half a spacing is lost under `nearest_even`, and
arrives on average under `stochastic`. `GridScales` is the part that GridOptim shares, which lands on the
grid by itself.

Rounding draws are a pure function of (seed, step, tensor, element): see `random_bits`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from altgrad_core import scaling
from altgrad_core.format import Format
from altgrad_core.quantizer import quantizer_of
from altgrad_core.random_bits import draw_seed, stream_key_tensor
from altgrad_core.recipe import refuse_off_grid

STORAGE_ROUNDINGS = ("nearest_even", "stochastic")
SCALE_MODES = ("adaptive", "initial")


class GridScales:
    """The scales of grid-stored weights as they train, and the bound on the weights.

    scales: 0-d float32 tensors, written in place when a scale moves.
    fitted: which scales are fitted to the weights now; the others (1, or static) stay as they are.
    adaptive: which of those follow the weights afterwards.
    bound: limit on |w| as a multiple of the tensor's float32 rms at construction; 0 means none.
    may_move: whether any scale is adaptive.

    The state is device tensors of shape (n,): exponents k, whether a positive amax was seen, the initial
    rms, and the number of scale changes.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        formats: Sequence[Format],
        scales: Sequence[Tensor],
        *,
        fitted: Sequence[bool],
        adaptive: Sequence[bool],
        bound: float = 0.0,
        margins: Sequence[float] | None = None,
        shrink_early: bool = False,
    ) -> None:
        device = weights[0].device
        if any(scale.dim() for scale in scales):
            raise ValueError(
                "a weight on the grid has one scale, these have one per channel or block: "
                'quantize_model(..., granularity="tensor")'
            )
        self.scales = list(scales)
        self.bound = bound
        self.shrink_early = shrink_early
        self._fitted = torch.tensor(list(fitted), device=device)
        moving = [one and other for one, other in zip(fitted, adaptive, strict=True)]
        self._adaptive = torch.tensor(moving, device=device)
        self.may_move = any(moving)
        self._margins = list(margins or [1.0] * len(self.scales))
        self._kinds = _positions(list(zip(formats, self._margins, strict=True)), device)
        amax = scaling.amax(weights)
        self.rms = _rms(weights)
        self.seen = scaling.usable(amax)
        self.exponents = torch.zeros(len(self.scales), dtype=torch.int32, device=device)
        for (format, margin), at in self._kinds.items():
            self.exponents[at] = scaling.fitted_exponent(amax[at], format, margin).to(torch.int32)
        self.rescales = torch.zeros_like(self.exponents)
        self._write()

    def adapt(self, amax: Tensor) -> None:
        """Move the scales after an update whose unrounded weights have this amax, (n,); 0: not updated."""
        if not self.may_move:
            return
        moved = self.exponents.clone()
        for (format, margin), at in self._kinds.items():
            moved[at] = scaling.adapted(
                self.exponents[at], self.seen[at], amax[at], format, margin, self.shrink_early
            )
        moved = torch.where(self._adaptive, moved, self.exponents)
        self.rescales += moved != self.exponents
        self.seen |= scaling.usable(amax)
        self.exponents.copy_(moved)
        self._write()

    def limits(self) -> Tensor | None:
        """Return the lowest and the largest grid value within each weight's bound; None: no bound.

        (n, 2) float32, times the scale. A weight whose initial rms is 0 has no bound: the format's ends.
        """
        if not self.bound:
            return None
        multiples = torch.where(self.rms > 0, self.bound * self.rms, math.inf) * torch.stack(self.scales)
        limits = torch.stack((-multiples, multiples), dim=1)
        for (format, _), at in self._kinds.items():
            limits[at] = format.quantize(limits[at], rounding="toward_zero")
        return limits

    def take_over(self, other: GridScales, places: Mapping[int, int]) -> None:
        """Take up the state of weights that `other` has kept: its place to the place here."""
        if places:
            theirs, mine = list(places), list(places.values())
            for key, own in self.state_dict().items():
                own[mine] = other.state_dict()[key][theirs]
            self._write()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state; the scales themselves are the quantisers' and follow from the exponents."""
        return {"exponents": self.exponents, "seen": self.seen, "rms": self.rms, "rescales": self.rescales}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for key, mine in self.state_dict().items():
            if state[key].shape != mine.shape:
                raise ValueError(f"the saved scales are of {len(state[key])} weights, these are {len(mine)}")
            mine.copy_(state[key])
        self._write()

    def _write(self) -> None:
        """Set the fitted scales to 2^k, in place."""
        powers = scaling.power_of_two(self.exponents)
        current = torch.stack(self.scales).to(powers.device)
        torch._foreach_copy_(self.scales, list(torch.where(self._fitted, powers, current).unbind()))


@torch.no_grad()
def _rms(weights: Sequence[Tensor]) -> Tensor:
    """Return each tensor's root mean square, (n,) float32; by float64: no square overflows."""
    return torch.stack([weight.double().square().mean().sqrt().float() for weight in weights])


def _positions(kinds: Sequence[Any], device: torch.device) -> dict[Any, Tensor]:
    """Return where each distinct kind stands: kind to a 1-d index tensor."""
    found: dict[Any, list[int]] = {}
    for index, kind in enumerate(kinds):
        found.setdefault(kind, []).append(index)
    return {kind: torch.tensor(indices, device=device) for kind, indices in found.items()}


class GridStorage:
    """Keeps an optimizer's quantised weights on their grids; made by `store_on_grid`.

    torch does not copy an optimizer's hooks: deepcopy or pickle model, optimizer and storage together, as
    one tuple, and the copy keeps its own weights on their grids.

    Attributes:
        weights: the Parameters on the grid, in the order of their random streams.
        scales: their `GridScales`; `scales.rescales` counts changes of scale.
        watched: set to a mapping from Parameter to its value before the step, and the next step leaves the
            update before rounding in `intended`, keyed alike.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, rounding: str, seed: int, bound: float, scale_mode: str
    ) -> None:
        self.optimizer = optimizer
        self.weights = _grid_weights(optimizer)
        self.rounding = rounding
        self.seed = seed
        self.counter = 0
        self.watched: dict[Tensor, Tensor] = {}
        self.intended: dict[Tensor, Tensor] = {}
        quantizers = [_quantizer(weight) for weight in self.weights]
        for quantizer in quantizers:
            refuse_off_grid(quantizer.recipe)
        self._formats = [quantizer.format for quantizer in quantizers]
        self.scales = GridScales(
            [weight.detach() for weight in self.weights],
            self._formats,
            [quantizer.scale for quantizer in quantizers],
            fitted=[quantizer.fitted for quantizer in quantizers],
            adaptive=[scale_mode == "adaptive"] * len(quantizers),
            bound=bound,
            margins=[quantizer.margin for quantizer in quantizers],
            shrink_early=rounding == "stochastic",
        )
        self._round("nearest_even")
        for quantizer in quantizers:
            quantizer.on_grid = True
        self._hook()

    def _hook(self) -> None:
        self._hooks = (
            self.optimizer.register_step_pre_hook(_refuse_closure),
            self.optimizer.register_step_post_hook(self._after_step),
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._hook()

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        """Scale, round, bound; nothing more once the model has been dequantised."""
        if any(quantizer_of(weight) is None for weight in self.weights):
            for hook in self._hooks:
                hook.remove()
            return
        self.intended = {weight: weight - before for weight, before in self.watched.items()}
        if self.scales.may_move:
            self.scales.adapt(scaling.amax([weight.detach() for weight in self.weights]))
        self._round(self.rounding)
        self.counter += 1

    @torch.no_grad()
    def _round(self, rounding: str) -> None:
        limits = self.scales.limits()
        bounds = [None] * len(self.weights) if limits is None else list(limits.unbind())
        for index, (weight, format) in enumerate(zip(self.weights, self._formats, strict=True)):
            stream = (self.seed, self.counter, index)
            keys = stream_key_tensor(stream, weight.device) if rounding == "stochastic" else None
            scale, limit = self.scales.scales[index], bounds[index]
            weight.copy_(format.fake_quantize(weight.detach(), scale, rounding, keys=keys, limit=limit))

    def state_dict(self) -> dict[str, Any]:
        """Return scales, initial rms, seed and counter: all that a resume needs beside the weights."""
        return {"scales": self.scales.state_dict(), "seed": self.seed, "counter": self.counter}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a saved state; the weights themselves are loaded with the model."""
        self.scales.load_state_dict(state["scales"])
        self.seed, self.counter = state["seed"], state["counter"]


def store_on_grid(
    optimizer: torch.optim.Optimizer,
    rounding: str = "nearest_even",
    generator: torch.Generator | None = None,
    *,
    bound: float = 0.0,
    scale_mode: str = "adaptive",
) -> GridStorage:
    """Keep the optimizer's quantised weights on their grids from here on, and return what keeps them.

    The weights are snapped now, always to nearest even, under a scale fitted to them. After each step they
    are rounded by `rounding` ("nearest_even" or "stochastic") under a scale that follows them ("adaptive")
    or stays ("initial"), and limited to `bound` times their initial rms (0: not at all). Other parameters,
    and weights whose rule says storage="master", are left alone.

    generator: one seed is drawn from it now; None means seed 0. Steps with a closure are refused.
    Raises ValueError: no quantised weight, an unknown rounding or scale mode, an optimizer that lands on the
    grid by itself, weights stored already, a granularity or scale rule that a grid cannot have.
    """
    if rounding not in STORAGE_ROUNDINGS:
        raise ValueError(f"storage rounding is one of {', '.join(STORAGE_ROUNDINGS)}, not {rounding!r}")
    if scale_mode not in SCALE_MODES:
        raise ValueError(
            f"the scale mode of grid storage is one of {', '.join(SCALE_MODES)}, not {scale_mode!r}"
        )
    if not (math.isfinite(bound) and bound >= 0):
        raise ValueError(f"bound is a multiple of the initial rms, 0 or more, not {bound!r}")
    if getattr(optimizer, "stores_on_grid", False):
        raise ValueError(f"{type(optimizer).__name__} keeps its weights on the grid by itself")
    return GridStorage(
        optimizer, rounding=rounding, seed=draw_seed(generator), bound=bound, scale_mode=scale_mode
    )


class MasterBound:
    """Limits float32 master weights to a multiple of their initial rms, after each step.

    A weight whose initial rms is 0 has no bound. Raises ValueError for a bound of 0, which would mean none.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, weights: Sequence[nn.Parameter], bound: float
    ) -> None:
        if not (math.isfinite(bound) and bound > 0):
            raise ValueError(f"bound is a multiple of the initial rms, more than 0, not {bound!r}")
        self.weights = list(weights)
        rms = _rms(self.weights)
        self.limits = torch.where(rms > 0, bound * rms, math.inf)
        optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for weight, limit in zip(self.weights, self.limits.unbind(), strict=True):
            weight.copy_(torch.minimum(torch.maximum(weight, -limit), limit))

    def state_dict(self) -> dict[str, Tensor]:
        return {"limits": self.limits}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.limits.copy_(state["limits"])


def _refuse_closure(_: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if any(given is not None for given in (*args[1:], kwargs.get("closure"))):  # args[0] is the optimizer
        raise ValueError(
            "grid storage works after the whole step, a closure would see unrounded weights: "
            "call loss.backward() and then step() without a closure"
        )


def _quantizer(weight: Tensor) -> Any:
    found = quantizer_of(weight)
    if found is None:  # _grid_weights lets only quantised weights through
        raise ValueError("the weight is not quantised")
    return found


def _grid_weights(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    weights = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (quantizer := quantizer_of(parameter)) is not None and quantizer.storage != "master"
    ]
    if not weights:
        raise ValueError(
            "the optimizer holds no quantised weight to store on a grid: quantize_model(model, format) first"
        )
    if any(_quantizer(weight).on_grid for weight in weights):
        raise ValueError(
            "the weights are on the grid already: one store_on_grid per model; for a copy of such a model, "
            "dequantize_model and quantize_model it first"
        )
    return weights
