import math

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core.hookspecs import ClipGradients
from altgrad_core.registry import UsageError
from altgrad_policies import PartitionClipOptions
from altgrad_policies.partition_clip import PartitionClip, by_largest, by_octaves

BACKWARD, FORWARD = "range/backward_overflow_fraction/total", "range/forward_overflow_fraction/total"


@pytest.fixture
def started(run_of, table):
    """Return a function that gives a policy in a run whose weights are E3M4, and its gradients as told."""

    def start(gradients="E4M3", activations=None, **options):
        run, flows = run_of({"0": "E3M4"}), {"gradients": gradients, "activations": activations}
        flows = {kind: None if name is None else table(name) for kind, name in flows.items()}
        run.model = altgrad.quantize_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), table("E3M4"), **flows)
        policy = PartitionClip(PartitionClipOptions(**options))
        policy.start(run)
        return policy, run

    return start


def test_by_octaves_the_narrower_range_gets_the_smaller_share(table):
    """E5M2: 1.75 * 2^15 over 2^-16; E4M3: 1.75 * 2^8 over 2^-9."""
    assert by_octaves(table("E5M2")) == 1.0
    assert by_octaves(table("E4M3")) == (math.log2(1.75) + 17) / (math.log2(1.75) + 31)
    assert by_octaves(table("E7M0")) == 126 / (math.log2(1.75) + 31)


def test_by_the_founding_rule_the_largest_value_is_all_that_counts(table):
    assert by_largest(table("E5M2")) == 1.0
    assert by_largest(table("E3M4")) == 124 / 57344


def test_overflow_at_the_threshold_clips_to_the_formats_share_of_the_base(started, read, table):
    policy, _ = started(base_clip=2.0)
    action = policy.decide(2, read(norm=5.0, **{BACKWARD: 0.01}))
    assert isinstance(action, ClipGradients)
    assert action.norm == 2 * by_octaves(table("E4M3"))
    assert "0.01 of the backward pass overflows in E4M3" in action.reason


@pytest.mark.parametrize("share", [0.0, 0.0099, math.nan, None])
def test_less_overflow_or_none_known_changes_nothing(started, read, share):
    policy, _ = started()
    assert policy.decide(2, read(norm=5.0, **({} if share is None else {BACKWARD: share}))) is None


def test_a_norm_within_the_limit_needs_no_clipping(started, read, table):
    policy, _ = started()
    limit = by_octaves(table("E4M3"))
    assert policy.decide(2, read(norm=limit, **{BACKWARD: 0.5})) is None
    assert policy.decide(3, read(norm=limit * 1.001, **{BACKWARD: 0.5})) is not None


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_left_to_others(started, read, norm):
    assert started()[0].decide(2, read(norm=norm, **{BACKWARD: 0.5})) is None


def test_the_founding_factor_is_an_option(started, read):
    policy, _ = started(factor="max")
    assert policy.decide(2, read(**{BACKWARD: 0.5})).norm == 448 / 57344


@pytest.mark.parametrize("activations", ["E4M3", None])
def test_forward_is_about_weights_and_activations(started, read, table, activations):
    policy, _ = started(gradients="E5M2", activations=activations, flow="forward")
    assert policy.needs == (FORWARD,)
    assert policy.decide(2, read(**{FORWARD: 0.5})).norm == by_octaves(table("E3M4"))


def test_forward_takes_the_narrower_of_both(started, read, table):
    policy, run = started(activations="E4M3", flow="forward")
    run.formats["0"] = "E7M0"
    assert policy.decide(2, read(**{FORWARD: 0.5})).norm == by_octaves(table("E4M3"))


def test_nothing_to_watch_is_said_once(started):
    policy, run = started(gradients=None)
    assert run.warnings == ["partition_clip watches the backward pass, where no gradients are quantized"]
    run.step = 5
    policy.start(run)
    assert len(run.warnings) == 1


def test_a_monitor_that_observes_none_of_the_gradients_is_refused_at_the_start(started):
    _, run = started()
    run.monitors = {"range": {"layers": "head"}}
    with pytest.raises(UsageError, match=r"partition_clip reads 'range', whose layers = 'head' matches none"):
        PartitionClip(PartitionClipOptions()).start(run)


def test_without_a_format_there_is_nothing_to_clip_to(started, read):
    assert started(gradients=None)[0].decide(2, read(norm=5.0, **{BACKWARD: 0.5})) is None


def test_gradients_to_watch_are_no_reason_to_warn(started):
    assert not started()[1].warnings
