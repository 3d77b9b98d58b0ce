"""How long quantizing takes, as a multiple of `torch.clone`, for AltGrad and every peer.

    python benchmarks/quantize.py [--device cuda] [--peers gfloat qtorch] [--formats E4M3] [--json]

Everything that does one job takes turns in one process, in an order that alternates, on the same float32
tensor, after a warm-up in which kernels compile. A ratio is the median over the turns of (its time / clone's
time in that turn), with its quartiles. A slow one leaves when its time is spent. Only public functions of
AltGrad are called. The last line says what was compiled for 40 formats that were never seen before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from typing import Any

import attrs
import compilations
import peers
import torch
from race import Run, physical_cores, race, ratios, reuse_pages
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import altgrad_core as altgrad
from altgrad_formats.layout import NAMED, Layout

TARGETS = {  # at most so many times torch.clone, of the same elements in float32
    "nearest_even": {"cpu": 1.2, "cuda": 1.15},
    "stochastic": {"cpu": 1.6, "cuda": 1.5},
    "encode": {"cpu": 1.5, "cuda": 1.0},
    "decode": {"cpu": 1.5, "cuda": 1.0},
    "with amax": {"cpu": 2.0, "cuda": 1.8},
    "by its table": {"cpu": 6.0, "cuda": 2.0},
    "50 weights": {"cpu": 3.0, "cuda": 2.0},
}
MODEL_FORMAT = "E4M3"


@attrs.frozen(kw_only=True)
class Entry:
    """One that takes part in a race; `run` is None, with the reason in `missing`, where it cannot."""

    who: str
    version: str | None
    run: Run | None = None
    missing: str | None = None


@attrs.frozen(kw_only=True)
class Row:
    """What is printed of one entry; of a peer that is not here, one row says why."""

    job: str
    format: str
    who: str
    version: str | None
    seconds: float | None = None
    ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    turns: int = 0
    target: float | None = None
    met: bool | None = None
    missing: str | None = None


# --- what is measured ---------------------------------------------------------------------------------


def jobs(
    found: list[peers.Found], arguments: argparse.Namespace, x: Tensor
) -> Iterator[tuple[str, str, Run, list[Entry]]]:
    """Yield (job, format, the clone to compare with, who takes part)."""
    for name in arguments.formats:
        for mode in peers.adapters.MODES:
            yield mode, name, x.clone, [e for one in found for e in entries(one, NAMED[name], mode, x)]
        amax = ours(found, lambda name=name: quantize_with_amax(altgrad.get_format(name), x))
        yield "with amax", name, x.clone, [amax]
    known = altgrad.get_format(MODEL_FORMAT)
    table = altgrad.Format(name=f"{MODEL_FORMAT}_TABLE", bits=known.bits, values=known.values)
    yield "by its table", MODEL_FORMAT, x.clone, [ours(found, lambda: table.quantize(x))]
    weights = model_of(arguments.parameters, x.device)
    clones = lambda: [weight.clone() for weight in weights.parameters()]  # noqa: E731
    yield "50 weights", MODEL_FORMAT, clones, [ours(found, lambda: quantize_weights(weights))]


def entries(found: peers.Found, layout: Layout, mode: str, x: Tensor) -> Iterator[Entry]:
    """Yield the entry of a peer, if it can do that at all."""
    call = found.call(layout, mode, x.device.type)
    if call is None:
        return
    facts = {"who": found.name, "version": found.version}
    try:
        given = x if mode != "decode" else found.call(layout, "encode", x.device.type)(x)
        call(given)
    except Exception as error:  # noqa: BLE001 - a peer that raises is a row that says so
        yield Entry(**facts, missing=f"{type(error).__name__}: {error}")
    else:
        yield Entry(**facts, run=lambda: call(given))


def ours(found: list[peers.Found], run: Run) -> Entry:
    return Entry(who=found[0].name, version=found[0].version, run=run)


def quantize_with_amax(format: altgrad.Format, x: Tensor) -> Tensor:
    """Quantize a tensor at the scale that its own largest magnitude fits."""
    recipe = altgrad.Recipe(format=format)
    return recipe.quantize(x, recipe.scale_of(x))


def model_of(parameters: int, device: torch.device) -> nn.ModuleList:
    """Return 50 quantized Linears with so many parameters together."""
    width = max(1, round((parameters / 50) ** 0.5))
    model = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(50)).to(device)
    altgrad.quantize_model(model, MODEL_FORMAT)
    return model


def quantize_weights(model: nn.Module) -> None:
    """Compute every quantized weight of a model once, as the training loop does before a step."""
    with torch.no_grad(), altgrad.held_weights(model):
        pass


# --- the rows ---------------------------------------------------------------------------------------


def rows(
    job: str, format: str, clone: Run, taking_part: list[Entry], arguments: argparse.Namespace
) -> list[Row]:
    runs = {entry.who: entry.run for entry in taking_part if entry.run}
    limits = {"turns": arguments.turns, "budget": arguments.budget, "device": arguments.device}
    base, times = race(clone, runs, **limits)
    target = TARGETS[job][arguments.device]
    result = []
    for entry in taking_part:
        facts = {"job": job, "format": format, "who": entry.who, "version": entry.version}
        if entry.run is None:
            result.append(Row(**facts, missing=entry.missing))
            continue
        own = times[entry.who]
        low, middle, high = ratios(own, base)
        measured = {"seconds": statistics.median(own), "ratio": middle, "quartiles": (low, high)}
        mine = {"target": target, "met": middle <= target} if entry.who == "altgrad" else {}
        result.append(Row(**facts, **measured, turns=len(own), **mine))
    return result


# --- the command --------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    columns = ("job", "format", "", "version", "times clone", "quartiles", "ms", "target", "met")
    table = Table(*columns, box=box.SIMPLE)
    for row in result["rows"]:
        facts = [row.job, row.format, row.who, row.version or ""]
        if row.missing:
            table.add_row(*facts, row.missing)
            continue
        low, high = row.quartiles
        met = {None: "", True: "yes", False: "no"}[row.met]
        target = "" if row.target is None else f"{row.target:g}"
        numbers = [f"{row.ratio:.2f}", f"{low:.2f} to {high:.2f}", f"{1000 * row.seconds:.2f}", target, met]
        table.add_row(*facts, *numbers)
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
    console.print(table)
    console.print(compilations.LINE.format(**result["new"]))
    console.print("  ".join(f"{name} {value}" for name, value in result["machine"].items()))


def parsed() -> argparse.Namespace:
    eight_bits = [name for name, layout in NAMED.items() if layout.bits == 8]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--elements", type=int, default=2**24, help="of the tensor")
    parser.add_argument("--parameters", type=int, default=10_000_000, help="of the model of 50 weights")
    parser.add_argument("--peers", nargs="*", help="by name, AltGrad always; default: all")
    parser.add_argument("--formats", nargs="*", choices=list(NAMED), default=eight_bits, metavar="FORMAT")
    parser.add_argument("--turns", type=int, default=15, help="of each in a race")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds after which a slow one leaves")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: physical cores")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    found = peers.find_all(arguments.peers)
    x = torch.randn(arguments.elements, generator=torch.Generator().manual_seed(0)).to(arguments.device)
    result: dict[str, Any] = {
        "machine": {**peers.machine(), "threads": arguments.threads, "elements": arguments.elements},
        "rows": [
            *(row for job in jobs(found, arguments, x) for row in rows(*job, arguments)),
            *(
                Row(job="", format="", who=f.name, version=None, missing=f.missing)
                for f in found
                if f.missing
            ),
        ],
        "new": compilations.counted(compilations.unseen_formats(), x),
    }
    if arguments.json:
        print(json.dumps({**result, "rows": [attrs.asdict(row) for row in result["rows"]]}))
    else:
        show(result)


if __name__ == "__main__":
    reuse_pages()
    main()
