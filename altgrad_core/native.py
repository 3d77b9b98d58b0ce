"""Loops in C for the CPU: compiled once, kept, and called on tensors.

A rounding in eager torch passes over memory ten times and more; fused by torch.compile it passes once, but in
instructions enough to make stochastic rounding three times as slow as the same loop from a C compiler, after
ten seconds of compilation (docs/decisions/006-loops-in-c.md). So the formats' innermost loops have a C
file beside their Python: the same arithmetic, held to the same bits by tests.

`library(source)` compiles such a file with the machine's own C compiler, in half a second, into the cache
folder; what they share is in loops.h, which each of them finds. Where there is no compiler, or with
ALTGRAD_KERNELS=eager, it returns None after one warning, and everything stays eager: slower, with the same
bits.

Threads are torch's own: the file is compiled with OpenMP but not linked to it, so that it finds the runtime
which torch has loaded, and `torch.set_num_threads` holds for it too.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from altgrad_core.cache_folder import default_cache
from altgrad_core.kernels import VARIABLE

Table = TypeVar("Table")

FEWEST_ELEMENTS = 1024
"""Below this a call costs more than it saves."""


@attrs.frozen(kw_only=True)
class BlockLoops:
    """A format's arithmetic as C functions for the loops of others, which call them on a block at a time.

    Addresses of functions of float32 blocks that stay in a core's cache, n elements each, in one thread, of
    the types in loops.h:

        rungs     (const float *x, int32_t *rungs, int32_t n, const void *context)
        values    (const int32_t *rungs, float *x, int32_t n, const void *context), clamped to both ends
        moves     (const float *x, const float *down, const int32_t *draws, float *to, int32_t n,
                   const Walk *walk, Moved *moved, const void *context): to the values at
                   clamp(rung(x·scale) - k, low, high) over the scale, k being clamp(down, -clip, clip)
                   rounded stochastically to whole rungs (`whole_rungs`). What `moved` tells is added to
                   what is there; the value for a NaN may be anything
        spacings  (const float *x, float *spacings, int32_t n, float scale, const void *context), of x·scale,
                   over the scale
        quantize  (const float *x, float *out, int32_t n, uint32_t first, float scale, float low, float high,
                   const Keys *keys, const void *context), as `Format.fake_quantize`, saturating:
                   element i takes the number first + i of the keys' stream; keys NULL: to nearest even
        steps     (const float *before, const float *now, int32_t *same, float *shares, int32_t n,
                   float scale, const void *context): min(1, |now - before| over the spacing at before), to
                   float32's precision; and in `same`, unless it is NULL, -1 where both times the scale have
                   one rung, or are NaN, else 0

    They give the bits of `Format.rung`, `from_rung`, `spacing` and `fake_quantize`; the rung of NaN may be
    anything, but for `same`. `context` is the address of what they need, `owner` keeps it alive.
    """

    rungs: int
    values: int
    moves: int
    spacings: int
    quantize: int
    steps: int
    context: int
    owner: object = attrs.field(repr=False)


@attrs.frozen(kw_only=True)
class SpacingLoop:
    """A stiffness formula as a C function over blocks: the arguments and the bits are those of `spacings` in
    `BlockLoops`, with weights that are not scaled. A formula that has one offers it as `block_loop(format)`.
    """

    function: int
    context: int
    owner: object = attrs.field(repr=False)


_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fPIC")
_HEADER = Path(__file__).with_name("loops.h")
_PATIENCE = 120  # seconds for a compiler, on a machine that is busy


def serves(x: Tensor) -> bool:
    """Whether a loop in C may be called on this tensor: a plain float32 one of a CPU, outside of a trace."""
    return x.dtype == torch.float32 and plain(x)


def plain(x: Tensor) -> bool:
    """Whether a C function may read this tensor's memory, and it is large enough to be worth it.

    Not while somebody records or transforms what is done to it: torch.compile, torch.jit.trace, torch.func,
    and dispatch modes, which would see nothing, or find no memory.
    """
    return (
        not recording()
        and type(x) is Tensor
        and x.is_cpu
        and x.numel() >= FEWEST_ELEMENTS
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def recording() -> bool:
    """Whether somebody records what is done to tensors, so that a C function would do it unseen."""
    return torch.compiler.is_compiling() or torch._C._is_tracing() or is_in_torch_dispatch_mode()


def one_a_row(scale: Tensor | None, x: Tensor) -> bool:
    """Whether a scale is none, one float32 number, or one for each row of x along its last dimension."""
    if scale is None or (scale.dim() == 0 and scale.dtype == torch.float32 and scale.device == x.device):
        return True
    rows = scale.dim() == x.dim() and scale.shape == (*x.shape[:-1], 1)
    return rows and scale.dtype == torch.float32 and scale.device == x.device


class Blocks:
    """The block loops of formats, looked up once each, for as long as one call takes."""

    def __init__(self) -> None:
        self._found: dict[int, BlockLoops | None] = {}

    def of(self, format: LendsLoops) -> BlockLoops | None:
        """Return the loops of a format; None where it has none."""
        if id(format) not in self._found:
            self._found[id(format)] = format.block_loops()
        return self._found[id(format)]


class LendsLoops(Protocol):
    """A `Format`, which this module does not know."""

    def block_loops(self) -> BlockLoops | None: ...


def readable(*tensors: Tensor) -> bool:
    """Whether a loop that reads memory as it lies can take such tensors: float32, contiguous, on a CPU.

    No other class's: a subclass may have its numbers elsewhere, and no memory of its own.
    """
    for x in tensors:  # not all(...): it is asked of every tensor in every step
        if type(x) is not Tensor and type(x) is not Parameter:
            return False
        if not (x.dtype == torch.float32 and x.is_cpu and x.is_contiguous()) or x.is_neg() or not x.numel():
            return False
    return not torch._C._functorch.maybe_current_level()


def whereabouts(tensors: Sequence[Tensor]) -> list[tuple[object, ...]]:
    """Return what tables of addresses follow from: as long as it stays equal, so do they, and `readable` too.

    (Not for tensors under torch.func, which `recording` tells of.)
    """
    return [(x.data_ptr(), type(x), x.dtype, x.is_contiguous(), x.is_neg(), x.numel()) for x in tensors]


class KeptTables(Generic[Table]):
    """Tables for a loop in C, kept as long as what they were made of stays equal; they go with their owner.

    What a table holds addresses of must be among what it is made of (`whereabouts`), or owned by the table.
    """

    def __init__(self) -> None:
        self._found: WeakKeyDictionary[Any, dict[int, tuple[object, Table]]] = WeakKeyDictionary()

    def get(self, owner: object, part: object, made_of: object, make: Callable[[], Table]) -> Table:
        """Return the table of a part of the owner, made anew where there is none, or it has changed."""
        if torch._C._functorch.maybe_current_level():
            return make()  # what a transform wraps looks like what it wraps, and does not outlive it
        tables = self._found.setdefault(owner, {})
        found = tables.get(id(part))
        if found is None or found[0] != made_of:
            found = tables[id(part)] = made_of, make()
        return found[1]


def one_number(scale: Tensor) -> bool:
    """Whether a loop that reads one float32 number may read this scale."""
    return scale.dim() == 0 and scale.dtype == torch.float32 and scale.is_cpu


def too_few_for_threads(sizes: Sequence[int]) -> bool:
    """Whether threads must share each of so many elements, since one each would leave some idle."""
    return max(sizes) * torch.get_num_threads() > sum(sizes)


def block_loops(loops: ctypes.CDLL, context: Tensor, owner: object = None) -> BlockLoops:
    """Return the functions `block_rungs`, ... of a compiled file, for the context that a tensor holds."""
    names = "rungs", "values", "moves", "spacings", "quantize", "steps"
    addresses = {name: entry(loops, f"block_{name}") for name in names}
    return BlockLoops(**addresses, context=context.data_ptr(), owner=(context, owner))


def entry(loops: ctypes.CDLL, name: str) -> int:
    """Return the address of a function of a compiled file."""
    return ctypes.cast(getattr(loops, name), ctypes.c_void_p).value or 0


def address(x: Tensor | None) -> ctypes.c_void_p:
    """Return a contiguous tensor's memory, for a C function; NULL for None."""
    return ctypes.c_void_p(None if x is None else x.data_ptr())


@functools.cache
def library(source: Path) -> ctypes.CDLL | None:
    """Return the compiled C file, or None where it cannot be compiled, which is said once."""
    if os.environ.get(VARIABLE) == "eager":
        return None
    compilers = [
        found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := which(name))
    ]
    reason = "there is no C compiler; install one, or set CC"
    for compiler in dict.fromkeys(compilers):
        for extra in ("-fopenmp",), ():
            try:
                return _loaded(source, compiler, (*_FLAGS, *extra))
            except (OSError, subprocess.SubprocessError) as error:
                reason = f"{compiler} cannot compile {source.name}: {_said(error)}"
    _warn(reason)
    return None


def in_use(loops: ctypes.CDLL | None) -> ctypes.CDLL:
    """Return a compiled file. Raises RuntimeError for None: who calls a loop asks first if there is one."""
    if loops is None:
        raise RuntimeError("there is no compiled loop; ask `serves` first")
    return loops


@functools.cache
def _warn(reason: str) -> None:
    """Say once, whichever loops are asked for first, that there are none."""
    warnings.warn(f"everything stays eager, which is slower: {reason}", RuntimeWarning, stacklevel=4)


def which(command: str) -> str | None:
    """Return the path of a command."""
    return shutil.which(command)


def _said(error: Exception) -> str:
    """Return the line of a compiler's complaint that says what is wrong."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error:" in line), lines[0])


def _loaded(source: Path, compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL:
    """Load the shared object of a source, from the cache if it has it whole, else compiled now."""
    texts = source.read_text(), _HEADER.read_text()
    identity = "\n".join((*texts, compiler, *flags, _processor(), torch.__version__))
    name = f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    with tempfile.TemporaryDirectory(prefix="altgrad-native-") as scratch:
        folder = _folder() or Path(scratch)
        if not _whole(folder / name):
            _compile(source, compiler, flags, folder / name)
        return ctypes.CDLL(str(folder / name))  # which stays in memory when the file is gone


def _compile(source: Path, compiler: str, flags: tuple[str, ...], path: Path) -> None:
    """Compile a source to a shared object with its digest behind it, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        parts = Path(scratch, "part.o"), Path(scratch, "whole.so")
        compile_ = [compiler, *flags, "-iquote", str(_HEADER.parent), "-c", str(source), "-o", str(parts[0])]
        link = [compiler, "-shared", str(parts[0]), "-o", str(parts[1]), "-lm"]  # finds torch's OpenMP
        for command in (compile_, link):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PATIENCE)
        with parts[1].open("r+b") as file:
            digest = hashlib.sha256(file.read()).digest()
            file.write(digest)
            file.flush()
            os.fsync(file.fileno())
        os.replace(parts[1], path)  # whoever else compiles it now


def _whole(path: Path) -> bool:
    """Whether a compiled file is what was written: loading one that was cut short kills the process."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    size = hashlib.sha256().digest_size
    return hashlib.sha256(content[:-size]).digest() == content[-size:]


def _folder() -> Path | None:
    """Return the cache's folder for compiled loops; None where it cannot be written."""
    try:
        folder = default_cache() / "native"
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None  # no home, or a read-only one: compile for this process alone
    return folder if os.access(folder, os.W_OK) else None


def _processor() -> str:
    """Describe what -march=native means here: a cache may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    first = {line.partition(":")[0].strip(): line.partition(":")[2] for line in reversed(lines)}
    return "".join(first.get(key, "") for key in ("model name", "flags", "Features", "CPU part"))
