"""Sizes of weights worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_monitors import MagnitudeOptions
from altgrad_monitors.magnitude import Magnitude

FORMAT = Format(name="POWERS", bits=5, values=[0.0, *(2.0**k for k in range(-9, 4))])


def weights(**layers):
    return {
        f"{layer}.weight": Weight(
            value=torch.tensor(value), layer=layer, format=FORMAT, scale=torch.tensor(1.0)
        )
        for layer, value in layers.items()
    }


def seen(monitor, **layers):
    step = Step(
        index=1, loss=torch.tensor(1.0), weights=weights(**layers), gradients={}, before={}, intended={}
    )  # fmt: skip
    found = monitor.observe(step).items()
    return {name.removeprefix("magnitude/"): float(value) for name, value in found}


def started(**layers):
    monitor = Magnitude(MagnitudeOptions())
    monitor.start(SimpleNamespace(weights=lambda: weights(**layers)))
    return monitor


def test_logarithms_are_taken_of_the_weights_that_are_not_zero():
    found = seen(started(a=[1.0]), a=[1.0, -4.0, 0.0, 0.25, -2.0])
    assert found["log2_mean/a"] == pytest.approx((0 + 2 - 2 + 1) / 4)
    assert found["log2_std/a"] == pytest.approx(math.sqrt((0 + 4 + 4 + 1) / 4 - (1 / 4) ** 2))


def test_the_total_is_over_all_elements_of_all_layers():
    found = seen(started(a=[1.0], b=[1.0]), a=[2.0, 2.0, 2.0], b=[8.0])
    assert found["log2_mean/total"] == 1.5
    assert found["log2_std/total"] == pytest.approx(math.sqrt((1 + 1 + 1 + 9) / 4 - 1.5**2))


def test_the_largest_weight_is_a_multiple_of_the_rms_at_the_start():
    monitor = started(a=[3.0, -4.0], b=[1.0, 1.0])
    found = seen(monitor, a=[-6.0, 0.0], b=[0.5, 3.0])
    assert found["max_over_initial_rms/a"] == pytest.approx(6 / math.sqrt(12.5))
    assert found["max_over_initial_rms/total"] == pytest.approx(3.0)


def test_after_a_resume_the_start_is_that_of_the_first_run():
    monitor = Magnitude(MagnitudeOptions())
    monitor.load_state_dict(started(a=[2.0, -2.0]).state_dict())
    monitor.start(SimpleNamespace(weights=lambda: weights(a=[8.0, 8.0])))
    assert seen(monitor, a=[8.0, 8.0])["max_over_initial_rms/a"] == 4


def test_a_weight_of_zeros_has_no_logarithm_and_no_ratio():
    found = seen(started(a=[0.0], b=[2.0]), a=[0.0], b=[6.0])
    assert math.isnan(found["log2_mean/a"])
    assert "max_over_initial_rms/a" not in found
    assert found["max_over_initial_rms/total"] == 3.0


def test_nan_is_never_a_number():
    assert all(math.isnan(value) for value in seen(started(a=[1.0, 1.0]), a=[math.nan, 1.0]).values())
