"""`altgrad diff`: options, metrics and tensors of two runs, on folders written by hand."""

import copy
import json

import attrs
import pytest
import torch

from altgrad_core import checkpoint, diff
from altgrad_core.apps import app, guarded
from altgrad_core.diff_page import lines
from altgrad_core.registry import UsageError

OPTIONS = {
    "name": "e",
    "steps": 4,
    "quantize": {"format": "E4M3", "rule": [{"layers": "a", "format": "BF16"}]},
    "optimizer": {"plugin": "AdamW", "lr": 0.001},
    "monitor": [{"plugin": "flip", "every": 1}, {"plugin": "stall", "every": 5}],
    "train": {"freeze": ["a", "b"]},
}
METRICS = [
    {"step": 0, "validation/loss": 5.5},
    {"step": 2, "train/loss": 5.25, "flip/ratio/total": 0.5, "time/tokens_per_second": 1.0},
    {"step": 4, "train/loss": 5.0, "flip/ratio/total": 0.25, "time/tokens_per_second": 2.0},
]
MODEL = {
    "classifier.weight": torch.ones(2, 2),
    "lm_head.weight": torch.ones(2, 2),
    "transformer.h.10.ln_1.weight": torch.ones(2),
    "transformer.h.2.ln_1.weight": torch.ones(2),
    "transformer.ln_f.weight": torch.ones(2),
    "transformer.wte.weight": torch.ones(2, 2),
}
STATE = {
    "step": 4,
    "seconds": 3.0,
    "random": {"python": 1},
    "optimizer": {"state": {"0": {"exp_avg": torch.zeros(3), "step": torch.tensor(4.0)}}},
    "scales": {"a": torch.tensor(2.0)},
}


@attrs.define
class Folder:
    """A run folder to be."""

    path: object
    options: dict = attrs.field(factory=lambda: copy.deepcopy(OPTIONS))
    metrics: list = attrs.field(factory=lambda: copy.deepcopy(METRICS))
    checkpoints: dict = attrs.field(
        factory=lambda: {step: (copy.deepcopy(MODEL), copy.deepcopy(STATE)) for step in (2, 4)}
    )
    made_with: dict = attrs.field(factory=lambda: {"device": "cpu", "plugins": {"altgrad-optim": "0.1.0"}})

    def write(self):
        self.path.mkdir()
        resolved = {"cell": "run", "options": self.options, **self.made_with}
        (self.path / "resolved.json").write_text(json.dumps(resolved))
        text = "".join(json.dumps(line) + "\n" for line in self.metrics)
        (self.path / "metrics.jsonl").write_text(text + '{"step": 5, "train/lo')  # torn
        for step, (model, state) in self.checkpoints.items():
            checkpoint.save(self.path / "checkpoints", checkpoint.step_name(step), model, state)
        return self.path


@pytest.fixture
def pair(tmp_path):
    """Two runs, equal until a test changes one."""
    return Folder(tmp_path / "a"), Folder(tmp_path / "b")


def compared(pair):
    return diff.compare(*(folder.write() for folder in pair))


def text(found):
    return "\n".join(lines(found))


def test_a_run_equals_its_twin(pair):
    found = compared(pair)
    assert not found.differs
    assert found.metrics.common == 3
    assert found.tensors.steps == (2, 4)
    assert text(found).endswith("\nthe runs are equal")


# --- options -------------------------------------------------------------------------------------------


def changed(pair, change):
    change(pair[1].options)
    return [(one.path, one.first, one.second) for one in compared(pair).options]


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (lambda o: o.update(steps=5), ("steps", "4", "5")),
        (lambda o: o["optimizer"].update(lr=0.01), ("optimizer.lr", "0.001", "0.01")),
        (lambda o: o["optimizer"].pop("lr"), ("optimizer.lr", "0.001", "-")),
        (lambda o: o["monitor"][1].update(every=6), ("monitor.stall.every", "5", "6")),
        (lambda o: o["train"].update(freeze=[]), ("train.freeze", '["a", "b"]', "[]")),
        (lambda o: o["quantize"]["rule"][0].update(format="X"), ("quantize.rule.0.format", '"BF16"', '"X"')),
        (lambda o: o.update(seed=None), ()),
        (lambda o: o["monitor"].reverse(), ("monitor", '["flip", "stall"]', '["stall", "flip"]')),
    ],
)  # fmt: skip
def test_an_option_that_differs_is_named_with_both_values(pair, change, row):
    assert changed(pair, change) == ([row] if row else [])


def test_what_one_run_has_alone_is_listed(pair):
    rows = changed(pair, lambda options: options.pop("quantize"))
    assert rows == [
        ("quantize.format", '"E4M3"', "-"),
        ("quantize.rule", '["0"]', "-"),
        ("quantize.rule.0.layers", '"a"', "-"),
        ("quantize.rule.0.format", '"BF16"', "-"),
    ]


def test_options_alone_make_a_difference_and_versions_do_not(pair):
    pair[1].made_with = {"device": "cuda", "plugins": {"altgrad-optim": "0.2.0"}}
    found = compared(pair)
    assert [(one.path, one.first, one.second) for one in found.made_with] == [
        ("device", '"cpu"', '"cuda"'),
        ("plugins.altgrad-optim", '"0.1.0"', '"0.2.0"'),
    ]
    assert not found.differs
    assert attrs.evolve(found, options=found.made_with[:1]).differs


# --- metrics -------------------------------------------------------------------------------------------


def test_the_first_step_whose_metrics_differ_is_named_with_what_differs(pair):
    pair[1].metrics[1]["train/loss"] = 5.250000000000001
    pair[1].metrics[2]["flip/ratio/total"] = 0.0
    found = compared(pair).metrics
    assert (found.step, found.values) == (2, {"train/loss": (5.25, 5.250000000000001)})


def test_clocks_are_no_difference_and_nan_is_nan(pair):
    pair[1].metrics[1]["time/tokens_per_second"] = 7.0
    for one in pair:
        one.metrics[2]["train/loss"] = float("nan")
    assert not compared(pair).metrics.differs


def test_a_number_in_place_of_nan_differs(pair):
    pair[0].metrics[2]["train/loss"] = float("nan")
    found = compared(pair).metrics
    assert found.step == 4
    assert found.values["train/loss"][1] == 5.0


def test_steps_that_one_run_alone_has_logged_are_counted(pair):
    del pair[0].metrics[2]
    found = compared(pair)
    assert (found.metrics.common, found.metrics.alone, found.differs) == (2, (0, 1), True)
    assert text(found).endswith("the runs differ: what was logged")


def test_metrics_that_one_run_alone_has_at_a_common_step_are_named(pair):
    pair[1].metrics[2]["stall/ratio/total"] = 0.0
    del pair[1].metrics[2]["flip/ratio/total"]
    found = compared(pair).metrics
    assert (found.step, found.names) == (None, (("flip/ratio/total",), ("stall/ratio/total",)))
    assert found.differs


# --- tensors -------------------------------------------------------------------------------------------


def test_the_first_tensor_of_the_first_checkpoint_that_differs_is_named(pair):
    model = pair[1].checkpoints[4][0]
    model["transformer.ln_f.weight"][0] = 3
    model["transformer.h.10.ln_1.weight"][1] = 0.75
    model["lm_head.weight"][0] = 3
    found = compared(pair).tensors
    assert (found.steps, found.step, found.tensor) == ((2, 4), 4, "transformer.h.10.ln_1.weight")
    assert found.detail == "1 of 2 elements, by at most 0.25; the first at [1]: 1.0 and 0.75"


@pytest.mark.parametrize(
    "names",
    [
        ("transformer.wte.weight", "transformer.h.2.ln_1.weight"),
        ("transformer.h.2.ln_1.weight", "transformer.h.10.ln_1.weight"),
        ("transformer.h.10.ln_1.weight", "transformer.ln_f.weight"),
        ("transformer.ln_f.weight", "lm_head.weight"),
        ("transformer.ln_f.weight", "classifier.weight"),
    ],
)
def test_tensors_come_in_the_order_of_the_model(pair, names):
    for name in names:
        pair[0].checkpoints[2][0][name].mul_(2)
    assert compared(pair).tensors.tensor == names[0]


def test_the_signs_of_zeros_differ_and_their_place_is_named(pair):
    for one, zero in zip(pair, (0.0, -0.0), strict=True):
        one.checkpoints[2][0]["transformer.wte.weight"][1, 0] = zero
    assert compared(pair).tensors.detail == "1 of 4 elements, by at most 0; the first at [1, 0]: 0.0 and -0.0"


def test_equal_nans_are_equal(pair):
    for one in pair:
        one.checkpoints[2][0]["transformer.wte.weight"][1, 0] = float("nan")
    assert not compared(pair).differs


def test_state_that_differs_is_named_by_its_path(pair):
    pair[1].checkpoints[4][1]["optimizer"]["state"]["0"]["exp_avg"][2] = 1e-8
    found = compared(pair).tensors
    assert (found.step, found.tensor) == (4, "optimizer/state/0/exp_avg")


def test_clocks_and_global_generators_are_no_part_of_the_comparison(pair):
    pair[1].checkpoints[4][1].update(seconds=9.0, random={"python": 2})
    assert not compared(pair).differs


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        (torch.zeros(4), "(3,) float32 and (4,) float32"),
        (torch.zeros(3, dtype=torch.float64), "(3,) float32 and (3,) float64"),
    ],
)
def test_tensors_of_another_shape_or_dtype_differ(pair, value, detail):
    pair[1].checkpoints[2][1]["optimizer"]["state"]["0"]["exp_avg"] = value
    assert compared(pair).tensors.detail == detail


@pytest.mark.parametrize(("which", "said"), [(0, "first"), (1, "second")])
def test_a_tensor_that_one_run_has_not_is_a_difference(pair, which, said):
    del pair[which].checkpoints[2][1]["scales"]["a"]
    found = compared(pair).tensors
    assert (found.tensor, found.detail) == ("scales/a", f"the {said} run has none")


def test_checkpoints_of_other_steps_are_not_compared(pair):
    del pair[0].checkpoints[2], pair[1].checkpoints[4]
    found = compared(pair)
    assert (found.tensors.steps, found.differs) == ((), False)
    assert "checkpoints: none of a step that both have" in text(found)


def test_a_damaged_checkpoint_is_said_and_the_next_is_compared(pair):
    pair[1].checkpoints[4][0]["transformer.wte.weight"][0, 0] = 2
    folders = [one.write() for one in pair]
    (folders[0] / "checkpoints" / "step_00000002" / "model.safetensors").write_bytes(b"")
    found = diff.compare(*folders)
    assert (found.tensors.steps, found.tensors.step) == ((4,), 4)
    assert "not compared: " in text(found)
    assert "step_00000002: model.safetensors is not what its manifest says" in text(found)


# --- the command ---------------------------------------------------------------------------------------


def test_a_folder_that_is_no_run_is_refused_with_those_that_are(pair, tmp_path):
    folder = pair[0].write()
    with pytest.raises(UsageError, match=r"b: is no run folder, it has no resolved.json; name the folder of"):
        diff.compare(folder, tmp_path / "b")
    with pytest.raises(UsageError, match=f"name one of its runs: {folder}$"):
        diff.compare(tmp_path, folder)


def test_the_exit_code_is_0_for_equal_1_for_different_and_2_for_a_wrong_path(pair, capsys):
    pair[1].options["steps"] = 5
    first, second = (str(one.write()) for one in pair)
    assert [guarded(app, ["diff", first, other]) for other in (first, second, "nowhere")] == [0, 1, 2]
    out, err = capsys.readouterr()
    assert "  steps  4      5\n" in out
    assert err.startswith("nowhere: is no run folder")


def test_the_comparison_as_json(pair, capsys):
    pair[1].metrics[1]["train/loss"] = 1.0
    assert guarded(app, ["diff", *(str(one.write()) for one in pair), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["differs"]
    assert (found["metrics"]["step"], found["metrics"]["values"]) == (2, {"train/loss": [5.25, 1.0]})
    assert found["tensors"]["steps"] == [2, 4]


def test_the_page_side_by_side(pair):
    pair[1].options["optimizer"]["lr"] = 0.01
    pair[1].metrics[1]["train/loss"] = 5.5
    pair[1].checkpoints[2][0]["transformer.wte.weight"][0, 1] = 2
    found = attrs.evolve(compared(pair), first="runs/a", second="runs/b")
    assert (
        text(found)
        == """\
first   runs/a: not ended, at step 4
second  runs/b: not ended, at step 4

options that differ
                first  second
  optimizer.lr  0.001  0.01

metrics: 3 steps in both; the first that differs: step 2
              first  second
  train/loss  5.25   5.5

checkpoints: the first that differs: step 2
  transformer.wte.weight: 1 of 4 elements, by at most 1; the first at [0, 1]: 1.0 and 2.0

the runs differ: 1 option, metrics from step 2, tensors from step 2"""
    )


def test_many_metrics_are_counted(pair):
    for index in range(12):
        for one in pair:
            one.metrics[1][f"flip/ratio/{index}"] = float(index)
        pair[1].metrics[1][f"flip/ratio/{index}"] += 1
    page = text(compared(pair))
    assert "  flip/ratio/7  7.0    8.0\n  and 4 more metrics\n" in page
