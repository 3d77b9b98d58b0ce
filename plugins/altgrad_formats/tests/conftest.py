"""Shared by the tests of this plugin: bitwise comparison, inputs worth trying, and gfloat as an oracle."""

import gfloat
import numpy as np
import pytest
import torch
from gfloat.types import Domain

MODES = {
    "nearest_even": gfloat.RoundMode.TiesToEven,
    "nearest_away": gfloat.RoundMode.TiesToAway,
    "toward_zero": gfloat.RoundMode.TowardZero,
    "up": gfloat.RoundMode.TowardPositive,
    "down": gfloat.RoundMode.TowardNegative,
}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small tensors are slower on two threads than on one, twenty times where the second core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _differences(a, b):
    integer = torch.int64 if a.dtype == torch.float64 else torch.int32
    return ~((a.isnan() & b.isnan()) | (a.view(integer) == b.view(integer)))


@pytest.fixture(scope="session")
def assert_same_bits():
    """Return a function that compares two float32 or float64 results of x, any NaN equal to any other."""

    def check(x, seen, expected):
        assert seen.dtype == expected.dtype
        assert seen.shape == expected.shape
        wrong = _differences(seen, expected).nonzero()
        if len(wrong):
            at = int(wrong[0])
            values = (x[at].item(), seen[at].item(), expected[at].item())
            pytest.fail("{} of {} differ: x = {!r} gives {!r}, not {!r}".format(len(wrong), len(x), *values))

    return check


@pytest.fixture(scope="session")
def edges():
    """Return a function (format, dtype) -> all codes, midpoints, the ends, and both neighbors of each."""

    def points(format, dtype=torch.float32):
        values = format.values.double()
        if len(values) > 2**13:  # 16 bits: both ends, around zero, and every 29th (a prime) between
            keep = torch.zeros(len(values), dtype=torch.bool)
            keep[::29] = True
            middle = len(values) // 2
            for at in (0, middle - 300, len(values) - 600):
                keep[at : at + 600] = True
            values = values[keep]
        beyond = 2 * values[-1] - values[-2]
        special = torch.tensor([0.0, 1e-45, 1e-38, 3.4e38, np.inf], dtype=torch.float64)
        ends = torch.stack((beyond, (values[-1] + beyond) / 2, values[-1] * 1.5, values[-1] * 3))
        x = torch.cat((values, (values[1:] + values[:-1]) / 2, ends, -ends, special, -special)).to(dtype)
        up, down = torch.full_like(x, np.inf), torch.full_like(x, -np.inf)
        return torch.cat((x, torch.nextafter(x, up), torch.nextafter(x, down), x.new_tensor([np.nan])))

    return points


@pytest.fixture(scope="session")
def random_patterns():
    """Return a function (format, count) -> float32: half any bit pattern, half near the format's values."""

    def patterns(format, count, seed=0):
        rng = np.random.default_rng(seed)
        anything = rng.integers(0, 2**32, count // 2, dtype=np.uint32).view(np.float32)
        values = torch.from_numpy(rng.choice(format.values.double().numpy(), count - count // 2))
        near = values * torch.from_numpy(rng.uniform(0.4, 2.1, count - count // 2))
        return torch.cat((torch.from_numpy(anything), near.float()))

    return patterns


def _info(layout, more_exponent_bits=0):
    """Return gfloat's description: precision M + 1, and a bias one larger where there is no exponent."""
    bounded = more_exponent_bits == 0
    nans = {"finite": 0, "fn": 1, "ieee": 2**layout.mantissa_bits - 1}[layout.specials]
    return gfloat.FormatInfo(
        layout.shape,
        layout.bits + more_exponent_bits,
        layout.mantissa_bits + 1,
        bias=layout.bias + (layout.exponent_bits == 0),
        is_signed=True,
        domain=Domain.Extended if layout.specials == "ieee" and bounded else Domain.Finite,
        has_nz=True,
        num_high_nans=nans if bounded else 0,
        has_subnormals=True,
        is_twos_complement=False,
    )


@pytest.fixture(scope="session")
def gfloat_rounds():
    """Return a function that rounds by gfloat, which raises where it cannot represent the result."""

    def rounded(format, x, mode, overflow="saturate"):
        v = x.double().numpy()
        finite_or_inf = ~np.isnan(v)
        result = np.full_like(v, np.nan)
        saturate = overflow == "saturate"
        with np.errstate(over="ignore"):  # gfloat scales before it clamps
            result[finite_or_inf] = gfloat.round_ndarray(
                _info(format.layout), v[finite_or_inf], MODES[mode], saturate
            )
        return torch.from_numpy(result).to(x.dtype)

    return rounded


@pytest.fixture(scope="session")
def gfloat_unbounded():
    """Return a function that rounds by gfloat with one exponent bit more than the format has."""

    def rounded(format, x, mode):
        with np.errstate(over="ignore"):  # of a BF16 with one exponent bit more, in its `max`
            result = gfloat.round_ndarray(_info(format.layout, 1), x.double().numpy(), MODES[mode], sat=True)
        return torch.from_numpy(result)

    return rounded


@pytest.fixture(scope="session")
def gfloat_decodes():
    """Return a function (format) -> the float64 value of each code, by gfloat."""

    def decoded(format):
        info = _info(format.layout)
        return torch.tensor([gfloat.decode_float(info, code).fval for code in range(2**format.bits)])

    return decoded
