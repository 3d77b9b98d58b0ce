import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_examples_in_python_run():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(compile(block, "README.md", "exec"), names)
    assert names["storage"].weights[0] is names["model"][0].weight
    assert names["mlp"][2].quantizer.format.name == "BF16"


def test_every_module_of_the_core_is_on_the_plan():
    plan = (ROOT / "docs" / "architecture.md").read_text()
    modules = {path.stem for path in (ROOT / "altgrad_core").glob("*.py")} - {"__init__"}
    assert {name for name in modules if f"`{name}`" not in plan} == set()
