"""What training costs: quantized steps, upstream's, memory, and how soon a command is at its first step.

    python benchmarks/train.py [--upstream ../nanoGPT] [--batch-sizes 8 16 32 64] [--device cuda] [--json]
    python benchmarks/train.py --n-layer 4 --n-head 4 --n-embd 128 --block-size 64     # nanoGPT's for a CPU

Steps are the training loop's own, of runs on tokens of a Markov chain: the batch, forward and backward, the
gradient's norm and its limit, fused AdamW. Runs that differ in [quantize] alone take turns in one process, in
an order that alternates. A ratio is the median over the turns of (its time / the unquantized run's in that
turn), with its quartiles. Upstream nanoGPT's model, loaded with the same weights, takes its turns in the loop
of its train.py: the same batches, dtype, limit of the norm, and torch.compile where ours has it; once with
its own configure_optimizers (AdamW, fused on a GPU alone), once with fused AdamW as here.

Memory is what train_memory.py tells of, the commands' seconds are what starting.py does.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import peers
import starting
import torch
import train_memory
from race import physical_cores, race, ratios, reuse_pages
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from training_runs import ARMS, SIZES, assembled, one_step
from upstream import upstream_model

from altgrad_core.run_state import Run

UPSTREAM = "upstream nanoGPT"
UPSTREAM_FUSED = "upstream nanoGPT, AdamW fused"
AGAIN = "unquantized, again"
"""A second run of the same: how far its ratio is from 1 is what this race cannot tell."""
PARTS = ("steps", "memory", "starts")
TARGETS = {  # a step of ours takes at most so many times an unquantized one; upstream's at least so many
    "weights": {"cpu": 1.10, "cuda": 1.05},
    "weights, activations, gradients": {"cpu": 1.5, "cuda": 1.3},
    UPSTREAM: {"cpu": 1.0, "cuda": 1.0},
}


@attrs.frozen(kw_only=True)
class Row:
    """How long one kind of step takes."""

    who: str
    batch_size: int
    seconds: float
    tokens_per_second: float
    ratio: float | None
    """To the unquantized step; None for that one itself."""
    quartiles: tuple[float, float] | None
    target: float | None
    met: bool | None


def upstream_step(run: Run, folder: Path, fused: bool) -> Callable[[], None]:
    """Return a step of upstream's train.py, on the weights and tokens of a run.

    fused: whether its AdamW is, whatever its configure_optimizers says.
    """
    options, train = run.experiment.model, run.experiment.train
    original = upstream_model(folder, options).to(run.device)
    original.load_state_dict(run.model.state_dict(), strict=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it counts
        optimizer = original.configure_optimizers(0.1, 1e-3, (0.9, 0.95), run.device.type)
    if fused:
        groups = [
            {name: group[name] for name in ("params", "weight_decay")} for group in optimizer.param_groups
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    model: Any = original if run.compiled is run.model else torch.compile(original)
    device = run.device.type

    def step() -> None:
        starts = torch.randint(len(run.tokens.train) - options.block_size, (train.batch_size,))
        windows = [run.tokens.train[i : i + options.block_size + 1].astype("int64") for i in starts.tolist()]
        batch = torch.stack([torch.from_numpy(window) for window in windows])
        with torch.autocast(device, dtype=torch.bfloat16, enabled=run.autocast):
            _, loss = model(batch[:, :-1].to(run.device), batch[:, 1:].contiguous().to(run.device))
        loss.backward()
        nn.utils.clip_grad_norm_(original.parameters(), train.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def steps(batch_size: int, arguments: argparse.Namespace) -> list[Row]:
    """Race a step of every arm, and upstream's, at one batch size."""
    with contextlib.ExitStack() as stack:
        arms = {**ARMS, AGAIN: ARMS["unquantized"]}
        runs = {who: stack.enter_context(assembled(arm, batch_size, arguments)) for who, arm in arms.items()}
        plain = runs.pop("unquantized")
        takes: dict[str, Callable[[], Any]] = {who: one_step(run) for who, run in runs.items()}
        if arguments.upstream:
            for who, fused in ((UPSTREAM, False), (UPSTREAM_FUSED, True)):
                takes[who] = upstream_step(plain, arguments.upstream, fused)
        base, times = race(
            one_step(plain), takes, turns=arguments.turns, budget=arguments.budget, device=arguments.device
        )
    tokens = batch_size * arguments.block_size
    return list(rows(base, times, batch_size, tokens, arguments.device))


def rows(
    base: list[float], times: Mapping[str, list[float]], batch_size: int, tokens: int, device: str
) -> Iterator[Row]:
    """Yield what is printed of a race; `tokens` are those of a step."""
    for who, own in {"unquantized": base, **times}.items():
        seconds = statistics.median(own)
        facts = {"batch_size": batch_size, "seconds": seconds, "tokens_per_second": tokens / seconds}
        if own is base:
            yield Row(who=who, **facts, ratio=None, quartiles=None, target=None, met=None)
            continue
        low, middle, high = ratios(own, base)
        target = TARGETS[who][device] if who in TARGETS else None
        met = None if target is None else (middle >= target if who == UPSTREAM else middle <= target)
        yield Row(who=who, **facts, ratio=middle, quartiles=(low, high), target=target, met=met)


# --- the command -------------------------------------------------------------------------------------


def show(found: list[Row], console: Console) -> None:
    table = Table(
        "a step", "batch", "ms", "tokens/s", "times unquantized", "quartiles", "target", "met", box=box.SIMPLE
    )
    for row in found:
        numbers = f"{1000 * row.seconds:.1f}", f"{row.tokens_per_second:,.0f}"
        judged = ["", "", "", ""]
        if row.ratio is not None and row.quartiles is not None:
            low, high = row.quartiles
            judged[:2] = f"{row.ratio:.3f}", f"{low:.3f} to {high:.3f}"
        if row.target is not None:
            sign = "≥" if row.who == UPSTREAM else "≤"
            judged[2:] = f"{sign} {row.target:g}", "yes" if row.met else "no"
        table.add_row(row.who, str(row.batch_size), *numbers, *judged)
    console.print(table)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", type=Path, help="a folder that holds nanoGPT's model.py")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS, help="parts to measure")
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=[8, 16, 32, 64], metavar="SEQUENCES")
    for name, size in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size)
    parser.add_argument("--turns", type=int, default=11, help="steps of each; commands of each kind")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds after which one leaves a race")
    parser.add_argument("--experiment", type=Path, default=starting.QUICKSTART, help="for the commands")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: physical cores")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    machine = {**peers.machine(), **{name: getattr(arguments, name) for name in (*SIZES, "threads")}}
    raced = [
        row for size in arguments.batch_sizes if "steps" in arguments.only for row in steps(size, arguments)
    ]
    held = train_memory.rows(arguments) if "memory" in arguments.only else []
    started = starting.rows(arguments) if "starts" in arguments.only else []
    if arguments.json:
        parts = zip(PARTS, (raced, held, started), strict=True)
        print(json.dumps({"machine": machine, **{name: list(map(attrs.asdict, one)) for name, one in parts}}))
        return
    console = Console(width=130, markup=False, highlight=False)
    if raced:
        show(raced, console)
    if held:
        train_memory.show(held, console)
    if started:
        starting.show(started, console)
    console.print("  ".join(f"{name} {value}" for name, value in machine.items()))


if __name__ == "__main__":
    reuse_pages()
    main()
