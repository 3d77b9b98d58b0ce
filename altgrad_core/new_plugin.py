"""A third party's package, written from templates: one working component of a kind, and tests that pass."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import keyword
import re
import string
from collections.abc import Mapping
from pathlib import Path

from altgrad_core.plugin_contract import RESERVED
from altgrad_core.registry import CORE_DISTRIBUTION, UsageError, discover
from altgrad_core.wording import listed, shown

TEMPLATES = Path(__file__).with_name("templates")
"""A folder for each kind, and what all share; `$module` and the like stand for a package's own names."""

_DISTRIBUTION = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


def write(distribution: str, kind: str, into: Path = Path()) -> Path:
    """Write the package of a distribution with one component of a kind, and return its folder.

    Raises UsageError for a name that is taken or that no distribution can have, and where the folder is there
    already or cannot be written.
    """
    names = names_of(distribution, kind)
    folder = into / distribution
    if folder.exists():
        raise UsageError(f"{folder}: is there already; choose another name, or another folder with --into")
    for path, template in files(names["module"], kind).items():
        text = string.Template((TEMPLATES / template).read_text()).substitute(names)
        try:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        except OSError as error:
            reason = f"cannot be written: {error.strerror}; choose another folder with --into"
            raise UsageError(f"{folder}: {reason}") from error
    return folder


def names_of(distribution: str, kind: str) -> Mapping[str, str]:
    """Return what the placeholders of the templates stand for. Raises UsageError for an impossible name."""
    module = re.sub(r"[-.]+", "_", distribution).lower()
    valid = _DISTRIBUTION.fullmatch(distribution) and module.isidentifier() and not keyword.iskeyword(module)
    if not valid:
        raise UsageError(
            f"{shown(distribution)} is no name for a package: letters, digits, '-' and '.', a letter first, "
            "such as altgrad-eighths"
        )
    if importlib.util.find_spec(module) is not None:
        raise UsageError(
            f"a module {module!r} is installed already; choose another name than {distribution!r}"
        )
    bare = module.removeprefix("altgrad_")
    name = bare.upper() if kind == "format" else bare
    if name in RESERVED.get(kind, ()):
        raise UsageError(f"the {kind} {name!r} means 'leave it alone'; choose another name")
    if owners := [one.owner for one in discover().of_kind(kind) if one.name == name]:
        raise UsageError(
            f"a {kind} {name!r} is installed already, by {listed(owners)}; choose another name than "
            f"{distribution!r}"
        )
    core = importlib.metadata.version(CORE_DISTRIBUTION)
    return {"distribution": distribution, "module": module, "name": name, "kind": kind, "core": core}


def files(module: str, kind: str) -> Mapping[str, str]:
    """Return the files of a package, each with its template."""
    return {
        "pyproject.toml": "pyproject.toml.txt",
        "README.md": "README.md.txt",
        f"{module}/__init__.py": f"{kind}/window.py.txt",
        f"{module}/{kind}.py": f"{kind}/thing.py.txt",
        f"tests/test_{module}.py": f"{kind}/test.py.txt",
    }
