"""GridOptim: weights that move by whole rungs of their format's grid.

A rung is one step from a grid value to its neighbour. With a direction d (the raw velocity, or Adam's),

    r = clamp(lr*d, -rung_clip, rung_clip)                   # rungs, float32
    k = stochastic_round(r)                                  # |r| rounds up with probability frac|r|
    w = from_rung(clamp(rung(w*s) - k, -limit, limit)) / s

The rule founded on the raw velocity (`normalize="none"`) couples weight decay into the gradient; under
"adam", lr reads as rungs per step, and decay adds decay_lr*weight_decay*w/ulp(w) rungs before the clip.

rounding="value" rounds the target w - r*ulp(w) stochastically between its neighbours instead, never further
than rung_clip rungs, and a target beyond 0 becomes 0. Rung rounding makes log|w| a driftless random walk on
flat directions of a floating-point format, so that the largest weights grow: give a `bound`. Value rounding
shrinks the typical weight.

storage="grid": the weights between steps are on the grid and nothing else is kept. storage="master": the
float32 master is the rung coordinate u, optimizer state; the Parameter holds from_rung(round(u))/s, no random
number is drawn and nothing is lost (mirror descent in rung space).

When not to use it: where weights must cross zero often. A constant drift of r rungs a step needs rung(w)/r
steps to change a weight's sign, hundreds of them in formats with many exponents.

Source: stochastic rounding of integer updates, Gupta et al., arXiv 1502.02551.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import attrs
import torch
from torch import Tensor

from altgrad_core import scaling
from altgrad_core.format import Format
from altgrad_core.groups import grid_of
from altgrad_core.hookspecs import OptimizerInputs
from altgrad_core.kernels import flat, kernel
from altgrad_core.random_bits import draw_seed, stream_key_tensor, uniform_like
from altgrad_core.storage import SCALE_MODES, STORAGE_ROUNDINGS, GridScales
from altgrad_core.surgery import quantizer_of
from altgrad_optim import GridOptimOptions
from altgrad_optim.adamw import adamw_direction, moments, plain_step
from altgrad_optim.base import (
    GeometryOptimizer,
    evaluated,
    plain_lr,
    refuse_bad,
    refuse_betas,
    schedule_factor,
    split_by_grid,
)

STORAGES = ("grid", "master")


class GridOptim(GeometryOptimizer):
    """Whole-rung updates; see the module's text. Parameters without a grid: AdamW at `other_lr`.

    step_scale: rungs per unit of direction; stored as the groups' `lr`, which schedulers drive.
    bound: limit on |w| as a multiple of the tensor's rms at construction; 0: none.
    storage_rounding: how weights are rounded again after a change of scale: "nearest_even", "stochastic".
    scale_mode: "adaptive" (follows the weights; under storage="grid" only) or "initial".
    generator: one seed is drawn from it at construction; None: seed 0.

    Attributes:
        flips, updates: 0-d int64 device tensors: weights whose code changed, and elements with a non-zero
            gradient, in the last step. `counts` holds both by Parameter.
        watch: set it to True and each step leaves -r, the update in rungs before rounding, in `intended`.
        scales: the `GridScales`, None before there is a weight with a grid.
    Raises ValueError on options out of range.
    """

    stores_on_grid = True
    intended_in_rungs = True

    def __init__(
        self,
        groups: Iterable[Any],
        step_scale: float = 6.0,
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decay_lr: float = 1e-3,
        other_lr: float = 1e-3,
        rung_clip: float = 10,
        normalize: str = "none",
        rounding: str = "rung",
        storage: str = "grid",
        bound: float = 0.0,
        generator: torch.Generator | None = None,
        *,
        storage_rounding: str = "nearest_even",
        scale_mode: str = "adaptive",
    ) -> None:
        not_negative, positive = (lambda x: x >= 0), (lambda x: x > 0)
        refuse_bad(
            step_scale=(step_scale, not_negative), epsilon=(eps, not_negative), bound=(bound, not_negative)
        )
        refuse_bad(weight_decay=(weight_decay, not_negative), decay_lr=(decay_lr, not_negative))
        refuse_bad(other_lr=(other_lr, not_negative), rung_clip=(rung_clip, positive))
        refuse_bad(momentum=(momentum, lambda x: 0 <= x < 1))
        refuse_betas(betas)
        for name, given, allowed in (
            ("normalize", normalize, ("none", "adam")),
            ("rounding", rounding, ("rung", "value")),
            ("storage", storage, STORAGES),
            ("storage_rounding", storage_rounding, STORAGE_ROUNDINGS),
            ("scale_mode", scale_mode, SCALE_MODES),
        ):
            if given not in allowed:
                raise ValueError(f"Invalid {name} value: {given!r}; use one of {', '.join(allowed)}")
        self.storage = storage
        self.bound = bound
        self.storage_rounding = storage_rounding
        self.scale_mode = scale_mode
        self.seed = draw_seed(generator)
        self.counter = 0
        self.scales: GridScales | None = None
        self.watch = False
        self.intended: dict[Tensor, Tensor] = {}
        self.counts: dict[Tensor, tuple[Tensor, Tensor]] = {}
        self.flips = self.updates = torch.zeros((), dtype=torch.int64)
        self._members: list[_Member] = []
        self._index: dict[Tensor, int] = {}
        super().__init__(
            groups,
            {
                "lr": step_scale,
                "momentum": momentum,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "decay_lr": decay_lr,
                "other_lr": other_lr,
                "rung_clip": rung_clip,
                "normalize": normalize,
                "rounding": rounding,
            },
        )
        self._settle()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take one step; returns the closure's loss, None without one."""
        loss = evaluated(closure)
        self._settle()
        self.counts, self.intended = {}, {}
        landings: dict[int, _Landing] = {}
        for group in self.param_groups:
            gridded, plain = split_by_grid(group)
            moved = [weight for weight, *_ in gridded if weight in self._index]
            for weight in moved:
                landings[self._index[weight]] = self._move(group, self._members[self._index[weight]])
            plain += [weight for weight, *_ in gridded if weight not in self._index]
            plain_step(self, group, plain, plain_lr(group, mixed=bool(moved)))
        if landings:
            self._land(landings)
        self.counter += 1
        return loss

    def _move(self, group: dict[str, Any], member: _Member) -> _Landing:
        """Compute where one weight goes, before scale and bound."""
        scale = self._scale(member)
        rungs = self._rungs(group, member.weight, member.format, scale)
        if self.watch:
            self.intended[member.weight] = -rungs
        if member.master:
            return _Landing(self.state[member.weight]["rung_coordinate"].sub_(rungs), None)
        keys = stream_key_tensor((self.seed, self.counter, member.index), member.weight.device)
        clip, by_value = int(group["rung_clip"]), group["rounding"] == "value"
        return _Landing(*_moved(flat(member.weight), flat(rungs), scale, keys, member.format, clip, by_value))

    def _rungs(self, group: dict[str, Any], weight: Tensor, format: Format, scale: Tensor) -> Tensor:
        """Return r, the rungs to go down, after the clip; NaN where the gradient is."""
        state, decay = self.state[weight], group["weight_decay"]
        if group["normalize"] == "none":
            moments(state, weight, "velocity")
            state["step"] += 1
            gradient = weight.grad.add(weight, alpha=decay) if decay else weight.grad
            direction = state["velocity"].mul_(group["momentum"]).add_(gradient) * group["lr"]
        else:
            moments(state, weight, "exp_avg", "exp_avg_sq")
            state["step"] += 1
            direction = group["lr"] * adamw_direction(
                weight.grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                int(state["step"]),
                group["betas"],
                group["eps"],
            )
            if decay:
                rate = group["decay_lr"] * schedule_factor(group) * decay
                scaled = weight * scale
                direction.addcdiv_(scaled, format.spacing(scaled), value=rate)
        return direction.clamp_(-group["rung_clip"], group["rung_clip"])

    def _land(self, landings: dict[int, _Landing]) -> None:
        """Scale, round, bound, for the weights that move in this step."""
        scales = self._scales_in_use()
        before = torch.stack(scales.scales)
        if self.scale_mode == "adaptive":
            scales.adapt(
                torch.stack([self._amax(member, landings.get(member.index)) for member in self._members])
            )
        limits = scales.limits()
        ratios = torch.stack(scales.scales) / before
        for index, landing in landings.items():
            member = self._members[index]
            limit, scale = None if limits is None else limits[index], scales.scales[index]
            if member.master:
                values = _master_values(landing.target, member.format, limit) / scale
            else:
                keys = self._rerounding_keys(member)
                values = _landed(landing.target, ratios[index], scale, limit, keys, member.format)
            values = values.view_as(member.weight)
            self.counts[member.weight] = _counted(*map(flat, (values, member.weight, member.weight.grad)))
            member.weight.copy_(values)
        self.flips = torch.stack([flips for flips, _ in self.counts.values()]).sum()
        self.updates = torch.stack([updates for _, updates in self.counts.values()]).sum()

    def _rerounding_keys(self, member: _Member) -> Tensor | None:
        """Return the random stream of the rounding after a change of scale; None: nearest even."""
        if self.storage_rounding == "nearest_even":
            return None
        stream = (self.seed, self.counter, len(self._members) + member.index)
        return stream_key_tensor(stream, member.weight.device)

    def _amax(self, member: _Member, landing: _Landing | None) -> Tensor:
        """Return the magnitude that the scale must serve; past the last rung it is twice the largest."""
        if landing is None or landing.past_end is None:
            return member.weight.abs().amax().float()
        largest = member.format.largest
        asked = torch.where(landing.past_end, 2 * largest, landing.target.abs().amax())
        return (asked / self._scale(member)).float()

    # --- which weights move in rungs, and their first snap -------------------------------------------

    def _settle(self) -> None:
        """Find the weights that move in rungs, and snap them, at construction and whenever they change."""
        found = list(self._found_members())
        if [(id(one.weight), one.format) for one in found] == [
            (id(one.weight), one.format) for one in self._members
        ]:
            return
        self._members = found
        self._index = {member.weight: member.index for member in found}
        self.scales = (
            GridScales(
                [member.weight.detach() for member in found],
                [member.format for member in found],
                [member.scale for member in found],
                movable=[member.movable for member in found],
                bound=self.bound,
                shrink_early=self.storage_rounding == "stochastic",
            )
            if found
            else None
        )
        self._snap()

    def _found_members(self) -> Iterable[_Member]:
        index = 0
        for group in self.param_groups:
            for place, weight in enumerate(group["params"]):
                grid = grid_of(group, place)
                quantizer = quantizer_of(weight)
                storage = (quantizer.storage if quantizer else None) or self.storage
                if grid is None or (storage == "master" and self.storage == "grid"):
                    continue
                master = storage == "master"
                movable = (
                    quantizer is not None and not master and scaling.scaled(grid[0], quantizer.granularity)
                )
                yield _Member(weight, grid[0], grid[1], index, master, movable)
                index += 1

    @torch.no_grad()
    def _snap(self) -> None:
        if self.scales is None:
            return
        limits = self.scales.limits()
        for member in self._members:
            limit = None if limits is None else limits[member.index]
            scale = self._scale(member)
            scaled = member.weight.detach() * scale
            if member.master:
                u = self.state[member.weight]["rung_coordinate"] = rung_coordinate(scaled, member.format)
                values = _master_values(u, member.format, limit)
            else:
                values = _bounded(member.format.quantize(scaled), limit)
            member.weight.copy_(values / scale)
            quantizer = quantizer_of(member.weight)
            if quantizer is not None:
                quantizer.on_grid = True

    def _scale(self, member: _Member) -> Tensor:
        return self._scales_in_use().scales[member.index]

    def _scales_in_use(self) -> GridScales:
        if self.scales is None:
            raise RuntimeError("no weight of this optimizer has a grid")
        return self.scales

    # --- state ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state, and under `grid` the seed, the counter and the scales."""
        scales = self.scales.state_dict() if self.scales is not None else None
        return {
            **super().state_dict(),
            "grid": {"seed": self.seed, "counter": self.counter, "scales": scales},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = state_dict["grid"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "grid"})
        self.seed, self.counter = own["seed"], own["counter"]
        if self.scales is not None:
            self.scales.load_state_dict(own["scales"])


@attrs.frozen(eq=False)
class _Member:
    """A weight that moves in rungs."""

    weight: Tensor
    format: Format
    scale: Tensor  # 0-d float32, the quantiser's own where there is one
    index: int  # of its random stream and of its scale
    master: bool
    movable: bool  # whether its scale may follow it


@attrs.frozen(eq=False)
class _Landing:
    """Where a weight goes: grid values in scaled units, or under master the rung coordinate."""

    target: Tensor
    past_end: Tensor | None  # 0-d bool: some element was pushed past the last rung


# --- the pure functions ----------------------------------------------------------------------------


def stochastic_round(x: Tensor, uniform: Tensor) -> Tensor:
    """Round to an integer, up in magnitude with probability frac|x|; integers never move. Floating result.

    uniform: float32 in [0, 1), of x's shape. Unbiased to the resolution of `uniform`; NaN stays NaN.
    """
    magnitude = x.abs()
    whole = magnitude.floor()
    return (whole + (uniform < magnitude - whole)).copysign(x)


def grid_step(
    scaled: Tensor, rungs: Tensor, format: Format, uniform: Tensor, rung_clip: int = 10
) -> tuple[Tensor, Tensor]:
    """Move on-grid values down by `rungs`, rounded stochastically to whole rungs.

    scaled: w*s, on the format's grid. rungs: r, float, already clipped. uniform: float32 in [0, 1).
    Returns the new grid values (NaN where w or r is NaN), and 0-d bool: whether one was pushed past the end.
    """
    moved = format.rung(scaled) - stochastic_round(rungs, uniform).to(torch.int32)
    lost = torch.isnan(rungs) | torch.isnan(scaled)
    values = format.from_rung(moved).to(scaled.dtype)
    past = (moved.abs() > format.rung(values).abs()) & ~lost
    return torch.where(lost, torch.nan, values), past.any()


def value_step(
    scaled: Tensor, rungs: Tensor, format: Format, uniform: Tensor, rung_clip: int = 10
) -> tuple[Tensor, Tensor]:
    """Move on-grid values by `rungs` of their spacing, rounded stochastically between grid values.

    As `grid_step`; the target w - r*ulp(w) becomes 0 where it lies beyond 0, and the result stays within
    `rung_clip` rungs of where it was.
    """
    target = scaled - rungs * format.spacing(scaled)
    target = torch.where(target * scaled < 0, 0.0, target)
    start = format.rung(scaled)
    landed = format.rung(format.quantize(target, rounding="stochastic", uniform=uniform))
    values = format.from_rung(landed.clamp(start - rung_clip, start + rung_clip)).to(scaled.dtype)
    lost = torch.isnan(rungs) | torch.isnan(scaled)
    past = (target.abs() > format.largest) & ~lost
    return torch.where(lost, torch.nan, values), past.any()


@kernel
def _moved(
    weight: Tensor, rungs: Tensor, scale: Tensor, keys: Tensor, format: Format, rung_clip: int, by_value: bool
) -> tuple[Tensor, Tensor]:
    """Draw and take the step of on-grid weights; see `grid_step` and `value_step`."""
    step = value_step if by_value else grid_step
    return step(weight * scale, rungs, format, uniform_like(weight, keys), rung_clip)


@kernel
def _landed(
    target: Tensor, ratio: Tensor, scale: Tensor, limit: Tensor | None, keys: Tensor | None, format: Format
) -> Tensor:
    """Return weights on the grid of the new `scale`, which is `ratio` times the old one, within the limit.

    Rounding again, by the stream `keys` or to nearest even, changes something only where the scale moved.
    """
    draws = None if keys is None else uniform_like(target, keys)
    rounding = "nearest_even" if keys is None else "stochastic"
    return _bounded(format.quantize(target * ratio, rounding=rounding, uniform=draws), limit) / scale


@kernel
def _counted(values: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many weights change, and how many have a non-zero gradient: 0-d int64."""
    return (values != weight).sum(), (gradient != 0).sum()


def rung_coordinate(scaled: Tensor, format: Format) -> Tensor:
    """Return the real rung coordinate u of any values, linear between neighbouring rungs."""
    below = format.quantize(scaled, rounding="toward_zero")
    rung = format.rung(below)
    outward = torch.where(torch.signbit(scaled), -1, 1)
    gap = format.from_rung(rung + outward).to(scaled.dtype) - below
    fraction = torch.where(gap == 0, 0.0, (scaled - below) / torch.where(gap == 0, 1.0, gap)).clamp_(0, 1)
    return rung + outward * fraction


def _master_values(u: Tensor, format: Format, limit: Tensor | None) -> Tensor:
    """Clamp the coordinate u in place to the format's end or the bound, and return from_rung(round(u))."""
    end = torch.as_tensor(format.largest if limit is None else limit, dtype=torch.float32, device=u.device)
    last = format.rung(end).to(u.dtype)
    u.copy_(torch.minimum(torch.maximum(u, -last), last))
    values = format.from_rung(torch.nan_to_num(u).round().to(torch.int32)).to(u.dtype)
    return torch.where(torch.isnan(u), torch.nan, values)


def _bounded(values: Tensor, limit: Tensor | None) -> Tensor:
    return values if limit is None else torch.minimum(torch.maximum(values, -limit), limit)


def build(options: GridOptimOptions, inputs: OptimizerInputs) -> GridOptim:
    """Return the optimizer of an experiment."""
    return GridOptim(
        inputs.groups,
        step_scale=options.step_scale,
        momentum=options.momentum,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        decay_lr=options.decay_lr,
        other_lr=options.other_lr,
        rung_clip=options.rung_clip,
        normalize=options.normalize,
        rounding=options.rounding,
        storage=inputs.storage,
        bound=inputs.bound,
        generator=inputs.generator,
        storage_rounding=inputs.storage_rounding,
        scale_mode=inputs.scale_mode,
    )
