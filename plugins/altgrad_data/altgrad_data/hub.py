"""Data sets of the Hugging Face hub: `eurlex` and `ecthr_a` of LexGLUE, and `wikitext`.

Each comes from the hub by the package `datasets`, or with `path` from files of the same columns. Nothing is
imported or asked before documents are wanted: tokens that were prepared once need neither the package nor
a network. So the content on the hub is taken to stay what it was when the tokens were prepared.

`datasets` tries for minutes to reach a hub that does not answer. A connection is tried first; without one, a
copy in the hub's own cache on this machine is used, and where there is none it is said within a second.

LexGLUE: Chalkidis et al. 2022. WikiText-103: Merity et al. 2017.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import attrs

from altgrad_core.hookspecs import Document
from altgrad_core.network import reachable
from altgrad_data import EcthrOptions, EurlexOptions, HubOptions
from altgrad_data.files import content_hash
from altgrad_data.hub_files import HubFiles
from altgrad_data.rows import Row, labels_of, text_of, value_of

LAYOUT = 1
"""Part of the fingerprint: raise it when the same rows give other documents."""

HUB = "https://huggingface.co"

_TITLE = re.compile(r"\s= [^\n]*[^=\s] =\s*")
_TRUE = ("1", "ON", "YES", "TRUE")


@attrs.frozen
class Origin:
    """Where a data set is on the hub."""

    repository: str
    configuration: str

    @property
    def address(self) -> str:
        return f"{self.repository} ({self.configuration})"


class HubTexts:
    """Rows with a text, and labels where the origin has them: a `TextSource`."""

    def __init__(self, origin: Origin, path: str, labels: str = "", label_count: int = 0) -> None:
        self._origin = origin
        self._labels = labels
        self.label_count = label_count
        """How many labels there are; 0: as many as the largest index says."""
        self._files = HubFiles(path, origin.configuration) if path else None

    def fingerprint(self) -> str:
        files = self._files.all if self._files else []
        settings = (self._labels, self.label_count)
        return content_hash(files, attrs.astuple(self._origin), LAYOUT, *settings, len(files))

    def refuse_absent(self) -> None:
        """Raise ConnectionError where there is no network and no copy of the data set on this machine."""
        if not self._files and not copy_of(self._origin).is_dir() and not _answers():
            raise _absent(self._origin)

    def documents(self, split: str) -> Iterator[Document]:
        for where, row in self._rows(split):
            text = text_of(row, "text", "", where)
            if self._labels:
                value = value_of(row, self._labels, "labels", where)
                yield Document(text, labels_of(value, self._labels, where))
            else:
                yield Document(text)

    def _rows(self, split: str) -> Iterator[tuple[str, Row]]:
        if self._files:
            yield from self._files.rows(split)
            return
        for number, row in enumerate(from_hub(self._origin, split), start=1):
            yield f"{self._origin.address} {split} row {number}", row


class Articles(HubTexts):
    """Rows that are lines of articles: a document is an article."""

    def documents(self, split: str) -> Iterator[Document]:
        lines = (document.text for document in super().documents(split))
        return (Document(text) for text in articles(lines))


def eurlex(options: EurlexOptions = EurlexOptions()) -> HubTexts:  # noqa: B008 - it is frozen
    """Return the data set `eurlex`."""
    origin = Origin("coastalcph/lex_glue", "eurlex")
    return HubTexts(origin, options.path, options.labels, options.label_count)


def ecthr_a(options: EcthrOptions = EcthrOptions()) -> HubTexts:  # noqa: B008 - it is frozen
    """Return the data set `ecthr_a`."""
    origin = Origin("coastalcph/lex_glue", "ecthr_a")
    return HubTexts(origin, options.path, options.labels, options.label_count)


def wikitext(options: HubOptions = HubOptions()) -> HubTexts:  # noqa: B008 - it is frozen
    """Return the data set `wikitext`."""
    return Articles(Origin("Salesforce/wikitext", "wikitext-103-raw-v1"), options.path)


def articles(lines: Iterable[str]) -> Iterator[str]:
    """Join lines to articles: each begins with a title, ` = Title = `, after an empty line."""
    article: list[str] = []
    after_empty = True
    for line in lines:
        if after_empty and _TITLE.fullmatch(line) and "".join(article).strip():
            yield "".join(article)
            article = []
        article.append(line)
        after_empty = not line.strip()
    if "".join(article).strip():
        yield "".join(article)


def from_hub(origin: Origin, split: str) -> Iterable[Row]:
    """Return the rows of a split, by the package `datasets`, which downloads them once.

    Raises ConnectionError where there is no network and no copy on this machine.
    """
    offline = not _answers()
    if offline and not copy_of(origin).is_dir():
        raise _absent(origin)
    datasets = _datasets()
    with _without_network(datasets) if offline else contextlib.nullcontext():
        try:
            rows: Iterable[Row] = datasets.load_dataset(origin.repository, origin.configuration, split=split)
        except Exception as error:  # the hub's clients have no error in common
            raise ConnectionError(
                f"{origin.address} could not be loaded from {_endpoint()}: {type(error).__name__}: {error}; "
                "try again, or set path to files of its own"
            ) from error
    return rows


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT") or HUB


def _answers() -> bool:
    """Whether the hub may be asked, and takes a connection."""
    return not _offline_asked() and reachable(_endpoint())


def _absent(origin: Origin) -> ConnectionError:
    return ConnectionError(
        f"no network: {_endpoint()} {'is not to be asked' if _offline_asked() else 'does not answer'}, and "
        f"no copy of {origin.address} is in {copy_of(origin).parents[1]}; set path to a folder of its "
        'Parquet files or to a .jsonl file with the same columns, or take plugin = "licenses", "text", '
        '"jsonl", "bin" or "markov", which need no network'
    )


def copy_of(origin: Origin) -> Path:
    """Return the folder in which `datasets` keeps what it downloaded of this data set."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    home = Path(os.environ.get("HF_HOME") or caches)
    cache = os.path.expanduser(os.environ.get("HF_DATASETS_CACHE") or home / "datasets")
    return Path(cache) / origin.repository.replace("/", "___") / origin.configuration


def _offline_asked() -> bool:
    return any(
        os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    )


def _datasets() -> Any:
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(
            "data sets of the hub are loaded by the package datasets, which is not installed: "
            "pip install 'altgrad-data[hub]', or set path to files on disk"
        ) from error


@contextlib.contextmanager
def _without_network(datasets: Any) -> Iterator[None]:
    """Have `datasets` use what is on this machine: its offline mode, which else is a matter of start-up."""
    settings = (datasets.config, importlib.import_module("huggingface_hub.constants"))
    before = [module.HF_HUB_OFFLINE for module in settings]
    for module in settings:
        module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(settings, before, strict=True):
            module.HF_HUB_OFFLINE = value
