"""Hand-computed steps, on a grid of eighths; no other plugin is needed."""

import math
import types

import pytest
import torch

from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_monitors import MonitorOptions
from altgrad_monitors.descent import Descent
from altgrad_monitors.flip import Flip
from altgrad_monitors.stall import Stall

EIGHTHS = Format(name="EIGHTHS", bits=4, values=[rung / 8 for rung in range(-7, 8)])
LAYER = "h.0.mlp.c_fc"


def weight(values, storage="master", layer=LAYER):
    return Weight(
        value=torch.tensor(values), layer=layer, format=EIGHTHS, scale=torch.tensor(1.0), storage=storage
    )


def step(index, values, gradients, before=None, intended=None, **more):
    name = f"{LAYER}.weight"
    return Step(
        index=index,
        loss=torch.tensor(1.0),
        weights={name: weight(values)},
        gradients={name: torch.tensor(gradients)},
        before={} if before is None else {name: torch.tensor(before)},
        intended={} if intended is None else {name: torch.tensor(intended)},
        **more,
    )


class Run(types.SimpleNamespace):
    """What the monitors use of a run; hashable by identity."""

    __hash__ = object.__hash__
    step = 0

    def weights(self):
        return {f"{LAYER}.weight": weight(self.start)}


def started(monitor, values, **options):
    made = monitor(MonitorOptions(**options))
    made.start(Run(start=values))
    return made


def numbers(metrics):
    return {name: float(value) for name, value in metrics.items()}


def test_flips_are_changed_codes_and_updates_non_zero_gradients():
    flip = started(Flip, [0.0, 0.125, 0.25, 0.5])
    seen = numbers(flip.observe(step(1, [0.125, 0.125, 0.26, 0.75], [1.0, 1.0, 0.0, 0.0])))
    assert seen[f"flip/flip_count/{LAYER}"] == 2
    assert seen[f"flip/update_count/{LAYER}"] == 2
    assert seen[f"flip/flips_of_updated/{LAYER}"] == 1
    assert seen["flip/flip_count/total"] == 2


def test_flips_are_counted_from_step_to_step():
    flip = started(Flip, [0.0, 0.0])
    flip.observe(step(1, [0.125, 0.0], [1.0, 1.0]))
    seen = numbers(flip.observe(step(2, [0.125, 0.25], [1.0, 1.0])))
    assert seen["flip/flip_count/total"] == 1


def test_where_steps_are_left_out_the_weights_before_count():
    flip, run = Flip(MonitorOptions(every=10)), Run(start=[0.0, 0.0])
    flip.start(run)
    run.step = 9
    assert flip.needs == ("before",)
    seen = numbers(flip.observe(step(10, [0.5, 0.25], [1.0, 1.0], before=[0.5, 0.0])))
    assert seen["flip/flip_count/total"] == 1


def test_layers_outside_of_the_pattern_are_not_observed():
    flip = started(Flip, [0.0], layers="lm_head")
    assert flip.observe(step(1, [1.0], [1.0])) == {}


def test_three_flips_in_ten_updates_are_a_stall_ratio_of_seven_tenths():
    stall = started(Stall, [0.0] * 12)
    after = [0.125] * 3 + [0.01] * 7 + [0.125] * 2
    gradients = [1.0] * 10 + [0.0] * 2
    seen = numbers(stall.observe(step(1, after, gradients, before=[0.0] * 12, intended=after)))
    assert seen["stall/stall_ratio/total"] == pytest.approx(0.7)


def test_flips_of_elements_without_a_gradient_do_not_count_as_arrived():
    stall = started(Stall, [0.0, 0.0])
    seen = numbers(stall.observe(step(1, [0.0, 0.5], [1.0, 0.0], before=[0.0, 0.0], intended=[0.01, 0.5])))
    assert seen["stall/stall_ratio/total"] == 1.0


def test_bit_stall_is_the_share_of_actual_moves_that_keep_their_code():
    stall = started(Stall, [0.0, 0.0, 0.0, 0.0])
    after = [0.01, 0.02, 0.25, 0.0]
    seen = numbers(stall.observe(step(1, after, [1.0] * 4, before=[0.0] * 4, intended=after)))
    assert seen["stall/bit_stall/total"] == pytest.approx(2 / 3)


def test_expected_stall_is_what_stochastic_rounding_of_the_updates_would_give():
    stall = started(Stall, [0.0, 0.0])
    seen = numbers(stall.observe(step(1, [0.0, 0.0], [1.0, 1.0], before=[0.0, 0.0], intended=[0.03125, 0.5])))
    assert seen["stall/expected_stall/total"] == pytest.approx(1 - (0.25 + 1.0) / 2)


def test_without_an_update_the_stall_ratio_is_undefined():
    stall = started(Stall, [0.0])
    seen = stall.observe(step(1, [0.0], [0.0], before=[0.0], intended=[0.0]))
    assert torch.isnan(seen["stall/stall_ratio/total"])
    assert stall.undefined_is_nan


def test_under_whole_rung_updates_the_optimizers_own_counts_are_used():
    stall = started(Stall, [0.0, 0.0])
    counts = {f"{LAYER}.weight": (torch.tensor(1), torch.tensor(4))}
    seen = numbers(
        stall.observe(
            step(
                1, [0.0, 0.125], [1.0, 1.0],
                before=[0.0, 0.0], intended=[-0.5, 2.0], intended_in_rungs=True, counts=counts,
            )
        )
    )  # fmt: skip
    assert seen["stall/stall_ratio/total"] == 0.75
    assert seen["stall/expected_stall/total"] == pytest.approx(0.25)


@pytest.mark.parametrize(("flips", "updates", "ratio"), [(3, 1, 0.0), (2, 0, math.nan)])
def test_momentum_that_moves_what_has_no_gradient_is_no_negative_stall(flips, updates, ratio):
    stall = started(Stall, [0.0, 0.0])
    own = {
        "intended_in_rungs": True,
        "counts": {f"{LAYER}.weight": (torch.tensor(flips), torch.tensor(updates))},
    }
    moved = {"before": [0.0, 0.0], "intended": [1.0, 1.0]}
    seen = numbers(stall.observe(step(1, [0.125, 0.125], [float(updates), 0.0], **moved, **own)))
    assert seen["stall/stall_ratio/total"] == pytest.approx(ratio, nan_ok=True)


def test_a_nan_weight_does_not_stop_the_counting():
    flip = started(Flip, [0.0, 0.5])
    seen = numbers(flip.observe(step(1, [float("nan"), 0.5], [float("nan"), 1.0])))
    assert seen["flip/flip_count/total"] == 1


@pytest.mark.parametrize(
    ("after", "quality"), [([0.25, -0.5], 1.0), ([0.0, 0.0], 0.0), ([0.5, -1.0], 2.0), ([0.25, 0.0], 0.2)]
)
def test_descent_quality_projects_the_actual_update_on_the_intended_one(after, quality):
    descent = started(Descent, [0.0, 0.0])
    seen = numbers(descent.observe(step(1, after, [1.0, 1.0], before=[0.0, 0.0], intended=[0.25, -0.5])))
    assert seen["descent/quality/total"] == pytest.approx(quality)


def test_descent_under_whole_rung_updates_counts_rungs():
    descent = started(Descent, [0.0, 0.0])
    counts = {f"{LAYER}.weight": (torch.tensor(1), torch.tensor(2))}
    seen = numbers(
        descent.observe(
            step(
                1, [0.25, 0.0], [1.0, 1.0],
                before=[0.0, 0.0], intended=[2.0, -1.0], intended_in_rungs=True, counts=counts,
            )
        )
    )  # fmt: skip
    assert seen["descent/quality/total"] == pytest.approx(4 / 5)


def test_descent_in_rungs_is_on_the_grid_that_the_rungs_were_of():
    descent = started(Descent, [0.0, 0.0])
    name = f"{LAYER}.weight"
    own = {
        "intended_in_rungs": True,
        "counts": {name: (torch.tensor(1), torch.tensor(2))},
        "scales_before": {name: torch.tensor(2.0)},
    }
    moved = {"before": [0.0, 0.0625], "intended": [4.0, -1.0]}
    seen = numbers(descent.observe(step(1, [0.25, 0.0], [1.0, 1.0], **moved, **own)))
    assert seen["descent/quality/total"] == pytest.approx(1)


def test_monitors_change_nothing():
    seen = step(1, [0.3, 0.1], [1.0, 0.0], before=[0.0, 0.0], intended=[0.3, 0.1])
    kept = [tensor.clone() for tensor in (*seen.gradients.values(), *seen.before.values())]
    state = torch.get_rng_state()
    for monitor in (Flip, Stall, Descent):
        started(monitor, [0.0, 0.0]).observe(seen)
    after = (*seen.gradients.values(), *seen.before.values())
    assert all(map(torch.equal, kept, after))
    assert torch.equal(torch.get_rng_state(), state)
