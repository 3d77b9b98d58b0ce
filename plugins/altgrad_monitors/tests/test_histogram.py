"""Counts and quantiles worked out by hand."""

import pytest
import torch

from altgrad_monitors.histogram import binned, quantile_bin


def test_each_index_is_counted_and_absent_ones_are_zero():
    assert binned(torch.tensor([3, 0, 3], dtype=torch.int32), 5).tolist() == [1, 0, 0, 2, 0]
    assert binned(torch.tensor([], dtype=torch.int32), 2).tolist() == [0, 0]


@pytest.mark.parametrize(("share", "bin"), [(0.01, 1), (0.25, 1), (0.26, 3), (0.75, 3), (0.76, 4), (1.0, 4)])
def test_a_quantile_is_the_first_bin_up_to_which_the_share_lies(share, bin):
    assert int(quantile_bin(torch.tensor([0, 1, 0, 2, 1]), share)) == bin


def test_quantiles_of_more_elements_than_float32_counts_are_exact():
    assert int(quantile_bin(torch.tensor([2**24, 2**24 + 2]), 0.5)) == 1
