import math

import numpy as np
import pytest
import torch

from altgrad_core.random_bits import (
    RESOLUTION,
    _split_mix,
    bits_to_uniform,
    draw_seed,
    mix_,
    stream_keys,
    uniform,
)

COUNT = 2**20
KEYS = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1234, 99999, 49), (2**63 - 1, 2**63 - 1, 2**63 - 1)]


def words(key, count=COUNT):
    return mix_(torch.arange(count, dtype=torch.int32), *stream_keys(key)).numpy().view(np.uint32)


def centered(key):
    return uniform(key, COUNT).double() - 0.5


def reference_word(index, key):
    """The definition in Python integers."""
    first, second = (k % 2**32 for k in stream_keys(key))
    x = (index + first) * 0xED5AD4BB % 2**32
    x = ((x ^ (x >> 15)) * 0xAC4C1B51 + second) % 2**32
    return (x ^ (x >> 15)) * 0x31848BAB % 2**32


def chi_square_score(cells, bins):
    """Standard deviations by which the cells' chi-square is off that of a uniform distribution."""
    expected = len(cells) / bins
    chi_square = ((np.bincount(cells, minlength=bins) - expected) ** 2).sum() / expected
    return (chi_square - (bins - 1)) / math.sqrt(2 * (bins - 1))


# --- what the stream is -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "first_words"),
    [
        ((0, 0, 0), ["0xbe3c2e4", "0xaebfc501", "0xe3bcc6df", "0x995c38ae"]),
        ((1, 2, 3), ["0x4cd054da", "0x9d233d90", "0xf9a0f6a", "0x605dd7f3"]),
        ((2**63 - 1, 10**6, 50), ["0x8f7a8f0c", "0x77d596f1", "0x5c2ea90c", "0xc9a0d40a"]),
    ],
)
def test_the_stream_never_changes(key, first_words):
    assert [hex(word) for word in words(key, 4)] == first_words
    assert uniform(key, 4).tolist() == [(int(word, 16) >> 8) * 2.0**-24 for word in first_words]


@pytest.mark.parametrize("key", KEYS)
def test_the_tensor_arithmetic_is_the_32_bit_arithmetic_of_the_definition(key):
    assert words(key, 200).tolist() == [reference_word(i, key) for i in range(200)]


def test_split_mix_gives_the_published_first_output_of_seed_zero():
    assert _split_mix(0) == 0xE220A8397B1DCDAF


def test_numbers_are_multiples_of_the_resolution_below_one():
    drawn = uniform((3, 1, 4), COUNT)
    assert drawn.dtype == torch.float32
    assert torch.equal((drawn / RESOLUTION).round() * RESOLUTION, drawn)
    assert 0 <= drawn.min() < 1e-5
    assert 1 - 1e-5 < drawn.max() <= 1 - RESOLUTION


def test_the_largest_bits_stay_below_one():
    assert bits_to_uniform(torch.tensor([-1, 0, 255], dtype=torch.int32)).tolist() == [1 - 2**-24, 0.0, 0.0]


def test_the_shape_only_lays_the_stream_out():
    flat = uniform((5, 6, 7), 24)
    assert torch.equal(uniform((5, 6, 7), (2, 3, 4)), flat.reshape(2, 3, 4))
    assert torch.equal(uniform((5, 6, 7), 10), flat[:10])
    assert uniform((5, 6, 7), ()).shape == ()
    assert uniform((5, 6, 7), (0, 3)).shape == (0, 3)


def test_threads_do_not_matter():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = uniform((1, 1, 1), COUNT)
        torch.set_num_threads(2)
        assert torch.equal(uniform((1, 1, 1), COUNT), one)
    finally:
        torch.set_num_threads(before)


def test_keys_may_be_tensors():
    first, second = stream_keys((1, 2, 3))
    index = torch.arange(9, dtype=torch.int32)
    keys = [torch.tensor(key, dtype=torch.int32) for key in (first, second)]
    assert torch.equal(mix_(index.clone(), *keys), mix_(index.clone(), first, second))


@pytest.mark.parametrize("key", [(-1, 0, 0), (0, 2**63, 0), (0, 0, -5)])
def test_a_key_out_of_range_is_refused_by_name(key):
    name = ("seed", "step", "tensor")[[0 <= part < 2**63 for part in key].index(False)]
    with pytest.raises(ValueError, match=f"the {name} of a random stream"):
        uniform(key, 3)


def test_a_stream_too_long_for_its_index_is_refused():
    with pytest.raises(ValueError, match="at most 2\\^31 elements"):
        uniform((0, 0, 0), (2**16, 2**16), device="meta")


# --- whether it looks random --------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("shift", [24, 16, 8], ids=["high bits", "middle bits", "low bits"])
def test_256_bins_fill_evenly(key, shift):
    assert abs(chi_square_score((words(key) >> shift) & 255, 256)) < 5


@pytest.mark.parametrize("key", KEYS)
def test_neighboring_pairs_fill_a_64_by_64_square_evenly(key):
    top = words(key).astype(np.int64) >> 26
    assert abs(chi_square_score(top[:-1] * 64 + top[1:], 4096)) < 5


@pytest.mark.parametrize("key", KEYS)
def test_mean_and_variance_are_those_of_the_uniform_distribution(key):
    v = centered(key)
    assert abs(v.mean()) < 5 / math.sqrt(12 * COUNT)
    assert abs(v.square().mean() * 12 - 1) < 5 * math.sqrt(0.8 / COUNT)


@pytest.mark.parametrize("lag", [1, 2, 3, 8, 64, 384, 4096])
def test_elements_are_uncorrelated_along_the_stream(lag):
    v = centered((11, 12, 13))
    assert abs((v[:-lag] * v[lag:]).mean() * 12) < 5 / math.sqrt(COUNT - lag)


@pytest.mark.parametrize("other", [(8, 500, 3), (7, 501, 3), (7, 500, 4), (7, 3, 500), (500, 7, 3)])
@pytest.mark.parametrize("lag", [0, 1, 2])
def test_streams_of_neighboring_keys_are_uncorrelated(other, lag):
    v, w = centered((7, 500, 3)), centered(other)
    assert abs((v[lag:] * w[: COUNT - lag]).mean() * 12) < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("other", [(8, 500, 3), (7, 501, 3), (7, 500, 4), (7, 3, 500), (500, 7, 3)])
def test_streams_of_neighboring_keys_share_no_more_numbers_than_chance(other):
    equal = int((words((7, 500, 3)) >> 8 == words(other) >> 8).sum())
    assert equal <= 3  # 2^20 elements of 2^24 values: 1/16 expected


def test_one_element_is_random_from_step_to_step_and_tensor_to_tensor():
    v = np.array(
        [words((1, step, tensor), 1)[0] / 2**32 - 0.5 for step in range(200) for tensor in range(50)]
    )
    assert abs(v.mean()) < 5 / math.sqrt(12 * len(v))
    assert abs((v[:-1] * v[1:]).mean() * 12) < 5 / math.sqrt(len(v))
    assert abs((v[:-50] * v[50:]).mean() * 12) < 5 / math.sqrt(len(v))


def test_each_input_bit_changes_half_of_the_output_bits():
    first, second = stream_keys((1, 2, 3))
    index = torch.arange(2**14, dtype=torch.int32)
    plain = mix_(index.clone(), first, second)
    for bit in range(31):
        changed = (mix_(index ^ (1 << bit), first, second) ^ plain).numpy().view(np.uint32)
        shares = [((changed >> out) & 1).mean() for out in range(8, 32)]
        assert min(shares) > 0.46
        assert max(shares) < 0.54


# --- seeds --------------------------------------------------------------------------------------------


def test_a_seed_advances_the_generator_once_and_leaves_the_global_one():
    generator = torch.Generator().manual_seed(5)
    state = torch.get_rng_state()
    seeds = [draw_seed(generator) for _ in range(3)]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**53
    assert torch.equal(torch.get_rng_state(), state)
    assert draw_seed(torch.Generator().manual_seed(5)) == seeds[0]


def test_no_generator_gives_seed_zero():
    assert draw_seed(None) == 0
