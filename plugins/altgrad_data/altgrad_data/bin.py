"""nanoGPT's token files, as many a user already has: `train.bin` and `val.bin`, little-endian uint16.

The files are mapped, never read whole or copied: OpenWebText's training file is 17 GB.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from altgrad_data import BinOptions
from altgrad_data.files import existing

NAMES = {"train": "train.bin", "validation": "val.bin"}

BLOCK = 2**20
BLOCKS = 256
"""The fingerprint reads this many blocks of this many bytes of each file: all of one of up to 256 MB."""


class TokenFiles:
    """The `bin` data set: a `TokenSource`."""

    loss_floor: float | None = None

    def __init__(self, options: BinOptions) -> None:
        folder = existing(options.path, "path", "a folder with train.bin and val.bin")
        self.vocab_size = options.vocab_size
        self._files = {split: folder / name for split, name in NAMES.items()}
        for file in self._files.values():
            if not file.is_file():
                raise FileNotFoundError(
                    f"path = {options.path!r} holds no {file.name}; set path to a folder with train.bin and "
                    "val.bin, as nanoGPT's data/*/prepare.py writes them"
                )
            size = file.stat().st_size
            if size == 0 or size % 2:
                raise ValueError(
                    f"{file} has {size} bytes; expected uint16 tokens, two bytes each: prepare it again"
                )

    def fingerprint(self) -> str:
        """Hash the sizes and content; of a file beyond 256 MB, 256 blocks spread evenly over it."""
        digest = hashlib.sha256(f"bin {self.vocab_size}".encode())
        for file in self._files.values():
            _update(digest, file)
        return digest.hexdigest()

    def tokens(self, split: str) -> NDArray[np.uint16]:
        return np.memmap(self._files[split], dtype="<u2", mode="r")


def _update(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    digest.update(f" {size} ".encode())
    last = max(size - BLOCK, 0)
    count = min(BLOCKS, -(-size // BLOCK))
    with path.open("rb") as file:
        for block in range(count):
            file.seek(block * last // max(count - 1, 1))
            digest.update(file.read(BLOCK))
