"""Loops in C for the CPU: compiled once, kept, and called on tensors.

A rounding in eager torch passes over memory ten times and more; fused by torch.compile it passes once, but in
instructions enough to make stochastic rounding three times as slow as the same loop from a C compiler, after
ten seconds of compilation (docs/decisions/006-loops-in-c.md). So the formats' innermost loops have a C
file beside their Python: the same arithmetic, held to the same bits by tests.

`library(source)` compiles such a file with the machine's own C compiler, in half a second, into the cache
folder. Where there is none, or with ALTGRAD_KERNELS=eager, it returns None after one warning, and everything
stays eager: slower, with the same bits.

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
from pathlib import Path

import torch
from torch import Tensor

from altgrad_core.cache_folder import default_cache
from altgrad_core.kernels import VARIABLE

FEWEST_ELEMENTS = 1024
"""Below this a call costs more than it saves."""

_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fPIC")
_PATIENCE = 120  # seconds for a compiler, on a machine that is busy


def serves(x: Tensor) -> bool:
    """Whether a loop in C may be called on this tensor: a plain float32 one of a CPU, outside of a trace."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() >= FEWEST_ELEMENTS
    )


def one_a_row(scale: Tensor | None, x: Tensor) -> bool:
    """Whether a scale is none, one float32 number, or one for each row of x along its last dimension."""
    if scale is None or (scale.dim() == 0 and scale.dtype == torch.float32 and scale.device == x.device):
        return True
    rows = scale.dim() == x.dim() and scale.shape == (*x.shape[:-1], 1)
    return rows and scale.dtype == torch.float32 and scale.device == x.device


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
                return ctypes.CDLL(str(_compiled(source, compiler, (*_FLAGS, *extra))))
            except (OSError, subprocess.SubprocessError) as error:
                reason = f"{compiler} cannot compile {source.name}: {_said(error)}"
    warnings.warn(f"formats stay eager, which is slower: {reason}", RuntimeWarning, stacklevel=2)
    return None


def which(command: str) -> str | None:
    """Return the path of a command."""
    return shutil.which(command)


def _said(error: Exception) -> str:
    """Return the line of a compiler's complaint that says what is wrong."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error:" in line), lines[0])


def _compiled(source: Path, compiler: str, flags: tuple[str, ...]) -> Path:
    """Return the shared object of a source, compiled now unless the cache has it."""
    identity = "\n".join((source.read_text(), compiler, *flags, _processor(), torch.__version__))
    name = f"{source.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so"
    folder = _folder()
    if not (folder / name).exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            parts = Path(scratch, "part.o"), Path(scratch, "whole.so")
            compile_ = [compiler, *flags, "-c", str(source), "-o", str(parts[0])]
            link = [compiler, "-shared", str(parts[0]), "-o", str(parts[1]), "-lm"]  # finds torch's OpenMP
            for command in (compile_, link):
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=_PATIENCE)
            os.replace(parts[1], folder / name)  # whole or not at all, whoever else compiles it now
    return folder / name


def _folder() -> Path:
    """Return the cache's folder for compiled loops, or a temporary one where that cannot be written."""
    try:
        folder = default_cache() / "native"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # a read-only home: compile for this process alone
    return Path(tempfile.mkdtemp(prefix="altgrad-native-"))


def _processor() -> str:
    """Describe what -march=native means here: a cache may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    first = {line.partition(":")[0].strip(): line.partition(":")[2] for line in reversed(lines)}
    return "".join(first.get(key, "") for key in ("model name", "flags", "Features", "CPU part"))
