"""How evenly optimizers move weights, counted in ULPs of the format: the real class, on weights held fixed.

    python benchmarks/ulp_uniformity.py [--json]

E4M3 at scale 2^7; |w| log-uniform in [2^-8, 1), so that its eight octaves are equally full, with both signs;
g ~ N(0, 1); after 300 steps of moments, one step is looked at. The coefficient of variation is that of
|ULPs moved| over the weights. For a sign direction it would be 0 under `update`; what is left there is the
spread of Adam's direction itself. A weight in the lowest octave has a spacing 2^7 times smaller than one in
the highest, so equal steps in weight units are 128 times as many ULPs down there.

`gradient` multiplies the gradient by S before the moments, which divide it out again: it moves as AdamW does.
"""

from __future__ import annotations

import argparse
import json
import math

import attrs
import peers
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import altgrad_core as altgrad
from altgrad_optim.manifold import ManifoldAdamW

OCTAVES = 8
SCALE = 2.0**7
STEPS = 300
WEIGHTS = 40_000
LR = 1e-3
ARMS = {"AdamW": (0.0, 0.0), "gradient": (1.0, 0.0), "update": (0.0, 1.0), "both": (1.0, 1.0)}


@attrs.frozen(kw_only=True)
class Uniformity:
    """The ULPs that one step moves: their coefficient of variation, and lowest octave over highest."""

    arm: str
    variation: float
    lowest_over_highest: float


def held_weights(count: int, draws: torch.Generator) -> Tensor:
    """Return weights of both signs, |w| log-uniform in [2^-OCTAVES, 1)."""
    size = torch.exp2(OCTAVES * torch.rand(count, generator=draws) - OCTAVES)
    return size * (torch.randint(2, size.shape, generator=draws) * 2 - 1)


def last_moves(weight: Tensor, count: int, draws: torch.Generator) -> dict[str, Tensor]:
    """Return by how much each arm moves every weight in the step after `count` others, all from `weight`."""
    format = altgrad.get_format("E4M3")
    held = {arm: nn.Parameter(weight.clone()) for arm in ARMS}
    optimizers = [
        ManifoldAdamW(
            [{"params": [held[arm]], "format": format, "scale": SCALE}],
            lr=LR,
            betas=(0.9, 0.95),
            eps=0.0,
            placement=placement,
            normalize="none",
        )
        for arm, placement in ARMS.items()
    ]
    for _ in range(count + 1):
        gradient = torch.randn(weight.shape, generator=draws)
        for parameter, optimizer in zip(held.values(), optimizers, strict=True):
            parameter.data.copy_(weight)
            parameter.grad = gradient
            optimizer.step()
    return {arm: parameter.detach() - weight for arm, parameter in held.items()}


def measured(weights: int = WEIGHTS, steps: int = STEPS, seed: int = 0) -> list[Uniformity]:
    """Return one row for each arm."""
    draws = torch.Generator().manual_seed(seed)
    weight = held_weights(weights, draws)
    spacing = altgrad.get_format("E4M3").spacing(weight * SCALE) / SCALE
    size, rows = weight.abs(), []
    for arm, move in last_moves(weight, steps, draws).items():
        ulps = (move / spacing).abs().double()
        lowest, highest = ulps[size < 2.0 ** (1 - OCTAVES)].mean(), ulps[size >= 0.5].mean()
        variation = float(ulps.std() / ulps.mean())
        rows.append(Uniformity(arm=arm, variation=variation, lowest_over_highest=float(lowest / highest)))
    return rows


def independent_variation(direction: float) -> float:
    """Return what the coefficient of variation of equal steps in weight units must be.

    ULPs are |d|/u with d independent of u, and 1/u = 2^k for k = 0, ..., 7, all equally often, so
    1 + CV^2 = (1 + CV^2 of |d|) E[1/u^2] / E[1/u]^2.
    """
    first, second = (sum(2.0 ** (power * k) for k in range(OCTAVES)) / OCTAVES for power in (1, 2))
    return math.sqrt((1 + direction**2) * second / first**2 - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = measured()
    if arguments.json:
        print(json.dumps({"machine": peers.machine(), "rows": [attrs.asdict(row) for row in rows]}))
        return
    table = Table("", "CV of ULPs moved", "lowest octave over highest", box=box.SIMPLE)
    for row in rows:
        table.add_row(row.arm, f"{row.variation:.3f}", f"{row.lowest_over_highest:.2f}")
    console = Console(width=120, markup=False, highlight=False)
    console.print(table, "  ".join(f"{name} {value}" for name, value in peers.machine().items()), sep="")


if __name__ == "__main__":
    main()
