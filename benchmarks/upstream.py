"""Tokens per second of an unquantized training step, beside upstream nanoGPT's on the same weights.

    python benchmarks/upstream.py --upstream ../nanoGPT [--setting 10m] [--device cuda] [--json]

A step is forward, backward, fused AdamW; no torch.compile; float32 on the CPU, bf16 autocast on cuda. Both
models take turns in one process, in an order that alternates, and the ratio is the median over the turns of
(upstream's time / ours), with its quartiles. The models start from the same weights, loaded strictly, and
must have the same loss after the warm-up: otherwise the rows would not compare the same work.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from race import reuse_pages
from torch import Tensor, nn

from altgrad_core.model import GPT
from altgrad_core.model_options import ModelOptions

VOCABULARY = 256  # bytes
SETTINGS = {  # name: (model, sequences per batch)
    "small": (ModelOptions(n_layer=4, n_head=4, n_embd=128, block_size=64), 12),  # nanoGPT's for a CPU
    "10m": (ModelOptions(), 32),
}
WARM_UP_STEPS = 5
LOSS_TOLERANCE = 0.01  # bf16 and atomic additions on a GPU; on a CPU the losses are equal

Step = Callable[[], Tensor]


def upstream_model(folder: Path, options: ModelOptions) -> nn.Module:
    """Build the GPT of the checkout's model.py."""
    spec = importlib.util.spec_from_file_location("upstream_nanogpt", folder / "model.py")
    if spec is None or spec.loader is None or not (folder / "model.py").is_file():
        raise SystemExit(f"no model.py in {str(folder)!r}; expected a checkout of nanoGPT")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    names = ("n_layer", "n_head", "n_embd", "block_size", "dropout", "bias")
    config = module.GPTConfig(vocab_size=VOCABULARY, **{name: getattr(options, name) for name in names})
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
        model: nn.Module = module.GPT(config)
    return model


def training_step(model: nn.Module, tokens: Tensor, targets: Tensor) -> Step:
    """Return a function that makes one step and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), fused=True)
    device = tokens.device.type

    def step() -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            _, loss = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value: Tensor = loss.detach()
        return value

    return step


def seconds(step: Step, steps: int, device: str) -> float:
    """Return the time of one step, averaged over `steps`."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def measure(
    steps: dict[str, Step], repetitions: int, steps_a_turn: int, device: str
) -> dict[str, list[float]]:
    """Return the seconds per step of every turn; who goes first alternates."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repetitions):
        for name in sorted(steps, reverse=bool(repetition % 2)):
            times[name].append(seconds(steps[name], steps_a_turn, device))
    return times


def row(
    setting: str, times: dict[str, list[float]], tokens_a_step: int, losses: dict[str, float]
) -> dict[str, Any]:
    """Return what is printed: speeds, and the ratio with its quartiles where upstream was measured."""
    speeds = {f"{name}_tokens_per_second": tokens_a_step / statistics.median(t) for name, t in times.items()}
    result: dict[str, Any] = {"setting": setting, **speeds, "losses": losses}
    if "upstream" in times:
        ratios = [theirs / ours for ours, theirs in zip(times["ours"], times["upstream"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result |= {"ratio": middle, "ratio_quartiles": [low, high]}
    return result


def show(result: dict[str, Any]) -> str:
    line = f"{result['setting']:8} ours {result['ours_tokens_per_second']:10,.0f} tokens/s   "
    if "ratio" not in result:
        return line + "upstream not measured: give a nanoGPT checkout with --upstream PATH"
    low, high = result["ratio_quartiles"]
    return line + (
        f"upstream {result['upstream_tokens_per_second']:10,.0f} tokens/s   "
        f"ratio {result['ratio']:.3f} (quartiles {low:.3f} to {high:.3f}; target 1.0 or more)"
    )


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    options, batch_size = SETTINGS[arguments.setting]
    batch_size = arguments.batch_size or batch_size
    generator = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(VOCABULARY, (2, batch_size, options.block_size), generator=generator).to(
        arguments.device
    )

    models: dict[str, nn.Module] = {"ours": GPT(options, VOCABULARY, generator)}
    if arguments.upstream:
        models["upstream"] = upstream_model(arguments.upstream, options)
        models["upstream"].load_state_dict(models["ours"].state_dict(), strict=True)
    steps = {name: training_step(m.to(arguments.device), tokens, targets) for name, m in models.items()}
    losses = {name: [float(step()) for _ in range(WARM_UP_STEPS)][-1] for name, step in steps.items()}
    if max(losses.values()) > (1 + LOSS_TOLERANCE) * min(losses.values()):
        raise SystemExit(f"the two models do not train alike; losses after {WARM_UP_STEPS} steps: {losses}")
    times = measure(steps, arguments.repetitions, arguments.steps, arguments.device)
    return row(arguments.setting, times, tokens.numel(), losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", type=Path, help="a folder that holds nanoGPT's model.py")
    parser.add_argument("--setting", choices=SETTINGS, default="small")
    parser.add_argument("--batch-size", type=int, help="sequences per batch; default: the setting's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=40, help="turns of each model")
    parser.add_argument("--steps", type=int, default=5, help="steps in a turn")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = run(arguments)
    print(json.dumps(result) if arguments.json else show(result))


if __name__ == "__main__":
    reuse_pages()
    main()
