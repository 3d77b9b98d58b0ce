"""Error compensation (ECO): what rounding took from a weight goes into the optimizer's first moment.

A moment m with decay beta moves a weight by -rate*m in each step. To give a residual e back in the next step
its moment must change by -e/(rate*beta). Of that, -e/rate would still be there after the step and be given a
second time; it is taken out again when the next residual comes, which is about the same. Both together:

    m += (1 - 1/beta) * e / rate,

without a buffer for e (Nikdan et al., "ECO: Quantized Training without Full-Precision Master Weights", arXiv
2601.22101, where it is derived for momentum SGD and for Adam with their own rates). The rate is

    momentum SGD    lr                                           (Nesterov: lr*momentum)
    Adam, AdamW     lr / ((1 - beta1^t) * (sqrt(v_hat) + eps))   per element

and for any other optimizer what its `momentum_of(weight)` says. Residuals are those of nearest rounding.

Limits. The two residuals are taken for equal, so that a weight circles its optimum within about half a
spacing. The rate is the last step's: after a jump of lr, what is given back is off by its ratio. At a rate of
0 nothing is given. Behind a fixed scale a saturated weight has residuals without end; they are cut off at
half the widest spacing, so that its moment does not wind up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor

from altgrad_core.format import Format
from altgrad_core.rows import Row


@attrs.frozen(kw_only=True)
class Momentum:
    """The first moment of one weight, and what it does to it.

    An optimizer with a method `momentum_of(weight: Tensor) -> Momentum | None` can be compensated. It is
    asked after each step, when the weight has been rounded to its grid; None: no moment yet.
    """

    buffer: Tensor
    """The moment itself, of the weight's shape; it is written in place."""
    rate: Tensor | float
    """What a step subtracts from the weight for each unit of the buffer as it stands after the step."""
    beta: Tensor | float
    """The share of the buffer that the next step keeps, more than 0."""


class ErrorCompensation:
    """Puts the residuals of grid-stored weights into their moments.

    Raises ValueError for an optimizer, or a group, whose weights have no moment that can take them.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, weights: Sequence[Tensor], formats: Sequence[Format]
    ) -> None:
        self._optimizer = optimizer
        self._weights = list(weights)
        self._momentum_of = _reader(optimizer)
        self._widest = [float(format.spacing(format.values).max()) for format in formats]
        for weight in weights:
            _refuse_without_moment(optimizer, weight)

    def keep(self, places: Sequence[int], row: Row, weights: Tensor, scale: Tensor, residual: Tensor) -> None:
        """Give the residuals of a row of weights that have just been rounded to their moments.

        places: of the weights, all of one format. scale: 0-d, or for each element.
        """
        half = 0.5 * self._widest[places[0]] / scale
        given = row.parts(torch.minimum(torch.maximum(residual, -half), half))
        for place, part in zip(places, given, strict=True):
            momentum = self._momentum_of(self._optimizer, self._weights[place])
            if momentum is not None:
                compensate(momentum, part)


def compensate(momentum: Momentum, residual: Tensor) -> None:
    """Add (1 - 1/beta)*residual/rate to the moment, in place; nothing where the rate is 0."""
    rate, device = momentum.rate, residual.device
    rate = (
        rate.to(device)
        if isinstance(rate, Tensor)
        else torch.full((), rate, dtype=torch.float32, device=device)
    )
    given = torch.where(rate != 0, residual / rate, 0.0) * (1 - 1 / momentum.beta)
    momentum.buffer.add_(given.to(momentum.buffer.dtype))


def adam_rate(
    second_moment: Tensor, step: Tensor | float, lr: Any, betas: tuple[Any, Any], eps: float
) -> Tensor:
    """Return what Adam's step number `step` subtracts for each unit of its first moment, per element."""
    root = (second_moment / (1 - betas[1] ** step)).sqrt_().add_(eps)
    rate: Tensor = lr / (root * (1 - betas[0] ** step))
    return rate


def _reader(optimizer: torch.optim.Optimizer) -> Callable[[Any, Tensor], Momentum | None]:
    if hasattr(optimizer, "momentum_of"):
        return _offered
    if _steps_as(optimizer, torch.optim.Adam):
        return _of_adam
    if _steps_as(optimizer, torch.optim.SGD):
        return _of_sgd
    raise ValueError(
        f"storage rounding 'eco' puts residuals into a first moment, and {type(optimizer).__name__} has none "
        "that is known: use Adam, AdamW or SGD with momentum, give the optimizer a method "
        "momentum_of(weight), or use 'error_feedback'"
    )


def _steps_as(optimizer: torch.optim.Optimizer, known: type[torch.optim.Optimizer]) -> bool:
    """Whether the step is torch's own; a subclass with a step of its own moves weights in another way."""
    return isinstance(optimizer, known) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(known.step)


def _refuse_without_moment(optimizer: torch.optim.Optimizer, weight: Tensor) -> None:
    group = _group(optimizer, weight)
    if _steps_as(optimizer, torch.optim.SGD) and not group["momentum"]:
        raise ValueError("storage rounding 'eco' needs a momentum, and SGD's is 0: momentum=0.9")
    if "betas" in group and not float(group["betas"][0]):
        raise ValueError("storage rounding 'eco' needs a first moment, and betas[0] is 0: betas=(0.9, 0.95)")


def _group(optimizer: torch.optim.Optimizer, weight: Tensor) -> dict[str, Any]:
    return next(
        group for group in optimizer.param_groups if any(weight is parameter for parameter in group["params"])
    )


def _offered(optimizer: Any, weight: Tensor) -> Momentum | None:
    found: Momentum | None = optimizer.momentum_of(weight)
    return found


def _of_adam(optimizer: torch.optim.Optimizer, weight: Tensor) -> Momentum | None:
    state, group = optimizer.state.get(weight), _group(optimizer, weight)
    if not state:
        return None
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    rate = adam_rate(second, state["step"], group["lr"], group["betas"], group["eps"])
    return Momentum(buffer=state["exp_avg"], rate=rate, beta=group["betas"][0])


def _of_sgd(optimizer: torch.optim.Optimizer, weight: Tensor) -> Momentum | None:
    buffer, group = optimizer.state.get(weight, {}).get("momentum_buffer"), _group(optimizer, weight)
    if buffer is None:
        return None
    nesterov = group["momentum"] if group["nesterov"] else 1.0
    return Momentum(buffer=buffer, rate=group["lr"] * nesterov, beta=group["momentum"])
