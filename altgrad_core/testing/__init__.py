"""The conformance kit: checks that a plugin author runs on what he wrote, in his own tests.

Each module holds the checks of one kind of component: `altgrad_core.testing.formats.check_format(format)`,
`altgrad_core.testing.optimizers.check_optimizer(make)`.
They need neither pytest nor hypothesis, and raise `ConformanceError`, which says what was expected, what
was seen for which input, and where to look.
"""

from __future__ import annotations


class ConformanceError(AssertionError):
    """A component breaks its contract."""
