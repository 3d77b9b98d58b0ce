"""The `[model]` table of an experiment file, from which the shapes and the model itself follow."""

from __future__ import annotations

import attrs

from altgrad_core.options import FieldError, at_least, between, option, within


@attrs.frozen(kw_only=True)
class ModelOptions:
    """`[model]`: nanoGPT."""

    n_layer: int = option("transformer blocks", default=6, validator=between(1, 1000))
    n_head: int = option("attention heads; divides n_embd", default=6, validator=at_least(1))
    n_embd: int = option("width of the residual stream", default=384, validator=at_least(1))
    block_size: int = option("context length", unit="tokens", default=256, validator=at_least(1))
    dropout: float = option("dropout probability", default=0.0, validator=within(0, 1))
    bias: bool = option("biases in Linears and LayerNorms", default=False)
    tie_weights: bool = option("a language model's head shares the token embedding's weight", default=True)

    def __attrs_post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise FieldError(
                "n_head",
                f"n_embd = {self.n_embd} is no multiple of n_head = {self.n_head}; change one of them",
            )
