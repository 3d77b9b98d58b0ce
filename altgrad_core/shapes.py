"""The shapes of the model's parameters, as a function of the options alone.

`--check` needs layer names, widths and parameter counts without importing torch, so they are written here
once more; a test holds them equal to `altgrad_core.model` and `altgrad_core.text_classifier`.
"""

from __future__ import annotations

import math

import attrs

from altgrad_core.model_options import ModelOptions

TOKEN_EMBEDDING = "transformer.wte"
POSITION_EMBEDDING = "transformer.wpe"
EMBEDDINGS = (TOKEN_EMBEDDING, POSITION_EMBEDDING)
HEAD = "lm_head"
CLASSIFIER = "classifier"
HEADS = (HEAD, CLASSIFIER)
"""Module paths. A tied head has no parameter of its own: its weight is the token embedding's."""


@attrs.frozen
class Architecture:
    """What the shapes follow from."""

    options: ModelOptions
    vocab_size: int
    labels: int = 0
    """Outputs of the classifier; 0: a language model."""

    @property
    def head(self) -> str:
        """The module path of the Linear on top."""
        return CLASSIFIER if self.labels else HEAD

    @property
    def ties_head(self) -> bool:
        """Whether the head's weight is the token embedding's: a classifier has other outputs."""
        return self.options.tie_weights and not self.labels


def linear_shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """Return the weight shape (out, in) of every Linear by module path; tied or not, the head is last."""
    return {
        module: (shape[0], shape[1])
        for module, shape in _weight_shapes(architecture).items()
        if len(shape) == 2 and module not in EMBEDDINGS
    }


def parameter_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name, in the order of the model's `named_parameters()`."""
    shapes = {}
    for module, shape in _weight_shapes(architecture).items():
        if module == architecture.head and architecture.ties_head:
            continue
        shapes[f"{module}.weight"] = shape
        if _has_bias(module, architecture):
            shapes[f"{module}.bias"] = shape[:1]
    return shapes


def parameter_count(architecture: Architecture, embeddings: bool) -> int:
    """Count the parameters, with the embeddings or without.

    A token embedding that is tied to the head is an embedding here. (nanoGPT's count keeps it.)
    """
    left_out = () if embeddings else {f"{name}.weight" for name in EMBEDDINGS}
    shapes = parameter_shapes(architecture)
    return sum(math.prod(shape) for name, shape in shapes.items() if name not in left_out)


def _has_bias(module: str, architecture: Architecture) -> bool:
    """A classifier has a bias in any case, a language model's head in none; embeddings have none."""
    always = module == CLASSIFIER
    return always or (architecture.options.bias and module not in (*EMBEDDINGS, HEAD))


def _weight_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every module's weight, in the model's order, the head's even where it is tied."""
    options, width = architecture.options, architecture.options.n_embd
    block = {
        "ln_1": (width,),
        "attn.c_attn": (3 * width, width),
        "attn.c_proj": (width, width),
        "ln_2": (width,),
        "mlp.c_fc": (4 * width, width),
        "mlp.c_proj": (width, 4 * width),
    }
    return {
        TOKEN_EMBEDDING: (architecture.vocab_size, width),
        POSITION_EMBEDDING: (options.block_size, width),
        **{f"transformer.h.{n}.{module}": s for n in range(options.n_layer) for module, s in block.items()},
        "transformer.ln_f": (width,),
        architecture.head: (architecture.labels or architecture.vocab_size, width),
    }
