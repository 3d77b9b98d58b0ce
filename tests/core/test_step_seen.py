"""What is kept for a step: whom the storage is to tell of weights as they land."""

import types

import pytest
import torch
from torch import nn

import altgrad_core as altgrad
from altgrad_core.step_seen import watch
from altgrad_core.watched import Watched


class Looks:
    """A monitor that looks on as weights land; `wanted` is what its `onlookers` returns, or raises."""

    needs = ("landing",)

    def __init__(self, wanted):
        self.wanted = wanted

    @property
    def landing(self):
        return self

    def onlookers(self, gradients):
        if isinstance(self.wanted, Exception):
            raise self.wanted
        return dict.fromkeys(gradients, self.wanted)


@pytest.fixture
def run(table, request):
    """A run of one weight on a grid, with a gradient, as far as `watch` looks; `dropped` says who was."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    altgrad.quantize_model(model, table("E4M3"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model[0].weight.grad = torch.ones(4, 4)
    trained, dropped = dict(model.named_parameters()), {}
    return types.SimpleNamespace(
        storage=altgrad.store_on_grid(optimizer, getattr(request, "param", "nearest_even")),
        optimizer=optimizer,
        trained=trained,
        quantized=trained,
        scales_before={},
        regridded=set(),
        dropped=dropped,
        drop=lambda watched, method, error: dropped.update({watched.name: (method, str(error))}),
    )


def watched(**monitors):
    return [Watched(name, "some-plugin", plugin) for name, plugin in monitors.items()]


def test_the_storage_is_given_who_looks_on_by_its_weight(run):
    watch(run, watched(one=Looks((1, 2)), other=Looks(None)))
    weight = run.trained["0.weight"]
    assert [one[weight] for one in run.storage.onlookers] == [(1, 2), None]


def test_who_looks_on_may_want_something_else_in_each_step(run):
    looks, weight = Looks((1, 2)), run.trained["0.weight"]
    (one,) = watched(one=looks)
    for looks.wanted in ((1, 2), (3, 4), None, (1, 2)):
        watch(run, [one])
        assert [found[weight] for found in run.storage.onlookers] == [looks.wanted]
    looks.wanted = (1, 2.5)
    watch(run, [one])
    assert list(run.dropped) == ["one"]


def test_a_mapping_that_is_written_anew_is_looked_at_anew(run):
    mapping, weight = {}, run.trained["0.weight"]
    landing = types.SimpleNamespace(onlookers=lambda gradients: mapping)
    (one,) = watched(one=types.SimpleNamespace(needs=("landing",), landing=landing))
    for mapping["0.weight"] in ((1, 2), (3, 4)):
        watch(run, [one])
        assert run.storage.onlookers == [{weight: mapping["0.weight"]}]


def test_who_fails_to_look_on_is_dropped_and_others_look_on(run):
    shared = Looks(ValueError("no memory"))
    sharing = types.SimpleNamespace(needs=("landing",), landing=shared)
    watch(run, watched(one=shared, two=sharing, three=Looks((1, 2))))
    assert run.dropped == dict.fromkeys(("one", "two"), ("onlookers", "no memory"))
    assert len(run.storage.onlookers) == 1


def test_who_needs_landing_and_has_no_such_attribute_is_dropped(run):
    watch(run, watched(one=types.SimpleNamespace(needs=("landing",))))
    ((method, message),) = run.dropped.values()
    assert (method, "landing" in message) == ("onlookers", True)


@pytest.mark.parametrize("wanted", [1, (1,), (1, 2.0), "ab", [1, 2]], ids=str)
def test_what_is_no_pair_of_addresses_never_reaches_a_loop(run, wanted):
    watch(run, watched(one=Looks(wanted)))
    assert "it must return a function's address and its context's" in run.dropped["one"][1]
    assert run.storage.onlookers == []


@pytest.mark.parametrize("run", ["error_feedback", "eco"], indirect=True)
def test_nobody_is_asked_where_rounding_leaves_residuals(run):
    watch(run, watched(one=Looks(ValueError("asked"))))
    assert (run.dropped, run.storage.onlookers) == ({}, [])
