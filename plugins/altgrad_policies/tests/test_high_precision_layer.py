import math
import re

import pytest

from altgrad_core.hookspecs import Policy, SwitchFormat
from altgrad_core.registry import UsageError
from altgrad_policies import HighPrecisionLayerOptions
from altgrad_policies.high_precision_layer import HighPrecisionLayer

LAYERS = {"h.0.mlp": "E4M3", "h.1.mlp": "E4M3", "head": None}


@pytest.fixture
def started(run_of):
    """Return a function that gives a policy that has begun, and its run."""

    def start(layers=LAYERS, monitors=None, **options):
        run = run_of(layers, **(monitors or {}))
        policy = HighPrecisionLayer(HighPrecisionLayerOptions(**{"patience": 2, "every": 10, **options}))
        policy.start(run)
        return policy, run

    return start


@pytest.fixture
def check(read):
    """Return a function that hands the policy the excess kurtosis of some layers; alerts are above 10."""

    def decide(policy, step, **excess):
        layers = {name.replace("_", "."): value for name, value in excess.items()}
        metrics = {f"kurtosis/excess/{layer}": value for layer, value in layers.items()}
        metrics |= {f"kurtosis/alert/{layer}": float(value > 10) for layer, value in layers.items()}
        return policy.decide(step, read(**metrics))

    return decide


def test_alerts_in_enough_checks_in_a_row_move_that_layer_and_no_other(started, check):
    policy, _ = started()
    assert check(policy, 11, h_0_mlp=12.0, h_1_mlp=3.0) is None
    action = check(policy, 21, h_0_mlp=40.0, h_1_mlp=3.0)
    assert isinstance(action, SwitchFormat)
    assert action.to == "BF16"
    assert [layer for layer in LAYERS if re.fullmatch(action.layers, layer)] == ["h.0.mlp"]
    assert "in 2 checks in a row (h.0.mlp: 40)" in action.reason


def test_layers_that_are_due_together_move_together(started, check):
    policy, _ = started(patience=1)
    assert check(policy, 11, h_0_mlp=12.0, h_1_mlp=13.0).layers == r"h\.0\.mlp|h\.1\.mlp"


def test_a_check_without_an_alert_begins_again(started, check):
    policy, _ = started()
    answers = [check(policy, 1 + 10 * n, h_0_mlp=value) for n, value in enumerate([12.0, 3.0, 12.0], 1)]
    assert answers == [None, None, None]


def test_a_check_without_a_value_changes_no_count(started, check):
    policy, _ = started()
    answers = [check(policy, 1 + 10 * n, h_0_mlp=value) for n, value in enumerate([12.0, math.nan, 12.0], 1)]
    assert answers[:2] == [None, None]
    assert isinstance(answers[2], SwitchFormat)


def test_an_alert_without_a_value_counts(started, read):
    """As for inputs that are not finite."""
    metrics = {"kurtosis/excess/h.0.mlp": math.nan, "kurtosis/alert/h.0.mlp": 1.0}
    assert isinstance(started(patience=1)[0].decide(11, read(**metrics)), SwitchFormat)


def test_it_looks_after_every_so_many_steps_only(started, check):
    policy, _ = started(patience=1)
    assert [step for step in range(1, 40) if check(policy, step, h_0_mlp=12.0)] == [1, 11, 21, 31]


def test_the_first_step_of_a_run_has_nothing_to_look_at(started, check):
    assert check(started(patience=1)[0], 1) is None


def test_a_layer_that_has_the_format_stays_out(started, check):
    policy, run = started(patience=1)
    assert check(policy, 11, h_0_mlp=12.0)
    run.formats["h.0.mlp"] = "BF16"
    assert "kurtosis/excess/h.0.mlp" not in policy.needs
    assert check(policy, 21, h_0_mlp=12.0) is None


def test_a_layer_that_somebody_moves_back_is_counted_anew(started, check):
    policy, _ = started()
    answers = [check(policy, step, h_0_mlp=12.0) for step in (11, 21, 31, 41)]  # its format stays as it is
    assert [bool(answer) for answer in answers] == [False, True, False, True]


def test_when_all_observed_layers_have_moved_the_others_are_no_mistake(started, check, read):
    policy, run = started(patience=1)
    check(policy, 11, h_0_mlp=12.0, total=12.0)
    run.formats["h.0.mlp"] = "BF16"
    assert check(policy, 21, total=12.0) is None


def test_a_metric_per_type_of_layer_is_refused_with_the_way_out(started, check):
    with pytest.raises(ValueError, match=r'for none of the layers h\.0\.mlp, h\.1\.mlp; set per = "layer"'):
        check(started()[0], 11, total=12.0, mlp=12.0)


def test_it_needs_totals_before_a_run_and_every_candidate_in_it(started):
    assert HighPrecisionLayer(HighPrecisionLayerOptions()).needs == (
        "kurtosis/excess/total",
        "kurtosis/alert/total",
    )
    policy, _ = started()
    assert isinstance(policy, Policy)
    layers = {name.partition("kurtosis/excess/")[2] for name in policy.needs} - {""}
    assert layers == {"total", "h.0.mlp", "h.1.mlp"}


def test_an_unknown_format_is_refused_when_the_run_starts(started):
    with pytest.raises(UsageError, match="BF17"):
        started(to="BF17")


def test_high_precision_may_be_no_format_at_all(started, check):
    assert check(started(to="none", patience=1)[0], 11, h_0_mlp=12.0).to == "none"


def test_resume_reproduces_the_decisions(started, check):
    first, second = started()[0], started()[0]
    check(first, 11, h_0_mlp=12.0)
    second.load_state_dict(first.state_dict())
    assert check(second, 21, h_0_mlp=12.0) == check(first, 21, h_0_mlp=12.0) is not None
    assert second.state_dict() == first.state_dict()


@pytest.mark.parametrize(
    ("options", "way_out"),
    [({"per": "type", "layers": ".*"}, 'set per = "layer"'), ({"layers": "head"}, "widen that pattern")],
)
def test_a_monitor_that_tells_nothing_of_the_layers_is_refused_at_the_start(started, options, way_out):
    with pytest.raises(UsageError, match=way_out):
        started(monitors={"kurtosis": options})


def test_a_run_without_quantized_weights_is_told_so(started):
    assert started()[1].warnings == []
    assert started({"head": None})[1].warnings == [
        "high_precision_layer has no layer to move: no weights are quantized"
    ]
