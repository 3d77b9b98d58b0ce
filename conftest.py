"""For every test of the repository: one thread, and interruptions; for all of them together: two processes.

Small tensors are slower on two threads than on one, twenty times slower where the second core is busy. Set
before torch is imported, and inherited by the commands that tests start.

The whole suite is shared by two workers of pytest-xdist, which each take seconds to import torch and to
collect: what was chosen by name, `-k` or `-m` stays in one process, as everything does with `-n 0`, or
without pytest-xdist.
"""

import os
import signal

import pytest

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # begun in the background of a shell: so would be
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the commands that tests start and interrupt
os.environ.setdefault("OMP_NUM_THREADS", "1")

WORKERS = 2


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config):
    option = config.option
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # or started by one: none has workers of its own
    if not is_worker and getattr(option, "numprocesses", 0) is None and _everything(config):
        option.numprocesses, option.dist = WORKERS, "worksteal"


def _everything(config):
    """Whether the command line chooses no tests, and does not debug them."""
    chosen = {"-k", "-m", "--pdb"}.intersection(config.invocation_params.args)
    return config.args_source is pytest.Config.ArgsSource.TESTPATHS and not chosen
