"""Shared by the tests: both formats by their options, as an experiment file would ask for them."""

import pytest
import torch

import altgrad_core as altgrad


@pytest.fixture
def posit():
    """Return a function es -> the posit format."""
    return lambda es=2: altgrad.get_format({"plugin": "posit8", "es": es})


@pytest.fixture
def lns():
    """Return a function gamma -> the logarithmic format."""
    return lambda gamma: altgrad.get_format({"plugin": "LNS", "gamma": gamma})


@pytest.fixture
def relative_error():
    """Return a function (format, options of quantize_model) -> rms of Q(w) - w over rms of w, w normal."""

    def error(format, **options):
        linear = torch.nn.Linear(256, 256, bias=False)
        torch.nn.init.normal_(linear.weight, std=0.02, generator=torch.Generator().manual_seed(0))
        exact = linear.weight.detach().T
        altgrad.quantize_model(torch.nn.Sequential(linear), format, **options)
        rounded = linear(torch.eye(256)).detach()
        return float((rounded - exact).norm() / exact.norm())

    return error
