"""The data set of an experiment: its tokens; and, before torch is imported, that they cannot be had.

Importing torch takes seconds. Whether a file is there, or a host answers, is told in less than one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from altgrad_core import preparing, tokenizers
from altgrad_core.cache_folder import default_cache
from altgrad_core.experiment import DataOptions
from altgrad_core.experiment_file import ExperimentFile
from altgrad_core.hookspecs import TextSource, TokenSource
from altgrad_core.options import DatasetChoice
from altgrad_core.preparing import TokenData
from altgrad_core.record import SUMMARY
from altgrad_core.registry import CORE_DISTRIBUTION, PluginError, Registry, UsageError


def tokens(options: DataOptions, registry: Registry, announce: Callable[[str], None]) -> TokenData:
    """Return the tokens of a data set, from the cache if they are in it. Raises UsageError, and says why."""
    choice = options.source
    with _named(choice, registry):
        source = _built(choice, registry)
        found = preparing.prepare(source, choice.plugin, options.tokenizer, default_cache(), announce)
    if found.vocab_size != options.vocab_size:
        raise UsageError(
            f"the data set {choice.plugin!r} has {found.vocab_size} tokens, its options say "
            f"{options.vocab_size}; make its vocab_size that"
        )
    return found


def refuse_absent(file: ExperimentFile, out: Path) -> None:
    """Raise UsageError where no run of a file can have its data, as far as that is told at once.

    A file of which runs have ended is left to its runs, since what is over needs no data; so is one whose
    runs go elsewhere.
    """
    here = file.registry.find("executor", file.executor.plugin).distribution == CORE_DISTRIBUTION
    if not here or any((out / file.name).glob(f"*/{SUMMARY}")):
        return
    wanted = dict.fromkeys(cell.experiment.data for cells in file.cells_on.values() for cell in cells)
    refusals = [_refusal(options, file.registry) for options in wanted]
    if refusals[0] is not None and all(refusals):
        raise refusals[0]


def _refusal(options: DataOptions, registry: Registry) -> UsageError | None:
    """Return why the data cannot be had; None: perhaps they can."""
    choice = options.source
    try:
        with _named(choice, registry):
            for refuse in _asked(_built(choice, registry), options):
                refuse()
    except UsageError as error:
        return error
    except PluginError:  # the run says so, in its folder too
        return None
    return None


def _asked(source: TextSource | TokenSource, options: DataOptions) -> list[Callable[[], None]]:
    """Return what raises, at once, where tokens cannot be had; nothing where they are prepared already."""
    asked = [source.refuse_absent] if hasattr(source, "refuse_absent") else []
    if isinstance(source, TextSource) and tokenizers.must_download(options.tokenizer):
        asked.append(tokenizers.refuse_unreachable)
    if asked and preparing.folder(source, options.source.plugin, options.tokenizer, default_cache()).is_dir():
        return []
    return asked


def _built(choice: DatasetChoice, registry: Registry) -> TextSource | TokenSource:
    """Return a data set. Raises PluginError for what is none, and UsageError as the plugin does."""
    source = choice.build(registry)
    if not isinstance(source, (TextSource, TokenSource)):
        kind = type(source).__name__
        raise PluginError(
            f"{choice.title(registry)} is no TextSource and no TokenSource but {kind}: mend its plugin"
        )
    return source


@contextlib.contextmanager
def _named(choice: DatasetChoice, registry: Registry) -> Iterator[None]:
    """Have errors name the data set; those by which it refuses what it was given are the user's."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise UsageError(f"the data set {choice.plugin!r} cannot be prepared: {error}") from error
    except (Exception, SystemExit) as error:
        error.add_note(f"while the tokens of {choice.title(registry)} were prepared")
        raise
