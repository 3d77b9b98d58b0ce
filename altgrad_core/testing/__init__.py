"""The conformance kit: checks that a plugin author runs on what he wrote, in his own tests.

    from altgrad_core.testing import check_format, check_optimizer, check_stiffness

The checks need neither pytest nor hypothesis, and raise `ConformanceError`, which says what was expected,
what was seen for which input, and where to look.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from altgrad_core.testing.formats import check_format as check_format
    from altgrad_core.testing.optimizers import check_optimizer as check_optimizer
    from altgrad_core.testing.stiffness import check_stiffness as check_stiffness

_HOMES = {"check_format": "formats", "check_optimizer": "optimizers", "check_stiffness": "stiffness"}


class ConformanceError(AssertionError):
    """A component breaks its contract."""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
