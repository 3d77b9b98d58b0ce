"""From a data set's documents to memory-mapped tokens, once per source, tokenizer and settings.

A split is one long row of tokens: the documents one after another, each closed by the tokenizer's end of
document. Where documents have labels, the row keeps where each of them ends, and a matrix of labels stands
beside it: the same cache serves language modelling and classification.

The cache's folder is keyed by the source's fingerprint (content and settings) and the tokenizer, so another
file, option or vocabulary is another folder. `altgrad_core.token_cache` sees to that a folder is whole.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import attrs
import numpy as np
from numpy.typing import NDArray

from altgrad_core import token_cache, tokenizers
from altgrad_core.hookspecs import Document, TextSource, TokenSource
from altgrad_core.registry import PluginError
from altgrad_core.token_cache import Contents, Writer
from altgrad_core.wording import shown

SPLITS = ("train", "validation")

CACHE_LAYOUT = 3
"""Part of every cache key: raise it when what is written changes, and old caches are left behind."""

BATCH = 2**22
"""Characters of text tokenized in one call, on all cores."""

MOST_LABELS = 2**30
"""Elements of a split's matrix of documents and labels, a byte each: that of 10 million documents of 100."""

Tokens: TypeAlias = NDArray[np.unsignedinteger[Any]]


@attrs.frozen(kw_only=True, eq=False)
class Documents:
    """Where the documents of a split end, and their labels; memory maps."""

    ends: NDArray[np.int64]
    """(documents,): the position after the token that ends each document; it begins where the last ended."""
    labels: NDArray[np.uint8]
    """(documents, labels): 1 where the document has the label. A row may hold any number of ones, or none."""


@attrs.frozen(kw_only=True, eq=False)
class TokenData:
    """The two token streams of a data set, and what is known about them."""

    train: Tokens
    validation: Tokens
    """1-d memory maps, of the smallest unsigned type that holds `vocab_size` (a source that maps its own
    file keeps its own type)."""
    vocab_size: int
    bytes_per_token: float | None
    """UTF-8 bytes of text per token of the validation split, ends of documents counted as tokens and not as
    text; None where the source is tokens. Bits per byte = nats per token / (ln 2 * bytes_per_token)."""
    loss_floor: float | None
    """The exact entropy of the source, nats per token, where it is known."""
    fingerprint: str
    """Hash of the content of both splits."""
    tokenizer: str
    """Hash of what says which text a token stands for, merges that were learnt included; empty where the
    source is tokens."""
    train_documents: Documents | None = None
    validation_documents: Documents | None = None
    """None where the source has no labels."""


def prepare(
    source: TextSource | TokenSource,
    name: str,
    tokenizer: str,
    cache: Path,
    announce: Callable[[str], None] = lambda line: None,
) -> TokenData:
    """Return the tokens of a data set, from the cache if they are in it.

    `name` is the data set's, for the folder and for messages. `tokenizer` is ignored where the source is
    tokens already. `announce` is told, before they are made, that this may take a while.

    Raises ValueError for an unknown tokenizer, a split of fewer than two tokens, tokens that do not fit the
    vocabulary, and a training split too small for the vocabulary that is to be learnt; whatever the source
    raises goes through.
    """
    if isinstance(source, TextSource):
        tokenizers.vocabulary(tokenizer)
    place = folder(source, name, tokenizer, cache)

    def write(writer: Writer) -> None:
        if isinstance(source, TextSource):
            _write_text(source, name, tokenizer, writer)
        else:
            _write_tokens(source, name, writer)

    contents = token_cache.opened(place)
    if contents is not None and (found := _token_data(contents, source)) is not None:
        return found
    how = f" by the tokenizer {tokenizer}" if isinstance(source, TextSource) else ""
    announce(f"preparing the tokens of {name!r}{how}; the next run finds them in {place}")
    found = _token_data(token_cache.build(place, write), source)
    if found is None:
        raise ValueError(f"data set {name!r}: its token files changed while they were read; start again")
    return found


def folder(source: TextSource | TokenSource, name: str, tokenizer: str, cache: Path) -> Path:
    """Return the folder of the cache in which the tokens of a data set are, or would be."""
    key = [CACHE_LAYOUT, source.fingerprint(), tokenizer if isinstance(source, TextSource) else None]
    return cache / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"


def _token_data(contents: Contents, source: TextSource | TokenSource) -> TokenData | None:
    """Return what a folder holds; None where files of the source's own are not as long as they were."""
    facts = dict(contents.facts)
    lengths = facts.pop("lengths")
    tokens = {split: contents.arrays.get(f"{split}.bin") for split in SPLITS}
    if not isinstance(source, TextSource) and not contents.arrays:
        tokens = {split: source.tokens(split) for split in SPLITS}
    if {split: len(row) for split, row in tokens.items() if row is not None} != lengths:
        return None
    documents = {f"{split}_documents": _documents(contents, split) for split in SPLITS}
    return TokenData(**tokens, **documents, **facts)  # type: ignore[arg-type]


def _documents(contents: Contents, split: str) -> Documents | None:
    if f"{split}.labels.bin" not in contents.arrays:
        return None
    return Documents(ends=contents.arrays[f"{split}.ends.bin"], labels=contents.arrays[f"{split}.labels.bin"])


@attrs.frozen(kw_only=True)
class _Split:
    """What was seen while a split was written."""

    length: int
    """Tokens."""
    text_bytes: int
    ends: list[int]
    labels: list[tuple[int, ...]]


def _write_text(source: TextSource, name: str, tokenizer: str, writer: Writer) -> None:
    def training_texts() -> Iterator[str]:
        return (document.text for document, _ in _read(source, "train", name))

    encoder = tokenizers.load(tokenizer, training_texts)
    learnt = encoder.save(writer.folder)
    writer.files(learnt)
    size = tokenizers.vocabulary(tokenizer)
    digest = hashlib.sha256(tokenizer.encode())
    written = {}
    for split in SPLITS:
        with writer.stream(f"{split}.bin", _dtype(size)) as append:
            written[split] = _write_split(_read(source, split, name), encoder, _dtype(size), append, digest)
        _check_length(written[split].length, split, name)
    _write_labels(written, name, getattr(source, "label_count", 0), writer, digest)
    writer.finish(
        {
            "lengths": {split: written[split].length for split in SPLITS},
            "vocab_size": size,
            "bytes_per_token": written["validation"].text_bytes / written["validation"].length,
            "loss_floor": None,
            "fingerprint": digest.hexdigest(),
            "tokenizer": _identity(tokenizer, learnt),
        }
    )


def _identity(tokenizer: str, learnt: Sequence[Path]) -> str:
    """Return the hash of a tokenizer's name and of what it has learnt."""
    return hashlib.sha256(
        b"\0".join([tokenizer.encode(), *(path.read_bytes() for path in learnt)])
    ).hexdigest()


def _read(source: TextSource, split: str, name: str) -> Iterator[tuple[Document, int]]:
    """Yield each document of a split with the length of its text in bytes."""
    for number, document in enumerate(source.documents(split), start=1):
        if not isinstance(document, Document) or not isinstance(document.text, str):
            seen = f"{shown(document)}, which is no Document with a text"
            raise PluginError(f"data set {name!r}: document {number} of {split} is {seen}: mend its plugin")
        try:
            text_bytes = len(document.text.encode())
        except UnicodeEncodeError as error:
            raise ValueError(f"data set {name!r}: document {number} of {split}: {error}") from error
        yield document, text_bytes


def _write_split(
    documents: Iterable[tuple[Document, int]],
    encoder: tokenizers.Tokenizer,
    dtype: str,
    append: Callable[[Tokens], None],
    digest: hashlib._Hash,
) -> _Split:
    length = text_bytes = 0
    ends: list[int] = []
    labels: list[tuple[int, ...]] = []
    for batch in _batches(documents):
        for tokens in encoder.encode([document.text for document, _ in batch]):
            row = tokens.astype(dtype)
            append(row)
            digest.update(row.data)
            length += len(row)
            ends.append(length)
        labels += [document.labels for document, _ in batch]
        text_bytes += sum(size for _, size in batch)
    digest.update(str(length).encode())
    return _Split(length=length, text_bytes=text_bytes, ends=ends, labels=labels)


def _batches(documents: Iterable[tuple[Document, int]]) -> Iterator[list[tuple[Document, int]]]:
    """Yield the documents in lists of BATCH characters or a document more."""
    batch, characters = [], 0
    for document in documents:
        batch.append(document)
        characters += len(document[0].text)
        if characters >= BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_labels(
    written: dict[str, _Split], name: str, declared: int, writer: Writer, digest: hashlib._Hash
) -> None:
    """Write where documents end, and a matrix of labels: where any document has one, or could have."""
    count = _label_count(written, name, declared)
    if not count:
        return
    for split, seen in written.items():
        labels = np.zeros((len(seen.labels), count), dtype=np.uint8)
        for row, ones in zip(labels, seen.labels, strict=True):
            row[list(ones)] = 1
        writer.array(f"{split}.ends.bin", np.array(seen.ends, dtype=np.int64))
        writer.array(f"{split}.labels.bin", labels)
        digest.update(labels.data)


def _label_count(written: Mapping[str, _Split], name: str, declared: int) -> int:
    """Return how many labels there are: as many as declared, else as the largest says, 0 where there is none.

    Raises ValueError for a label beyond those declared, and where their matrix would be too large.
    """
    largest, split, number = max(
        (
            (max(labels), split, number)
            for split, seen in written.items()
            for number, labels in enumerate(seen.labels, start=1)
            if labels
        ),
        default=(-1, "", 0),
        key=operator.itemgetter(0),
    )
    found = f"document {number} of {split} has the label {largest}"
    if declared and largest >= declared:
        raise ValueError(f"data set {name!r}: {found}; the {declared} labels are 0 to {declared - 1}")
    count = declared or largest + 1
    if count * max(len(seen.labels) for seen in written.values()) > MOST_LABELS:
        cause = f"label_count is {declared}" if declared else found
        raise ValueError(
            f"data set {name!r}: {cause}: a matrix of documents and labels has no more than {MOST_LABELS:,} "
            "elements; number the labels 0, 1, 2, ..., or, where they are not to be learnt, set labels to a "
            "key that no document has"
        )
    return count


def _write_tokens(source: TokenSource, name: str, writer: Writer) -> None:
    splits = {split: source.tokens(split) for split in SPLITS}
    for split, tokens in splits.items():
        _check_tokens(tokens, source.vocab_size, split, name)
    stored = not all(isinstance(tokens, np.memmap) for tokens in splits.values())
    dtype = _dtype(source.vocab_size)
    digest = hashlib.sha256(dtype.encode() if stored else source.fingerprint().encode())
    for split, tokens in splits.items() if stored else ():
        row = np.ascontiguousarray(tokens, dtype=dtype)
        writer.array(f"{split}.bin", row)
        digest.update(row.data)
        digest.update(str(len(row)).encode())
    writer.finish(
        {
            "lengths": {split: len(tokens) for split, tokens in splits.items()},
            "vocab_size": source.vocab_size,
            "bytes_per_token": None,
            "loss_floor": source.loss_floor,
            "fingerprint": digest.hexdigest(),
            "tokenizer": "",
        }
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
    array = isinstance(tokens, np.ndarray)
    if not (array and tokens.ndim == 1 and tokens.dtype.kind == "u"):
        what = f"{tokens.ndim}-d array of {tokens.dtype}" if array else type(tokens).__name__
        raise ValueError(f"data set {name!r}: the {split} split is a {what}; expected 1-d unsigned tokens")
    _check_length(len(tokens), split, name)
    if (largest := int(tokens.max())) >= vocab_size:
        raise ValueError(
            f"data set {name!r}: the {split} split holds token {largest}, but vocab_size is {vocab_size}; "
            f"set vocab_size to {largest + 1} or more"
        )
