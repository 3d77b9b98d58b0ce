"""The Python face: what `import altgrad_core as altgrad` offers."""

import pathlib
import subprocess
import sys

import pytest

import altgrad_core as altgrad


def test_no_public_name_is_a_submodules_name():
    modules = {path.stem for path in pathlib.Path(altgrad.__file__).parent.iterdir()}
    assert not modules & set(altgrad.__all__)


@pytest.mark.parametrize("name", altgrad.__all__)
def test_every_public_name_resolves_and_is_callable(name):
    assert callable(getattr(altgrad, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="quantise_model"):
        altgrad.quantise_model  # noqa: B018 - the look-up is the test


def test_the_import_alone_is_free_of_torch():
    script = "import sys, altgrad_core; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
