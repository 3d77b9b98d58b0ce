"""nanoGPT: the decoder on which the formats are compared.

The architecture is GPT-2's (Radford et al., 2019) as Karpathy's nanoGPT writes it: pre-norm blocks of causal
self-attention and a four times wider MLP with exact GELU, learned positions, no bias by default. Modules and
parameters carry nanoGPT's names, so that its checkpoints load here with `strict=True` and ours load there.

Initial weights follow nanoGPT too: N(0, 0.02²), the two projections back into the residual stream
N(0, 0.02²/(2 n_layer)), biases 0, LayerNorm weights 1. Unlike there, each parameter draws from a stream of
its own, seeded by its name: arms that differ in one layer (an untied head, a bias, a block more) share all
other initial weights, and the global generators are never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad_core.model_options import ModelOptions
from altgrad_core.random_bits import draw_seed

INITIAL_STD = 0.02  # GPT-2's
LAYER_NORM_EPS = 1e-5  # GPT-2's
IGNORED = -1
"""A target that does not count in the loss, as in nanoGPT."""


class LayerNorm(nn.Module):
    """Layer normalization over the last dimension, whose bias can be left out."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, LAYER_NORM_EPS)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what comes before it."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        width = options.n_embd
        self.n_head = options.n_head
        self.dropout = options.dropout
        self.c_attn = nn.Linear(width, 3 * width, bias=options.bias)  # queries, keys, values of all heads
        self.c_proj = nn.Linear(width, width, bias=options.bias)
        self.resid_dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.c_attn(x).unflatten(2, (3, self.n_head, -1))  # (B, T, 3, heads, head width)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, heads, T, head width)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        mixed: Tensor = self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))  # (B, T, C)
        return mixed


class MLP(nn.Module):
    """Two Linears with a GELU between them, four times as wide inside."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        width = options.n_embd
        self.c_fc = nn.Linear(width, 4 * width, bias=options.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * width, width, bias=options.bias)
        self.dropout = nn.Dropout(options.dropout)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.gelu(self.c_fc(x))  # (B, T, 4C)
        outer: Tensor = self.dropout(self.c_proj(inner))
        return outer


class Block(nn.Module):
    """Attention and MLP, each behind a LayerNorm and beside a residual connection."""

    def __init__(self, options: ModelOptions) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(options.n_embd, options.bias)
        self.attn = CausalSelfAttention(options)
        self.ln_2 = LayerNorm(options.n_embd, options.bias)
        self.mlp = MLP(options)

    def forward(self, x: Tensor) -> Tensor:
        middle: Tensor = x + self.attn(self.ln_1(x))
        outer: Tensor = middle + self.mlp(self.ln_2(middle))
        return outer


class Transformer(nn.Module):
    """Everything before the head: embeddings, blocks, the last LayerNorm."""

    def __init__(self, options: ModelOptions, vocab_size: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab_size, options.n_embd)
        self.wpe = nn.Embedding(options.block_size, options.n_embd)
        self.drop = nn.Dropout(options.dropout)
        self.h = nn.ModuleList(Block(options) for _ in range(options.n_layer))
        self.ln_f = LayerNorm(options.n_embd, options.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        length, block_size = tokens.shape[1], self.wpe.num_embeddings
        if length > block_size:
            raise ValueError(f"got {length} tokens in a row, expected at most block_size = {block_size}")
        x = self.drop(self.wte(tokens) + self.wpe.weight[:length])  # (B, T, C)
        for block in self.h:
            x = block(x)
        hidden: Tensor = self.ln_f(x)
        return hidden


class GPT(nn.Module):
    """A GPT-2 style language model; with `tie_weights` the head's weight *is* the token embedding's."""

    def __init__(self, options: ModelOptions, vocab_size: int, generator: torch.Generator) -> None:
        """Build the model on the CPU; `generator` is drawn from once, to seed the initial weights."""
        super().__init__()
        self.options = options
        with empty_modules():
            self.transformer = Transformer(options, vocab_size)
            self.lm_head = nn.Linear(options.n_embd, vocab_size, bias=False)
        if options.tie_weights:
            self.lm_head.weight = self.transformer.wte.weight
        initialize(self, options.n_layer, draw_seed(generator))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return (logits, loss) for `tokens` (B, T), int64.

        With `targets` (B, T): the logits (B, T, vocabulary) and the mean cross-entropy in nats, in float32.
        Without: the logits (B, 1, vocabulary) of the last position, and None.
        """
        hidden = self.transformer(tokens)
        if targets is None:
            return self.lm_head(hidden[:, -1:]), None
        logits = self.lm_head(hidden)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED)
        return logits, loss


@contextlib.contextmanager
def empty_modules() -> Iterator[None]:
    """Make modules on the CPU inside; what they fill themselves with leaves the global generator alone."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        yield


@torch.no_grad()
def initialize(model: nn.Module, n_layer: int, seed: int) -> None:
    """Fill every parameter with its initial values, a function of `seed`, its name and its shape."""
    residual_std = INITIAL_STD / math.sqrt(2 * n_layer)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            std = residual_std if name.endswith("c_proj.weight") else INITIAL_STD
            parameter.normal_(0.0, std, generator=_stream(seed, name))


def _stream(seed: int, name: str) -> torch.Generator:
    """Return the random stream of the parameter `name`."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))
