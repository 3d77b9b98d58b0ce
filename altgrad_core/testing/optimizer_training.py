"""What the checks of an optimizer train: a small model in the groups that `param_groups` makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import attrs
import torch
from torch import Tensor, nn

from altgrad_core.format import Format
from altgrad_core.groups import param_groups
from altgrad_core.rules import Rule
from altgrad_core.surgery import quantize_model
from altgrad_core.testing.expect import fail

Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Groups to the optimizer that is checked."""

FORMAT = Format(name="CONFORMANCE", bits=8, values=[k / 128 for k in range(-127, 128)])


@attrs.frozen
class Training:
    """A model in training, with gradients that depend on the step alone."""

    model: nn.Module
    optimizer: Any
    shrinks_to: float = 0.5
    """The share of its first value to which training must bring a quadratic loss."""

    @classmethod
    def of(
        cls, make: Make, *, dtype: torch.dtype = torch.float32, width: int = 12, groups: slice = slice(None)
    ) -> Training:
        model = small_model(dtype, width)
        return cls(model, make(groups_of(model)[groups]))

    @property
    def name(self) -> str:
        return type(self.optimizer).__name__

    @property
    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    def give_gradients(self, step: int) -> None:
        for index, parameter in enumerate(self.model.parameters()):
            generator = torch.Generator().manual_seed(1000 * step + index)
            draws = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = draws.to(parameter.dtype)

    def steps(self, first: int, count: int) -> list[Tensor]:
        for step in range(first, first + count):
            self.give_gradients(step)
            self.optimizer.step()
        return self.weights

    def fail(self, rule: str, *, expected: object, seen: object, fix: str, given: str = "") -> NoReturn:
        fail(self.name, rule, given=given or "the model of the kit", expected=expected, seen=seen, fix=fix)


def small_model(dtype: torch.dtype, width: int) -> nn.Module:
    """Return a quantized Linear, a LayerNorm and a plain Linear; always the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, width), nn.LayerNorm(width), nn.Linear(width, width)).to(dtype)
    return quantize_model(model, rules=[Rule("0", FORMAT)])


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return the groups of `param_groups`, without weight decay: a learning rate of 0 then means no move."""
    return [{**group, "weight_decay": 0.0} for group in param_groups(model)]


def same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether all weights are equal, NaN to nothing."""
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def differences(first: Sequence[Tensor], second: Sequence[Tensor]) -> str:
    """Return how many weights differ, for a message."""
    count = sum(int((one != other).sum()) for one, other in zip(first, second, strict=True))
    return f"{count} weights that differ"
