"""Joining a Ray cluster, and what its nodes have room for.

Ray itself waits ten minutes and more for a cluster that is not there; the port is tried first, and the answer
comes within seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from altgrad_core.registry import UsageError
from altgrad_ray import RayOptions

CONNECTING = 5.0
"""Seconds that a cluster may take to answer on its port."""

OBJECT_STORE = 100 * 2**20
"""Bytes of shared memory for a cluster of our own; cells hand over names and outcomes, no tensors."""

LONGEST_FOLDER = 30
"""Characters of the temporary folder, beyond which the names of Ray's sockets in it would pass the 107 that
one may have: a cluster of our own takes /tmp then."""

EXPECTED = (ConnectionError, OSError, RuntimeError, ValueError)
"""What `ray.init` raises for a cluster that is away, of another version, or not this machine's."""


@contextlib.contextmanager
def joined(address: str) -> Iterator[ModuleType]:
    """Yield Ray's module, connected to the cluster; a connection that was open before stays so.

    Raises UsageError where Ray is not installed, or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster of our own reports to nobody
    try:
        import ray
    except ImportError as error:
        raise UsageError(
            f"executor 'ray': Ray cannot be imported: {error}; pip install ray, or take executor 'local'"
        ) from error
    if ray.is_initialized():
        yield ray
        return
    _connect(ray, address)
    try:
        yield ray
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    own: dict[str, Any] = {
        "address": "local",
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE,
    }
    if "RAY_TMPDIR" not in os.environ and len(tempfile.gettempdir()) > LONGEST_FOLDER:
        own["_temp_dir"] = "/tmp/ray"
    where = {"address": address} if address else own
    try:
        _answers(address)
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
    except (*EXPECTED, ray.exceptions.RayError) as error:
        shown = (
            f"the cluster at {address!r} cannot be joined" if address else "no cluster can be started here"
        )
        raise UsageError(
            f"executor 'ray': {shown}: {error}; start one with `ray start --head`, run this command on one "
            'of its nodes, or leave the address out: address = "" starts one on this machine'
        ) from error


def _answers(address: str) -> None:
    """Raise OSError where nobody listens on the address."""
    host, separator, port = address.rpartition(":")
    if separator:
        with socket.create_connection((host.strip("[]"), int(port)), CONNECTING):
            pass


def resources(ray: Any, options: RayOptions) -> dict[str, float]:
    """Return what one cell takes, as arguments of a Ray task."""
    gpus = options.gpus_per_cell
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU", 0.0) else 0.0
    return {"num_cpus": options.cpus_per_cell, "num_gpus": gpus}


def shortage(ray: Any, taken: dict[str, float]) -> str:
    """Return why no node of the cluster, as it is now, has room for a cell; empty: one has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = taken["num_cpus"], taken["num_gpus"]
    if any(node.get("CPU", 0.0) >= cpus and node.get("GPU", 0.0) >= gpus for node in nodes):
        return ""
    there = ", ".join(f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs" for node in nodes)
    return (
        f"a cell takes {cpus:g} CPUs and {gpus:g} GPUs, and no node has that (there are: {there or 'none'})"
    )
