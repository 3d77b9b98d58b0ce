"""Memory that a step frees is kept for the next one, where glibc would return it to the system.

A training step on the CPU allocates each activation anew. glibc maps large blocks one by one and unmaps them
when they are freed, so that every step faults in, and has the system clear, the pages of the step before.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h; mallopt(3)."""


def keep() -> bool:
    """Have the process keep the memory it frees, at most what it held at once; return whether it will.

    False where the C library is not glibc: nothing changes there.
    """
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - musl has a mallopt that does nothing
        mallopt = library.mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: Windows has no library of the process
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, -1))
