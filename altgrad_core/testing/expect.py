"""How the kit compares, and what it says when a comparison fails."""

from __future__ import annotations

import contextlib
import pickle
import random
from collections.abc import Callable, Iterator
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from altgrad_core.testing import ConformanceError


def fail(name: str, rule: str, *, given: object, expected: object, seen: object, fix: str) -> NoReturn:
    """Raise ConformanceError for the component `name`, which breaks `rule`."""
    raise ConformanceError(
        f"{name}: {rule}\n  input: {given}\n  expected: {expected}\n  seen: {seen}\n  fix: {fix}"
    )


def expect(
    name: str, rule: str, x: Tensor, seen: Tensor, expected: Tensor, fix: str, *, signed_zero: bool = False
) -> None:
    """Fail at the first element x for which `seen` is not `expected` (NaN equals NaN)."""
    if seen.shape != expected.shape or seen.dtype != expected.dtype:
        given, wanted, got = (f"{t.dtype} of shape {tuple(t.shape)}" for t in (x, expected, seen))
        fail(name, rule, given=given, expected=wanted, seen=got, fix=fix)
    same = (seen == expected) | (seen.isnan() & expected.isnan())
    if signed_zero:
        same &= seen.isnan() | (seen.signbit() == expected.signbit())
    wrong = (~same).flatten().nonzero()
    if len(wrong):
        given, wanted, got = (repr(t.flatten()[int(wrong[0])].item()) for t in (x, expected, seen))
        rule = f"{rule} ({len(wrong)} of {same.numel()} inputs)"
        fail(name, rule, given=given, expected=wanted, seen=got, fix=fix)


def expect_error(
    name: str, kind: type[Exception], rule: str, call: Callable[[], object], *, given: str, fix: str
) -> None:
    """Fail unless `call` raises an exception of that kind."""
    try:
        seen = call()
    except kind:
        return
    fail(name, rule, given=given, expected=f"a {kind.__name__}", seen=repr(seen), fix=fix)


@contextlib.contextmanager
def checking(name: str, check: Callable[..., None], fix: str) -> Iterator[None]:
    """Have a check run inside, which completes "check that ..."; whatever else it raises fails it too."""
    try:
        yield
    except ConformanceError:
        raise
    except Exception as error:
        seen = f"{type(error).__name__}: {error}"
        message = f"{name}: while checking that {check.__doc__}\n  seen: {seen}\n  fix: {fix}"
        raise ConformanceError(message) from error


@contextlib.contextmanager
def no_random_trace(name: str, rule: str, fix: str) -> Iterator[None]:
    """Fail where what runs inside advances a global generator."""
    before = global_random_states()
    yield
    if global_random_states() != before:
        fail(name, rule, given="", expected="no trace", seen="a global generator advanced", fix=fix)


def global_random_states() -> tuple[object, ...]:
    """Return the states of torch's, numpy's and Python's global generators, to be compared."""
    legacy = pickle.dumps(np.random.get_state(legacy=False))
    return torch.get_rng_state().numpy().tobytes(), legacy, random.getstate()
