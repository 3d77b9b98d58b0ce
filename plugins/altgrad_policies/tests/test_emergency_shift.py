import math
import re

import pytest

from altgrad_core.hookspecs import Policy, SkipStep, Stop, SwitchFormat
from altgrad_core.registry import UsageError
from altgrad_policies import EmergencyShiftOptions
from altgrad_policies.emergency_shift import EmergencyShift

LAYERS = {"h.0.attn": "E7M0", "h.0.mlp": "E7M0", "head": None}
MIXED = {"h.0.attn": "E7M0", "h.0.mlp": "E3M4", "h.1.mlp": "E3M4"}


@pytest.fixture
def started(run_of):
    """Return a function that gives a policy that has begun, and its run."""

    def start(layers=LAYERS, monitors=None, **options):
        run = run_of(layers, **(monitors or {}))
        policy = EmergencyShift(EmergencyShiftOptions(**{"patience": 3, "warmup": 0, **options}))
        policy.start(run)
        return policy, run

    return start


@pytest.fixture
def decisions(read):
    """Return a function that hands the policy one descent quality a step, from `first` on."""

    def decide(policy, qualities, first=2):
        return [
            policy.decide(step, read(**{"descent/delivered/total": quality}))
            for step, quality in enumerate(qualities, first)
        ]

    return decide


def kinds(actions):
    return [type(action).__name__ if action else None for action in actions]


def test_lost_updates_move_every_layer_of_the_format_at_the_count_and_not_before(started, decisions):
    policy, _ = started()
    *before, action = decisions(policy, [0.0, 0.0, 0.0])
    assert before == [None, None]
    assert isinstance(action, SwitchFormat)
    assert action.to == "E5M2"
    assert [layer for layer in LAYERS if re.fullmatch(action.layers, layer)] == ["h.0.attn", "h.0.mlp"]
    assert "1 - descent/delivered of E7M0 was 1 on average over 3 steps, above 0.5" in action.reason


def test_the_default_is_an_average_above_one_half_over_fifty_steps_after_twenty(run_of, decisions):
    policy = EmergencyShift(EmergencyShiftOptions())
    policy.start(run_of(LAYERS))
    actions = decisions(policy, [0.0] * 70)  # of the steps 1 to 70, read in the steps 2 to 71
    assert kinds(actions) == [None] * 69 + ["SwitchFormat"]


def test_an_average_at_the_threshold_does_not_fire_and_one_above_does(started, decisions):
    assert kinds(decisions(started()[0], [0.25, 0.5, 0.75])) == [None, None, None]
    assert kinds(decisions(started()[0], [0.25, 0.5, 0.7])) == [None, None, "SwitchFormat"]


def test_updates_that_arrive_late_but_whole_are_no_stall(started, decisions):
    policy, _ = started()
    assert kinds(decisions(policy, [0.0, 3.0, 0.0, 0.0, 3.0, 0.0, 3.0])) == [None] * 7


def test_the_warm_up_counts_for_nothing(started, decisions):
    policy, _ = started(warmup=4)
    assert kinds(decisions(policy, [0.0] * 7)) == [None] * 6 + ["SwitchFormat"]


def test_the_end_of_a_schedule_counts_for_nothing(started, decisions):
    policy, run = started()
    decisions(policy, [0.0, 0.0])
    (group,) = run.optimizer.param_groups
    group["lr"] = 0.49
    assert kinds(decisions(policy, [0.0] * 9, first=4)) == [None] * 9
    group["lr"] = 0.5
    assert kinds(decisions(policy, [0.0], first=13)) == ["SwitchFormat"]


def test_a_learning_rate_that_a_policy_has_lowered_is_no_end_of_a_schedule(started, decisions):
    policy, run = started()
    run.optimizer.param_groups[0]["lr"] = run.lr_factor = 0.125
    assert kinds(decisions(policy, [0.0] * 3)) == [None, None, "SwitchFormat"]


@pytest.mark.parametrize("undefined", [math.nan, math.inf, -math.inf])
def test_a_step_without_a_value_is_neither_healthy_nor_stalled(started, decisions, undefined):
    policy, _ = started()
    assert kinds(decisions(policy, [undefined, 0.0, undefined, 0.0, undefined])) == [None] * 5
    assert kinds(decisions(policy, [0.0], first=7)) == ["SwitchFormat"]


def test_a_step_whose_metric_has_not_come_in_changes_nothing(started, read):
    policy, _ = started(patience=1)
    assert policy.decide(1, read()) is None


def test_after_a_switch_the_count_begins_again(started, decisions):
    policy, run = started()
    decisions(policy, [0.0] * 3)
    run.formats |= {"h.0.attn": "E5M2", "h.0.mlp": "E5M2"}
    assert kinds(decisions(policy, [0.0] * 3, first=5)) == [None, None, "Stop"]


def test_a_switch_that_another_policy_has_made_begins_the_count_again(started, decisions):
    policy, run = started()
    decisions(policy, [0.0] * 2)
    run.formats |= {"h.0.attn": "E5M2", "h.0.mlp": "E5M2"}
    assert kinds(decisions(policy, [0.0] * 2, first=4)) == [None, None]


@pytest.mark.parametrize("chain", [{"E7M0": "stop"}, {}])
def test_a_format_without_a_next_one_ends_the_run_and_the_reason_says_so(started, decisions, chain):
    policy, _ = started(chain=chain)
    action = decisions(policy, [0.0] * 3)[-1]
    assert isinstance(action, Stop)
    assert "no format follows E7M0 in the chain" in action.reason


def test_the_founding_measure_reads_the_stall_ratio(started, read):
    policy, _ = started(measure="ratio")
    assert policy.needs == ("stall/stall_ratio/total",)
    actions = [policy.decide(step, read(**{"stall/stall_ratio/total": 0.9})) for step in (2, 3, 4)]
    assert kinds(actions) == [None, None, "SwitchFormat"]
    assert "the stall ratio of E7M0 was 0.9" in actions[-1].reason


def mixed(attn, *mlps):
    values = zip(MIXED, (attn, *mlps), strict=True)
    return {f"descent/delivered/{layer}": value for layer, value in values}


def test_with_several_formats_each_is_judged_by_its_own_layers(started, read):
    policy, _ = started(MIXED, patience=2)
    assert set(policy.needs) == {"descent/delivered/total", *mixed(0, 0, 0)}
    actions = [policy.decide(step, read(**mixed(1.0, 0.1, 0.3))) for step in (2, 3)]
    assert kinds(actions) == [None, "SwitchFormat"]
    assert actions[-1].to == "E5M2"
    assert [layer for layer in MIXED if re.fullmatch(actions[-1].layers, layer)] == ["h.0.mlp", "h.1.mlp"]
    assert "of E3M4 was 0.8 on average" in actions[-1].reason


def test_two_stalled_formats_move_one_after_the_other(started, read):
    policy, run = started(MIXED, patience=2, chain={"E7M0": "E4M3", "E3M4": "BF16"})
    first = [policy.decide(step, read(**mixed(0.0, 0.0, 0.0))) for step in (2, 3)][-1]
    run.formats["h.0.attn"] = first.to
    second = policy.decide(4, read(**mixed(0.0, 0.0, 0.0)))
    assert (first.to, second.to) == ("E4M3", "BF16")


def test_a_layer_without_a_value_leaves_the_others_of_its_format_to_speak(started, read):
    policy, _ = started(MIXED, patience=1)
    assert isinstance(policy.decide(2, read(**mixed(1.0, math.nan, 0.0))), SwitchFormat)


def test_a_format_that_takes_layers_in_is_judged_anew(started, read):
    policy, run = started(MIXED, patience=3, chain={"E7M0": "E3M4", "E3M4": "E5M2"})
    for step in (2, 3):
        policy.decide(step, read(**mixed(1.0, 0.0, 0.0)))
    run.formats["h.0.attn"] = "E3M4"
    assert policy.decide(4, read(**mixed(1.0, 0.0, 0.0), **{"descent/delivered/total": 0.0})) is None


def test_several_formats_and_a_metric_per_type_of_layer_are_refused_with_the_way_out(started, read):
    policy, _ = started(MIXED)
    with pytest.raises(ValueError, match=r'for none of the layers h\.0\.attn, h\.0\.mlp.*set per = "layer"'):
        policy.decide(2, read(**{"descent/delivered/total": 1.0, "descent/delivered/mlp": 1.0}))


def test_layers_that_have_reported_once_may_fall_silent_and_a_resume_knows_it(started, read):
    policy, run = started(MIXED)
    policy.decide(2, read(**mixed(1.0, 1.0, 1.0), **{"descent/delivered/total": 1.0}))
    assert policy.decide(3, read(**{"descent/delivered/total": 1.0})) is None
    resumed = EmergencyShift(policy.options)
    resumed.load_state_dict(policy.state_dict())
    resumed.start(run)
    assert resumed.decide(4, read(**{"descent/delivered/total": 1.0})) is None


def test_a_metric_per_type_of_layer_is_refused_at_the_start_where_layers_are_read(started):
    by_type = {"descent": {"per": "type", "layers": ".*"}}
    with pytest.raises(UsageError, match=r"single layers of 'descent'.*set per = .layer."):
        started(MIXED, by_type)
    assert started(LAYERS, by_type)[1].warnings == []


def test_a_monitor_that_observes_none_of_the_layers_is_refused_at_the_start(started):
    with pytest.raises(UsageError, match=r"'stall', whose layers = 'head' matches none .*h\.0\.attn"):
        started(LAYERS, {"stall": {"layers": "head"}}, measure="ratio")


def test_a_format_that_is_not_observed_is_told_at_the_start(started):
    _, run = started(MIXED, {"descent": {"layers": ".*mlp"}})
    assert run.warnings == ["emergency_shift does not judge E7M0: 'descent' observes none of its layers"]


@pytest.mark.parametrize(
    ("options", "told"), [({}, True), ({"schedule_floor": 0.4}, False), ({"measure": "ratio"}, False)]
)
def test_a_run_that_is_too_short_for_its_schedule_to_be_judged_is_told_so(run_of, options, told):
    """Cosine over 100 steps: those of 21 to 50 are read at half of the learning rate or more."""
    run = run_of(LAYERS)
    run.steps, run.min_lr_ratio = 100, 0.0
    EmergencyShift(EmergencyShiftOptions(patience=31, **options)).start(run)
    assert bool(run.warnings) == told
    assert not told or "30 steps of the run are looked at, patience is 31" in run.warnings[0]


def test_a_run_without_quantized_weights_is_told_so(started):
    assert started()[1].warnings == []
    assert started({"head": None})[1].warnings == [
        "emergency_shift has no format to move: no weights are quantized"
    ]


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"loss": math.inf}, {"norm": math.nan}])
def test_two_non_finite_steps_are_skipped_and_the_third_moves_the_layers(started, read, bad):
    policy, _ = started()
    actions = [policy.decide(step, read(**bad)) for step in (1, 2, 3)]
    assert kinds(actions) == ["SkipStep", "SkipStep", "SwitchFormat"]
    assert "not finite" in actions[0].reason
    assert "for 3 steps in a row; E7M0 -> E5M2" in actions[-1].reason


def test_a_finite_step_in_between_starts_that_count_again(started, read):
    policy, _ = started()
    losses = [math.nan, math.nan, 1.0, math.nan, math.nan]
    actions = [policy.decide(step, read(loss=loss)) for step, loss in enumerate(losses, 1)]
    assert kinds(actions) == ["SkipStep", "SkipStep", None, "SkipStep", "SkipStep"]


def test_a_non_finite_step_in_between_leaves_the_stalls_where_they_are(started, decisions, read):
    policy, _ = started()
    decisions(policy, [0.0, 0.0])
    assert isinstance(policy.decide(4, read(loss=math.nan, **{"descent/delivered/total": 0.0})), SkipStep)
    assert kinds(decisions(policy, [0.0], first=5)) == ["SwitchFormat"]


def test_three_more_after_the_switch_go_on_along_the_chain(started, read):
    policy, run = started()
    first = [policy.decide(step, read(loss=math.nan)) for step in (1, 2, 3)]
    run.formats |= {"h.0.attn": "E5M2", "h.0.mlp": "E5M2"}
    second = [policy.decide(step, read(loss=math.nan)) for step in (4, 5, 6)]
    assert kinds(first + second) == ["SkipStep", "SkipStep", "SwitchFormat", "SkipStep", "SkipStep", "Stop"]
    assert "(nan) for 3 steps in a row, and no format follows E5M2" in second[-1].reason


def test_of_several_formats_the_first_with_a_next_one_moves(started, read):
    policy, _ = started(MIXED, nan_patience=1, chain={"E3M4": "E5M2"})
    assert policy.decide(1, read(loss=math.nan)).layers == r"h\.0\.mlp|h\.1\.mlp"


def test_without_quantized_weights_there_is_nothing_to_move(started, read):
    policy, _ = started({"head": None}, nan_patience=2)
    assert isinstance(policy.decide(1, read(loss=math.nan)), SkipStep)
    action = policy.decide(2, read(loss=math.nan))
    assert isinstance(action, Stop)
    assert "no weights are quantized" in action.reason


def test_the_default_chain_is_the_founding_one():
    moves = {"E7M0": "E5M2", "E1M6": "E3M4", "E0M7": "E3M4", "E3M4": "E5M2"}
    assert EmergencyShiftOptions().chain == moves | {"E5M2": "stop"}


def test_a_chain_that_never_ends_is_refused():
    with pytest.raises(ValueError, match="never ends: E3M4 -> E5M2 -> E3M4"):
        EmergencyShiftOptions(chain={"E3M4": "E5M2", "E5M2": "E3M4"})


def test_an_unknown_format_down_the_chain_is_refused_when_the_run_starts(started):
    with pytest.raises(UsageError, match=r"E5M3.*did you mean 'E5M2'"):
        started(chain={"E7M0": "E3M4", "E3M4": "E5M3"})


def test_formats_that_the_run_cannot_come_to_are_not_looked_up(started):
    started(chain={"E7M0": "none", "E0M7": "NOWHERE"})


def test_names_are_matched_letter_by_letter(started, decisions):
    policy, _ = started({"h.0": "E7M0", "hx0": None})
    action = decisions(policy, [0.0] * 3)[-1]
    assert not re.fullmatch(action.layers, "hx0")


def test_it_is_a_policy_before_and_after_a_run_begins(started):
    assert isinstance(EmergencyShift(EmergencyShiftOptions()), Policy)
    assert EmergencyShift(EmergencyShiftOptions()).needs == ("descent/delivered/total",)
    assert started()[0].needs == ("descent/delivered/total",)


@pytest.mark.parametrize("cut", range(1, 7))
def test_resume_reproduces_the_decisions(started, read, cut):
    def decide(policy, steps):
        values = [math.nan, 0.0, 0.0, math.nan, 0.2, 0.0]
        losses = [1.0, 1.0, math.nan, math.nan, 1.0, 1.0]
        return [
            policy.decide(step + 2, read(loss=losses[step], **{"descent/delivered/total": values[step]}))
            for step in steps
        ]

    whole, first, second = started()[0], started()[0], EmergencyShift(started()[0].options)
    parts = decide(first, range(cut))
    second.load_state_dict(first.state_dict())
    second.start(first._run)
    parts += decide(second, range(cut, 6))
    assert parts == decide(whole, range(6))
    assert kinds(parts)[-1] == "SwitchFormat"
    assert second.state_dict() == whole.state_dict()
