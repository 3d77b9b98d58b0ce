"""Locks between processes: `flock` on an open file, which the system lets go of as its process ends."""

from __future__ import annotations

import errno
import fcntl
from typing import IO, Any

_HELD = (errno.EWOULDBLOCK, errno.EACCES)
"""What `flock` says of a lock that another process has; anything else means that there can be none."""


def take(file: IO[Any]) -> bool:
    """Lock an open file; False where another process has. Raises OSError where its file system has no locks.

    Closing the file lets go of the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True
