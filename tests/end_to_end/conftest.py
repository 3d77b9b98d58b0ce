"""Runs in processes of their own, forked from one that has imported everything, to begin at once."""

import multiprocessing
import os
import sys

import pytest

PRELOADED = [
    *("__main__", "torch._dynamo", "torch.profiler", "numpy", "safetensors.torch"),
    *("altgrad_core.commands", "altgrad_core.assemble", "altgrad_core.loop"),
    *("altgrad_optim.adamw", "altgrad_data.markov", "altgrad_formats.layout"),
]


@pytest.fixture(scope="session")
def forking(tmp_path_factory):
    """What forks; its processes have a token cache of their own, the folder `cache`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    context.cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALTGRAD_CACHE", str(context.cache))
        first = context.Process(target=os.getpid)  # the server takes the environment of its first process
        first.start()
    first.join()
    return context


@pytest.fixture
def launch(forking, monkeypatch):
    """Return a function that starts `altgrad-run`, quiet, with its arguments, and returns the process."""
    from altgrad_core.cli import altgrad_run

    processes = []

    def launch(*arguments):
        monkeypatch.setattr(sys, "argv", ["altgrad-run", *map(str, arguments), "--quiet"])
        processes.append(forking.Process(target=altgrad_run))
        processes[-1].start()
        return processes[-1]

    yield launch
    for process in processes:
        process.kill()
        process.join()
