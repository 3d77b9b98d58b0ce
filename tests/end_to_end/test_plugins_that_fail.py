"""Plugins that raise at import or while they are built: monitors are dropped, all others end the run."""

import re
import sys

import pytest
import torch

from altgrad_core import lookup
from altgrad_core import registry as registry_module
from altgrad_core.apps import app, guarded, run_app
from altgrad_core.record import read_json, read_lines
from altgrad_core.registry import PluginError

PLUGIN = '''
"""One component of each kind, and all of them called acme; and a policy that reads the monitor. Light."""

from altgrad_core.hookspecs import Component, hookimpl


def _hook(name):
    return hookimpl(specname=name)(lambda: [Component(name="acme", summary="", target="acme_parts:Part")])


KINDS = "formats", "stiffness", "optimizers", "monitors", "fallbacks", "datasets", "executors"
for kind in KINDS:
    globals()["acme_" + kind] = _hook("altgrad_" + kind)


class Reader:
    needs = ("acme/count/total",)

    def __init__(self, options):
        pass

    def decide(self, step, metrics):
        return None


@hookimpl(specname="altgrad_fallbacks")
def readers():
    return [Component(name="reader", summary="", target="acme_plugin:Reader")]
'''
TINY = """
name = "tiny"
seed = 7
steps = 4
[data]
plugin = "markov"
tokens = 2000
[model]
n_layer = 1
n_head = 1
n_embd = 16
block_size = 16
[train]
batch_size = 2
device = "cpu"
eval_batches = 1
log_every = 1
checkpoint_every = 2
"""
MONITOR = "[[monitor]]\nplugin = 'acme'\n"
AT_IMPORT = "raise RuntimeError('boom')"
AS_IT_IS_BUILT = (
    "class Part:\n    needs = ()\n\n    def __init__(self, *inputs):\n        raise RuntimeError('boom')"
)
WORKING = (
    "class Part:\n    needs = ()\n\n    def __init__(self, options):\n        pass\n\n"
    "    def observe(self, step):\n        return {'acme/count/total': 1.0}"
)


@pytest.fixture
def acme(tmp_path, monkeypatch):
    """Return a function that installs the distribution acme 3.1 with the parts of a text."""
    place = tmp_path / "site"
    (place / "acme-3.1.dist-info").mkdir(parents=True)
    (place / "acme-3.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: acme\nVersion: 3.1\n"
    )
    (place / "acme-3.1.dist-info" / "entry_points.txt").write_text("[altgrad]\nacme = acme_plugin\n")
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two texts within a second have one time stamp

    def install(parts, plugin=PLUGIN):
        (place / "acme_plugin.py").write_text(plugin)
        (place / "acme_parts.py").write_text(parts)
        forget()

    def forget():
        registry_module._discover.cache_clear()
        lookup._built_format.cache_clear()
        for module in ("acme_plugin", "acme_parts"):
            sys.modules.pop(module, None)

    yield install
    forget()


@pytest.fixture(autouse=True)
def _settings_kept():
    yield
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def train(run_text):
    """Return a function that runs the experiment with further tables, from Python."""
    return lambda tables="", name="runs", flags=(): run_text(TINY + tables, name, *flags)


@pytest.fixture
def command(write, tmp_path, capsys):
    """Return a function that runs the command on the experiment; gives its exit code and errors, by line."""

    def command(tables, *flags):
        sets = [part for flag in flags for part in ("--set", flag)]
        path, out = write(TINY + tables), tmp_path / "runs"
        code = guarded(run_app, [str(path), "--out", str(out), "--quiet", *sets])
        return code, capsys.readouterr().err.splitlines()

    return command


def losses(result):
    return [line["train/loss"] for line in read_lines(result.folder / "metrics.jsonl") if line["step"]]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (AT_IMPORT, "its target 'acme_parts:Part' cannot be loaded: RuntimeError: boom"),
        ("import a_library_that_is_not_there", "its target 'acme_parts:Part' cannot be loaded: Module"),
        ("raise SystemExit(3)", "its target 'acme_parts:Part' cannot be loaded: SystemExit: 3"),
        ("Other = 1", "its target 'acme_parts:Part' cannot be loaded: AttributeError"),
        (AS_IT_IS_BUILT, "cannot be built: RuntimeError: boom"),
    ],
)
def test_a_monitor_that_cannot_be_had_is_said_once_and_dropped(parts, reason, acme, train, warnings):
    acme(parts)
    result = train(MONITOR)
    assert result.outcome == "finished"
    (warning,) = warnings(result.folder)
    assert re.match(r"acme of acme 3\.1: monitor 'acme' of acme 3\.1:? ", warning)
    assert reason in warning
    assert warning.endswith("the monitor is dropped, training goes on")
    assert losses(result) == losses(train(name="without"))


def test_a_monitor_that_was_never_had_is_not_said_again_on_resume(acme, train, warnings):
    acme(AT_IMPORT)
    (train(MONITOR).folder / "summary.json").unlink()
    assert len(warnings(train(MONITOR).folder)) == 1


def test_a_monitor_that_is_lost_between_two_commands_takes_its_metrics_with_it(acme, train, warnings):
    acme(WORKING)
    (train(MONITOR).folder / "summary.json").unlink()
    acme(AT_IMPORT)
    result = train(MONITOR)
    assert len(warnings(result.folder)) == 1
    assert not any(name.startswith("acme/") for name in result.summary["final"])


def test_the_policies_that_read_a_dropped_monitor_are_named(acme, train, warnings):
    acme(AT_IMPORT)
    (warning,) = warnings(train(MONITOR + "[[fallback]]\nplugin = 'reader'\n").folder)
    assert warning.endswith("; without its metrics: reader")


@pytest.mark.parametrize("parts", [AT_IMPORT, AS_IT_IS_BUILT], ids=["at import", "as it is built"])
@pytest.mark.parametrize(
    ("kind", "flag"),
    [
        ("format", "quantize.format='acme'"),
        ("optimizer", "optimizer.plugin='acme'"),
        ("stiffness", "optimizer={plugin = 'ManifoldAdamW', stiffness = 'acme'}"),
        ("fallback", "fallback=[{plugin = 'acme'}]"),
        ("dataset", "data.plugin='acme'"),
        ("executor", "executor='acme'"),
    ],
)
def test_anything_else_that_cannot_be_had_ends_the_run_in_one_line(kind, flag, parts, acme, command):
    acme(parts)
    code, (line,) = command("", flag)
    assert code == 1
    assert line.startswith(f"failed: {kind} 'acme' of acme 3.1")
    assert re.search(r"RuntimeError: boom \(acme_parts\.py:\d\)$", line)


THREE = "def Part(*inputs):\n    return 3"
OPTIMIZER = (
    "import torch\n\n\nclass Part(torch.optim.SGD):\n    def __init__(self, options, inputs):\n        "
)


@pytest.mark.parametrize(
    ("flag", "parts", "reason"),
    [
        ("quantize.format='acme'", THREE, "format 'acme' of acme 3.1 is no Format but int"),
        (
            "optimizer.plugin='acme'",
            "Part = print",
            "optimizer 'acme' of acme 3.1 is no torch.optim.Optimizer",
        ),
        (
            "optimizer.plugin='acme'",
            OPTIMIZER + "torch.optim.Optimizer.__init__(self, inputs.groups, {})",
            "optimizer 'acme' of acme 3.1 has a parameter group without lr",
        ),
        (
            "optimizer.plugin='acme'",
            OPTIMIZER + "super().__init__([{'params': group['params'][1:]} for group in inputs.groups])",
            "optimizer 'acme' of acme 3.1 leaves out 2 of the 9 parameters it was given",
        ),
        (
            "monitor=[{plugin = 'acme'}]",
            WORKING.replace(
                "return", "import torch\n\n        torch.set_default_dtype(torch.float64)\n        return"
            ),
            "acme of acme 3.1 left torch's default dtype at torch.float64, it was torch.float32",
        ),
        (
            "optimizer.plugin='acme'",
            OPTIMIZER
            + "super().__init__(inputs.groups)\n\n    def state_dict(self):\n        return {'f': print}",
            "optimizer 'acme' of acme 3.1: state_dict raised",
        ),
        (
            "executor='acme'",
            "class Part:\n    def __init__(self, options):\n        pass\n\n"
            "    def run(self, cells, run_cell, jobs):\n        return [3]",
            "executor 'acme' of acme 3.1: run raised TypeError: it must return a CellResult of each cell",
        ),
        (
            "fallback=[{plugin = 'acme'}]",
            "class Part:\n    needs = ()\n\n    def __init__(self, options):\n        pass\n\n"
            "    def decide(self, step, metrics):\n        raise SystemExit(0)",
            "acme of acme 3.1: decide raised SystemExit: 0",
        ),
        (
            "fallback=[{plugin = 'acme'}]",
            "class Part:\n    needs = ()\n\n    def __init__(self, options):\n        pass\n\n"
            "    def decide(self, step, metrics):\n"
            "        __import__('torch').set_grad_enabled(False)",
            "acme of acme 3.1 left torch's grad mode at False, it was True",
        ),
    ],
)
def test_what_is_not_what_its_kind_asks_for_ends_the_run_in_one_line(flag, parts, reason, acme, command):
    acme(parts)
    code, (line,) = command("", flag)
    assert (code, line.startswith(f"failed: {reason}")) == (1, True), line


DRAWING_FORMAT = (
    "import torch\n\nfrom altgrad_core.format import Format\n\n\nclass Drawing(Format):\n"
    "    def fake_quantize(self, *args, **kwargs):\n        torch.rand(1)\n"
    "        return super().fake_quantize(*args, **kwargs)\n\n\n"
    "def Part(options):\n    return Drawing(name='acme', bits=3, values=[-2.0, -1.0, 0.0, 1.0, 2.0])"
)


def test_evaluation_is_pure_though_a_format_draws_from_the_global_stream(acme, train):
    acme(DRAWING_FORMAT)
    arm = "[quantize]\nformat = 'acme'\n"
    runs = [
        train(arm, f"every {steps}", ("model.dropout=0.5", f"train.eval_every={steps}")) for steps in (1, 4)
    ]
    assert losses(runs[0]) == losses(runs[1])


LEAVING = (
    "import sys\n\nimport torch\n\n\nclass Part(torch.optim.SGD):\n"
    "    def __init__(self, options, inputs):\n        super().__init__(inputs.groups, lr=0.1)\n\n"
    "    def step(self, closure=None):\n        sys.exit(3)"
)
LEAVING_FORMAT = (
    "import sys\n\nfrom altgrad_core.format import Format\n\n\nclass Leaving(Format):\n"
    "    def fake_quantize(self, *args, **kwargs):\n        sys.exit(3)\n\n"
    "    quantize = fake_quantize\n\n\n"
    "def Part(options):\n    return Leaving(name='acme', bits=3, values=[-2.0, -1.0, 0.0, 1.0, 2.0])"
)


@pytest.mark.parametrize(
    ("parts", "flag", "notes"),
    [
        (
            LEAVING,
            "optimizer.plugin='acme'",
            [
                "in a step of optimizer 'acme' of acme 3.1",
                "raised in acme_parts of acme 3.1, here for optimizer 'acme'",
            ],
        ),
        (
            LEAVING_FORMAT,
            "quantize.format='acme'",
            ["raised in acme_parts of acme 3.1, here for format 'acme'"],
        ),
        (
            WORKING.replace("observe(self, step)", "tokens(self, split)").replace(
                "return {'acme/count/total': 1.0}",
                "raise SystemExit(3)\n\n    vocab_size = 4\n    loss_floor = None\n\n"
                "    def fingerprint(self):\n        return 'acme'",
            ),
            "data.plugin='acme'",
            [
                "while the tokens of dataset 'acme' of acme 3.1 were prepared",
                "raised in acme_parts of acme 3.1, here for dataset 'acme'",
            ],
        ),
    ],
)
def test_a_plugin_that_leaves_the_process_ends_the_run_and_is_named(
    parts, flag, notes, acme, train, tmp_path
):
    acme(parts)
    with pytest.raises(RuntimeError, match="SystemExit: 3") as raised:
        train("", flags=(flag,))
    assert raised.value.__notes__ == notes
    (path,) = (tmp_path / "runs").rglob("summary.json")
    summary = read_json(path)
    assert (summary["outcome"], summary["message"]) == (
        "failed",
        "; ".join(["RuntimeError: SystemExit: 3", *notes]),
    )


@pytest.mark.parametrize("answer", ["None", "[1.0]", "sys.exit(3)"])
def test_a_monitor_that_answers_with_no_table_is_dropped(answer, acme, train, warnings):
    acme("import sys\n\n\n" + WORKING.replace("{'acme/count/total': 1.0}", answer))
    result = train(MONITOR)
    assert result.outcome == "finished"
    (warning,) = warnings(result.folder)
    assert re.match(r"acme of acme 3\.1: observe raised .*; the monitor is dropped", warning)


@pytest.mark.parametrize("parts", [THREE, WORKING.replace("observe", "documents")])
def test_what_is_no_data_set_is_named_with_its_owner(parts, acme, train, tmp_path):
    acme(parts)
    with pytest.raises(PluginError, match=r"dataset 'acme' of acme 3\.1 is no TextSource and no TokenSource"):
        train("", flags=("data.plugin='acme'",))
    assert read_json(next(tmp_path.rglob("summary.json")))["outcome"] == "failed"


def test_what_is_no_document_is_named_with_its_place_in_the_data_set(acme, train):
    acme(
        WORKING.replace("observe(self, step)", "documents(self, split)").replace(
            "return {'acme/count/total': 1.0}", "return ['text']"
        )
        + "\n\n    def fingerprint(self):\n        return 'acme'"
    )
    with pytest.raises(PluginError, match="'acme': document 1 of train is 'text', which is no Document"):
        train("", flags=("data.plugin='acme'",))


def test_a_file_that_names_a_component_of_a_broken_plugin_is_refused_with_the_reason(acme, command, capsys):
    acme(WORKING, plugin=AT_IMPORT)
    code, (line,) = command(MONITOR)
    assert code == 2
    assert "monitor[0].plugin: no monitor named 'acme' is installed" in line
    assert line.endswith("broken plugins, where it may be: acme 3.1 (RuntimeError: boom (acme_plugin.py:1))")
    guarded(app, ["plugins"])
    assert "acme 3.1" in capsys.readouterr().out
    assert command("") == (0, [])
