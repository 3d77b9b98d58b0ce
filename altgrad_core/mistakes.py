"""What is wrong with an experiment file: every mistake once, where it stands, in the order of the lines."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Sequence

import attrs

from altgrad_core import locator
from altgrad_core.options import Path
from altgrad_core.overrides import Tree, spelled
from altgrad_core.registry import UsageError
from altgrad_core.structuring import Problem


class ExperimentError(UsageError):
    """Everything that is wrong with an experiment file, one line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)


@attrs.define
class Mistakes:
    """What is wrong with one file, each mistake once, in the order of the file's lines."""

    path: pathlib.Path
    positions: dict[Path, int]
    found: dict[tuple[float, str], None] = attrs.field(factory=dict)

    def add(self, problems: Iterable[Problem], tree: Tree | None = None) -> None:
        """Note problems; `tree` knows which of the paths were overridden, and where."""
        for problem in problems:
            origin = tree.origin(problem.path) if tree and problem.path else None
            line = locator.locate(self.positions, origin.path if origin else problem.path)
            flag = origin.flag if origin else ""
            parts = (flag or f"{self.path}:{line}", spelled(problem.path), problem.message)
            text = one_line(": ".join(part for part in parts if part))
            self.found[float("inf") if flag else line, text] = None

    def lines(self) -> list[str]:
        return [text for _, text in sorted(self.found, key=lambda one: one[0])]


def one_line(text: str) -> str:
    """Return a message without its line breaks."""
    return " ".join(text.splitlines())
