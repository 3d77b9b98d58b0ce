import math

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core.format import Format
from altgrad_core.hookspecs import AdjustScale
from altgrad_core.recipe import Recipe
from altgrad_core.registry import UsageError
from altgrad_policies import ScaleBackoffOptions
from altgrad_policies.scale_backoff import LOWEST, SATURATED, ScaleBackoff


@pytest.fixture
def factors(read):
    """Return a function that hands the policy one share a step and gives the factors it answers with."""

    def decide(policy, shares, first=1):
        actions = [
            policy.decide(step, read(**({} if share is None else {SATURATED: share})))
            for step, share in enumerate(shares, first)
        ]
        return [action.factor if action else None for action in actions]

    return decide


def backoff(**options):
    return ScaleBackoff(ScaleBackoffOptions(**{"clean_steps": 3, **options}))


def test_saturated_gradients_halve_the_scale_at_once(read):
    action = ScaleBackoff(ScaleBackoffOptions()).decide(2, read(**{SATURATED: 2e-5}))
    assert isinstance(action, AdjustScale)
    assert (action.layers, action.of, action.factor) == (".*", "gradients", 0.5)
    assert "2e-05 of the gradient elements saturate, above 1e-05; the factor is 0.5 now" in action.reason


@pytest.mark.parametrize("share", [0.0, 1e-5, math.nan, None])
def test_a_share_up_to_the_threshold_or_none_known_changes_nothing(factors, share):
    assert factors(ScaleBackoff(ScaleBackoffOptions()), [share]) == [None]


def test_the_value_of_the_step_of_the_change_is_passed_over(factors):
    assert factors(backoff(), [0.1, 0.1, 0.1, 0.1, 0.0]) == [0.5, None, 0.5, None, None]


def test_enough_clean_steps_in_a_row_double_it_and_not_before(factors):
    policy = backoff()
    assert factors(policy, [0.1, 0.1, 0.0, 0.0, 0.0]) == [0.5, None, None, None, 2.0]
    assert policy.factor == 1.0


def test_by_default_those_are_a_thousand(factors):
    policy = ScaleBackoff(ScaleBackoffOptions())
    assert factors(policy, [0.1, 0.0] + [0.0] * 1000) == [0.5] + [None] * 1000 + [2.0]


def test_it_never_goes_above_where_it_began(factors):
    policy = backoff()
    assert factors(policy, [0.0] * 20) == [None] * 20
    assert policy.factor == 1.0


def test_each_doubling_takes_as_many_clean_steps(factors):
    policy = backoff()
    shares = [0.1, 0.0, 0.1] + [0.0] * 9
    assert factors(policy, shares) == [0.5, None, 0.5, None, *[None] * 2, 2.0, None, *[None] * 2, 2.0, None]


def test_a_burst_or_a_change_begins_the_clean_steps_again(factors):
    policy = backoff()
    assert factors(policy, [0.1, 0, 0, 0, 0.1, 0, 0, 0, 0]) == [0.5, *[None] * 3, 0.5, *[None] * 3, 2.0]


def test_a_step_without_a_value_is_neither_clean_nor_saturated(factors):
    policy = backoff()
    assert factors(policy, [0.1, 0, 0, math.nan, 0, None, 0]) == [0.5, *[None] * 5, 2.0]


def test_what_is_passed_over_is_the_value_of_one_step_whether_it_comes_in_or_not(factors):
    policy = backoff()
    assert factors(policy, [0.1, None, 0.1, 0.1, 0.1]) == [0.5, None, 0.5, None, 0.5]


def test_what_saturates_at_any_scale_is_given_up(factors):
    policy = backoff()
    answers = factors(policy, [0.1] * 100)
    assert answers.count(0.5) == 24
    assert policy.factor == LOWEST


@pytest.fixture
def overflowing(run_of):
    """Return a function that gives a policy in a run whose gradients overflow as it says."""

    def start(overflow, **monitors):
        format = Format(name="F", bits=8, values=[-1.0, 0.0, 1.0])
        run, policy = run_of({"0": "E3M4"}, **monitors), backoff()
        gradients = Recipe(format=format, overflow=overflow)
        run.model = altgrad.quantize_model(
            torch.nn.Sequential(torch.nn.Linear(2, 2)), format, gradients=gradients
        )
        policy.start(run)
        return policy

    return start


def test_gradients_that_overflow_to_infinity_halve_the_scale_in_each_step(overflowing, read):
    policy = overflowing("ieee")
    actions = [policy.decide(step, read(norm=norm)) for step, norm in enumerate([math.inf, math.nan], 1)]
    assert [action.factor for action in actions] == [0.5, 0.5]
    assert "the gradient is not finite (inf)" in actions[0].reason


@pytest.mark.parametrize(
    ("overflow", "bad"), [("saturate", {"norm": math.nan}), ("ieee", {"loss": math.nan})]
)
def test_what_no_scale_of_gradients_has_done_changes_none(overflowing, read, overflow, bad):
    assert overflowing(overflow).decide(1, read(**bad)) is None


def test_infinite_gradients_are_given_up_where_halving_ends(overflowing, read):
    policy = overflowing("ieee")
    answers = [policy.decide(step, read(norm=math.inf)) for step in range(1, 31)]
    assert [action is not None for action in answers] == [True] * 24 + [False] * 6


def test_no_step_that_is_not_finite_is_a_clean_one(factors, read):
    policy = backoff()
    factors(policy, [0.1, 0.0, 0.0, 0.0])
    assert policy.decide(5, read(loss=math.nan, **{SATURATED: 0.0})) is None
    assert factors(policy, [0.0, 0.0, 0.0], first=6) == [None, None, 2.0]


def test_a_monitor_that_observes_none_of_the_gradients_is_refused_at_the_start(overflowing):
    with pytest.raises(UsageError, match=r"scale_backoff reads 'range', whose layers = 'head' matches none"):
        overflowing("saturate", range={"layers": "head"})


@pytest.mark.parametrize("cut", range(1, 9))
def test_resume_reproduces_the_decisions(factors, cut):
    shares = [0.1, 0.1, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0]
    whole, first, second = backoff(), backoff(), backoff()
    parts = factors(first, shares[:cut])
    second.load_state_dict(first.state_dict())
    parts += factors(second, shares[cut:], first=cut + 1)
    assert parts == factors(whole, shares) == [0.5, None, None, None, 0.5, None, None, None, 2.0]
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("gradients", [True, False])
def test_a_run_without_gradient_scales_is_told_so(run_of, gradients):
    format = Format(name="F", bits=8, values=[-1.0, 0.0, 1.0])
    run, policy = run_of({"0": "E3M4"}), backoff()
    run.model = altgrad.quantize_model(
        torch.nn.Sequential(torch.nn.Linear(2, 2)), format, gradients=format if gradients else None
    )
    policy.start(run)
    assert run.warnings == (
        [] if gradients else ["scale_backoff has no scale to adjust: no gradients are quantized"]
    )
