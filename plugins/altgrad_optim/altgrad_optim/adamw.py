"""AdamW: torch's own as the baseline, and its update for the plain parameters of the other optimizers.

AdamW (Loshchilov and Hutter, arXiv 1711.05101) with moments m, v and bias corrections c1 = 1 - b1^t,
c2 = 1 - b2^t:   w <- (1 - lr*decay)*w - lr * (m/c1) / (sqrt(v)/sqrt(c2) + eps).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from altgrad_core.hookspecs import OptimizerInputs
from altgrad_optim import AdamWOptions
from altgrad_optim.powers import root


def build(options: AdamWOptions, inputs: OptimizerInputs) -> torch.optim.AdamW:
    """Return torch.optim.AdamW; what [quantize] does not cover trains at `other_lr`, without it at `lr`."""
    other = options.other_lr if inputs.covers else options.lr
    groups = [{"lr": options.lr if group["covered"] else other, **group} for group in inputs.groups]
    return torch.optim.AdamW(
        groups,
        lr=options.lr,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        fused=True,
    )


def adamw_direction(
    gradient: Tensor, m: Tensor, v: Tensor, step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """Update the moments in place and return Adam's direction (m/c1) / (sqrt(v)/sqrt(c2) + eps).

    gradient, m, v: of one shape and dtype. step counts from 1. Arithmetic in their dtype, one rounding an
    operation, in the order of steps.c: lerp_ and addcmul_ would contract two of them.
    """
    first, second = betas
    over_c1, over_root_c2 = corrections(step, betas)
    m.add_((gradient - m).mul_(1 - first))
    v.mul_(second).add_((gradient * gradient).mul_(1 - second))
    return m.div(root(v).mul_(over_root_c2).add_(eps)).mul_(over_c1)


def corrections(step: int, betas: tuple[float, float]) -> tuple[float, float]:
    """Return what Adam's bias corrections multiply by in step t: 1/(1 - b1^t) and 1/sqrt(1 - b2^t)."""
    first, second = betas
    return 1 / (1 - first**step), 1 / math.sqrt(1 - second**step)


_CPU = torch.device("cpu")


def moments(state: dict[str, Any], parameter: Tensor, *names: str, step_device: torch.device = _CPU) -> None:
    """Start a parameter's state: zero tensors, and `step` (0-d float32, as torch keeps it).

    `step` moves to `step_device`, wherever a checkpoint has put it: on the CPU it can be read without
    waiting, torch's fused update wants it beside the parameter.
    """
    step = state["step"] if "step" in state else torch.zeros((), dtype=torch.float32, device="cpu")
    if step.dtype != torch.float32 or step.device != step_device:
        step = step.to(step_device, torch.float32)
    state["step"] = step
    for name in names:
        if name not in state:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def states_of(
    states: Mapping[Tensor, dict[str, Any]], parameters: Sequence[Tensor], *names: str
) -> list[dict[str, Any]]:
    """Return the states of an optimizer's parameters, those that lack something with their `moments`."""
    needed, found = {"step", *names}, [states[parameter] for parameter in parameters]
    for state, parameter in zip(found, parameters, strict=True):
        whole = state.keys() >= needed and state["step"].is_cpu and state["step"].dtype == torch.float32
        if not whole:  # asked first, for all weights in every step
            moments(state, parameter, *names)
    return found


def plain_step(
    optimizer: torch.optim.Optimizer, group: dict[str, Any], plain: Sequence[Tensor], lr: float
) -> None:
    """Update parameters without a format by torch's fused AdamW, at learning rate `lr`."""
    if not plain:
        return
    for parameter in plain:
        moments(optimizer.state[parameter], parameter, "exp_avg", "exp_avg_sq", step_device=parameter.device)
    states = [optimizer.state[parameter] for parameter in plain]
    beta1, beta2 = group["betas"]
    adamw(
        list(plain),
        [parameter.grad for parameter in plain],
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
