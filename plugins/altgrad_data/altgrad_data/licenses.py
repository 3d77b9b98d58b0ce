"""The license texts that ScanCode recognizes, in the pip package `licensedcode-data`: no network needed.

Each `*.LICENSE` file is a YAML front matter (key, category, ...) and a text. The few without a text, or of
the category "Unstated License" are dropped; the 10 other categories are the labels.

Licenses come in families (`gpl-1.0`, `gpl-2.0`, `gpl-2.0-autoconf`, ...) of near-duplicates, so a family
goes to one split whole. That is not enough: many texts of one name copy those of another (`qwt` is the
LGPL with a foreword). So a family can be held out only if each of its texts is its own: less than half of
its 13-word runs occur in other families. Of these families as many are held out, in the order of a hash of
the name, as make up a tenth of all the text (`altgrad_data.split`).
"""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import attrs

from altgrad_core.hookspecs import Document
from altgrad_data import LicensesOptions
from altgrad_data.overlap import copied_share
from altgrad_data.split import held_out

DISTRIBUTION = "licensedcode-data"

LAYOUT = 1
"""Part of the fingerprint: raise it when other documents or splits come out of the same package."""

VALIDATION_SHARE = 0.1
"""Of the bytes of all texts."""

MOST_COPIED = 0.5
"""A family with a text of which this share or more occurs in other families is never held out."""

WITHOUT_LICENSE = "Unstated License"

_FRONT_MATTER = re.compile(r"---\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)
_FAMILY = re.compile(r"[^-]*?[a-z](?=[0-9])|[^-]+")


@attrs.frozen
class License:
    """One license text."""

    key: str
    category: str
    text: str

    @property
    def family(self) -> str:
        return family(self.key)


def family(key: str) -> str:
    """Return a key up to its first hyphen, or up to its first digit after a letter: `gpl-2.0`, `apl1.1`."""
    found = _FAMILY.match(key)
    return found[0] if found else key


def parse(file: str, name: str) -> License:
    """Return the license in the content of a `*.LICENSE` file called `name`.

    Only two keys of the front matter are read, both plain scalars in the first column, so no YAML library
    is needed: nested and continued lines are indented.
    """
    front = _FRONT_MATTER.match(file)
    if front is None:
        raise ValueError(f"{name}: does not start with a front matter between two lines of ---")
    return License(
        _scalar(front[1], "key", name), _scalar(front[1], "category", name), file[front.end() :].strip()
    )


def _scalar(front: str, key: str, name: str) -> str:
    found = re.search(rf"^{key}:[ \t]*(.*?)[ \t]*\r?$", front, re.MULTILINE)
    if found is None:
        raise ValueError(f"{name}: the front matter has no {key!r}")
    return found[1].strip("'\"")


class Licenses:
    """The `licenses` data set: a `TextSource`."""

    def __init__(self, options: LicensesOptions = LicensesOptions()) -> None:  # noqa: B008 - it is frozen
        try:
            self._distribution = importlib.metadata.distribution(DISTRIBUTION)
        except importlib.metadata.PackageNotFoundError as error:
            raise FileNotFoundError(
                f"the license texts are in the pip package {DISTRIBUTION}, which is not installed: "
                f"pip install {DISTRIBUTION}"
            ) from error

    def fingerprint(self) -> str:
        return f"{DISTRIBUTION} {self._distribution.version}, layout {LAYOUT}"

    def documents(self, split: str) -> Iterator[Document]:
        for license in self.licenses:
            if (license.family in self.validation_families) == (split == "validation"):
                yield Document(license.text, (self.categories.index(license.category),))

    @cached_property
    def licenses(self) -> tuple[License, ...]:
        """Every license with a text, in the order of the keys."""
        folder = Path(str(self._distribution.locate_file("licensedcode/data/licenses")))
        files = sorted(folder.glob("*.LICENSE"))
        if not files:
            raise FileNotFoundError(
                f"{folder} holds no *.LICENSE files; reinstall {DISTRIBUTION}: pip install --force-reinstall"
            )
        parsed = (parse(file.read_bytes().decode(), file.name) for file in files)
        return tuple(one for one in parsed if one.text and one.category != WITHOUT_LICENSE)

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """The names of the labels, by index."""
        return tuple(sorted({license.category for license in self.licenses}))

    @property
    def label_count(self) -> int:
        return len(self.categories)

    @cached_property
    def validation_families(self) -> frozenset[str]:
        """The families that are held out."""
        sizes: Counter[str] = Counter()
        for license in self.licenses:
            sizes[license.family] += len(license.text.encode())
        copied = copied_share(
            [license.text for license in self.licenses], [license.family for license in self.licenses]
        )
        copying = {
            one.family for one, share in zip(self.licenses, copied, strict=True) if share >= MOST_COPIED
        }
        own = {name: size for name, size in sizes.items() if name not in copying}
        return held_out(own, VALIDATION_SHARE * sizes.total())
