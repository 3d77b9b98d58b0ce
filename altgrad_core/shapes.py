"""The shapes of nanoGPT's parameters, as a function of the options alone.

`--check` needs layer names, widths and parameter counts without importing torch, so they are written here
once more; a test holds them equal to `altgrad_core.model`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from altgrad_core.experiment import ModelOptions

TOKEN_EMBEDDING = "transformer.wte"
POSITION_EMBEDDING = "transformer.wpe"
EMBEDDINGS = (TOKEN_EMBEDDING, POSITION_EMBEDDING)
HEAD = "lm_head"
"""Module paths. A tied head has no parameter of its own: its weight is the token embedding's."""


def linear_shapes(options: ModelOptions, vocab_size: int) -> dict[str, tuple[int, int]]:
    """Return the weight shape (out, in) of every Linear by module path; tied or not, the head is last."""
    return {
        module: (shape[0], shape[1])
        for module, shape in _weight_shapes(options, vocab_size).items()
        if len(shape) == 2 and module not in EMBEDDINGS
    }


def parameter_shapes(options: ModelOptions, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name, in the order of the model's `named_parameters()`."""
    shapes = {}
    for module, shape in _weight_shapes(options, vocab_size).items():
        if module == HEAD and options.tie_weights:
            continue
        shapes[f"{module}.weight"] = shape
        if options.bias and module not in (*EMBEDDINGS, HEAD):
            shapes[f"{module}.bias"] = shape[:1]
    return shapes


def parameter_count(options: ModelOptions, vocab_size: int, embeddings: bool) -> int:
    """Count the parameters, with the embeddings or without.

    A token embedding that is tied to the head is an embedding here. (nanoGPT's count keeps it.)
    """
    left_out = () if embeddings else {f"{name}.weight" for name in EMBEDDINGS}
    shapes = parameter_shapes(options, vocab_size)
    return sum(math.prod(shape) for name, shape in shapes.items() if name not in left_out)


def _weight_shapes(options: ModelOptions, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every module's weight, in the model's order, the head's even where it is tied."""
    width = options.n_embd
    block = {
        "ln_1": (width,),
        "attn.c_attn": (3 * width, width),
        "attn.c_proj": (width, width),
        "ln_2": (width,),
        "mlp.c_fc": (4 * width, width),
        "mlp.c_proj": (width, 4 * width),
    }
    return {
        TOKEN_EMBEDDING: (vocab_size, width),
        POSITION_EMBEDDING: (options.block_size, width),
        **{f"transformer.h.{n}.{module}": s for n in range(options.n_layer) for module, s in block.items()},
        "transformer.ln_f": (width,),
        HEAD: (vocab_size, width),
    }
