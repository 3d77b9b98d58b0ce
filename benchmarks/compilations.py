"""What new formats cost at their first use: compilations, which take seconds each."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch
from race import wall_seconds
from torch import Tensor
from torch._dynamo.utils import counters

import altgrad_core as altgrad
from altgrad_formats.layout import MOST_BITS, default_bias

FORMATS = 40
LINE = (
    "torch.compile: {compiled_before} compilations before, {compiled} for {formats} new formats, {given_up}"
    " given up; the slowest first call of a format took {slowest_first_call:.1f} times the median"
)


def unseen_formats() -> list[altgrad.Format]:
    """Return 40 ExMy formats of 5 to 16 bits."""
    shapes = [(e, bits - 1 - e) for bits in range(5, MOST_BITS + 1) for e in range(7) if e < bits]
    tables = [
        {"exponent_bits": e, "mantissa_bits": m, "bias": default_bias(e, m) + 1}  # no named format's bias
        for e, m in shapes
    ]
    return [altgrad.get_format(table) for table in tables[::2][:FORMATS]]


def counted(formats: Sequence[altgrad.Format], x: Tensor) -> dict[str, float]:
    """Return what torch.compile made, and gave up on, before these formats were used and while.

    Kernels may be compiled otherwise too: that would show in the slowest first call of a format.
    """

    def compiled_and_given_up() -> tuple[int, int]:
        frames = counters["frames"]
        return counters["stats"]["unique_graphs"], frames["total"] - frames["ok"]

    generator = torch.Generator().manual_seed(0)
    before, first_calls = compiled_and_given_up(), []
    for format in formats:
        first_calls.append(wall_seconds(lambda format=format: format.quantize(x), x.device.type))
        for _ in range(2):
            format.quantize(x, "stochastic", generator=generator)
            format.decode(format.encode(x))
    compiled, given_up = (now - then for now, then in zip(compiled_and_given_up(), before, strict=True))
    return {
        "formats": len(formats),
        "compiled_before": before[0],
        "compiled": compiled,
        "given_up": given_up,
        "slowest_first_call": max(first_calls) / statistics.median(first_calls),
    }
