"""A small network in each format: what the forward pass uses, a step, and weights that live on the grid."""

import pytest
import torch

import altgrad_core as altgrad

SPECS = ["posit8", {"plugin": "posit8", "es": 0}, {"plugin": "LNS", "gamma": 8}]


@pytest.fixture(params=SPECS, ids=str)
def format(request):
    return altgrad.get_format(request.param)


@pytest.fixture
def model(format):
    """Return a quantized network whose largest weights are scaled to between 2 and 4."""
    torch.manual_seed(0)
    first, last = torch.nn.Linear(16, 32, bias=False), torch.nn.Linear(32, 4)
    model = torch.nn.Sequential(first, torch.nn.Tanh(), last)
    return altgrad.quantize_model(model, format, margin=format.largest / 4)


@pytest.fixture
def loss(model):
    """Return a function that gives the loss on one fixed batch."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 16, generator=generator), torch.randint(4, (64,), generator=generator)
    return lambda: torch.nn.functional.cross_entropy(model(x), y)


def step(optimizer, loss):
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def test_the_forward_pass_uses_values_of_the_format(model, format):
    weight = model[0].weight.detach()
    scale = 4 / 2 ** torch.ceil(torch.log2(weight.abs().max()))
    used = model[0](torch.eye(16)).detach().T
    assert torch.equal(used, format.quantize(weight * scale) / scale)


def test_a_step_lowers_the_loss(model, loss):
    before = loss().item()
    step(torch.optim.SGD(altgrad.param_groups(model), lr=0.1), loss)
    assert loss().item() < before


def test_stored_weights_are_on_the_grid_after_every_step(model, format, loss):
    optimizer = torch.optim.AdamW(altgrad.param_groups(model), lr=1e-2)
    generator = torch.Generator().manual_seed(2)
    altgrad.store_on_grid(optimizer, rounding="stochastic", generator=generator)
    start, first = model[0].weight.detach().clone(), loss().item()
    for _ in range(5):
        step(optimizer, loss)
        for group in optimizer.param_groups:
            if group["format"] is not None:
                for weight, scale in zip(group["params"], group["scale"], strict=True):
                    assert torch.isin(weight * scale, format.values).all()
    assert loss().item() < first
    assert not torch.equal(model[0].weight, start)
