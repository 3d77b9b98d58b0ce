"""The EUR-Lex sample: real acts with labels, beside the repository on the machines that have it."""

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).parents[3].parent / "shared" / "data" / "eurlex"


@pytest.fixture(scope="session")
def eurlex_sample():
    """Its folder: $ALTGRAD_EURLEX, or ../shared/data/eurlex of the repository."""
    folder = Path(os.environ.get("ALTGRAD_EURLEX") or BESIDE)
    if not folder.is_dir():
        pytest.skip(f"no EUR-Lex sample at {folder}; set ALTGRAD_EURLEX to its folder")
    return folder
