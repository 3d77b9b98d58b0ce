"""Scales of grid-stored weights: what a step on a CPU moves as numbers, beside what tensors say."""

import pytest
import torch

from altgrad_core.format import Format
from altgrad_core.grid_scales import GridScales

CODEBOOK = Format(name="CODEBOOK", bits=4, values=[-3.0, -1.25, -0.5, 0.0, 0.25, 0.75, 1.5, 3.0])


@pytest.fixture(params=[(0.0, False), (8.0, False), (0.3, True)], ids=["free", "bound", "tight"])
def scales(request, table):
    """Return what makes scales of weights of every kind: also one of zeros, and one that does not move."""
    bound, shrink_early = request.param
    formats = [table("E4M3"), table("E7M0"), table("E0M7"), CODEBOOK, table("E4M3"), table("E5M2")]
    margins = [1.0, 1.0, 1.0, 1.0, 1.3, 1.0]

    def make():
        draws = torch.Generator().manual_seed(0)
        weights = [0.02 * torch.randn(64, generator=draws) for _ in formats]
        weights[2].zero_()
        return GridScales(
            weights,
            formats,
            [torch.ones(()) for _ in formats],
            fitted=[True] * 6,
            adaptive=[True] * 5 + [False],
            bound=bound,
            margins=margins,
            shrink_early=shrink_early,
            adjustments=[1.0, 2.0, 1.0, 1.0, 0.5, 1.0],
        )

    return make


def test_the_limits_are_the_same_as_numbers_and_as_tensors(scales):
    found = scales()
    limits = found.limits()
    if limits is None:
        assert {one.limits for one in found.on_host()} == {(-torch.inf, torch.inf)}
    else:
        assert torch.equal(torch.tensor([one.limits for one in found.on_host()]), limits)


def test_scales_that_some_weights_move_are_those_that_tensors_move(scales):
    by_numbers, by_tensors = scales(), scales()
    draws = torch.Generator().manual_seed(1)
    for step in range(40):
        amax = torch.exp2(torch.randn(6, generator=draws, dtype=torch.float64) * 4 - 6)
        amax[torch.rand(6, generator=draws) < 0.5] = 0.0
        amax[step % 6] = [torch.nan, torch.inf, 1e-3, 1e-3][step % 4]
        by_tensors.adapt(amax)
        by_numbers.adapt_some({place: one for place, one in enumerate(amax.tolist()) if one})
        assert by_numbers.on_host() == by_tensors.on_host()
    for key, one in by_tensors.state_dict().items():
        assert torch.equal(by_numbers.state_dict()[key], one)
    assert torch.equal(torch.stack(by_numbers.scales), torch.stack(by_tensors.scales))
    assert by_tensors.rescales.tolist()[-1] == 0
    assert min(by_tensors.rescales.tolist()[:-1]) > 0
