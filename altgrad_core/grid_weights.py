"""Which of an optimizer's weights are to be stored on a grid."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from altgrad_core.quantizer import WeightQuantizer, quantizer_of


def grid_weights(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the quantized weights whose rule does not say storage="master", group by group."""
    return [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if (quantizer := quantizer_of(parameter)) is not None and quantizer.storage != "master"
    ]


def first_grid_weights(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the same. Raises ValueError where there is none, or somebody stores them already."""
    weights = grid_weights(optimizer)
    if not weights:
        raise ValueError(
            "the optimizer holds no quantized weight to store on a grid: quantize_model(model, format) first"
        )
    if any(quantizer_on_grid(weight).on_grid for weight in weights):
        raise ValueError(
            "the weights are on the grid already: one store_on_grid per model; for a copy of such a model, "
            "dequantize_model and quantize_model it first"
        )
    return weights


def quantizer_on_grid(weight: Tensor) -> WeightQuantizer:
    """Return the quantizer of one of these weights."""
    found = quantizer_of(weight)
    if found is None:  # `grid_weights` lets only quantized weights through
        raise ValueError("the weight is not quantized")
    return found
