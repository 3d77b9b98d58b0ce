"""What AltGrad sees of this package: two formats, light to list, and a README that holds."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import altgrad_core as altgrad

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_both_formats_are_registered_under_this_distribution():
    entries = altgrad.plugins().of_kind("format")
    ours = [entry.name for entry in entries if entry.distribution == "altgrad-posit"]
    assert ours == ["posit8", "LNS"]


def test_every_option_says_what_it_is():
    for entry in altgrad.plugins().of_kind("format"):
        if entry.distribution == "altgrad-posit":
            for field in entry.component.options.__attrs_attrs__:
                assert field.metadata["help"]
                assert field.metadata["unit"]


def test_a_format_is_named_after_the_options_that_matter():
    specs = ["posit8", {"plugin": "posit8", "es": 1}, "LNS", {"plugin": "LNS", "gamma": 3}]
    names = ["posit8", "posit8(es=1)", "LNS(gamma=8)", "LNS(gamma=3)"]
    assert [altgrad.get_format(spec).name for spec in specs] == names


def test_listing_the_formats_imports_no_torch():
    script = "import sys, altgrad_posit; altgrad_posit.altgrad_formats(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_the_python_of_the_readme_runs():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})


def test_the_experiment_is_a_run_with_each_format():
    pytest.importorskip("altgrad_data")
    pytest.importorskip("altgrad_optim")
    cells = altgrad.load_experiment(ROOT / "experiment.toml").cells_on["cpu"]
    assert [cell.name for cell in cells] == ["format=posit8", "format=LNS(gamma=8)"]
