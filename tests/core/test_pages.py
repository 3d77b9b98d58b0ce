"""Memory that is freed and asked for again."""

import platform
import subprocess
import sys

import pytest

from altgrad_core import pages

FAULTS = """
import resource, sys, torch
from altgrad_core import pages
assert sys.argv[1] == "returned" or pages.keep()
for _ in range(10):  # until the heap holds two of them
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow  # two processes that import torch
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="pages are kept where the C library is glibc")
def test_memory_that_was_freed_is_had_again_without_a_page_fault():
    faults = {
        kind: int(subprocess.check_output([sys.executable, "-c", FAULTS, kind]))
        for kind in ("returned", "kept")
    }
    assert faults["returned"] > 3 * 2**24 // 2**20  # 64 MiB three times, in pages of 2 MiB at most
    assert faults["kept"] < 10


def test_a_c_library_without_such_settings_changes_nothing(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert not pages.keep()
