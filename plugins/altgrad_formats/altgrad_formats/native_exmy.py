"""The loops of exmy.c for one layout, called on tensors: what `ExMy` does on a CPU, in one pass."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from altgrad_core import native
from altgrad_formats.layout import Layout
from altgrad_formats.one_kernel import constants, in_reach

_SOURCE = Path(__file__).with_name("exmy.c")


@functools.cache
def _loops() -> ctypes.CDLL | None:
    """Return the compiled file with the types of its arguments declared; None where there is none."""
    loops = native.library(_SOURCE)
    if loops is not None:
        pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
        limits = [number, number, number]
        loops.quantize.argtypes = [pointer, pointer, count, count, pointer, *limits, pointer, pointer]
        for name in ("encode_bytes", "encode_words", "decode_bytes", "decode_words"):
            getattr(loops, name).argtypes = [pointer, pointer, count, pointer]
    return loops


class NativeExMy:
    """The loops for one layout; `serves` says for which tensors there is one."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        numbers = constants(layout) if in_reach(layout, "nearest_even") else []
        self._constants = torch.tensor(numbers, dtype=torch.int32, device="cpu")

    def serves(self, x: Tensor, rounding: str = "nearest_even") -> bool:
        """Whether there is a loop for this tensor and rounding, and a compiler to make it."""
        return in_reach(self._layout, rounding) and native.serves(x) and _loops() is not None

    def quantize(
        self,
        x: Tensor,
        scale: Tensor | None,
        keys: Tensor | None,
        limit: Tensor | None,
        beyond: float,
    ) -> Tensor:
        """Return x rounded as `Format.fake_quantize` says; scale: None, 0-d, or (..., 1) for rows of x."""
        x = x.contiguous()
        out = torch.empty_like(x)
        scales = torch.ones(1, dtype=torch.float32, device="cpu") if scale is None else scale.contiguous()
        low, high = (-math.inf, math.inf) if limit is None else limit.tolist()
        rows = scales.numel()
        native.in_use(_loops()).quantize(
            native.address(x),
            native.address(out),
            rows,
            x.numel() // rows,
            native.address(scales),
            low,
            high,
            beyond,
            native.address(keys),
            native.address(self._constants),
        )
        return out

    def encode(self, x: Tensor) -> tuple[Tensor, bool]:
        """Return the codes of x, uint8 up to 8 bits, else int16, and whether an element is NaN."""
        x = x.contiguous()
        byte = self._layout.bits <= 8
        out = torch.empty(x.shape, dtype=torch.uint8 if byte else torch.int16, device="cpu")
        loops = native.in_use(_loops())
        loop = loops.encode_bytes if byte else loops.encode_words
        return out, bool(loop(*map(native.address, (x, out)), x.numel(), native.address(self._constants)))

    def decodes(self, codes: Tensor) -> bool:
        """Whether there is a loop for codes of this type and size."""
        expected = torch.uint8 if self._layout.bits <= 8 else torch.int16
        right = codes.dtype == expected and in_reach(self._layout, "nearest_even")
        return right and native.plain(codes) and _loops() is not None

    def block_loops(self) -> native.BlockLoops | None:
        """Return the loops over blocks, for any rounding; None out of reach or without a compiler."""
        loops = _loops() if in_reach(self._layout, "stochastic") else None
        return None if loops is None else native.block_loops(loops, self._constants)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the float32 values of codes that `decodes`."""
        codes = codes.contiguous()
        out = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
        loops = native.in_use(_loops())
        loop = loops.decode_bytes if codes.dtype == torch.uint8 else loops.decode_words
        loop(*map(native.address, (codes, out)), codes.numel(), native.address(self._constants))
        return out
