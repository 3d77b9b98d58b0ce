"""Tensors laid end to end: who shares a row, what is spread over it, and what comes back."""

import math

import pytest
import torch

from altgrad_core import rows, scaling
from altgrad_core.landing import landed
from altgrad_core.random_bits import stream_key_table, stream_key_tensor, uniform_like
from altgrad_core.rows import Row, among, in_rows, norms

SHAPES = ((3, 4), (7,), (5, 1), (0,), (2, 2, 2))


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def of_sizes(*sizes, dtype=torch.float32, device="cpu"):
    return [torch.empty(size, dtype=dtype, device=device) for size in sizes]


# --- who shares a row -------------------------------------------------------------------------------------


def test_tensors_of_one_kind_share_a_row():
    assert list(in_rows(of_sizes(2, 3, 4), [1, 2, 1])) == [[0, 2], [1]]


def test_dtypes_and_devices_do_not_share_a_row():
    mixed = [*of_sizes(2), *of_sizes(2, dtype=torch.float64), *of_sizes(2, device="meta")]
    assert list(in_rows(mixed, [0, 0, 0])) == [[0], [1], [2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_alone(dtype):
    assert list(in_rows(of_sizes(2, 3, dtype=dtype), [0, 0])) == [[0], [1]]


def test_a_row_is_no_longer_than_what_a_cpu_keeps_in_its_cache():
    third = rows.LONGEST_ON_CPU // 3
    assert list(in_rows(of_sizes(third, third, third, third), [0] * 4)) == [[0, 1, 2], [3]]


def test_a_tensor_as_long_as_a_row_is_alone_and_ends_no_other():
    assert list(in_rows(of_sizes(5, rows.LONGEST_ON_CPU, 5), [0] * 3)) == [[1], [0, 2]]


def test_a_row_is_longer_on_a_device():
    assert list(in_rows(of_sizes(rows.LONGEST_ON_CPU, 5, device="meta"), [0] * 2)) == [[0, 1]]


def test_tensors_without_elements_share_a_row():
    assert list(in_rows(of_sizes(0, 0), [0] * 2)) == [[0, 1]]


# --- there and back ---------------------------------------------------------------------------------------


def test_parts_are_what_was_laid_end_to_end(tensors):
    row = Row(tensors)
    assert all(map(torch.equal, row.parts(row.of(tensors)), tensors))


def test_a_row_of_one_tensor_is_its_own_memory():
    x = torch.ones(2, 3)
    Row([x]).of([x]).mul_(2)
    assert torch.equal(x, torch.full((2, 3), 2.0))


@pytest.mark.parametrize("count", [1, 2])
def test_what_changed_in_place_comes_back_to_tensors_in_any_layout(count):
    weights = [torch.arange(6.0).view(3, 2).t() for _ in range(count)]
    row = Row(weights)
    changed = row.of(weights)
    changed.mul_(2)
    row.write_back(changed, weights)
    assert all(torch.equal(weight, 2 * torch.arange(6.0).view(3, 2).t()) for weight in weights)


def test_numbers_are_spread_over_their_tensors_elements(tensors):
    row = Row(tensors)
    found = row.spread([torch.tensor(float(place)) for place in range(len(tensors))])
    assert found.tolist() == [0.0] * 12 + [1.0] * 7 + [2.0] * 5 + [4.0] * 8


def test_a_scale_for_each_channel_is_spread_along_it():
    row = Row([torch.empty(2, 3), torch.empty(2)])
    found = row.spread([torch.tensor([[1.0], [2.0]]), torch.tensor(3.0)])
    assert found.tolist() == [1, 1, 1, 2, 2, 2, 3, 3]


def test_numbers_of_a_tensor_alone_stay_as_they_are():
    row = Row([torch.empty(2, 3)])
    assert row.spread([torch.tensor(3.0)]).shape == ()
    assert row.pairs([torch.tensor([3.0, 4.0])]).shape == (2,)


def test_each_tensor_of_a_row_draws_the_numbers_of_its_own_stream(tensors):
    row = Row(tensors)
    streams = [stream_key_tensor((1, 2, place)) for place in (9, 0, 4, 1, 7)]
    found = row.parts(uniform_like(row.of(tensors), row.keys(streams)))
    assert all(map(torch.equal, found, map(uniform_like, tensors, streams)))


def test_a_table_of_keys_holds_the_keys_of_each_stream():
    expected = [stream_key_tensor((2**62 + 7, 2**40, tensor)) for tensor in range(3, 50)]
    assert torch.equal(stream_key_table(2**62 + 7, 2**40, range(3, 50)), torch.stack(expected))
    assert torch.equal(stream_key_table(2**62 + 7, 2**40, list(range(3, 50))), torch.stack(expected))


@pytest.mark.parametrize("rounding", ["nearest_even", "stochastic"])
def test_a_row_lands_as_its_tensors_do_alone(tensors, table, rounding):
    row, e4m3 = Row(tensors), table("E4M3")
    scales = [torch.tensor(2.0**place) for place in (3, -2, 7, 0, 5)]
    limits = [torch.tensor([-1.0 - place, 2.0 + place]) for place in range(5)]
    streams = [stream_key_tensor((1, 2, place)) for place in range(5)]
    scale, keys = row.spread(scales), row.keys(streams) if rounding == "stochastic" else None
    found = row.parts(landed(row.of(tensors), scale, scale, row.pairs(limits), keys, e4m3))
    for x, one, scale, limit, key in zip(tensors, found, scales, limits, streams, strict=True):
        own = key if rounding == "stochastic" else None
        assert torch.equal(one, e4m3.fake_quantize(x, scale, rounding, keys=own, limit=limit))


# --- one number for each tensor ---------------------------------------------------------------------------


def test_the_largest_magnitude_is_that_of_each_tensor():
    parts = [torch.tensor([1.0, -3.0]), torch.tensor([]), torch.tensor([2.0])]
    row = Row(parts)
    assert row.amax(row.of(parts)).tolist() == [3.0, 0.0, 2.0]
    assert norms(parts, math.inf).tolist() == [3.0, 0.0, 2.0], "as it is found on a device"


def test_the_largest_magnitude_beside_a_nan_is_nan_there_only():
    parts = [torch.tensor([1.0, math.nan]), torch.tensor([2.0])]
    for found in (scaling.amax(parts), norms(parts, math.inf)):
        assert found[0].isnan()
        assert found[1] == 2.0


def test_counts_are_those_of_each_tensor():
    row = Row([torch.empty(2), torch.empty(3)])
    assert row.counts(torch.tensor([True, False, True, False, True])).tolist() == [1, 2]


def test_counts_on_a_device_are_exact_past_what_float32_holds():
    ones = torch.ones(1).expand(2**24 + 1)
    assert norms([ones], 1).long().tolist() == [2**24 + 1]


def test_values_stand_at_their_places_among_zeros():
    assert among(4, {2: torch.tensor(5.0), 0: torch.tensor(7.0)}).tolist() == [7.0, 0.0, 5.0, 0.0]
