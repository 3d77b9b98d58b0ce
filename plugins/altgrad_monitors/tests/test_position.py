"""Positions as an optimizer keeps them: by hand; a counting optimizer is all that is needed."""

import types

import pytest
import torch
from torch import nn

from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_core.registry import UsageError
from altgrad_monitors import PositionOptions
from altgrad_monitors.position import Position

EIGHTHS = Format(name="EIGHTHS", bits=4, values=[rung / 8 for rung in range(-7, 8)])


class Counting(torch.optim.SGD):
    """An optimizer of somebody else's that knows where its weights stand."""

    def __init__(self, kept):
        super().__init__([parameter for parameter, _, _ in kept], lr=0.1)
        self.kept = {parameter: (moved, rung) for parameter, moved, rung in kept}

    def position_of(self, weight):
        moved, rung = self.kept[weight]
        return None if moved is None else types.SimpleNamespace(moved=moved, rung=rung)


def seen(kept_of, **options):
    """Return what is reported of layers: name to (moved, rungs)."""
    parameters = {f"{layer}.weight": nn.Parameter(torch.zeros(2)) for layer in kept_of}
    kept = [
        (
            parameter,
            *(None if one is None else torch.tensor(one) for one in kept_of[name.removesuffix(".weight")]),
        )
        for name, parameter in parameters.items()
    ]
    monitor = Position(PositionOptions(**options))
    monitor.start(types.SimpleNamespace(optimizer=Counting(kept), trained=parameters))
    weights = {
        name: Weight(
            value=one.detach(), layer=name.removesuffix(".weight"), format=EIGHTHS, scale=torch.tensor(1.0)
        )
        for name, one in parameters.items()
    }
    step = Step(index=1, loss=torch.tensor(1.0), weights=weights, gradients={}, before={}, intended={})
    return {name: float(value) for name, value in monitor.observe(step).items()}


def of(found, layer):
    return {name.split("/")[1]: value for name, value in found.items() if name.endswith(f"/{layer}")}


def test_positions_and_rungs_of_a_layer():
    found = seen({"a": ([0.5, -1.5, 4.0, 1.0], [3, -5, 0, 2])})
    assert of(found, "a") == {
        "mean": 1.0,
        "std": pytest.approx((15.5 / 4) ** 0.5),  # squares of -0.5, -2.5, 3 and 0 over 4
        "min": -1.5,
        "max": 4.0,
        "rung_mean": 0.0,
        "rung_std": pytest.approx(9.5**0.5),
        "rung_min": -5.0,
        "rung_max": 3.0,
    }


def test_the_total_is_that_of_all_weights():
    found = of(seen({"a": ([6.0], [1]), "b": ([0.0, 0.0, 2.0], [-1, -1, 1])}), "total")
    assert (found["mean"], found["min"], found["max"]) == (2.0, 0.0, 6.0)
    assert found["std"] == pytest.approx((40 / 4 - 4) ** 0.5)
    assert (found["rung_mean"], found["rung_std"]) == (0.0, 1.0)


def test_nan_is_seen_in_every_number():
    found = of(seen({"a": ([torch.nan, 1.0], [-(2**31), 2])}), "total")
    assert all(value != value for value in found.values())


def test_a_weight_that_is_not_tracked_is_left_out():
    found = seen({"a": ([1.0], [1]), "b": (None, None)})
    assert of(found, "b") == {}
    assert of(found, "total")["mean"] == 1.0


def test_layers_and_types_of_layers_are_chosen_as_everywhere():
    layers = {"h.0.attn.c_attn": ([1.0], [1]), "h.1.attn.c_attn": ([3.0], [1])}
    assert of(seen(layers, per="type"), "attention")["mean"] == 2.0
    assert of(seen(layers, layers=r"h\.0\..*"), "total")["mean"] == 1.0
    assert seen(layers, layers="lm_head") == {}


def test_every_quantity_is_announced():
    found = seen({"a": ([1.0], [1])})
    monitor = Position(PositionOptions())
    assert {name.split("/")[1] for name in found} == monitor.provides.keys()
    assert (monitor.every, tuple(monitor.needs)) == (100, ())


@pytest.mark.parametrize(
    ("optimizer", "way_out"),
    [
        (torch.optim.SGD, "use ManifoldAdamW with track_position = true"),
        (lambda weights: off(Counting([(weights[0], None, None)])), "set track_position = true"),
    ],
)
def test_an_optimizer_that_does_not_count_is_refused_with_the_way_out(optimizer, way_out):
    run = types.SimpleNamespace(optimizer=optimizer([nn.Parameter(torch.ones(1))]), trained={})
    with pytest.raises(UsageError, match=way_out):
        Position(PositionOptions()).start(run)


def off(optimizer):
    optimizer.param_groups[0]["track_position"] = False
    return optimizer


def test_what_it_needs_of_an_optimizer_stands_in_its_options():
    assert PositionOptions.optimizer_options == {"track_position": True}
