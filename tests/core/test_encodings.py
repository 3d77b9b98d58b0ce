"""Text that a locale has no characters for: of files, of names of folders, of what is printed."""

import os
import subprocess
import sys

import pytest

from altgrad_core.record import RunFolder

NO_UTF8 = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


@pytest.fixture
def in_a_poor_locale(tmp_path):
    """Return a function that runs Python where text is ASCII; gives what it printed."""

    def run(code):
        environment = {**os.environ, **NO_UTF8, "PYTHONIOENCODING": "ascii"}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, check=True).stdout

    return run


def test_files_are_utf8_in_every_locale(in_a_poor_locale, tmp_path):
    in_a_poor_locale(
        "import pathlib; from altgrad_core.durable import write_whole\n"
        "write_whole(pathlib.Path('a.toml'), '# \\u6f22')"
    )
    assert (tmp_path / "a.toml").read_text(encoding="utf-8") == "# \u6f22"


def test_what_output_cannot_show_is_escaped(in_a_poor_locale):
    code = "from altgrad_core import output; output.escape(); print('\\u6f22')"
    assert in_a_poor_locale(code) == b"\\u6f22\n"


@pytest.mark.skipif(sys.platform == "darwin", reason="its file system takes UTF-8 alone")
def test_a_folder_whose_name_is_no_utf8_goes_into_the_log(tmp_path):
    folder = RunFolder(tmp_path / "x\udcfcy")
    folder.log(str(folder.path))
    folder.close()
    assert (folder.path / "log.txt").read_bytes().endswith(b"x\\udcfcy\n")
