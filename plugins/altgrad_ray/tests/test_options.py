"""The shop window, and the errors of a cluster that is not there: nothing here starts one."""

import importlib.util
import re
import socket
import subprocess
import sys
import time

import attrs
import pytest

pytest.importorskip(
    "altgrad_ray", reason="the executor's tests run in an environment of their own: nox -s isolated"
)

from altgrad_core.registry import UsageError, discover
from altgrad_ray import RayOptions, altgrad_executors
from altgrad_ray.executor import RayExecutor

needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs Ray")


def test_the_executor_is_found_by_name_and_built_from_its_options():
    found = discover().find("executor", "ray")
    assert isinstance(found.build(RayOptions()), RayExecutor)


def test_every_option_has_help_and_a_unit():
    (component,) = altgrad_executors()
    for field in attrs.fields(component.options):
        assert field.metadata["help"]
        assert "unit" in field.metadata


def test_listing_imports_neither_ray_nor_torch():
    code = (
        "import sys, altgrad_ray; altgrad_ray.altgrad_executors();"
        "sys.exit(bool({'ray', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"address": "ray://head:10001"}, 'expected "" (start one on this machine), "auto"'),
        ({"address": "head"}, "\"host:port\", got 'head'"),
        ({"gpus_per_cell": 1.5}, "expected 0 to 1, or a whole number above 1, got 1.5"),
        ({"gpus_per_cell": -0.5}, "expected 0 to 1, or a whole number above 1, got -0.5"),
        ({"cpus_per_cell": 2.5}, "expected 0 to 1, or a whole number above 1, got 2.5"),
        ({"retries": -1}, "expected 0 or more, got -1"),
    ],
)
def test_options_that_ray_would_refuse_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        RayOptions(**options)


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0, 8.0])
def test_shares_and_whole_devices_are_taken(value):
    assert RayOptions(gpus_per_cell=value, cpus_per_cell=value).gpus_per_cell == value


@needs_ray
def test_a_cluster_that_is_away_is_said_within_seconds():
    with socket.socket() as taken:  # bound, but not listening: the port is nobody else's
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(
            UsageError, match=rf"cluster at '{address}' cannot be joined: .*refused.*ray start"
        ):
            RayExecutor(RayOptions(address=address)).run(["a"], print, 1)
    assert time.monotonic() - began < 10


def test_without_ray_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['ray'] = None\n"
        "from altgrad_ray import RayOptions, executor\n"
        "executor.RayExecutor(RayOptions()).run(['a'], print, 1)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "UsageError: executor 'ray': Ray cannot be imported" in ended.stderr
    assert "pip install ray, or take executor 'local'" in ended.stderr
