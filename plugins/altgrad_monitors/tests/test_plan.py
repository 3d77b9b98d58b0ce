"""Plans that stand from step to step beside plans made anew in each: the same counts, whatever happens."""

import random

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core.quantizer import quantizer_of
from altgrad_core.step_seen import keep_scales, watch
from altgrad_core.watched import Watched
from altgrad_core.watching import call_each, due_monitors, observe_after
from altgrad_monitors import MonitorOptions, codes, landings
from altgrad_monitors.descent import Descent
from altgrad_monitors.flip import Flip
from altgrad_monitors.oscillation import Oscillation
from altgrad_monitors.stall import Stall
from altgrad_monitors.ulp import Ulp

STEPS, LATE = 30, 15
QUIET = range(LATE - 2, LATE + 5)
MONITORS = {Flip: 1, Stall: 1, Ulp: 10}


class Steps:
    """Optimizer steps of a small run with monitors, and what befalls it in between; all drawn from a seed."""

    def __init__(self, run, storage, monitors):
        self.run, self.events = run, random.Random(5)
        self.generator = torch.Generator().manual_seed(6)
        run.optimizer = torch.optim.AdamW(altgrad.param_groups(run.model), lr=1e-2)
        if storage == "grid":
            run.storage = altgrad.store_on_grid(run.optimizer, "stochastic", self.generator)
        run.monitors, run.policies = monitors, []
        call_each(run, "start", run)

    def take(self, index):
        """Take a step; return what the monitors that are due said of it."""
        run = self.run
        due = due_monitors(run, index)
        keep_scales(run, due)
        for parameter in run.trained.values():
            draws = torch.randn(parameter.shape, generator=self.generator)
            parameter.grad = draws.clamp(min=0)  # half of it is zero
        one, *others = sorted(run.quantized)
        first, second, third = (self.events.random() if index not in QUIET else 1.0 for _ in range(3))
        if first < 0.5:
            self.befall(run.trained[one])
        if second < 0.3:
            run.trained[self.events.choice(others)].grad = None
        before = watch(run, due)
        run.optimizer.step()
        run.step = index
        observe_after(run, [] if third < 0.15 else due, torch.tensor(0.0), before)
        said = run.observed.take_unlogged()
        return {name: float(value) for name, value in said.items()}

    def befall(self, weight):
        """Have a weight lie elsewhere, or its gradient in no order, or its scale move."""
        what, quantizer = self.events.randrange(4), quantizer_of(weight)
        if what == 0:
            weight.data = weight.data.clone()
        elif what == 1:
            weight.grad = weight.grad.t().contiguous().t()
        elif self.run.storage is None:
            quantizer.scale = quantizer.scale * 2
            self.run.regridded |= {name for name, one in self.run.trained.items() if one is weight}
        else:
            weight.data.mul_(4)  # it lands under another scale


def monitor(kind, name, **options):
    return Watched(name, "altgrad-monitors", kind(MonitorOptions(**options)))


def told(run_of, storage, late):
    """Return what monitors say step by step; late: one that comes when others have begun."""
    monitors = [monitor(kind, kind.__name__.lower(), every=every) for kind, every in MONITORS.items()]
    steps = Steps(run_of("E4M3", model={"n_layer": 1}), storage, monitors)
    said = []
    for index in range(1, STEPS):
        if late and index == LATE:
            steps.run.monitors.append(monitor(late, late.__name__.lower(), every=2))
            steps.run.monitors[-1].plugin.start(steps.run)
        said.append(steps.take(index))
    return said


@pytest.mark.parametrize("late", [None, Descent, Oscillation])
@pytest.mark.parametrize("storage", ["master", "grid"])
def test_a_plan_that_stands_counts_what_one_made_anew_does(run_of, monkeypatch, storage, late):
    standing = told(run_of, storage, late)
    plan_of, begin = codes.CodeBook._plan_of, landings.Landings.begin

    def anew(function):
        def call(self, *arguments):
            self._plan = None
            return function(self, *arguments)

        return call

    monkeypatch.setattr(codes.CodeBook, "_plan_of", anew(plan_of))
    monkeypatch.setattr(landings.Landings, "begin", anew(begin))
    assert str(told(run_of, storage, late)) == str(standing)
    assert any("stall/stall_ratio/total" in one for one in standing)
