import functools

import pytest
import torch

from altgrad_core.format import Format

# name: exponent bits, mantissa bits, bias, magnitude codes that are no number
FORMATS = {
    "E0M7": (0, 7, 0, 0),
    "E1M6": (1, 6, 0, 0),
    "E4M3": (4, 3, 7, 1),
    "E5M2": (5, 2, 15, 4),
    "E6M1": (6, 1, 31, 0),
    "E7M0": (7, 0, 63, 0),
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """On tensors as small as these, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def _table(name):
    exponent_bits, mantissa_bits, bias, reserved = FORMATS[name]
    magnitude = torch.arange(2 ** (exponent_bits + mantissa_bits) - reserved)
    e, m = magnitude >> mantissa_bits, (magnitude & (2**mantissa_bits - 1)).double()
    power = torch.exp2((e.clamp(min=1) - bias).double()) if exponent_bits else 2.0**-bias
    hidden = (e > 0).double() if exponent_bits else 0.0
    values = power * (hidden + m / 2**mantissa_bits)
    return Format(name=name, bits=8, values=torch.cat((-values[1:].flip(0), values)))


@pytest.fixture(scope="session")
def table():
    """Return a function from a format's name to its table of values: no other plugin is needed."""
    return _table


@pytest.fixture(scope="session")
def formats():
    """Every kind of 8-bit format: uniform, with subnormals, powers of two only, and a lopsided codebook."""
    codebook = Format(name="CODEBOOK", bits=4, values=[-3.0, -1.25, -0.5, 0.0, 0.25, 0.75, 1.5, 3.0])
    return [*map(_table, FORMATS), codebook]
