"""Random numbers as a pure function of (seed, step, tensor, element): no state, no order, no device.

Stochastic rounding needs one uniform number per weight and step. A stateful generator makes a run
depend on the order in which tensors are visited and costs a pass over memory of its own; a hash of the
element's index under a key costs a few integer instructions, gives every element its number wherever and
whenever it is asked for, and fuses into the kernel that rounds (Salmon et al., "Parallel random numbers:
as easy as 1, 2, 3", 2011).

The host derives two 32-bit keys from (seed, step, tensor) by SplitMix64 (Steele, Lea and Flood, 2014).
Each element's 32-bit index is then shifted by the first key and multiplied three times by the odd constants
of the `triple32` permutation (C. Wellons' hash-prospector), with an exclusive-or of its upper bits into its
lower ones between them, and the second key added half way, so that two keys give two different permutations
and not two windows of one. The upper 24 bits are the number; triple32's outer two shifts, which serve the
lower bits, are left out, for they cost a third of the time. The tests hold what is left to chi-square,
serial correlation and avalanche. All arithmetic is 32-bit and wraps: compiled loops give the same bits.

Not for secrets. A stream is at most 2^31 elements long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

RESOLUTION = 2.0**-24
"""Spacing of the uniform numbers: the finest that float32 holds evenly on [0, 1)."""

Key = tuple[int, int, int]
"""(seed, step, tensor), each in [0, 2^63)."""

_WORD = 2**64 - 1
# SplitMix64's increment, 2^64 over the golden ratio; then shifts to the right and multipliers, in turn
_GOLDEN = 0x9E3779B97F4A7C15
_SPLIT_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_LONGEST_STREAM = 2**31


def _signed(word: int, bits: int = 32) -> int:
    """Return the low bits of `word` as the signed integer of the same pattern."""
    word &= 2**bits - 1
    return word - 2**bits if word >> (bits - 1) else word


# triple32's odd multipliers (github.com/skeeto/hash-prospector) as int32; of the shifts tried, that with the
# best avalanche of the upper 24 bits: no bit of the index flips one with a probability off 1/2 by over 0.02
_SHIFT = 15
_MULTIPLIERS = (_signed(0xED5AD4BB), _signed(0xAC4C1B51), _signed(0x31848BAB))


def _split_mix(word: int) -> int:
    """Return SplitMix64's output for the state `word` (a permutation of the 64-bit integers)."""
    word = (word + _GOLDEN) & _WORD
    for shift, multiplier in _SPLIT_MIX:
        word = ((word ^ (word >> shift)) * multiplier) & _WORD
    return word


def _split_mix_of(words: Tensor) -> Tensor:
    """Return `_split_mix` of each int64, whose product wraps; the shift is a logical one."""
    words = words + _signed(_GOLDEN, 64)
    for shift, multiplier in _SPLIT_MIX:
        words = (words ^ (words >> shift & 2 ** (64 - shift) - 1)) * _signed(multiplier, 64)
    return words


def stream_keys(key: Key) -> tuple[int, int]:
    """Return the two int32 keys of the stream (seed, step, tensor), for `mix_` and compiled kernels.

    Raises ValueError where a part of the key is not in [0, 2^63).
    """
    state = 0
    for name, part in zip(("seed", "step", "tensor"), key, strict=True):
        state = _next_state(state, name, part)
    return _signed(state), _signed(state >> 32)


def stream_state(seed: int, step: int) -> int:
    """Return what the keys of all tensors' streams in a step follow from, a 64-bit word.

    They are SplitMix64's output for its exclusive or with the tensor's number, the low half first.
    """
    return _next_state(_next_state(0, "seed", seed), "step", step)


def _next_state(state: int, name: str, part: int) -> int:
    if not 0 <= part < 2**63:
        raise ValueError(f"the {name} of a random stream is in [0, 2^63), not {part!r}")
    return _split_mix(state ^ part)


def _xor_shift_(x: Tensor, shift: int) -> None:
    """x ^= x >> shift in place, the shift a logical one (torch's keeps the sign)."""
    x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (32 - shift) - 1))


def mix_(index: Tensor, first: int | Tensor, second: int | Tensor) -> Tensor:
    """Overwrite element indices (int32) by 32 random bits under the two keys, the upper 24 good; return them.

    The keys may be int32 tensors, 0-d, so that a compiled kernel need not be compiled again for each, or one
    of each element.
    """
    index.add_(first).mul_(_MULTIPLIERS[0])
    _xor_shift_(index, _SHIFT)
    index.mul_(_MULTIPLIERS[1]).add_(second)
    _xor_shift_(index, _SHIFT)
    return index.mul_(_MULTIPLIERS[2])


def bits_to_uniform(bits: Tensor) -> Tensor:
    """Return the upper 24 of each 32 random bits (int32) as a float32 in [0, 1)."""
    return ((bits >> 8).bitwise_and_(0xFFFFFF)).to(torch.float32).mul_(RESOLUTION)


def uniform(key: Key, shape: int | Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Return float32 numbers in [0, 1), multiples of 2^-24: the stream `key` laid out in `shape`.

    Element i in row-major order is the stream's i-th number, whatever the shape; the first numbers of a
    longer stream are those of the shorter one.

    Raises ValueError for more than 2^31 elements or a key out of range.
    """
    size = (shape,) if isinstance(shape, int) else tuple(shape)
    count = math.prod(size)
    if count > _LONGEST_STREAM:
        raise ValueError(f"a random stream has at most 2^31 elements, not {count}; split the tensor")
    first, second = stream_keys(key)
    index = torch.arange(count, dtype=torch.int32, device=device)
    return bits_to_uniform(mix_(index, first, second)).reshape(size)


def stream_key_tensor(key: Key, device: torch.device | str | None = None) -> Tensor:
    """Return `stream_keys` as (2,) int32, for kernels: a new key then needs no new compilation."""
    first, second = stream_keys(key)
    keys = torch.full((2,), first, dtype=torch.int32, device=device)
    keys[1:].fill_(second)  # a copy from the host would make it wait for the device
    return keys


def stream_key_table(
    seed: int, step: int, tensors: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Return `stream_key_tensor` of (seed, step, tensor) for several tensors, (n, 2).

    A `range` of tensors is made on the device: nothing is copied from the host, which would have to wait.
    """
    if tensors and not 0 <= min(tensors) <= max(tensors) < 2**63:
        raise ValueError(f"the tensor of a random stream is in [0, 2^63), not {min(tensors)}")
    common = stream_state(seed, step)
    numbers = (
        torch.arange(tensors.start, tensors.stop, tensors.step, dtype=torch.int64, device=device)
        if isinstance(tensors, range)
        else torch.tensor(tensors, dtype=torch.int64, device=device)
    )
    states = _split_mix_of(numbers ^ _signed(common, 64))
    return torch.stack((states, states >> 32), dim=1).to(torch.int32)  # the low word comes first


def uniform_like(x: Tensor, keys: Tensor) -> Tensor:
    """Return the stream of `stream_key_tensor`'s keys, laid out in x's shape: the numbers of `uniform`.

    keys: (2,), or (elements, 2) with those of each element (`rows.Row.keys`).
    """
    index = torch.arange(x.numel(), dtype=torch.int32, device=x.device)
    return bits_to_uniform(mix_(index, *keys.unbind(-1))).reshape(x.shape)


def draw_seed(generator: torch.Generator | None) -> int:
    """Draw a 63-bit seed from `generator`, which advances once; None gives 0."""
    if generator is None:
        return 0
    return int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device).item())
