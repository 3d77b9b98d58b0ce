"""What `descent` counts as delivered, behind a real grid storage: two weights with a spacing of 1/8."""

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core.format import Format
from altgrad_core.hookspecs import Step, Weight
from altgrad_core.quantizer import WeightQuantizer, quantizer_of
from altgrad_core.recipe import Recipe
from altgrad_monitors import MonitorOptions
from altgrad_monitors.descent import Descent

EIGHTHS = Format(name="EIGHTHS", bits=4, values=[rung / 8 for rung in range(-7, 8)])
FINE = Format(name="FINE", bits=8, values=[rung / 64 for rung in range(-64, 65)])
COARSE = Format(name="COARSE", bits=3, values=[-1.0, 0.0, 1.0])


class Run:
    """One weight of a layer `0` under a storage rounding, and what a step of its optimizer shows."""

    step = 0

    def __init__(self, rounding, lr=1.0, residual_format="FP32"):
        parameter = torch.nn.Parameter(torch.tensor([[0.5, -0.25]]))
        WeightQuantizer(Recipe(format=EIGHTHS, scale_mode="static", amax=0.875)).attach(parameter)
        self.optimizer = torch.optim.SGD([parameter], lr=lr, momentum=0.5)
        residuals = {"residual_format": residual_format} if rounding == "error_feedback" else {}
        self.storage = altgrad.store_on_grid(self.optimizer, rounding, scale_mode="initial", **residuals)
        self.trained = {"0.weight": parameter}
        self.descent = Descent(MonitorOptions())
        self.descent.start(self)

    def weights(self):
        (parameter,) = self.trained.values()
        quantizer = quantizer_of(parameter)
        return {
            "0.weight": Weight(
                value=parameter.detach(), layer="0", format=quantizer.format, scale=quantizer.scale
            )
        }

    def observed(self, gradient):
        """Take a step and return (quality, delivered) of the layer."""
        (parameter,) = self.trained.values()
        before, parameter.grad = parameter.detach().clone(), torch.tensor([gradient])
        self.storage.watched = {parameter: before}
        self.optimizer.step()
        self.step += 1
        step = Step(
            index=self.step,
            loss=torch.tensor(1.0),
            weights=self.weights(),
            gradients={"0.weight": parameter.grad},
            before={"0.weight": before},
            intended={"0.weight": self.storage.intended[parameter]},
        )
        seen = self.descent.observe(step)
        return tuple(float(seen[f"descent/{quantity}/0"]) for quantity in ("quality", "delivered"))


def test_what_nearest_rounding_loses_is_not_delivered():
    assert Run("nearest_even").observed([0.01, -0.01]) == (0.0, 0.0)
    assert Run("nearest_even").observed([0.125, -0.25]) == (1.0, 1.0)


@pytest.mark.parametrize("rounding", ["error_feedback", "eco"])
def test_what_is_kept_for_later_steps_is_delivered_though_no_weight_moves(rounding):
    quality, delivered = Run(rounding).observed([0.01, -0.02])
    assert (quality, delivered) == (0.0, pytest.approx(1.0, abs=1e-6))


def test_a_residual_that_arrives_is_not_delivered_twice():
    """Momentum makes of 0.05 the updates 0.05 and 0.075: their sum, two halves of a spacing, moves it."""
    run = Run("error_feedback")
    run.observed([0.05, 0.05])
    quality, delivered = run.observed([0.05, 0.05])
    assert quality == pytest.approx(0.125 / 0.075)
    assert delivered == pytest.approx(1.0, abs=1e-6)


def test_what_the_format_of_the_residuals_rounds_away_is_lost():
    """The codes of FINE are 1/64 of half a spacing apart and more; COARSE has 0 alone below a half."""
    assert Run("error_feedback", residual_format=COARSE).observed([0.01, 0.01]) == (0.0, 0.0)
    quality, delivered = Run("error_feedback", residual_format=FINE).observed([0.01, 0.01])
    assert quality == 0.0
    assert delivered == pytest.approx(1.0, abs=0.1)
    assert delivered != 1.0


def test_what_a_moment_is_not_given_is_lost():
    """At the format's end, under a fixed scale, half a spacing is kept of an update of four."""
    run = Run("eco")
    with torch.no_grad():
        run.trained["0.weight"].copy_(torch.tensor([[0.875, -0.875]]))
    quality, delivered = run.observed([-0.5, 0.5])
    assert (quality, delivered) == (0.0, pytest.approx(0.125))


def test_a_weight_that_is_not_stored_has_the_same_of_both():
    run = Run("error_feedback")
    (parameter,) = run.trained.values()
    run.trained = {"0.weight": parameter}
    run.storage = None
    before = torch.tensor([[0.5, -0.25]])
    step = Step(
        index=1,
        loss=torch.tensor(1.0),
        weights=run.weights(),
        gradients={"0.weight": torch.ones(1, 2)},
        before={"0.weight": before - 0.125},
        intended={"0.weight": torch.full((1, 2), 0.25)},
    )
    seen = run.descent.observe(step)
    assert float(seen["descent/quality/total"]) == float(seen["descent/delivered/total"]) == 0.5
