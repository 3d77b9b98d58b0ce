import re
import tomllib
from pathlib import Path

import pytest

from altgrad_core.registry import Registry
from altgrad_core.structuring import structure
from altgrad_policies import altgrad_fallbacks

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMPONENTS = {component.name: component for component in altgrad_fallbacks()}


def test_the_file_snippet_is_what_the_options_read():
    (snippet,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    for table in tomllib.loads(snippet)["fallback"]:
        options = COMPONENTS[table.pop("plugin")].options
        read, problems = structure(table, options, Registry(registered=()))
        assert not problems
        assert all(getattr(read, name) == value for name, value in table.items())


@pytest.mark.parametrize("name", COMPONENTS)
def test_every_policy_has_a_section_and_loads(name):
    assert f"\n## {name}\n" in README
    module, _, attribute = COMPONENTS[name].target.partition(":")
    assert hasattr(__import__(module, fromlist=[attribute]), attribute)
