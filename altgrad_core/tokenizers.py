"""How text becomes tokens: bytes, byte pairs learnt from the training split, or GPT-2's byte pairs.

| name | vocabulary | end of a document |
|---|---|---|
| `bytes` | the 256 bytes; nothing is learnt or downloaded | 0, which UTF-8 text has no other use for |
| `bpe:N` | N: 256 bytes, N - 257 merges learnt from the training split | N - 1 |
| `gpt2` | GPT-2's 50,257, by tiktoken | 50,256, as nanoGPT writes it |

All three lose nothing: bytes are the smallest tokens, so every text has an encoding and its bytes can be
had back. None reads special tokens out of a text. `bpe:N` cuts text into words as GPT-2 does and merges
inside of words only (Sennrich et al. 2016; the package `tokenizers` learns and applies the merges).

The names and the sizes of their vocabularies are known without importing torch, numpy or a tokenizer.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from altgrad_core.registry import UsageError
from altgrad_core.wording import shown, suggestion

if TYPE_CHECKING:
    from numpy.typing import NDArray

BYTE_VOCABULARY = 256
"""Values of a byte."""

LARGEST_VOCABULARY = 2**18
"""Tokens that bpe:N may learn; the largest vocabularies in use have as many."""

GPT2_VOCABULARY = 50257

GPT2_FILES = tuple(
    f"https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}"
    for name in ("vocab.bpe", "encoder.json")
)
"""What tiktoken downloads for GPT-2, 1.5 MB."""

PIECE = 2**20
"""Characters handed to a tokenizer at once: it needs some hundred bytes of memory for each."""

_BYTE_PAIRS = re.compile(r"bpe:([1-9][0-9]{0,6})")


def vocabulary(name: str) -> int:
    """Return the size of a tokenizer's vocabulary. Raises ValueError where the name means none."""
    if name == "bytes":
        return BYTE_VOCABULARY
    if name == "gpt2":
        return GPT2_VOCABULARY
    if found := _BYTE_PAIRS.fullmatch(name):
        size = int(found[1])
        if BYTE_VOCABULARY < size <= LARGEST_VOCABULARY:
            return size
    raise ValueError(
        f'expected "bytes", "gpt2", or "bpe:N" with N from {BYTE_VOCABULARY + 1} to {LARGEST_VOCABULARY} '
        f'such as "bpe:4096"; got {shown(name)}{suggestion(name, ("bytes", "gpt2"))}'
    )


def tokenizer_name(_: Any, field: Any, value: str) -> None:
    """Attrs validator: the value names a tokenizer."""
    vocabulary(value)


class Tokenizer(Protocol):
    """Turns documents into tokens."""

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        """Return the tokens of each document, 1-d unsigned, the one that ends it included."""
        ...

    def save(self, folder: Path) -> list[Path]:
        """Write what was learnt, if anything, and return the files."""
        ...


def load(name: str, training_texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Return the tokenizer of that name; what has to be learnt is learnt from `training_texts`.

    Raises ValueError where the training text is too small for the vocabulary, and ConnectionError where
    files are missing that cannot be downloaded.
    """
    size = vocabulary(name)
    if name == "bytes":
        return Bytes()
    return Gpt2() if name == "gpt2" else BytePairs(size, training_texts())


class Bytes:
    """The UTF-8 bytes of a text, and one 0x00."""

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        import numpy as np

        return [np.frombuffer(text.encode() + b"\x00", dtype=np.uint8) for text in texts]

    def save(self, folder: Path) -> list[Path]:
        return []


class BytePairs:
    """Byte pairs learnt from a text: first the 256 bytes, then the merges, last the end of a document."""

    def __init__(self, size: int, texts: Iterable[str]) -> None:
        package = _package("tokenizers", f"bpe:{size}")
        words = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._end = size - 1
        self._learnt = package.Tokenizer(package.models.BPE())
        self._learnt.pre_tokenizer = words
        self._learnt.decoder = package.decoders.ByteLevel()
        trainer = package.trainers.BpeTrainer(
            vocab_size=self._end, initial_alphabet=words.alphabet(), show_progress=False
        )
        self._learn(texts, trainer)
        if (learnt := self._learnt.get_vocab_size()) < self._end:
            raise ValueError(
                f"tokenizer 'bpe:{size}': the training split is too small, no more than {learnt + 1} tokens "
                f"can be learnt from it; set data.tokenizer to 'bpe:{learnt + 1}' or fewer, or to 'bytes'"
            )

    def _learn(self, texts: Iterable[str], trainer: Any) -> None:
        """Learn in a thread: the package reads the texts where no Ctrl-C would ever be noticed."""
        from concurrent.futures import ThreadPoolExecutor  # here: it imports logging

        stopped = threading.Event()

        def unless_stopped() -> Iterator[str]:
            for text in texts:
                for piece in pieces(text):
                    if stopped.is_set():
                        return
                    yield piece

        with ThreadPoolExecutor(max_workers=1) as pool:
            learning = pool.submit(self._learnt.train_from_iterator, unless_stopped(), trainer)
            try:
                learning.result()
            finally:
                stopped.set()

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        def encode_all(flat: list[str]) -> list[list[int]]:
            return [one.ids for one in self._learnt.encode_batch_fast(flat)]

        return _encoded(texts, encode_all, self._end)

    def save(self, folder: Path) -> list[Path]:
        file = folder / "tokenizer.json"
        file.write_text(self._learnt.to_str(pretty=True), encoding="utf-8")  # its own errors say not of what
        return [file]


class Gpt2:
    """GPT-2's byte pairs, from the two files that tiktoken downloads once and keeps."""

    def __init__(self) -> None:
        tiktoken = _package("tiktoken", "gpt2")
        if must_download("gpt2"):
            refuse_unreachable()
        self._encoding = tiktoken.get_encoding("gpt2")

    def encode(self, texts: Sequence[str]) -> list[NDArray[Any]]:
        return _encoded(texts, self._encoding.encode_ordinary_batch, self._encoding.eot_token)

    def save(self, folder: Path) -> list[Path]:
        return []


def must_download(name: str) -> bool:
    """Whether a tokenizer of that name needs files that are not on this machine."""
    return name == "gpt2" and not all(file.exists() for file in gpt2_copies())


def refuse_unreachable() -> None:
    """Raise ConnectionError, within a second, where the files that are to be downloaded cannot be."""
    from altgrad_core import network  # here: half of what importing this module would cost

    if not network.reachable(GPT2_FILES[0]):
        raise ConnectionError(
            "tokenizer 'gpt2': no network, and GPT-2's vocabulary is not on this machine; run "
            "python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\" with TIKTOKEN_CACHE_DIR=FOLDER "
            "where there is a network, copy FOLDER here and set TIKTOKEN_CACHE_DIR to it, or use "
            "tokenizer = 'bpe:4096' or 'bytes', which need none"
        )


def gpt2_copies() -> list[Path]:
    """Return where tiktoken keeps GPT-2's files: under the hash of their addresses, as its load.py has it."""
    named = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = Path(named) if named else Path(tempfile.gettempdir(), "data-gym-cache")
    return [folder / hashlib.sha1(address.encode()).hexdigest() for address in GPT2_FILES]


def pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces of at most PIECE characters, cut after a line where there is one."""
    start = 0
    while len(text) - start > PIECE:
        cut = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
        yield text[start:cut]
        start = cut
    yield text[start:]


def _encoded(
    texts: Sequence[str], encode_all: Callable[[list[str]], list[list[int]]], end: int
) -> list[NDArray[Any]]:
    """Encode the pieces of all texts in one call, and put the tokens of each text together again."""
    import numpy as np

    cut = [list(pieces(text)) for text in texts]
    encoded = iter(encode_all([piece for one in cut for piece in one]))
    return [
        np.concatenate([np.array(ids, dtype=np.uint32) for ids in (*(next(encoded) for _ in one), [end])])
        for one in cut
    ]


def _package(name: str, tokenizer: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"tokenizer {tokenizer!r} needs the package {name}: pip install {name}; 'bytes' needs none"
        ) from error
