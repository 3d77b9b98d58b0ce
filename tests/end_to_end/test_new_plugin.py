"""`altgrad new-plugin`: packages as it writes them, built, installed, tested, and checked by the kit."""

import os
import pathlib
import subprocess
import sys

import pytest

from altgrad_core import new_plugin
from altgrad_core.apps import app, guarded
from altgrad_core.hookspecs import KINDS
from altgrad_core.registry import UsageError

ALTGRAD = pathlib.Path(sys.executable).with_name("altgrad")
EACH_KIND = [kind if kind == "format" else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Write and install a package of each kind; return the folder that they lie in, and who sees them."""
    folder = tmp_path_factory.mktemp("packages")
    written = [new_plugin.write(f"altgrad-a-{kind}", kind, folder) for kind in KINDS]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    isolated = ["--no-build-isolation", "--no-deps", "--no-index", "--target", folder / "site"]
    subprocess.run([*pip, *isolated, *written], check=True, timeout=300)
    return folder, {**os.environ, "PYTHONPATH": str(folder / "site")}


@pytest.mark.parametrize("kind", EACH_KIND)
def test_a_packages_own_tests_pass(kind, packages):
    folder, environment = packages
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"altgrad-a-{kind}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


@pytest.mark.parametrize("kind", EACH_KIND)
def test_the_kit_finds_a_package_right_under_its_name(kind, packages):
    folder, environment = packages
    command = [ALTGRAD, "check-plugin", f"altgrad-a-{kind}"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    name = "A_FORMAT" if kind == "format" else f"a_{kind}"
    assert (done.returncode, done.stdout.split()) == (0, ["ok", kind, name]), done.stdout + done.stderr


def test_the_command_says_what_it_wrote_and_what_to_type_next(tmp_path, capsys):
    assert guarded(app, ["new-plugin", "altgrad-x", "--kind", "stiffness", "--into", str(tmp_path)]) == 0
    *files, following = capsys.readouterr().out.splitlines()
    own = [
        "README.md",
        "altgrad_x/__init__.py",
        "altgrad_x/stiffness.py",
        "pyproject.toml",
        "tests/test_altgrad_x.py",
    ]
    assert files == [str(tmp_path / "altgrad-x" / one) for one in own]
    assert following.startswith(f"next: pip install -e '{tmp_path / 'altgrad-x'}[test]' && pytest ")
    assert following.endswith(" && altgrad check-plugin altgrad-x")


def test_a_folder_that_is_there_is_never_written_into(tmp_path):
    new_plugin.write("altgrad-x", "format", tmp_path)
    with pytest.raises(UsageError, match="altgrad-x: is there already; choose another name"):
        new_plugin.write("altgrad-x", "monitor", tmp_path)


@pytest.mark.parametrize("name", ["", "8bit", "my plugin", "a/b", "-x", "class", "../up"])
def test_a_name_that_no_package_can_have_is_refused(name, tmp_path):
    with pytest.raises(UsageError, match="is no name for a package"):
        new_plugin.write(name, "format", tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_name_that_would_hide_an_installed_module_is_refused(tmp_path):
    with pytest.raises(UsageError, match="a module 'torch' is installed already"):
        new_plugin.write("torch", "format", tmp_path)


def test_a_name_that_another_plugin_has_for_this_kind_is_refused(tmp_path):
    with pytest.raises(UsageError, match="a monitor 'flip' is installed already, by altgrad-monitors"):
        new_plugin.write("altgrad-flip", "monitor", tmp_path)


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="altgrad-x: cannot be written: Not a directory; choose another"):
        new_plugin.write("altgrad-x", "monitor", tmp_path / "file")


def test_a_format_is_not_given_a_name_that_means_none(tmp_path):
    with pytest.raises(UsageError, match="the format 'FP32' means 'leave it alone'"):
        new_plugin.write("altgrad-fp32", "format", tmp_path)


def test_an_unknown_kind_is_refused_with_the_nearest(tmp_path, capsys):
    assert guarded(app, ["new-plugin", "altgrad-x", "--kind", "formats", "--into", str(tmp_path)]) == 2
    assert "did you mean 'format'?" in capsys.readouterr().err
