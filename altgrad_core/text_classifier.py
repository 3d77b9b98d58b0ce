"""nanoGPT's trunk with a head that tells the labels of a document.

A document is read as W windows of T tokens, each by itself from position 0. The last hidden states of a
window's tokens are averaged, the head makes logits of the mean, and a document's logits are the mean of its
windows'. The mean rather than the last token's state: under causal attention that one state would have to
gather all of the window, which a trunk trained on the next token does not do; the mean needs nothing of it.

    logit_l = mean over windows of (c_l . mean over tokens of h + b_l),  P(label l) = sigmoid(logit_l)

The loss is the binary cross-entropy of each label for itself, in nats, its mean over labels and documents: a
document may have several labels, or none. A head has a bias in any case: a rare label's logit is negative
whatever the text is.

Past its end a document is padded. No token attends to what comes after it, so padding changes no hidden state
of a token; padded positions are left out of the mean over tokens, and windows past the end out of the mean
over windows. The trunk's Linears round what passes there like everything else: it is in the amax of quantized
activations, and in what `range` counts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from altgrad_core.model import Transformer, empty_modules, initialize
from altgrad_core.model_options import ModelOptions
from altgrad_core.random_bits import draw_seed

PADDING = -1
"""Stands where a document has no token."""


class TextClassifier(nn.Module):
    """A multi-label classifier of documents; its parameters' names are nanoGPT's but for the head's."""

    def __init__(
        self, options: ModelOptions, vocab_size: int, labels: int, generator: torch.Generator
    ) -> None:
        """Build the model on the CPU; `generator` is drawn from once, to seed the initial weights.

        The trunk begins with the weights that a language model begins with.
        """
        super().__init__()
        with empty_modules():
            self.transformer = Transformer(options, vocab_size)
            self.classifier = nn.Linear(options.n_embd, labels)
        initialize(self, options.n_layer, draw_seed(generator))

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits (B, labels) and the loss, 0-d float32.

        tokens: (B, W, T) int64, PADDING past a document's end; no document is empty.
        targets: (B, labels) of 0 and 1, in float32.
        """
        there = tokens != PADDING
        hidden = self.transformer(tokens.clamp(min=0).flatten(0, 1)).unflatten(0, tokens.shape[:2])
        logits = _mean(self.classifier(_mean(hidden, there)), there.any(-1))  # (B, W, C), (B, W, labels)
        return logits, F.binary_cross_entropy_with_logits(logits, targets)


def _mean(x: Tensor, there: Tensor) -> Tensor:
    """Return the mean over the last dimension but one of what is there, in float32 or wider; 0: nothing is.

    x: (..., N, C); there: (..., N).
    """
    share = there.float() / there.sum(-1, keepdim=True).clamp(min=1)
    return (x * share.unsqueeze(-1)).sum(-2)
