"""Token streams: from a data set's documents to batches, with a cache in between.

A split is one long row of tokens. The byte tokenizer writes each document as its UTF-8 bytes followed by
one 0x00 byte that ends it, so its vocabulary is the 256 bytes and nothing has to be learnt or downloaded.
`prepare` does this once per data set and tokenizer and keeps the result as memory-mapped files.

Batches are nanoGPT's: windows of `block_size` tokens at random offsets, the targets one token further on.
The offsets are a pure function of (seed, step, micro-batch), computed by the counter-based Philox generator:
nothing has to be saved to resume, and no global random state is read or written. Evaluation always reads the
same windows, whatever the seed, so that its numbers can be compared between runs.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from io import BufferedWriter
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from altgrad_core.cache_folder import default_cache as default_cache
from altgrad_core.hookspecs import TextSource, TokenSource

BYTE_VOCABULARY = 256
"""Values of a byte: what the tokenizer `bytes` can produce."""

END_OF_DOCUMENT = b"\x00"
"""Written after each document; UTF-8 text has no other use for it."""

SPLITS = ("train", "validation")

CACHE_LAYOUT = 1
"""Part of every cache key: raise it when what is written changes, and old caches are left behind."""

LEFTOVER_AGE = 24 * 3600.0
"""Seconds after which an unfinished cache of a killed process is deleted."""

TRAINING_STREAM = 0x64617461
"""Second word of Philox's key ("data"): keeps these draws apart from others made with the same seed."""

Tokens: TypeAlias = NDArray[np.unsignedinteger[Any]]


@attrs.frozen(kw_only=True, eq=False)
class TokenData:
    """The two token streams of a data set, and what is known about them."""

    train: Tokens
    validation: Tokens
    """1-d memory maps, of the smallest unsigned type that holds `vocab_size` (a source that maps its own
    file keeps its own type)."""
    vocab_size: int
    bytes_per_token: float | None
    """UTF-8 bytes of text per token of the validation split; None where the source is tokens.
    Bits per byte = nats per token / (ln 2 * bytes_per_token)."""
    loss_floor: float | None
    """The exact entropy of the source, nats per token, where it is known."""
    fingerprint: str
    """Hash of the content of both splits."""


# --- preparing and caching -----------------------------------------------------------------------------


def prepare(source: TextSource | TokenSource, name: str, tokenizer: str, cache: Path) -> TokenData:
    """Return the tokens of a data set, from the cache if they are in it.

    `name` is the data set's, for the folder and for messages. `tokenizer` is ignored where the source is
    tokens already. Any number of processes may prepare the same data at once: each writes a folder of its
    own, the first to finish publishes it, the others use that one. A killed process leaves no half cache.

    Raises ValueError for an unknown tokenizer, a split of fewer than two tokens, and tokens that do not fit
    the vocabulary; whatever the source raises goes through.
    """
    if isinstance(source, TextSource) and tokenizer != "bytes":
        raise ValueError(f"tokenizer {tokenizer!r} is not known; there is: 'bytes'")
    folder = cache / f"{name}-{_cache_key(source, tokenizer)}"
    return _open(folder, source) or _build(folder, source, name)


@attrs.frozen(kw_only=True)
class _Meta:
    """`meta.json`: what a cache folder holds."""

    train: int
    validation: int
    dtype: str
    vocab_size: int
    bytes_per_token: float | None
    loss_floor: float | None
    fingerprint: str
    stored: bool
    """False: the source maps files of its own, and the folder holds only this record."""


def _cache_key(source: TextSource | TokenSource, tokenizer: str) -> str:
    parts = [CACHE_LAYOUT, source.fingerprint(), tokenizer if isinstance(source, TextSource) else None]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _open(folder: Path, source: TextSource | TokenSource) -> TokenData | None:
    """Map a cache folder; None where there is none, or where it is damaged."""
    try:
        meta = _Meta(**json.loads((folder / "meta.json").read_text()))
        tokens = {split: _map(folder, split, meta) for split in SPLITS} if meta.stored else {}
    except (OSError, ValueError, TypeError):
        return None
    if not isinstance(source, TextSource) and not meta.stored:
        tokens = {split: source.tokens(split) for split in SPLITS}
    if any(len(tokens[split]) != getattr(meta, split) for split in SPLITS):
        return None
    return TokenData(
        **tokens,
        vocab_size=meta.vocab_size,
        bytes_per_token=meta.bytes_per_token,
        loss_floor=meta.loss_floor,
        fingerprint=meta.fingerprint,
    )


def _map(folder: Path, split: str, meta: _Meta) -> Tokens:
    return np.memmap(folder / f"{split}.bin", dtype=meta.dtype, mode="r")


def _build(folder: Path, source: TextSource | TokenSource, name: str) -> TokenData:
    """Write a cache into a temporary sibling folder, then rename it into place."""
    scratch = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        scratch.mkdir()
    except OSError as error:
        raise OSError(
            f"cannot write prepared tokens to {folder.parent}: {error}; "
            "set ALTGRAD_CACHE to a folder that can be written"
        ) from error
    try:
        if isinstance(source, TextSource):
            meta = _write_text(source, name, scratch)
        else:
            meta = _write_tokens(source, name, scratch)
        _write_synced(scratch / "meta.json", json.dumps(attrs.asdict(meta), indent=1).encode())
        _sync_folder(scratch)
        built = _open(scratch, source)
        _publish(scratch, folder, source)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)  # not there any more if it was published
    # The winner's, where another process was faster. Mapped files outlive a folder that is replaced.
    data = _open(folder, source) or built
    assert data is not None
    return data


def _write_text(source: TextSource, name: str, folder: Path) -> _Meta:
    counts, text_bytes, digest = {}, {}, hashlib.sha256(b"bytes")
    for split in SPLITS:
        counts[split] = text_bytes[split] = 0
        with (folder / f"{split}.bin").open("wb") as file:
            for number, document in enumerate(source.documents(split), start=1):
                try:
                    encoded = document.text.encode()
                except UnicodeEncodeError as error:
                    raise ValueError(f"data set {name!r}: document {number} of {split}: {error}") from error
                text_bytes[split] += len(encoded)
                counts[split] += file.write(encoded + END_OF_DOCUMENT)
                digest.update(encoded + END_OF_DOCUMENT)
            _sync(file)
        digest.update(str(counts[split]).encode())
        _check_length(counts[split], split, name)
    return _Meta(
        **counts,
        dtype=_dtype(BYTE_VOCABULARY),
        vocab_size=BYTE_VOCABULARY,
        bytes_per_token=text_bytes["validation"] / counts["validation"],
        loss_floor=None,
        fingerprint=digest.hexdigest(),
        stored=True,
    )


def _write_tokens(source: TokenSource, name: str, folder: Path) -> _Meta:
    splits = {split: source.tokens(split) for split in SPLITS}
    for split, tokens in splits.items():
        _check_tokens(tokens, source.vocab_size, split, name)
    stored = not all(isinstance(tokens, np.memmap) for tokens in splits.values())
    dtype = _dtype(source.vocab_size)
    digest = hashlib.sha256(source.fingerprint().encode())
    if stored:
        digest = hashlib.sha256(dtype.encode())
        for split, tokens in splits.items():
            content = np.ascontiguousarray(tokens, dtype=dtype).data
            _write_synced(folder / f"{split}.bin", content)
            digest.update(content)
            digest.update(str(len(tokens)).encode())
    return _Meta(
        train=len(splits["train"]),
        validation=len(splits["validation"]),
        dtype=dtype,
        vocab_size=source.vocab_size,
        bytes_per_token=None,
        loss_floor=source.loss_floor,
        fingerprint=digest.hexdigest(),
        stored=stored,
    )


def _dtype(vocab_size: int) -> str:
    return np.min_scalar_type(vocab_size - 1).name


def _check_length(tokens: int, split: str, name: str) -> None:
    if tokens < 2:
        raise ValueError(
            f"data set {name!r}: the {split} split has {tokens} tokens; a token and its successor are the "
            "least there can be: give it more text, or a larger share of it"
        )


def _check_tokens(tokens: Tokens, vocab_size: int, split: str, name: str) -> None:
    if tokens.ndim != 1 or tokens.dtype.kind != "u":
        raise ValueError(
            f"data set {name!r}: the {split} split is a {tokens.ndim}-d array of {tokens.dtype}; "
            "expected 1-d unsigned tokens"
        )
    _check_length(len(tokens), split, name)
    if (largest := int(tokens.max())) >= vocab_size:
        raise ValueError(
            f"data set {name!r}: the {split} split holds token {largest}, but vocab_size is {vocab_size}; "
            f"set vocab_size to {largest + 1} or more"
        )


def _publish(scratch: Path, folder: Path, source: TextSource | TokenSource) -> None:
    """Rename `scratch` to `folder`, unless a whole cache is there already."""
    if folder.exists() and _open(folder, source) is None:
        damaged = scratch.with_name(f"{scratch.name}.damaged")
        with contextlib.suppress(FileNotFoundError):  # another process has just put it aside
            folder.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
    try:
        scratch.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    _sync_folder(folder.parent)


def _sweep(folder: Path) -> None:
    """Delete what killed processes left of the same cache."""
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE:
                shutil.rmtree(leftover, ignore_errors=True)


def _write_synced(path: Path, content: bytes | memoryview) -> None:
    with path.open("wb") as file:
        file.write(content)
        _sync(file)


def _sync(file: BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- batches -------------------------------------------------------------------------------------------


def training_batch(
    tokens: Tokens, *, block_size: int, batch_size: int, seed: int, step: int, micro_batch: int
) -> tuple[Tensor, Tensor]:
    """Return inputs and targets, both (batch_size, block_size) int64: windows at random offsets.

    The same (seed, step, micro_batch) gives the same windows on every machine; any two that differ draw
    from streams of Philox that do not meet.
    """
    _check_block(tokens, block_size, "training")
    philox = np.random.Philox(
        key=np.array([seed % 2**64, TRAINING_STREAM], dtype=np.uint64),
        counter=np.array([0, 0, micro_batch, step], dtype=np.uint64),  # the first two count the draws
    )
    # The bias of the remainder is below len(tokens) / 2^64.
    starts = philox.random_raw(batch_size) % np.uint64(len(tokens) - block_size)
    return _windows(tokens, starts.astype(np.int64), block_size)


def evaluation_batches(
    tokens: Tokens, *, block_size: int, batch_size: int, batches: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Return an iterator over inputs and targets of windows that do not overlap, spread evenly.

    `batches = 0`, or more than there are: the whole split. The last batch may then be smaller, so weight
    the batches by their number of targets. The fewer than `block_size` targets after the last full window
    are left out.
    """
    _check_block(tokens, block_size, "evaluated")
    available = (len(tokens) - 1) // block_size
    wanted = min(batches * batch_size, available) or available
    starts = np.arange(wanted) * available // wanted * block_size
    return (
        _windows(tokens, starts[first : first + batch_size], block_size)
        for first in range(0, wanted, batch_size)
    )


def _windows(tokens: Tokens, starts: NDArray[np.int64], block_size: int) -> tuple[Tensor, Tensor]:
    window = np.asarray(tokens)[starts[:, None] + np.arange(block_size + 1)]  # (batch, block + 1)
    return torch.from_numpy(window[:, :-1].astype(np.int64)), torch.from_numpy(window[:, 1:].astype(np.int64))


def _check_block(tokens: Tokens, block_size: int, split: str) -> None:
    if len(tokens) < block_size + 1:
        raise ValueError(
            f"the {split} split has {len(tokens)} tokens, fewer than the {block_size + 1} of one window "
            f"(model.block_size = {block_size} and its last target); "
            f"set model.block_size to {max(len(tokens) - 1, 1)} or less, or give the split more text"
        )
