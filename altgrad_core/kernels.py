"""Compiled kernels: pure tensor functions fused to one loop, where that pays.

`@kernel` marks a function whose arithmetic is exact (integers, roundings, powers of two), so that compiled
and eager give the same bits. It runs eagerly until `enable()`; then torch.compile fuses it, once per format
and dtype, for every shape. Compiling takes seconds, so a run enables kernels only when it is long enough.
Where no C++ compiler works, that is said once and everything stays eager.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

VARIABLE = "ALTGRAD_KERNELS"
"""Environment variable: `eager` keeps every kernel eager."""

WORTH_COMPILING = 3e8
"""Elements over a whole run from which compiling (some 20 s cold) is repaid; eager takes 0.1 us each."""

_KERNELS_PER_FUNCTION = 64  # torch gives up silently at 8: one for each format, dtype and rounding in use

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_enabled = False
_broken = False


def enable(elements: float = float("inf")) -> bool:
    """Compile kernels from here on, if so many elements are worth it; returns whether they are compiled."""
    global _enabled
    if elements >= WORTH_COMPILING and _allowed():
        import torch._dynamo

        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, _KERNELS_PER_FUNCTION
        )
        _enabled = True
    return _enabled


def disable() -> None:
    """Run kernels eagerly from here on."""
    global _enabled
    _enabled = False


def _allowed() -> bool:
    return os.environ.get(VARIABLE) != "eager"


def _give_up() -> None:
    """Compile nothing any more: the compiler does not work."""
    global _broken
    _broken = True
    disable()


def flat(x: Tensor) -> Tensor:
    """Return x detached, as one row: kernels are compiled once for all one-row tensors of a dtype."""
    return x.detach().reshape(-1)


def kernel(function: Callable[_Arguments, _Result], *, always: bool = False) -> Callable[_Arguments, _Result]:
    """Mark a pure tensor function for compilation; see the module's text.

    always: whether it is compiled without `enable` too.
    """
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*arguments: _Arguments.args, **keywords: _Arguments.kwargs) -> _Result:
        wanted = _enabled or (always and not _broken and _allowed())
        if torch.compiler.is_compiling() or not wanted or any(map(_is_meta, arguments)):
            return function(*arguments, **keywords)
        if not compiled:
            compiled.append(torch.compile(function))
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.dim():
                torch._dynamo.maybe_mark_dynamic(argument, 0)  # not dynamic=True: that spoils constants too
        try:
            with torch.no_grad():
                return compiled[0](*arguments, **keywords)  # type: ignore[no-any-return]
        except Exception as error:
            if not _is_compiler_error(error):
                raise
            _give_up()
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"kernels stay eager, which is slower: {reason}", RuntimeWarning, stacklevel=2)
            return function(*arguments, **keywords)

    return call


def _is_meta(argument: Any) -> bool:
    """Whether an argument has no memory: what is compiled for it writes nothing, and would serve others."""
    return isinstance(argument, Tensor) and argument.is_meta


def not_compiled(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Keep torch.compile from tracing a function, or what it calls: it runs as it is, between two graphs.

    As torch.compiler.disable, which would import the compiler, for a second.
    """

    @functools.cache
    def disabled() -> Callable[_Arguments, _Result]:
        return sys.modules["torch._dynamo"].disable(function)  # type: ignore[no-any-return]

    @functools.wraps(function)
    def call(*arguments: _Arguments.args, **keywords: _Arguments.kwargs) -> _Result:
        if not hasattr(sys.modules.get("torch._dynamo"), "disable"):  # not imported, or only just so far
            return function(*arguments, **keywords)
        return disabled()(*arguments, **keywords)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]
    return call


def _is_compiler_error(error: Exception) -> bool:
    """Whether torch.compile itself failed, such as for want of a C++ compiler."""
    import torch._dynamo.exc
    import torch._inductor.exc

    failures = (
        torch._dynamo.exc.BackendCompilerFailed,
        torch._inductor.exc.InductorError,
        torch._inductor.exc.InvalidCxxCompiler,
        torch._inductor.exc.CppCompileError,
    )
    return isinstance(error, failures)
