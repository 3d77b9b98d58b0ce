"""The weights as monitors see them: one mapping, until something of a weight is another."""

import pytest
import torch
from torch import nn

import altgrad_core as altgrad
from altgrad_core.quantizer import quantizer_of
from altgrad_core.weights_seen import WeightsSeen


@pytest.fixture
def model(table):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    return altgrad.quantize_model(model, table("E4M3")) or model


@pytest.fixture
def look(model):
    """Return a function that looks at the model's weights."""
    seen = WeightsSeen()
    layers = {name: name for name, _ in model.named_parameters()}
    return lambda: seen.of(dict(model.named_parameters()), layers)


def test_what_is_written_in_place_is_seen_in_the_same_mapping(model, look):
    before = look()
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        quantizer_of(model[0].weight).scale.fill_(0.5)
    assert look() is before
    assert before["0.weight"].value.unique().tolist() == [2.0]
    assert before["0.weight"].scale.item() == 0.5


def moved(model):
    model[0].weight.data = torch.ones(4, 4)


def stored(model):
    optimizer = torch.optim.SGD([model[0].weight], lr=1.0)
    altgrad.store_on_grid(optimizer)


def another_scale(model):
    quantizer_of(model[0].weight).scale = torch.tensor(4.0)


def unquantized(model):
    quantizer_of(model[0].weight).detach(model[0].weight)


@pytest.mark.parametrize("change", [moved, stored, another_scale, unquantized], ids=lambda one: one.__name__)
def test_a_change_of_one_weight_makes_it_anew_and_leaves_the_others(model, look, change):
    before = look()
    change(model)
    after = look()
    assert after is not before
    assert after["1.weight"] is before["1.weight"]
    assert after["0.weight"] is not before["0.weight"]
    assert after["0.weight"].value.data_ptr() == model[0].weight.data_ptr()
    assert (after["0.weight"].format is None) == (change is unquantized)
    assert after["0.weight"].storage == ("grid" if change is stored else "master")
