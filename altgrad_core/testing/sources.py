"""Data sets and executors as they must be."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy

from altgrad_core.hookspecs import CellResult, Document, Executor, TextSource, TokenSource
from altgrad_core.preparing import SPLITS
from altgrad_core.registry import REFUSALS, Registered, Registry
from altgrad_core.testing.components import NotCheckedError, built
from altgrad_core.testing.expect import checking, fail

FIRST_DOCUMENTS = 100
"""How many documents of a split are looked at."""

CELLS = ("a", "b", "fails", "c")


def check_dataset(entry: Registered, registry: Registry) -> None:
    """a data set says the same each time."""
    source, again = built(entry, registry), built(entry, registry)
    if not isinstance(source, (TextSource, TokenSource)):
        expected, fix = "a TextSource or a TokenSource", "see altgrad_core.hookspecs for their methods"
        seen = type(source).__name__
        fail(entry.name, "it must be a data set", given="", expected=expected, seen=seen, fix=fix)
    try:
        content = _documents if isinstance(source, TextSource) else _tokens
        for split in SPLITS:
            first, second = content(entry, source, split), content(entry, again, split)
            if list(first) != list(second):
                fix = "seed what is drawn; sort what is listed"
                fail(entry.name, "splits never change", given=split, expected="", seen="another", fix=fix)
        one, other = source.fingerprint(), again.fingerprint()
        if one != other or not isinstance(one, str):
            rule, seen = "fingerprint() must be the same text each time", f"{one!r} and {other!r}"
            fail(entry.name, rule, given="", expected="one str", seen=seen, fix="hash the content")
    except REFUSALS["dataset"] as error:
        raise NotCheckedError(str(error)) from error


def _documents(entry: Registered, source: Any, split: str) -> Sequence[Document]:
    found = list(itertools.islice(source.documents(split), FIRST_DOCUMENTS))
    if not found or not all(isinstance(one, Document) for one in found):
        expected, fix = "one Document or more", "yield altgrad_core.hookspecs.Document(text=...)"
        fail(entry.name, "a split has documents", given=split, expected=expected, seen=found[:1], fix=fix)
    count = getattr(source, "label_count", 0)
    if wrong := [one for one in found if not _is_right(one, count or math.inf)]:
        rule = "a document is text, and its labels are indices"
        labels = f"labels from 0 to {count - 1}" if count else "labels of 0 or more"
        expected, fix = f"a str, and {labels}", "number the labels 0, 1, 2, ..."
        fail(entry.name, rule, given=split, expected=expected, seen=wrong[0], fix=fix)
    return found


def _is_right(document: Document, label_count: float) -> bool:
    labels = (type(label) is int and 0 <= label < label_count for label in document.labels)
    return isinstance(document.text, str) and all(labels)


def _tokens(entry: Registered, source: Any, split: str) -> Sequence[int]:
    found = numpy.asarray(source.tokens(split))
    if found.ndim != 1 or found.dtype.kind != "u" or not found.size or found.max() >= source.vocab_size:
        expected = f"1-d, unsigned, below {source.vocab_size}, one at least"
        fix = "tokens.astype(numpy.uint16), and the vocab_size that they need"
        seen = f"{found.dtype} of shape {found.shape}"
        fail(
            entry.name,
            "tokens are numbers of the vocabulary",
            given=split,
            expected=expected,
            seen=seen,
            fix=fix,
        )
    return [int(one) for one in found]


def run_cell(cell: str) -> CellResult:
    """Stand for a run."""
    return CellResult(cell=cell, outcome="failed" if cell == "fails" else "finished")


def check_executor(entry: Registered, registry: Registry) -> None:
    """an executor returns a result for each cell."""
    executor: Executor = built(entry, registry)
    with checking(entry.name, check_executor, "see altgrad_core.hookspecs.Executor"):
        for jobs in (1, 2):
            found = executor.run(CELLS, run_cell, jobs)
            if not isinstance(found, list):
                rule, fix = "the results are a list", "list(...)"
                fail(
                    entry.name,
                    rule,
                    given=f"jobs={jobs}",
                    expected="list",
                    seen=type(found).__name__,
                    fix=fix,
                )
            seen = {one.cell: one.outcome for one in found}
            expected = {cell: run_cell(cell).outcome for cell in CELLS}
            if seen != expected:
                rule, fix = "every cell has one result, and one that fails stops no other", "see Executor"
                fail(entry.name, rule, given=f"jobs={jobs}", expected=expected, seen=seen, fix=fix)
