"""Weights that go back and forth, on a grid of eighths: by hand, and against the published recursion."""

import copy
import io
import itertools
import types

import attrs
import pytest
import torch

from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_monitors import MonitorOptions, native_oscillation
from altgrad_monitors.oscillation import Oscillation, advance

EIGHTHS = Format(name="EIGHTHS", bits=5, values=[rung / 8 for rung in range(-15, 16)])
QUARTERS = Format(name="QUARTERS", bits=5, values=[rung / 4 for rung in range(-15, 16)])
LAYER = "h.0.mlp.c_fc"
NAME = f"{LAYER}.weight"


def weight(rungs, scale=1.0, format=EIGHTHS):
    return Weight(
        value=torch.tensor(rungs) / 8, layer=LAYER, format=format, scale=torch.tensor(scale), storage="grid"
    )


class Run(types.SimpleNamespace):
    """What the monitor uses of a run; hashable by identity."""

    __hash__ = object.__hash__

    def weights(self):
        return {NAME: self.now}


def step(index, now, before=None):
    return Step(
        index=index,
        loss=torch.tensor(1.0),
        weights={NAME: now},
        gradients={NAME: torch.ones_like(now.value)},
        before={} if before is None else {NAME: before.value},
        intended={},
    )


def started(rungs, index=0, **options):
    monitor = Oscillation(MonitorOptions(**options))
    monitor.start(Run(step=index, now=weight(rungs)))
    return monitor


def fractions(monitor, path, first=1):
    """Observe the rungs of each step, one list per step, and return the fractions."""
    found = [monitor.observe(step(index, weight(rungs))) for index, rungs in enumerate(path, first)]
    return [float(metrics["oscillation/fraction/total"]) for metrics in found]


def frequency(monitor):
    return monitor.state_dict()[NAME]["frequency"].tolist()


def test_a_change_back_is_a_reversal_and_the_first_change_is_none():
    monitor = started([0.0])
    fractions(monitor, [[1.0]])
    assert frequency(monitor) == [0.0]
    fractions(monitor, [[0.0]], first=2)
    assert frequency(monitor) == pytest.approx([0.01])


def test_two_reversals_within_reach_of_each_other_are_not_yet_above_the_threshold_three_are():
    path = [[1.0], [0.0], [1.0], [0.0]]  # the average after reversals: 0.01, 0.0199, 0.029701
    assert fractions(started([0.0]), path) == [0.0, 0.0, 0.0, 1.0]


def test_going_on_in_one_direction_is_no_reversal():
    monitor = started([0.0])
    fractions(monitor, [[float(rung)] for rung in range(1, 9)])
    assert frequency(monitor) == [0.0]


def test_the_direction_is_that_of_the_last_change_however_long_ago():
    monitor = started([0.0])
    fractions(monitor, [[1.0], [1.0], [1.0], [0.0]])
    assert frequency(monitor) == pytest.approx([0.01])


def test_the_average_fades_by_a_hundredth_in_a_step():
    monitor = started([0.0])
    fractions(monitor, [[1.0], [0.0], [0.0], [0.0]])
    assert frequency(monitor) == pytest.approx([0.01 * 0.99**2])


def test_the_fraction_is_of_the_weights():
    path = [[float(index % 2), float(index), 0.0, 0.0] for index in range(1, 9)]
    assert fractions(started([0.0] * 4), path)[-1] == 0.25


def test_crossing_zero_back_and_forth_is_oscillation():
    path = [[1.0], [-1.0]] * 3
    assert fractions(started([-1.0]), path)[-1] == 1.0


def test_a_weight_that_turns_round_every_hundredth_step_does_not_oscillate_every_thirtieth_one_does():
    for period, oscillates in ((100, 0.0), (30, 1.0)):
        path = [[float((index // period) % 2)] for index in range(1, 8 * period + 1)]
        assert fractions(started([0.0]), path)[-1] == oscillates


def test_a_change_of_scale_is_nobodys_movement():
    monitor = started([4.0])
    fractions(monitor, [[5.0]])
    monitor.observe(step(2, weight([5.0], scale=0.5)))
    assert frequency(monitor) == [0.0], "the code went from 5 to 2, the weight stayed"
    monitor.observe(step(3, weight([2.0], scale=0.5)))
    assert frequency(monitor) == pytest.approx([0.01]), "down, after up"


def test_a_scale_that_is_changed_in_place_is_seen_to_change():
    monitor, now = started([4.0]), weight([5.0])
    monitor.observe(step(1, now))
    now.scale.fill_(0.5)
    monitor.observe(step(2, now))
    assert frequency(monitor) == [0.0]


def test_a_change_of_format_is_nobodys_movement():
    monitor = started([4.0])
    fractions(monitor, [[5.0]])
    monitor.observe(step(2, weight([5.0], format=QUARTERS)))
    assert frequency(monitor) == [0.0]


def test_nan_does_not_stop_the_counting():
    assert fractions(started([0.0, 0.0]), [[torch.nan, 1.0], [torch.nan, 0.0]]) == [0.0, 0.0]


def test_where_steps_are_left_out_the_weights_before_count():
    monitor = started([0.0], every=10)
    monitor.observe(step(10, weight([4.0]), before=weight([3.0])))
    monitor.observe(step(20, weight([8.0]), before=weight([9.0])))
    assert frequency(monitor) == pytest.approx([0.01])


def test_a_scale_that_moved_in_steps_left_out_does_not_keep_weights_from_reversing():
    monitor = started([0.0], every=10)
    monitor.observe(step(10, weight([1.0]), before=weight([0.0])))
    back = step(20, weight([1.0], scale=0.5), before=weight([2.0]))
    monitor.observe(attrs.evolve(back, scales_before={NAME: torch.tensor(0.5)}))
    assert frequency(monitor) == pytest.approx([0.01])


def test_without_a_gradient_a_weight_is_not_observed():
    monitor = started([0.0])
    assert monitor.observe(attrs.evolve(step(1, weight([1.0])), gradients={})) == {}


def published(codes):
    """Return f after a path of integer codes, (steps, n), as the paper's (4) says it, in float64."""
    average = torch.zeros(codes.shape[1], dtype=torch.float64)
    for place in range(average.numel()):
        last = 0
        for before, now in zip(codes[:-1, place].tolist(), codes[1:, place].tolist(), strict=True):
            sign = (now > before) - (now < before)
            turned = sign != 0 and last != 0 and sign != last
            average[place] = 0.01 * turned + 0.99 * average[place]
            last = sign or last
    return average


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16])
@pytest.mark.parametrize("count", [1, 4095, 4096, 4097, 20_001])
def test_the_loop_in_c_has_the_bits_of_torch(dtype, count):
    draws = torch.Generator().manual_seed(count)
    frequency, direction = torch.zeros(count), torch.zeros(count, dtype=torch.int8)
    rows = frequency.clone(), direction.clone()
    codes = torch.randint(-3, 4, (30, count), generator=draws).to(dtype)
    codes[:, 0] = torch.tensor([torch.iinfo(dtype).min, torch.iinfo(dtype).max] * 15)
    if not native_oscillation.serves((codes[0], codes[1], *rows)):
        pytest.skip("there is no C compiler here")
    for before, now in itertools.pairwise(codes):
        frequency, direction = advance(before, now, frequency, direction, torch.tensor(True))
        (found,) = native_oscillation.advanced([(before, now, *rows)], 0.01, 0.02)
        assert torch.equal(rows[0], frequency)
        assert torch.equal(rows[1], direction)
        assert int(found) == int((frequency > 0.02).sum())
    assert int(found) > 0


def test_without_the_loop_the_fractions_are_the_same(monkeypatch):
    codes = torch.randint(-3, 4, (40, 30), generator=torch.Generator().manual_seed(1)).float().tolist()
    found = fractions(started(codes[0]), codes[1:])
    monkeypatch.setattr(native_oscillation, "serves", lambda rows: False)
    assert fractions(started(codes[0]), codes[1:]) == found


def test_loading_leaves_the_saved_state_its_own():
    monitor = started([0.0])
    fractions(monitor, [[1.0]])
    saved = copy.deepcopy(monitor.state_dict())
    monitor.load_state_dict(saved)
    fractions(monitor, [[0.0]], first=2)
    assert saved[NAME]["frequency"].tolist() == [0.0]


def test_random_walks_have_the_published_frequencies():
    moves = torch.randint(-1, 2, (200, 50), generator=torch.Generator().manual_seed(0))
    codes = moves.cumsum(0).clamp(-15, 15)
    monitor = started(codes[0].float().tolist())
    found = fractions(monitor, codes[1:].float().tolist())
    expected = published(codes)
    torch.testing.assert_close(torch.tensor(frequency(monitor)).double(), expected, rtol=0, atol=1e-6)
    assert 0.5 < found[-1] == (expected > 0.02).double().mean()


def test_a_resume_goes_on_to_the_bit():
    codes = torch.randint(-3, 4, (40, 30), generator=torch.Generator().manual_seed(1)).float().tolist()
    whole, part = started(codes[0]), started(codes[0])
    expected = fractions(whole, codes[1:])
    fractions(part, codes[1:20])
    file = io.BytesIO()
    torch.save(part.state_dict(), file)
    file.seek(0)
    resumed = started(codes[19], index=19)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert fractions(resumed, codes[20:], first=20) == expected[19:]
    one, other = whole.state_dict()[NAME], resumed.state_dict()[NAME]
    assert one["format"] == other["format"] == "EIGHTHS"
    assert all(torch.equal(one[key], other[key]) for key in ("frequency", "direction"))
