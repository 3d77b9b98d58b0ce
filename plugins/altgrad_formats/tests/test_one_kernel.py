"""The kernel that takes the format as data: the same bits eager and compiled, and one compilation for all."""

import pytest
import torch
from torch._dynamo.utils import counters

from altgrad_core.random_bits import stream_key_tensor
from altgrad_formats import one_kernel
from altgrad_formats.exmy import ExMy

FORTY = [ExMy(e, m) for e in range(8) for m in range(9) if 4 <= e + m <= 9][:40]
KEYS = stream_key_tensor((1, 2, 3))


def patterns(count=20_000):
    bits = torch.randint(-(2**31), 2**31 - 1, (count,), generator=torch.Generator().manual_seed(1))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-45, 3.4e38])
    return torch.cat((special, bits.to(torch.int32).view(torch.float32)))


def by_kernel(kernel, format, x, keys, overflow):
    beyond = torch.tensor(format._beyond(overflow))
    layout = torch.tensor(one_kernel.constants(format.layout), dtype=torch.int32)
    return kernel(x, None, keys, None, beyond, layout)


def same_bits(a, b):
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(torch.int32), b[~nan].view(torch.int32))


@pytest.mark.parametrize("overflow", ["saturate", "ieee"])
@pytest.mark.parametrize("format", [*FORTY, ExMy(4, 3, 7, "fn"), ExMy(5, 2, 15, "ieee")], ids=repr)
def test_it_gives_the_bits_of_the_format(format, overflow):
    x = patterns()
    nearest = by_kernel(one_kernel.quantized, format, x, None, overflow)
    assert same_bits(nearest, format.quantize(x, overflow=overflow))
    stochastic = by_kernel(one_kernel.quantized, format, x, KEYS, overflow)
    assert same_bits(stochastic, format.fake_quantize(x, None, "stochastic", overflow, keys=KEYS))


@pytest.mark.slow
@pytest.mark.parametrize("keys", [None, KEYS], ids=["nearest", "stochastic"])
def test_forty_formats_and_many_shapes_take_one_compilation(keys):
    x = patterns()
    by_kernel(one_kernel.compiled, FORTY[0], x, keys, "saturate")
    before = counters["stats"]["unique_graphs"]
    for index, format in enumerate(FORTY):
        part = x[: 1000 + 17 * index]
        expected = by_kernel(one_kernel.quantized, format, part, keys, "saturate")
        assert same_bits(by_kernel(one_kernel.compiled, format, part, keys, "saturate"), expected)
    assert counters["stats"]["unique_graphs"] == before
