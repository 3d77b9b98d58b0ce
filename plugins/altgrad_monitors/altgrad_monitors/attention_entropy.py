"""`attention_entropy`: how widely attention looks.

A query's attention weights p over the positions it may see have the entropy -sum p ln p, in nats: 0 where it
looks at one position only, ln n where it looks at n alike. Reported is the mean over the queries, heads and
sequences of one micro-batch, of each attention layer (called by its Linear, such as
`transformer.h.0.attn.c_attn`). Collapsed attention is an early sign of divergence (Zhai et al., arXiv
2303.06296).

entropy  the mean, in nats; `total` is the mean of the layers'
alert    1 where it is below the option `alert`, or not a number, else 0; `total` is 1 where a layer's is

Attention is causal: query i, counted from 0, sees i + 1 positions, and its entropy is ln(i + 1) at most. All
queries count, but those of padding past a document's end; the mean over T of them is at most ln(T!)/T: 1.92
for T = 16, 4.56 for T = 256. At T <= 4 it lies below 1 whatever the weights do.

One extra forward pass, in evaluation mode (no dropout), on the coming step's first micro-batch. The softmax
is worked out in float32, one sequence at a time, which takes heads * T^2 numbers of memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from altgrad_core.extra_pass import extra_passes, micro_batches, watched
from altgrad_core.hookspecs import Step
from altgrad_core.model import CausalSelfAttention
from altgrad_monitors import AttentionEntropyOptions
from altgrad_monitors.reporting import averaged, largest, reported


class AttentionEntropy:
    """Reports `entropy` and `alert` per attention layer; see the module's text."""

    needs = ()
    provides: Mapping[str, str] = {"entropy": "mean", "alert": "sum"}
    undefined_is_nan = True

    def __init__(self, options: AttentionEntropyOptions) -> None:
        self.every = options.every
        self._options, self.layers = options, options.layers
        self._run: Any = None

    def start(self, run: Any) -> None:
        self._run = run

    def observe(self, step: Step) -> Mapping[str, Tensor | float]:
        """Return both quantities of each attention layer and in total."""
        attention = {
            f"{name}.c_attn": module
            for name, module in self._run.model.named_modules()
            if isinstance(module, CausalSelfAttention) and re.fullmatch(self.layers, f"{name}.c_attn")
        }
        projections: dict[str, nn.Module] = {layer: module.c_attn for layer, module in attention.items()}
        entropies: dict[str, Tensor] = {}

        batch = next(micro_batches(self._run, step.index, 1))

        def seen(layer: str, _: Tensor, qkv: Tensor) -> None:
            there = self._run.task.there(batch[0], qkv.shape[:-1])
            entropies[layer] = mean_entropy(qkv, attention[layer].n_head, there)

        with extra_passes(self._run) as loss_of, torch.no_grad(), watched(projections, seen):
            loss_of(*batch)
        alerts = {layer: (~(one >= self._options.alert)).float() for layer, one in entropies.items()}
        return {
            **reported("attention_entropy/entropy", entropies, averaged, self._options.per),
            **reported("attention_entropy/alert", alerts, largest, self._options.per),
        }


def mean_entropy(qkv: Tensor, heads: int, there: Tensor | None = None) -> Tensor:
    """Return the mean entropy of causal attention, 0-d float64.

    qkv: (B, T, 3C), what `c_attn` puts out: queries, keys and values of all heads side by side.
    there: (B, T) bool, which queries count; None: all.
    """
    there = torch.ones(qkv.shape[:-1], dtype=torch.bool, device=qkv.device) if there is None else there
    q, k, _ = (part.transpose(1, 2).float() for part in qkv.unflatten(2, (3, heads, -1)).unbind(2))
    unseen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
    sums = [
        torch.where(row, _entropies(*pair, unseen), 0.0).sum(dtype=torch.float64)
        for *pair, row in zip(q, k, there, strict=True)
    ]
    return torch.stack(sums).sum() / (heads * there.sum())


def _entropies(q: Tensor, k: Tensor, unseen: Tensor) -> Tensor:
    """Return each query's entropy, (heads, T); q, k: (heads, T, head width)."""
    logits = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill_(unseen, -math.inf)  # (heads, T, T)
    return torch.special.entr(logits.softmax(-1)).sum(-1)
