"""T1: the floor of stochastic rounding, which knows no learning rate, and under noise no stiffness either.

A step s = lr D |g|, no longer than the gap u it points into, lands s past a grid value; rounding it
stochastically adds the variance (s/u)(1 - s/u) u^2 = u s - s^2. With delta = w - w*,

    E[delta'^2] = E[(delta - lr D g)^2] + E[u lr D |g| - (lr D g)^2]
                = E[delta^2] - 2 lr E[D delta g] + lr E[u D |g|],

the lr^2 terms cancel, and in equilibrium 2 h E[D delta^2] = E[u D |g|]. For constant D and u, summed over the
weights, the excess loss is 1/4 sum u_i E|g_i|. Neglected by it: that u and D change along a weight's walk,
which `quadratic.stationary` takes into account, and steps longer than the gap, which nothing here does; their
share is measured. Steps rounded to whole rungs (`rungs`, the optimizer's own `grid_step`) are rounded in
another way, and `stationary` says that they come to the equilibrium of plain ones.
"""

from __future__ import annotations

import attrs
import torch
from quadratic import EIGHT_BITS, Bowl, Estimate, Grid, gaussian_bowl, stationary
from torch import Tensor

from altgrad_optim.rungs import grid_step

ARMS = ("plain", "update", "scrambled", "rungs")
REPLICAS = 32
WEIGHTS = 256
NOISE = 0.2
LR = 0.025
RELAXATIONS = 25  # of the mean curvature, 1/(lr h) steps each, before anything is measured
MEASURED = 40  # relaxations during which the excess is averaged
SAMPLES = 320  # in that time
SWEEP = (0.0125, 0.025, 0.1, 0.4)
SWEPT = ("E0M7", "E4M3", "E7M0")


@attrs.frozen(kw_only=True)
class Floor:
    """Excess loss per weight in equilibrium, and what was predicted."""

    format: str
    arm: str
    lr: float
    excess: Estimate
    formula: float  # 1/4 mean of u(w*) E|g|, E|g| as the run has it
    chain: float  # the equilibrium without simulation
    long_steps: float  # share of the steps longer than the spacing; than one rung


class Arm:
    """A way to step: what the step is multiplied by, of rms 1 over the targets, and how it is rounded."""

    def __init__(self, name: str, grid: Grid, target: Tensor) -> None:
        self.name, self.grid = name, grid
        self.rms = grid.spacing(target).square().mean().sqrt()
        self.order = torch.randperm(len(target), generator=torch.Generator().manual_seed(1))

    def factor(self, w: Tensor) -> Tensor:
        """Return D: 1, the spacing, or the spacing of another weight."""
        if self.name not in ("update", "scrambled"):
            return torch.ones_like(w)
        spacing = self.grid.spacing(w) / self.rms
        return spacing if self.name == "update" else spacing[..., self.order]

    def landed(self, w: Tensor, move: Tensor, draws: torch.Generator) -> Tensor:
        """Return w - move, rounded; under `rungs` w less move/rms(u) rungs, rounded to whole ones."""
        if self.name != "rungs":
            return self.grid.rounded(w - move, draws)
        uniform, scale = torch.rand(w.shape, generator=draws), self.grid.scale
        scaled, _past = grid_step(w * scale, move / self.rms, self.grid.format, uniform)
        return scaled / scale

    def longest(self, w: Tensor) -> Tensor:
        """Return the move of one spacing, or of one rung."""
        return self.rms if self.name == "rungs" else self.grid.spacing(w)


def equilibrium(grid: Grid, bowl: Bowl, arm: str) -> Tensor:
    """Return the predicted excess of every weight: a scrambled D is no function of the own weight."""
    values = grid.values
    factor = Arm(arm, grid, bowl.target).factor(values) if arm == "update" else None
    return (stationary(grid, bowl, factor) * bowl.excess(values[:, None]).T).sum(1)


def floor(
    name: str,
    arm: str,
    lr: float = LR,
    *,
    weights: int = WEIGHTS,
    replicas: int = REPLICAS,
    noise: float = NOISE,
) -> Floor:
    """Simulate one arm into its equilibrium and measure there."""
    bowl, draws = gaussian_bowl(weights, noise), torch.Generator().manual_seed(3)
    grid = Grid.fitted(name, float(bowl.target.abs().max()))
    way = Arm(arm, grid, bowl.target)
    w = grid.rounded(bowl.target.repeat(replicas, 1), draws)
    excess, force, long_steps = torch.zeros_like(w), torch.zeros_like(w), 0.0
    before, during = round(RELAXATIONS / lr), round(MEASURED / lr)
    every = max(1, during // SAMPLES)
    for step in range(before + during):
        move = lr * way.factor(w) * bowl.gradient(w, draws)
        if step >= before and step % every == 0:
            excess += bowl.excess(w)
            force += sum(bowl.pushes(w))
            long_steps += float((move.abs() > way.longest(w)).double().mean())
        w = way.landed(w, move, draws)
    samples = len(range(before + -before % every, before + during, every))
    return Floor(
        format=name,
        arm=arm,
        lr=lr,
        excess=Estimate.of(excess.mean(1) / samples),
        formula=float((grid.spacing(bowl.target) * force).mean()) / (4 * samples),
        chain=float(equilibrium(grid, bowl, arm).mean()),
        long_steps=long_steps / samples,
    )


def floors() -> list[Floor]:
    return [floor(name, arm) for name in EIGHT_BITS for arm in ARMS]


def sweep() -> list[Floor]:
    """Return the plain arm at several learning rates: the floor stays until steps outgrow the gaps."""
    return [floor(name, "plain", lr) for name in SWEPT for lr in SWEEP]
