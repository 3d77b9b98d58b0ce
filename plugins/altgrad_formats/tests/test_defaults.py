"""What torch takes by default, where nothing is said, is no business of a format's."""

import pytest
import torch

import altgrad_core as altgrad
from altgrad_core.format import Format


def made():
    table = Format(name="LOPSIDED", bits=4, values=[-8.0, -3.0, -0.5, 0, 0.1875, 0.25, 1, 2, 5, 6])
    return [table, *map(altgrad.get_format, ("E4M3", "E7M0", "E0M7", "BF16"))]


def outcomes(format):
    x = torch.randn(5000, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    scale = torch.tensor(4.0, dtype=torch.float32, device="cpu")
    keys = torch.tensor([1, 2], dtype=torch.int32, device="cpu")
    generator = torch.Generator("cpu").manual_seed(1)
    rungs, codes = format.rung(x), format.encode(x)
    return [
        *(format.quantize(x, rounding=rounding) for rounding in ("nearest_even", "toward_zero")),
        format.quantize(x, rounding="stochastic", generator=generator),
        *(format.fake_quantize(x, scale, "stochastic", keys=keys), format.fake_quantize(x, scale)),
        *(rungs, format.from_rung(rungs), format.spacing(x), codes, format.decode(codes)),
    ]


@pytest.fixture(params=[torch.float64, torch.float16, torch.bfloat16, "meta"], ids=str)
def by_default(request):
    """Return a function that switches torch's default dtype, or device, to another one and back."""

    def switch(on):
        if request.param == "meta":
            torch.set_default_device("meta" if on else "cpu")
        else:
            torch.set_default_dtype(request.param if on else torch.float32)

    yield switch
    switch(False)
    torch.set_default_device(None)


@pytest.mark.parametrize("place", range(5))
def test_torchs_default_dtype_and_device_change_no_bit(by_default, place):
    expected = outcomes(made()[place])
    by_default(True)
    found = outcomes(made()[place])
    assert [(one.dtype, one.device) for one in found] == [(one.dtype, one.device) for one in expected]
    assert all(map(torch.equal, found, expected))
