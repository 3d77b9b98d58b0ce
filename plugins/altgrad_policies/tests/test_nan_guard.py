import math

import pytest

from altgrad_core.hookspecs import SkipStep, Stop
from altgrad_policies import NanGuardOptions
from altgrad_policies.nan_guard import NanGuard


def metrics(loss=1.0, norm=1.0):
    return {
        "train/loss": loss,
        "train/gradient_norm": norm,
        "train/loss_finite": float(math.isfinite(loss)),
        "train/gradient_finite": float(math.isfinite(norm)),
    }


def test_a_finite_step_is_left_alone():
    assert NanGuard(NanGuardOptions()).decide(1, metrics()) is None


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"loss": math.inf}, {"norm": math.nan}])
def test_one_non_finite_step_is_skipped(bad):
    action = NanGuard(NanGuardOptions()).decide(1, metrics(**bad))
    assert isinstance(action, SkipStep)
    assert "not finite" in action.reason


def test_patience_of_them_in_a_row_stop_the_run():
    guard = NanGuard(NanGuardOptions(nan_patience=3))
    actions = [type(guard.decide(step, metrics(loss=math.nan))) for step in range(3)]
    assert actions == [SkipStep, SkipStep, Stop]


def test_a_finite_step_in_between_starts_the_count_again():
    guard = NanGuard(NanGuardOptions(nan_patience=2))
    guard.decide(1, metrics(loss=math.nan))
    guard.decide(2, metrics())
    assert isinstance(guard.decide(3, metrics(loss=math.nan)), SkipStep)


def test_the_count_survives_a_resume():
    guard, resumed = NanGuard(NanGuardOptions(nan_patience=2)), NanGuard(NanGuardOptions(nan_patience=2))
    guard.decide(1, metrics(loss=math.nan))
    resumed.load_state_dict(guard.state_dict())
    assert isinstance(resumed.decide(2, metrics(loss=math.nan)), Stop)
