"""What a comparison takes: its groups of runs, its step sizes, and what is wrong with a [compare] table."""

import math
import pickle

import attrs
import pytest

from altgrad_core import compare, comparing, rules
from altgrad_core.check_page import check
from altgrad_core.experiment_file import load_experiment
from altgrad_core.grids import requested
from altgrad_core.options import StiffnessChoice, option
from altgrad_core.registry import Registry
from altgrad_core.tuning import Tuning

ARMS = """
name = "e"
quantize = {format = "E5M2", storage = "grid", bound = 8.0}
[grid]
"quantize.format" = ["E5M2", "E3M4"]
optimizer = [
  {plugin = "AdamW", lr = 1e-3},
  {plugin = "GridOptim", step_scale = 6},
]
[compare]
arm = "optimizer"
"""
REFERENCES = """
[compare.references]
fp32 = {"quantize.format" = "FP32"}
"""
ONE_FORMAT = ARMS.replace(', "E3M4"]', "]")


@pytest.fixture
def groups(experiment_at):
    """Return a function that gives the groups of a file as (name, kinds of roles, step_of)."""

    def groups(text, *flags):
        found = experiment_at(text, *flags).comparison.groups
        return [(group.name, [role.kind for role in group.roles], group.step_of) for group in found]

    return groups


# --- groups ------------------------------------------------------------------------------------------


def test_arms_references_and_arms_on_float32_are_groups_of_runs_each_once(groups):
    assert groups(ARMS + REFERENCES) == [
        ("format=E5M2,optimizer=AdamW(lr=0.001)", ["arm"], ""),
        ("format=E5M2,optimizer=GridOptim(step_scale=6)", ["arm"], ""),
        ("format=E3M4,optimizer=AdamW(lr=0.001)", ["arm"], ""),
        ("format=E3M4,optimizer=GridOptim(step_scale=6)", ["arm"], ""),
        ("format=FP32,optimizer=AdamW(lr=0.001)", ["reference"], ""),
        ("format=FP32,optimizer=GridOptim(step_scale=6),of_format=E5M2", ["intrinsic"], ""),
        ("format=FP32,optimizer=GridOptim(step_scale=6),of_format=E3M4", ["intrinsic"], ""),
    ]


def test_an_arm_on_float32_has_the_geometry_of_the_format_and_the_bound_and_nothing_else_of_quantize(
    experiment_at,
):
    experiment = experiment_at(ONE_FORMAT).cells_on["cpu"][-1].experiment.plain()
    assert experiment["optimizer"]["stiffness"]["of_format"] == "E5M2"
    assert experiment["quantize"]["format"] == "FP32"
    assert (experiment["quantize"]["storage"], experiment["quantize"]["bound"]) == ("master", 8.0)


RULES = """rule = [
  {layers = "lm_head", format = "BF16"},
  {layers = ".*attn.*", format = "E3M4"},
  {layers = ".*mlp.c_fc", format = "FP32"},
  {layers = ".*", storage = "master", activations = "E5M2"},
]"""
WITH_RULES = ONE_FORMAT.replace("bound = 8.0}", f"{RULES}}}")


def test_on_float32_the_rules_cover_the_same_weights_and_quantize_none_of_them(experiment_at, registry):
    arm, *_, intrinsic = experiment_at(WITH_RULES, "model.tie_weights=false").cells_on["cpu"]
    assert compare.is_on_float32(intrinsic.experiment.quantize, registry)
    layers = ["lm_head", "h.0.attn.c_attn", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    covered = [rules.covered(one.experiment.quantize, layers, (), registry) for one in (arm, intrinsic)]
    assert covered == [["h.0.attn.c_attn", "h.0.mlp.c_proj"]] * 2


def test_on_float32_the_weights_of_a_rule_with_its_own_format_take_that_ones_geometry(experiment_at):
    *_, intrinsic = experiment_at(WITH_RULES, "model.tie_weights=false").cells_on["cpu"]
    layers = ["lm_head", "h.0.attn.c_attn", "h.0.mlp.c_fc", "h.0.mlp.c_proj"]
    found = rules.geometries(intrinsic.experiment.quantize, layers)
    assert {layer: format.plugin for layer, format in found.items()} == {"h.0.attn.c_attn": "E3M4"}
    assert intrinsic.experiment.plain()["optimizer"]["stiffness"]["of_format"] == "E5M2"


def test_on_float32_a_mismatched_geometry_is_that_of_all_weights(experiment_at):
    mismatched = WITH_RULES.replace(
        "step_scale = 6", "step_scale = 6, stiffness = {plugin = 'grid', of_format = 'BF16'}"
    )
    *_, intrinsic = experiment_at(mismatched, "model.tie_weights=false").cells_on["cpu"]
    assert rules.geometries(intrinsic.experiment.quantize, ["h.0.attn.c_attn"]) == {}


def test_runs_without_a_stiffness_have_no_geometries_on_float32(experiment_at):
    file = experiment_at(WITH_RULES + REFERENCES, "model.tie_weights=false")
    (reference,) = (cell for cell in file.cells_on["cpu"] if "AdamW" in cell.name and "FP32" in cell.name)
    assert rules.geometries(reference.experiment.quantize, ["h.0.attn.c_attn"]) == {}


def test_a_reference_on_float32_has_the_weights_of_rules_there_too_and_it_is_said(experiment_at, registry):
    file = experiment_at(WITH_RULES + REFERENCES, "model.tie_weights=false")
    (reference,) = (
        cell for cell in file.cells_on["cpu"] if cell.name == "format=FP32,optimizer=AdamW(lr=0.001)"
    )
    assert compare.is_on_float32(reference.experiment.quantize, registry)
    assert file.comparison.notes == (
        "fp32 has the weights of the rules for '.*attn.*' (E3M4) on float32 too",
    )


def test_a_reference_that_lists_rules_keeps_their_formats(experiment_at):
    own = REFERENCES.replace('"FP32"}', '"FP32", "quantize.rule" = [{layers = ".*attn.*", format = "E3M4"}]}')
    file = experiment_at(WITH_RULES + own, "model.tie_weights=false")
    (reference,) = (cell for cell in file.cells_on["cpu"] if "AdamW" in cell.name and "FP32" in cell.name)
    assert [rule.format.plugin for rule in reference.experiment.quantize.rule] == ["E3M4"]
    assert file.comparison.notes == ()


def _no_other(_, field, value):
    if value.geometry.of_format is not None:
        raise ValueError("takes no of_format")


@attrs.frozen(kw_only=True)
class OwnGridOptions:
    """An optimizer's that knows the geometry of a weight's own grid alone."""

    lr: float = option("learning rate", default=0.1)
    stiffness: StiffnessChoice = option("formula", default=StiffnessChoice("grid"), validator=_no_other)


def test_an_optimizer_that_takes_no_other_geometry_has_no_runs_on_float32_and_it_is_said(
    registry, registered, tmp_path
):
    more = Registry(registered=(*registry.registered, registered("optimizer", "OwnGrid", OwnGridOptions)))
    path = tmp_path / "e.toml"
    path.write_text(ONE_FORMAT.replace('{plugin = "GridOptim", step_scale = 6}', '{plugin = "OwnGrid"}'))
    file = load_experiment(path, (), more)
    assert {role.kind for group in file.comparison.groups for role in group.roles} == {"arm"}
    (note,) = file.comparison.notes
    assert note == "OwnGrid has no run on float32 weights: takes no of_format"
    assert any(line.endswith(note) for line in check(file, tmp_path))


def test_on_float32_other_weights_and_flows_are_quantized_as_before_as_they_are_in_a_reference(experiment_at):
    flows = WITH_RULES.replace("rule =", 'activations = {format = "E5M2", margin = 2.0}, rule =')
    file = experiment_at(flows + REFERENCES, "model.tie_weights=false")
    arm, *_, reference, intrinsic = (cell.experiment.quantize for cell in file.cells_on["cpu"])
    for one in (reference, intrinsic):
        assert one.format.unquantized
        assert one.activations == arm.activations
        assert [one.rule[index].format.plugin for index in (0, 2)] == ["BF16", "FP32"]
        assert one.rule[3].activations.plugin == "E5M2"


def test_an_axis_of_the_flows_tells_runs_on_float32_apart(groups):
    axis = '[grid]\n"quantize.activations.format" = ["none", "E5M2"]'
    kinds = [kinds for _, kinds, _ in groups(ONE_FORMAT.replace("[grid]", axis) + REFERENCES)]
    assert (kinds.count(["reference"]), kinds.count(["intrinsic"])) == (2, 2)


def test_rules_that_exclude_no_weight_leave_no_rule_on_float32(experiment_at):
    text = WITH_RULES.replace("BF16", "E5M2").replace("FP32", "E5M2").replace("E3M4", "E5M2")
    text = text.replace(', activations = "E5M2"', "")
    assert experiment_at(text).cells_on["cpu"][-1].experiment.quantize.rule == ()


def test_where_nothing_is_quantized_the_bound_and_the_weights_covered_tell_runs_apart(groups):
    tables = """
    quantize = [
      {format = "E5M2"}, {format = "E3M4"}, {format = "E5M2", bound = 4.0},
      {format = "E5M2", rule = [{layers = "lm_head|.*mlp.*", format = "FP32"}]},
    ]
    """
    text = ONE_FORMAT.replace('"quantize.format" = ["E5M2"]', tables) + REFERENCES
    stem = "optimizer=AdamW(lr=0.001)"
    assert [name for name, kinds, _ in groups(text) if kinds == ["reference"]] == [
        f"format=FP32,{stem}",
        f"format=FP32,bound=4.0,{stem}",
        f"format=FP32,rule=(layers=lm_head_._mlp._-c06dab,format=FP32),{stem}",
    ]


def test_a_bound_that_varies_is_part_of_where_an_arm_on_float32_belongs(experiment_at):
    text = ONE_FORMAT.replace("[grid]", '[grid]\n"quantize.bound" = [0.0, 8.0]')
    roles = [role for group in experiment_at(text).comparison.groups for role in group.roles]
    found = [role.at for role in roles if role.kind == "intrinsic"]
    assert found == [{"quantize.bound": 0.0}, {"quantize.bound": 8.0}]


def test_a_format_axis_with_float32_needs_no_other_run_for_the_reference(groups):
    found = groups(ARMS.replace('"E3M4"', '"FP32"') + REFERENCES)
    assert ("format=FP32,optimizer=AdamW(lr=0.001)", ["arm", "reference"], "") in found
    assert len(found) == 5


def test_where_nothing_is_quantized_an_axis_of_quantize_tells_no_runs_apart(groups):
    text = ARMS.replace("[grid]", '[grid]\n"quantize.storage" = ["grid", "master"]') + REFERENCES
    kinds = [kinds for _, kinds, _ in groups(text)]
    assert kinds.count(["arm"]) == 8
    assert kinds.count(["reference"]) == 1
    assert kinds.count(["intrinsic"]) == 2


def test_a_reference_runs_in_each_combination_of_the_axes_that_it_leaves_open(experiment_at):
    text = ONE_FORMAT.replace("[grid]", '[grid]\n"model.n_layer" = [4, 6]') + REFERENCES
    found = experiment_at(text).comparison.groups
    references = [role for group in found for role in group.roles if role.kind == "reference"]
    assert [(role.at, role.reference) for role in references] == [
        ({"model.n_layer": 4}, "fp32"),
        ({"model.n_layer": 6}, "fp32"),
    ]


def test_a_reference_keeps_what_it_changes_under_set(experiment_at):
    file = experiment_at(ARMS + REFERENCES, "quantize.format=E3M4")
    formats = {
        role.kind: cell.experiment.quantize.format.plugin
        for group, cell in zip(file.comparison.groups, file.cells_on["cpu"], strict=True)
        for role in group.roles
    }
    assert formats == {"arm": "E3M4", "reference": "FP32", "intrinsic": "FP32"}


def test_an_arm_that_takes_anothers_step_size_does_so_on_float32_too(groups):
    text = ONE_FORMAT.replace(
        '{plugin = "GridOptim", step_scale = 6},', '{plugin = "GridOptim", step_scale = 6},\n  {%s},'
    )
    matched = 'plugin = "GridOptim", normalize = "adam", step_of = 1'
    found = {name: step_of for name, _, step_of in groups(text % matched)}
    stem = "optimizer=GridOptim(normalize=adam,step_of=1)"
    assert found[f"format=E5M2,{stem}"] == "format=E5M2,optimizer=GridOptim(step_scale=6)"
    of_format = "of_format=E5M2"
    assert found[f"format=FP32,{stem},{of_format}"] == (
        f"format=FP32,optimizer=GridOptim(step_scale=6),{of_format}"
    )


# --- one run of a group ------------------------------------------------------------------------------


def test_a_run_has_its_seed_its_step_size_and_the_whole_validation_split(experiment_at):
    cells = comparing.cells_of(experiment_at(ARMS), "format=E3M4,optimizer=AdamW(lr=0.001)", 3, 0.25)
    cell = cells["cpu"]
    assert cell.name == "format=E3M4,optimizer=AdamW(lr=0.001),seed=3,step=0.25"
    assert (cell.experiment.seed, cell.experiment.optimizer.options.lr) == (3, 0.00025)
    assert cell.experiment.train.final_eval_batches == 0
    assert cell.in_force[-2:] == ("seed = 3 ([compare])", "optimizer.lr = 0.00025 ([compare])")


def test_the_step_size_of_an_optimizer_is_the_option_that_its_class_names(experiment_at):
    cells = comparing.cells_of(experiment_at(ARMS), "format=E5M2,optimizer=GridOptim(step_scale=6)", 3, 0.5)
    assert cells["cpu"].experiment.optimizer.options.step_scale == 3.0


def test_arms_of_one_seed_differ_in_the_optimizer_alone(experiment_at):
    file = experiment_at(ONE_FORMAT)
    one, other = (
        comparing.cells_of(file, group.name, 3, 1.0)["cpu"].experiment.plain()
        for group in file.comparison.groups[:2]
    )
    assert one.pop("optimizer") != other.pop("optimizer")
    assert one == other


def test_a_run_is_found_by_the_name_of_its_folder(experiment_at):
    file = experiment_at(ARMS)
    for group in file.comparison.groups:
        cells = comparing.cells_of(file, group.name, 4, 1e-05)
        assert comparing.run_named(file, cells["cpu"].name) == cells
    assert comparing.run_named(file, "format=E5M2,optimizer=AdamW(lr=0.001)") is None


def test_a_step_size_follows_the_overlay_of_the_device(experiment_at):
    text = """
    name = "e"
    [on.cuda]
    "optimizer.lr" = 0.5
    [grid]
    "optimizer.betas" = [[0.8, 0.9], [0.9, 0.95]]
    [compare]
    arm = "optimizer.betas"
    """
    cells = comparing.cells_of(experiment_at(text), "betas=0.8+0.9", 3, 2.0)
    assert [cells[device].experiment.optimizer.options.lr for device in ("cpu", "cuda")] == [0.002, 1.0]


def test_cells_travel_to_other_processes(experiment_at):
    cells = experiment_at(ARMS + REFERENCES).cells_on["cpu"]
    assert pickle.loads(pickle.dumps(cells)) == cells


def test_check_counts_the_runs_of_each_kind(experiment_at, tmp_path):
    lines = [" ".join(line.split()) for line in check(experiment_at(ARMS + REFERENCES), tmp_path)]
    assert lines[2].startswith("on any device: 105 runs")
    assert lines[3:9] == [
        "compared 2 arms of optimizer; baseline AdamW(lr=0.001)",
        "by validation/loss on seeds 3, 4, 5, 6, 7",
        "tuning 70 runs: 7 x 5 step sizes x 2 seeds; up to 28 more where the best is the first or last",
        "comparison 20 runs: 4 x 5 seeds",
        "references 5 runs: 1 x 5 seeds",
        "float32 10 runs: 2 x 5 seeds (of_format on float32 weights)",
    ]
    assert not any("seed 1337" in line for line in lines)


def test_a_run_whose_optimizer_does_not_take_the_step_size_is_refused_with_its_reason(experiment_at):
    file = experiment_at(ONE_FORMAT.replace("AdamW", "Capped"), "compare.tune=[0.5, 1.0]")
    with pytest.raises(ValueError, match=r"expected 0 to 1, got 2\.0"):
        comparing.cells_of(file, "format=E5M2,optimizer=Capped(lr=0.001)", 3, 2000.0)


def test_a_single_factor_is_taken_without_tuning_runs(experiment_at):
    comparison = experiment_at(ARMS + "tune = [0.5]\n").comparison
    assert {comparison.runs(group) for group in comparison.groups} == {5}
    assert Tuning(comparison.options.tune).best == 0.5


def test_the_hash_is_that_of_the_table_with_its_defaults(experiment_at):
    given, written_out, other = (
        experiment_at(ARMS + more).comparison.options.digest
        for more in ("", "baseline = 0\nseeds = [3, 4, 5, 6, 7]\n", "seeds = [3, 4, 5, 6]\n")
    )
    assert given == written_out != other


# --- what is wrong -----------------------------------------------------------------------------------

AT = ARMS.count("\n") + 1
"""The line after `arm`."""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("baseline = 2", "compare.baseline: there are 2 arms, counted from 0; got 2"),
        ("baseline = -1", "compare.baseline: expected 0 or more, got -1"),
        ("seeds = [3, 2]", "compare.seeds: 2 is one of tune_seeds too: what was chosen on a seed is not"),
        ("seeds = []", "compare.seeds: expected a list with at least one value, got []"),
        ("seeds = [0, 0]", "compare.seeds: 0 is listed twice; keep one"),
        ("seeds = [-3]", "compare.seeds: expected seeds of 0 or more, got -3"),
        ("seeds = [true]", "compare.seeds[0]: expected a whole number, got true"),
        ("tune_seeds = []", "compare.tune_seeds: expected a list with at least one value, got []"),
        ("tune = []", "compare.tune: expected a list with at least one value, got []"),
        ("tune = [0.0, 1]", "compare.tune: expected factors above 0, got 0.0"),
        ("tune = [1, 1.0]", "compare.tune: 1.0 is listed twice; keep one"),
        ("smallest_effect = -1", "compare.smallest_effect: expected 0 or more, got -1.0"),
        ('metric = "validation/los"', "compare.metric: no evaluation gives 'validation/los'; there are"),
        ('metric = "flip/x/total"', "compare.metric: no monitor 'flip' reports 'flip/x/total'; add it"),
        ("references = {a = {}}", "compare.references.a: changes nothing, so it is no reference; remove it"),
        ("references = {a = {x = 1}}", "x: unknown key 'x'"),
        ("references = {a = {'steps' = 500}}", "are the same run"),
        ("sedes = [1]", "compare.sedes: unknown key 'sedes'; did you mean 'seeds'?"),
    ],
)
def test_what_is_wrong_with_the_table_is_said_at_its_line(mistakes, line, message):
    (found,) = mistakes(f"{ONE_FORMAT}{line}\n")
    assert message in found
    assert found.startswith(f"e.toml:{AT}:" if "same run" not in message else "e.toml:4:")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            'arm = "optimizer"',
            'arm = "optimzer"',
            "11: compare.arm: 'optimzer' is no axis of [grid]; did you mean",
        ),
        ('arm = "optimizer"', 'arm = "a b"', "11: compare.arm: 'a b' is no axis of [grid]; its axes are: "),
        ('arm = "optimizer"', "", "10: compare.arm: is required and missing"),
        ("[grid]", "[grid]\nseed = [1, 2]", "5: grid.seed: [compare] gives the seeds"),
        (
            "lr = 1e-3",
            "lr = 0.0",
            "7: grid.optimizer[0]: [compare] tunes lr: expected more than 0 and a finite number, got 0.0",
        ),
        (
            'plugin = "AdamW", lr = 1e-3',
            'plugin = "Capped", lr = 0.3',
            "7: grid.optimizer[0]: [compare] tunes lr: expected 0 to 1, got 1.2 (0.3 x 4.0)",
        ),
        (
            'lr = 1e-3},\n  {plugin = "GridOptim", step_scale = 6}',
            'lr = 0.3},\n  {plugin = "Capped", step_of = 0}',
            "8: grid.optimizer[1]: [compare] tunes lr: expected 0 to 1, got 1.2 (0.3 x 4.0)",
        ),
        ("lr = 1e-3", "step_of = 1", "7: grid.optimizer[0].step_of: the baseline is tuned by itself"),
        ("step_scale = 6", "step_of = 1", "8: grid.optimizer[1].step_of: is the arm itself"),
        (
            "step_scale = 6",
            "step_of = 2",
            "8: grid.optimizer[1].step_of: expected the index of an arm, 0 to 1",
        ),
        ("step_scale = 6", "step_of = true", "8: grid.optimizer[1].step_of: expected the index of an arm"),
        ("step_scale = 6", "step_of = 0", "8: grid.optimizer[1].step_of: arm 0 has a step size called lr"),
        (
            "\n]",
            '\n  {plugin = "AdamW", lr = 1e-3, step_of = 0},\n]',
            "9: grid.optimizer[2].step_of: takes the lr of arm 0; leave lr out",
        ),
        (
            "\n]",
            '\n  {plugin = "AdamW", step_of = 0},\n  {plugin = "AdamW", betas = [0.8, 0.9], step_of = 2},\n]',
            "10: grid.optimizer[3].step_of: arm 2 takes its own step size from arm 0",
        ),
    ],
)
def test_what_is_wrong_with_an_arm_is_said_at_its_line(mistakes, before, after, message):
    (found,) = mistakes(ONE_FORMAT.replace(before, after))
    assert found.startswith(f"e.toml:{message}")


def test_a_seed_by_flag_is_refused_where_the_comparison_gives_the_seeds(mistakes):
    assert mistakes(ARMS, "seed=5") == [
        "--set seed=5: seed: [compare] gives the seeds; --set compare.seeds=[...]"
    ]


def test_an_arm_by_flag_leaves_nothing_to_compare(mistakes):
    (found,) = mistakes(ARMS, "optimizer=AdamW")
    assert "compare.arm: 'optimizer' is no axis of [grid]; its axes are: quantize.format" in found


def test_the_table_may_be_changed_by_flag(experiment_at, mistakes):
    options = experiment_at(ARMS, "compare.seeds=[8, 9]").comparison.options
    assert options.seeds == (8, 9)
    assert mistakes(ARMS, "compare.seeds=[1]")[0].startswith(
        "--set compare.seeds=[1]: compare.seeds: 1 is one of"
    )


def test_what_is_compared_must_be_the_same_on_every_device(mistakes):
    text = ONE_FORMAT.replace('"quantize.format" = ["E5M2"]', "").replace(
        "[grid]", '[on.cuda]\n"quantize.format" = "FP32"\n[grid]'
    )
    (found,) = mistakes(text)
    assert "compare: what is compared is not the same under [on.cpu] and [on.cuda]" in found


def test_an_executor_is_chosen_in_the_file_or_by_flag_and_checked(experiment_at, mistakes):
    assert experiment_at('name = "e"').executor.plugin == "local"
    assert "executor.plugin: no executor named 'loca'" in mistakes('name = "e"\nexecutor = "loca"')[0]
    assert mistakes('name = "e"', "executor=loca")[0].startswith(
        "--set executor=loca: executor.plugin: no executor named"
    )


@pytest.mark.parametrize("flag", ["executor=local", "executor.plugin=local", "executor={plugin='local'}"])
@pytest.mark.parametrize("written", ["", "executor = 'local'\n", "[executor]\nplugin = 'local'\n"])
def test_an_executor_by_flag_needs_none_in_the_file(experiment_at, flag, written):
    assert experiment_at(f'name = "e"\n{written}', flag).executor.plugin == "local"


def test_an_option_of_no_executor_is_refused_with_the_way_out(mistakes):
    assert mistakes('name = "e"', "executor.cpus=2") == [
        '--set executor.cpus=2: executor: the table names no plugin: add plugin = "..."; there are: local'
    ]


def test_what_is_wrong_with_a_table_by_flag_is_said_of_the_flag(mistakes):
    assert mistakes('name = "e"', "compare.arm=x") == [
        "--set compare.arm=x: compare.arm: 'x' is no axis of [grid]; its axes are: none"
    ]


# --- step sizes --------------------------------------------------------------------------------------


def tuned(losses, given=(0.5, 1.0, 2.0), largest=math.inf):
    """Return a tuning whose factors came to `losses`, on an optimizer that takes factors up to a largest."""
    tuning = Tuning(given)
    for factor in given:
        tuning.losses[factor] = {1: losses(factor)}
    while (factor := tuning.extend(lambda factor: factor <= largest)) is not None:
        tuning.losses[factor] = {1: losses(factor)}
    return tuning


def test_the_best_factor_has_the_lowest_mean_over_the_seeds():
    tuning = Tuning((1.0, 2.0), losses={1.0: {1: 3.0, 2: 3.0}, 2.0: {1: 2.0, 2: 3.9}})
    assert tuning.best == 2.0
    tuning.losses[2.0][2] = 4.1
    assert tuning.best == 1.0


def test_one_diverged_seed_rules_a_factor_out():
    assert Tuning((1.0, 2.0), losses={1.0: {1: 9.0, 2: 9.0}, 2.0: {1: 1.0, 2: math.inf}}).best == 1.0


def test_of_equal_factors_the_nearest_to_1_is_the_best():
    assert tuned(lambda factor: 3.0).best == 1.0
    assert Tuning((0.5, 4.0), losses={0.5: {1: 3.0}, 4.0: {1: 3.0}}).best == 0.5


@pytest.mark.parametrize(
    ("optimum", "added", "best", "edge"),
    [
        (1.0, [], 1.0, False),
        (2.5, [4.0], 2.0, False),
        (4.0, [4.0, 8.0], 4.0, False),
        (100.0, [4.0, 8.0], 8.0, True),
        (0.25, [0.25, 0.125], 0.25, False),
        (0.001, [0.25, 0.125], 0.125, True),
    ],
)
def test_an_optimum_on_the_edge_extends_the_list_at_most_twice(optimum, added, best, edge):
    tuning = tuned(lambda factor: abs(math.log(factor / optimum)))
    assert (tuning.added, tuning.best, tuning.on_the_edge) == (added, best, edge)


def test_a_factor_that_the_optimizer_does_not_take_leaves_the_best_on_the_edge():
    tuning = tuned(lambda factor: -factor, largest=5.0)
    assert (tuning.added, tuning.best, tuning.on_the_edge) == ([4.0], 4.0, True)


@pytest.mark.parametrize(("taker", "added"), [("AdamW", [4.0, 8.0]), ("Capped", [])])  # 0.3 x 4 is beyond 1
def test_a_list_grows_no_further_than_the_arms_that_take_its_step_size(experiment_at, tmp_path, taker, added):
    second = f'{{plugin = "{taker}", step_of = 0}}'
    arms = '{plugin = "AdamW", lr = 0.3},\n  ' + second
    text = ONE_FORMAT.replace(
        '{plugin = "AdamW", lr = 1e-3},\n  {plugin = "GridOptim", step_scale = 6}', arms
    )
    file = experiment_at(text, "compare.tune=[0.5, 1.0, 2.0]")
    running = comparing.Comparing(requested(file, out=tmp_path), file, 1)

    def more_is_better(runs):
        for name, seed, factor in runs:
            running.tunings[name].losses.setdefault(factor, {})[seed] = -factor
        return True

    assert running._tune(more_is_better)
    assert running.tunings["format=E5M2,optimizer=AdamW(lr=0.3)"].added == added


@pytest.mark.parametrize(
    ("losses", "given", "best"),
    [
        (lambda factor: factor, (1e-300, 1e150), 1e-300),  # 1e-750 is 0
        (lambda factor: -factor, (1e-300, 1e150), 1e150),  # 1e600 is inf
        (lambda factor: -factor, (1.0, 1e300), 1e300),  # 1e600 too
    ],
)
def test_a_list_does_not_grow_to_0_or_infinity(losses, given, best):
    tuning = tuned(losses, given)
    assert (tuning.added, tuning.best, tuning.on_the_edge) == ([], best, True)


def test_a_list_grows_where_only_the_square_of_its_edge_is_beyond_all_numbers():
    assert tuned(lambda factor: -factor, (1e200, 1e201)).added == [1e202, 1e203]


def test_where_everything_diverges_smaller_steps_are_tried():
    tuning = tuned(lambda factor: math.inf)
    assert (tuning.added, tuning.on_the_edge) == ([0.25, 0.125], True)


def test_a_list_grows_by_the_ratio_at_its_edge_without_noise():
    assert tuned(lambda factor: factor, (0.1, 0.3, 3.0)).added == [0.0333333333333, 0.0111111111111]
    assert tuned(lambda factor: -factor, (0.1, 0.3)).added == [0.9, 2.7]


def test_nothing_is_chosen_before_every_factor_has_its_loss():
    tuning = Tuning((1.0, 2.0), losses={1.0: {1: 3.0}})
    assert tuning.best is None
    tuning.losses[2.0] = {1: None}
    assert tuning.best is None
    assert tuning.extend(lambda factor: True) is None


def test_the_step_option_is_lr_where_a_class_says_nothing(experiment):
    from altgrad_core.options import OptimizerChoice

    class Options:
        step_size = 0.5

    assert compare.step_option(experiment('name = "e"').optimizer) == "lr"
    assert compare.step_option(OptimizerChoice("X", Options())) is None


def test_a_mistake_in_the_table_hides_none_of_the_arms_and_the_runs(mistakes):
    text = (
        ARMS.replace('{plugin = "GridOptim", step_scale = 6}', '{plugin = "GridOptim", step_of = 5}')
        + 'tune = []\nmetric = "validation/los"\n'
    )
    places = [line.split(": ")[1] for line in mistakes(text)]
    assert places == ["grid.optimizer[1].step_of", "compare.tune", "compare.metric"]


def test_where_no_axis_has_the_arms_the_runs_are_checked_all_the_same(mistakes):
    places = [
        line.split(": ")[1] for line in mistakes(ARMS.replace('arm = "optimizer"', 'arm = "x"'), "steps=0")
    ]
    assert places == ["compare.arm", "steps"]
