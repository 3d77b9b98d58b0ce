import math

from altgrad_core.loop import learning_rate_factor


def factors(steps=100, warmup=10, floor=0.1):
    return [learning_rate_factor(step, steps, warmup, floor) for step in range(steps)]


def test_warm_up_is_linear_and_starts_above_zero():
    assert factors()[:3] == [1 / 11, 2 / 11, 3 / 11]


def test_the_peak_follows_the_warm_up():
    assert factors()[10] == 1.0


def test_the_cosine_passes_its_middle_half_way_down():
    assert math.isclose(factors()[55], 0.55)


def test_the_end_is_the_floor():
    assert math.isclose(learning_rate_factor(100, 100, 10, 0.1), 0.1)
    assert math.isclose(learning_rate_factor(1000, 100, 10, 0.1), 0.1)


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    assert max(factors(steps=5)) < 1.0
