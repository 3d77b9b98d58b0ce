"""What a person reads of a run: its header, and at its end what came out and the next command to type."""

from __future__ import annotations

import collections
import itertools
import shlex
from collections.abc import Iterable
from typing import Any

from altgrad_core import baseline, describe
from altgrad_core.axes import SINGLE
from altgrad_core.experiment import Cell
from altgrad_core.experiment_file import ExperimentFile
from altgrad_core.price import cost, price_per_hour
from altgrad_core.record import EVENTS
from altgrad_core.run_state import Run
from altgrad_core.validation_metrics import LOSS, METRICS


def header(run: Run, file: ExperimentFile, cell: Cell, device: str) -> None:
    """Print what the run is, before it begins or goes on."""
    terminal = run.terminal
    title = file.name if cell.name == SINGLE else f"{file.name} / {cell.name}"
    terminal.say(f"{title} on {device}", style="bold")
    terminal.table(
        [
            *describe.rows(cell.experiment, file.registry),
            ("text", _text(run)),
            ("folder", str(run.folder.path)),
            *([("frozen", f"{run.frozen:,} numbers do not train")] if run.frozen else []),
            *([("overrides", "; ".join(cell.in_force))] if cell.in_force else []),
            *([("price", f"{price:g} an hour")] if (price := price_per_hour()) else []),
        ]
    )


def _text(run: Run) -> str:
    """Return how much there is to learn from, and how often the run is to read it."""
    task, tokens = run.task, len(run.tokens.train)
    passes = run.experiment.steps * task.per_step / task.epoch
    documents = "" if task.read == "tokens" else f"{task.epoch:,} documents of "
    return f"{documents}{tokens:,} training tokens, {passes:.2f} passes over them"


def report(run: Run, file: ExperimentFile, compared_with: baseline.Baseline | None) -> None:
    """Print the summary, and the next command to type."""
    summary, terminal = run.summary, run.terminal
    final, best = summary["final"], summary["best"]
    terminal.say(
        f"{summary['outcome']} at step {summary['step']} after {describe.duration(run.seconds)}", style="bold"
    )
    rows = [("reason", summary["message"])] if summary["message"] else []
    shown = METRICS[summary["task"]]
    if evaluated := [one.words.format(final[name]) for name, one in shown.items() if name in final]:
        rows.append(("validation", ", ".join(evaluated)))
    if compared_with is not None:
        rows += baseline.rows(final, compared_with)
    if best:
        rows.append(("best", f"{best[LOSS]:.4f} at step {best['step']:.0f}"))
    if summary["loss_floor"] is not None:
        rows.append(("floor", f"{summary['loss_floor']:.4f} nats per token, the source's entropy"))
    rows += _what_policies_did(summary)
    rows.append(("on the grid", f"{summary['share_on_grid']:.1%} of the non-embedding parameters"))
    rows.append(("text", f"{summary['passes']:.2f} passes over the training {run.task.read}"))
    if summary["tokens_per_second"]:
        rows.append(("speed", f"{summary['tokens_per_second']:,.0f} tokens/s{cost(run.seconds)}"))
    rows.append(("folder", str(run.folder.path)))
    if run.cell == SINGLE or summary["outcome"] != "finished":  # a grid goes on by itself
        rows.append(("next", _next(run, file)))
    if compared_with is not None and summary["outcome"] == "finished":
        rows.append(("compare", baseline.command(run.folder.path, compared_with)))
    terminal.table(rows)


def _what_policies_did(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return how often which policy acted, and, where formats were switched, what they are now."""
    rows = []
    for policy, kinds in summary["actions"].items():
        rows.append((policy, ", ".join(f"{count} x {kind}" for kind, count in kinds.items())))
    if summary["formats"]:
        now = collections.Counter(summary["formats"].values())
        rows.append(("formats now", ", ".join(f"{name} in {count} layers" for name, count in now.items())))
    return rows


def _next(run: Run, file: ExperimentFile) -> str:
    """Return what to type next."""
    folder, seed = run.folder.path, (run.experiment.seed + 1) % 2**63  # TOML's integers have 64 bits
    if run.summary["outcome"] == "finished":
        others = [flag for flag in file.flags if flag.partition("=")[0].strip() != "seed"]
        out = f"{folder.parent.parent}-seed{seed}"
        return f"another seed: {_command(file, [f'seed={seed}', *others], '--out', out)}"
    if run.summary["outcome"] == "stopped":
        return f"{folder / EVENTS} tells how it came to this; the file's next try needs another --out"
    return f"to go on: {_command(file, file.flags, '--resume', str(folder))}"


def _command(file: ExperimentFile, flags: Iterable[str], *more: str) -> str:
    """Return the command that runs a file with `--set` flags, as a shell takes it."""
    sets = itertools.chain.from_iterable(("--set", flag) for flag in flags)
    return shlex.join(["altgrad-run", str(file.path), *sets, *more])
