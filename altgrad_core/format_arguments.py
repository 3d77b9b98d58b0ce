"""What the methods of a format take: tensors, random numbers, modes; all else is refused with the way out."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def given(generator: torch.Generator | None) -> torch.Generator:
    """Return the generator. Raises ValueError where there is none."""
    if generator is None:
        raise ValueError(
            "stochastic rounding needs a torch.Generator: quantize(x, 'stochastic', generator=...)"
        )
    return generator


def check_uniform(x: Tensor, uniform: Tensor, generator: torch.Generator | None) -> None:
    """Raise ValueError unless `uniform` is float32 of x's shape, and the only source of random numbers."""
    if generator is not None:
        raise ValueError("stochastic rounding takes `generator` or `uniform`, not both")
    if uniform.shape != x.shape or uniform.dtype != torch.float32:
        raise ValueError(
            f"uniform is {uniform.dtype} of shape {tuple(uniform.shape)};"
            f" expected torch.float32 of x's shape {tuple(x.shape)}"
        )


def check_pair(name: str, given: Tensor | None, dtype: torch.dtype | None) -> None:
    """Raise ValueError unless a given tensor is of shape (2,), and of the dtype where there is one."""
    if given is not None and (given.shape != (2,) or (dtype and given.dtype != dtype)):
        expected = f"{dtype} of shape (2,)" if dtype else "shape (2,)"
        raise ValueError(f"`{name}` is {given.dtype} of shape {tuple(given.shape)}; expected {expected}")


def check_floating(x: Tensor) -> None:
    """Raise TypeError for a tensor that formats do not round."""
    given = getattr(x, "dtype", type(x).__name__)
    if given not in DTYPES:
        raise TypeError(f"expected a float32, float64, bfloat16 or float16 tensor, not {given}")


def check_choice(option: str, given: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError for a mode that there is not."""
    if given not in choices:
        raise ValueError(f"{option}={given!r} is not one of {', '.join(map(repr, choices))}")
