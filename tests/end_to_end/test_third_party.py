"""Somebody else's package, as he would write it: built, installed, listed, and trained with."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from altgrad_core import checkpoint

PACKAGE = {
    "pyproject.toml": """
[build-system]
requires = ["flit_core>=3.9"]
build-backend = "flit_core.buildapi"

[project]
name = "logarithmic-formats"
version = "0.2.1"
description = "Four-bit logarithmic formats for AltGrad."
dependencies = ["altgrad-core~=0.1.0"]

[tool.flit.module]
name = "logarithmic_formats"

[project.entry-points.altgrad]
logarithmic-formats = "logarithmic_formats"
""",
    "logarithmic_formats/__init__.py": '''
"""Logarithmic formats; this module is light."""

import attrs

from altgrad_core.hookspecs import Component, hookimpl
from altgrad_core.options import above, option


@attrs.frozen(kw_only=True)
class LogarithmicOptions:
    """Zero and 7 magnitudes of each sign, each `base` times the one before."""

    base: float = option("ratio of neighboring magnitudes", default=2.0, validator=above(1))


@hookimpl
def altgrad_formats():
    return [
        Component(
            name="LOG4",
            summary="zero and seven powers of a base",
            options=LogarithmicOptions,
            target="logarithmic_formats.table:build",
            bits=4,
        )
    ]
''',
    "logarithmic_formats/table.py": '''
"""The table of values."""

from altgrad_core.format import Format


def build(options):
    magnitudes = [options.base**exponent for exponent in range(7)]
    values = [*(-one for one in reversed(magnitudes)), 0.0, *magnitudes]
    return Format(name="LOG4", bits=4, values=values)
''',
}

EXPERIMENT = """
name = "theirs"
steps = 5
[data]
plugin = "markov"
tokens = 4000
validation_tokens = 2000
[model]
n_layer = 1
n_head = 1
n_embd = 16
block_size = 16
[train]
batch_size = 2
device = "cpu"
eval_batches = 1
warmup_steps = 1
[quantize]
format = {plugin = "LOG4", base = 3}
storage = "grid"
[optimizer]
plugin = "AdamW"
"""


def command(name):
    return pathlib.Path(sys.executable).with_name(name)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Build and install the package into a folder of its own; return the environment that sees it."""
    folder = tmp_path_factory.mktemp("theirs")
    for name, text in PACKAGE.items():
        path = folder / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    isolated = ["--no-build-isolation", "--no-deps", "--no-index", "--target", folder / "site"]
    subprocess.run([*pip, *isolated, folder / "source"], check=True, timeout=120)
    return {**os.environ, "PYTHONPATH": str(folder / "site"), "ALTGRAD_CACHE": str(folder / "cache")}


@pytest.fixture(scope="module")
def call(installed, tmp_path_factory):
    """Return a function that runs a command where the package is installed, in `call.folder`."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "theirs.toml").write_text(EXPERIMENT)

    def run(name, *arguments):
        done = subprocess.run(
            [command(name), *arguments],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=folder,
            env=installed,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def trained(call):
    """Return the folder of a run of five steps."""
    call("altgrad-run", "theirs.toml")
    return call.folder / "runs" / "theirs" / "run"


def test_a_third_partys_format_is_listed_and_shown(call):
    row = next(line for line in call("altgrad", "plugins").splitlines() if "LOG4" in line)
    assert row.split(maxsplit=4) == [
        *("format", "LOG4", "logarithmic-formats", "0.2.1", "zero and seven powers of a base"),
    ]
    assert 'format = {plugin = "LOG4", base = 2.0}' in call("altgrad", "show", "LOG4")


def test_a_third_partys_format_trains(trained):
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["outcome"], summary["step"]) == ("finished", 5)
    assert summary["share_on_grid"] > 0.9
    resolved = json.loads((trained / "resolved.json").read_text())
    assert resolved["plugins"]["logarithmic-formats"] == "0.2.1"
    assert resolved["options"]["quantize"]["format"] == {"plugin": "LOG4", "base": 3.0}


def test_the_weights_of_that_run_are_values_of_that_format(trained):
    saved, _ = checkpoint.newest(trained / "checkpoints")
    magnitudes = torch.unique(saved.model["transformer.h.0.mlp.c_fc.weight"].abs()).double()
    magnitudes = magnitudes[magnitudes > 0]
    assert len(magnitudes) >= 2
    assert set((magnitudes[-1] / magnitudes).tolist()) <= {3.0**power for power in range(7)}
