"""Where AltGrad keeps what it can make again: prepared tokens, compiled loops."""

from __future__ import annotations

import os
from pathlib import Path


def default_cache() -> Path:
    """Return the cache's folder: $ALTGRAD_CACHE, $XDG_CACHE_HOME/altgrad or ~/.cache/altgrad."""
    if chosen := os.environ.get("ALTGRAD_CACHE"):
        return Path(chosen).expanduser()
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "altgrad"
    return Path.home() / ".cache" / "altgrad"
