"""A tiny third-party plugin that every process of a cluster finds, and two Ray nodes on this machine."""

import os
import subprocess
import sys

import pytest

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"  # otherwise a token is written into the home folder
os.environ["RAY_TMPDIR"] = "/tmp"  # the names of sockets end at 107 characters, and TMPDIR may be a long one

PLUGIN = """
import attrs
import numpy
import torch
from altgrad_core.format import Format
from altgrad_core.hookspecs import Component, hookimpl


@attrs.frozen
class Options:
    vocab_size: int = 8

@hookimpl
def altgrad_formats():
    return [Component(name="T5", summary="", target="tiny_plugin:T5", bits=5)]

@hookimpl
def altgrad_optimizers():
    return [Component(name="Adam", summary="", target="tiny_plugin:adam")]

@hookimpl
def altgrad_datasets():
    return [Component(name="digits", summary="", options=Options, target="tiny_plugin:Digits")]


T5 = Format(name="T5", bits=5, values=[rung / 8 for rung in range(-15, 16)])

def adam(options, inputs):
    return torch.optim.Adam(inputs.groups, lr=3e-3)

class Digits:
    vocab_size = 8
    loss_floor = None
    def __init__(self, options):
        pass
    def fingerprint(self):
        return "digits"
    def tokens(self, split):
        seed = {"train": 1, "validation": 2}[split]
        return numpy.random.default_rng(seed).integers(0, 8, 4000).astype(numpy.uint8)
"""

CELLS = '''
import os, signal, time
from pathlib import Path
from altgrad_core.hookspecs import CellResult

def finished(cell):
    return CellResult(cell=cell, outcome="finished", message=os.getcwd())

def raises_at_b(cell):
    if cell == "b":
        raise ValueError("b it is")
    return finished(cell)

def tries(folder, cell):
    """Count this call in a file; return how many there were before."""
    path = Path(folder) / cell
    before = len(path.read_text()) if path.exists() else 0
    path.write_text("." * (before + 1))
    return before

def dies(times, folder, cell):
    if tries(folder, cell) < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return finished(cell)

def told_to_stop(folder, cell):
    if tries(folder, cell) < 1:
        return CellResult(cell=cell, outcome="terminated")
    return finished(cell)

def dies_and_is_busy(folder, cell):
    before = tries(folder, cell)
    if before == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return CellResult(cell=cell, outcome="busy") if before < 3 else finished(cell)

def busy(folder, cell):
    tries(folder, cell)
    return CellResult(cell=cell, outcome="busy")

def share(folder, cell):
    """Wait until two cells are here at once; tell the process and what it was given."""
    (Path(folder) / cell).touch()
    until = time.monotonic() + 30
    while len(list(Path(folder).iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    together = len(list(Path(folder).iterdir()))
    given = [os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "ALTGRAD_TEST")]
    return CellResult(cell=cell, outcome="finished", message=repr((together, *given, os.getpid())))

def at_once(folder, cell):
    """Tell how many cells are here with this one, which stays a while."""
    mark = Path(folder) / cell
    mark.touch()
    time.sleep(0.5)
    together = len(list(Path(folder).iterdir()))
    mark.unlink()
    return CellResult(cell=cell, outcome="finished", message=f"{together} {os.getpid()}")
'''


@pytest.fixture(scope="session", autouse=True)
def installed(tmp_path_factory):
    """Install the tiny plugin, and the module of cells, for this process and for all it starts."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "tiny_plugin.py").write_text(PLUGIN)
    (folder / "tiny_cells.py").write_text(CELLS)
    info = folder / "tiny_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[altgrad]\ntiny-plugin = tiny_plugin\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("ALTGRAD_CACHE", str(folder / "cache"))
        patch.delenv("ALTGRAD_WITHOUT", raising=False)
        patch.syspath_prepend(str(folder))
        yield


@pytest.fixture(scope="session")
def tiny(installed):
    """The module of cells that are plain functions; every process of a cluster finds it."""
    import tiny_cells

    return tiny_cells


@pytest.fixture(scope="module")
def cluster(installed):
    """Two nodes of one core each; the second has what Ray takes for a GPU."""
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    # Ray gives a worker as many threads as its task has cores, unless the environment says otherwise
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        cluster = Cluster(initialize_head=True, head_node_args={**small, "num_gpus": 0})
        cluster.second = cluster.add_node(
            num_cpus=1, num_gpus=1, object_store_memory=80 * 2**20, include_dashboard=False
        )
    yield cluster
    cluster.shutdown()


@pytest.fixture
def command():
    """Return a function that starts `altgrad-run`; what still runs when the test is over is killed."""
    script, started = "from altgrad_core.cli import altgrad_run; altgrad_run()", []

    def start(*arguments, **more):
        whole = [sys.executable, "-c", script, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(whole, **pipes, **more))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            print(*process.communicate(), sep="\n")
