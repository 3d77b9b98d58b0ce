"""Where AltGrad keeps what it can make again: prepared tokens, compiled loops."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """Return the cache's folder: $ALTGRAD_CACHE, $XDG_CACHE_HOME/altgrad or ~/.cache/altgrad.

    Raises OSError where neither is set, and the user has no home.
    """
    if chosen := os.environ.get("ALTGRAD_CACHE"):
        return Path(os.path.expanduser(chosen))
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "altgrad"
    try:
        return Path.home() / ".cache" / "altgrad"
    except RuntimeError as error:
        raise OSError("this user has no home folder; set ALTGRAD_CACHE to a folder for the cache") from error
