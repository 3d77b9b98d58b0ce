import re
import tomllib
from pathlib import Path

from altgrad_optim import Placement

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_examples_run():
    names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["loss"] < 0.02


def test_the_file_snippet_is_what_the_options_read():
    (snippet,) = blocks("toml")
    table = tomllib.loads(snippet)["optimizer"]
    assert Placement.from_plain(table["placement"]) == Placement(p=0.0, q=1.0)
    assert table["plugin"] == "ManifoldAdamW"
