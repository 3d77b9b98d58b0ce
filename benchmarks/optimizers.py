"""How long optimizer steps take, as a multiple of torch's fused AdamW.

    python benchmarks/optimizers.py [--device cuda] [--formats E4M3 E7M0] [--only GridOptim] [--json]

A model of 50 equal weights, 10 M parameters together, all with a gradient. Each optimizer steps its own copy;
all take turns in one process, in an order that alternates, after a warm-up in which loops are compiled. A
ratio is the median over the turns of (its time / fused AdamW's in that turn), with its quartiles. A row of
storage is what the storage adds to AdamW's own step: (its time - AdamW's in that turn) / AdamW's.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import attrs
import peers
import torch
from race import Run, physical_cores, race, ratios, reuse_pages
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import altgrad_core as altgrad
from altgrad_optim import GridOptim, ManifoldAdamW

TENSORS = 50
TARGETS = {  # at most so many times torch.optim.AdamW(fused=True)
    "ManifoldAdamW": {"cpu": 1.3, "cuda": 1.2},
    "GridOptim": {"cpu": 1.5, "cuda": 1.2},
    "storage": {"cpu": 0.6, "cuda": 0.4},
}


@attrs.frozen(kw_only=True)
class Row:
    """What is printed of one optimizer."""

    who: str
    format: str
    seconds: float
    ratio: float
    quartiles: tuple[float, float]
    target: float | None
    met: bool | None


def model_of(parameters: int, device: str, format: str | None) -> nn.ModuleList:
    """Return 50 Linears with so many parameters together, quantized if there is a format, and gradients."""
    width = max(1, round((parameters / TENSORS) ** 0.5))
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(TENSORS)).to(device)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.02)
        weight.grad = torch.randn_like(weight) * 1e-3
    if format is not None:
        altgrad.quantize_model(model, format)
    return model


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def stored(rounding: str) -> Callable[[Any], torch.optim.Optimizer]:
    """Return what makes an AdamW whose weights are on the grid."""

    def make(groups: Any) -> torch.optim.Optimizer:
        optimizer = adamw(groups)
        generator = torch.Generator().manual_seed(0)
        altgrad.store_on_grid(optimizer, rounding=rounding, generator=generator, bound=8.0)
        return optimizer

    return make


def makers() -> dict[str, Callable[[Any], torch.optim.Optimizer]]:
    """Return the optimizers measured: name to what makes one of parameter groups."""
    manifold = {"lr": 1e-5, "weight_decay": 0.1}
    grid = {"bound": 8.0}
    return {
        "ManifoldAdamW update": lambda groups: ManifoldAdamW(groups, **manifold),
        "ManifoldAdamW both": lambda groups: ManifoldAdamW(groups, **manifold, placement="both"),
        "ManifoldAdamW q = 1/2": lambda groups: ManifoldAdamW(groups, **manifold, placement=(0.0, 0.5)),
        "ManifoldAdamW founding": lambda groups: ManifoldAdamW(
            groups, **manifold, placement="gradient", stiffness="ideal", normalize="none"
        ),
        "GridOptim adam": lambda groups: GridOptim(groups, 0.1, normalize="adam", **grid),
        "GridOptim founding": lambda groups: GridOptim(groups, 6.0, **grid),
        "storage stochastic": stored("stochastic"),
        "storage nearest_even": stored("nearest_even"),
    }


def rows(format: str, arguments: argparse.Namespace) -> list[Row]:
    """Race all optimizers on weights of one format."""
    size = arguments.parameters, arguments.device
    chosen = {who: make for who, make in makers().items() if who.startswith(tuple(arguments.only))}
    base = adamw(model_of(*size, None).parameters()).step
    runs: dict[str, Run] = {
        who: make(altgrad.param_groups(model_of(*size, format))).step for who, make in chosen.items()
    }
    base_times, times = race(base, runs, turns=arguments.turns, budget=60.0, device=arguments.device)
    result = []
    for who, own in times.items():
        kind = who.split()[0]
        added = [t - b for t, b in zip(own, base_times, strict=True)] if kind == "storage" else own
        low, middle, high = ratios(added, base_times)
        target = TARGETS[kind][arguments.device]
        facts = {"seconds": statistics.median(added), "ratio": middle, "quartiles": (low, high)}
        result.append(Row(who=who, format=format, **facts, target=target, met=middle <= target))
    return result


def show(machine: dict[str, Any], found: list[Row]) -> None:
    table = Table("format", "", "times AdamW", "quartiles", "ms", "target", "met", box=box.SIMPLE)
    for row in found:
        low, high = row.quartiles
        numbers = f"{row.ratio:.2f}", f"{low:.2f} to {high:.2f}", f"{1000 * row.seconds:.2f}"
        table.add_row(row.format, row.who, *numbers, f"{row.target:g}", "yes" if row.met else "no")
    console = Console(width=120, markup=False, highlight=False)
    console.print(table)
    console.print("  ".join(f"{name} {value}" for name, value in machine.items()))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parameters", type=int, default=10_000_000, help="of the model of 50 weights")
    parser.add_argument("--formats", nargs="*", default=["E4M3", "E7M0"], metavar="FORMAT")
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of the names to measure")
    parser.add_argument("--turns", type=int, default=25, help="of each in a race")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: physical cores")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    machine = {**peers.machine(), "threads": arguments.threads, "parameters": arguments.parameters}
    found = [row for format in arguments.formats for row in rows(format, arguments)]
    if arguments.json:
        print(json.dumps({"machine": machine, "rows": [attrs.asdict(row) for row in found]}))
    else:
        show(machine, found)


if __name__ == "__main__":
    reuse_pages()
    main()
