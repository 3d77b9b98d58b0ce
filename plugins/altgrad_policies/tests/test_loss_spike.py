import math

import pytest

from altgrad_core.hookspecs import ScaleLearningRate
from altgrad_policies import LossSpikeOptions
from altgrad_policies.loss_spike import LossSpike


@pytest.fixture
def fires(read):
    """Return a function that hands the policy one loss a step and gives the steps it answers in."""

    def decide(policy, losses, first=1):
        actions = [policy.decide(step, read(loss=loss)) for step, loss in enumerate(losses, first)]
        assert all(action is None or isinstance(action, ScaleLearningRate) for action in actions)
        return [step for step, action in enumerate(actions, first) if action]

    return decide


def spike(**options):
    return LossSpike(LossSpikeOptions(**{"factor": 2.0, "ema": 0.5, "warmup": 2, "cooldown": 3, **options}))


def test_a_loss_above_factor_times_the_average_before_it_halves_the_learning_rate(read):
    policy = spike()
    for step in (1, 2):
        policy.decide(step, read(loss=1.0))
    action = policy.decide(3, read(loss=2.5))
    assert action.factor == 0.5
    assert action.reason == "the loss 2.5 is above 2 times its average 1"


def test_exactly_factor_times_the_average_is_no_spike(fires):
    assert fires(spike(), [1.0, 1.0, 2.0]) == []
    assert fires(spike(), [1.0, 1.0, 2.0001]) == [3]


def test_the_average_moves_by_the_weight_of_the_newest_loss(fires):
    policy = spike()
    fires(policy, [4.0, 2.0, 1.0])
    assert policy.average == 2.0  # (4 + 2)/2 = 3, (3 + 1)/2 = 2


def test_the_warm_up_only_feeds_the_average(fires):
    assert fires(spike(warmup=3), [1.0, 1.0, 100.0, 1.0]) == []


def test_the_very_first_loss_has_nothing_to_be_compared_with(fires):
    assert fires(spike(warmup=1), [100.0]) == []


def test_the_first_finite_loss_has_nothing_to_be_compared_with_either(fires):
    assert fires(spike(), [math.nan, math.nan, math.nan, 100.0]) == []


def test_one_answer_a_cooldown(fires):
    policy = spike(ema=0.001)
    assert fires(policy, [1.0, 1.0] + [10.0] * 7) == [3, 6, 9]


def test_a_loss_that_stays_high_ends_being_a_spike(fires):
    assert fires(spike(cooldown=1), [1.0, 1.0] + [3.0] * 20) == [3]


def test_losses_that_are_not_finite_are_left_to_others(fires):
    policy = spike()
    assert fires(policy, [1.0, 1.0, math.nan, math.inf]) == []
    assert policy.average == 1.0


def test_a_falling_loss_is_healthy(fires):
    assert fires(LossSpike(LossSpikeOptions()), [5.5 * 0.99**step for step in range(300)]) == []


@pytest.mark.parametrize("cut", range(1, 7))
def test_resume_reproduces_the_decisions(fires, cut):
    losses = [1.0, 2.0, 9.0, 9.0, 30.0, 90.0, 1.0]
    whole, first, second = spike(), spike(), spike()
    parts = fires(first, losses[:cut])
    second.load_state_dict(first.state_dict())
    parts += fires(second, losses[cut:], first=cut + 1)
    assert parts == fires(whole, losses) == [3, 6]
    assert second.state_dict() == whole.state_dict()
