"""The commands `altgrad-run` and `altgrad`: they parse, call, and print. They begin in `altgrad_core.cli`."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import cyclopts
from cyclopts import Parameter

from altgrad_core import output
from altgrad_core.durable import WriteError
from altgrad_core.hookspecs import KINDS
from altgrad_core.registry import Registered, UsageError, discover
from altgrad_core.wording import listed, shown, suggestion

_VERSION_FLAGS = ["--version"]
_SWITCH = Parameter(negative=(), show_default=False)
_Json = Annotated[bool, Parameter(name="--json", negative=(), show_default=False)]
Without = Annotated[
    tuple[str, ...],
    Parameter(help="Leave out this distribution's plugins.", negative=(), show_default=False),
]


def _whole_number(_: type[int], tokens: Sequence[cyclopts.Token]) -> int:
    """Read an integer; the library's own way rounds what is none."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{shown(tokens[0].value)} is no whole number") from None


SPINS = ("GOMP_SPINCOUNT", "2000")
"""How long a waiting OpenMP thread spins before it sleeps: docs/decisions/005-threads-that-sleep.md."""

run_app = cyclopts.App(
    name="altgrad-run",
    help="Train what an experiment file describes.",
    version_flags=_VERSION_FLAGS,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)
app = cyclopts.App(
    name="altgrad",
    help="What is installed, and what it can do.",
    version_flags=_VERSION_FLAGS,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)


def guarded(command: cyclopts.App, tokens: Sequence[str] | None = None) -> int:
    """Run a command; a user's mistake prints without a traceback and exits with 2."""
    code: Any = 0
    try:
        with output.told():
            code = command(tokens, exit_on_error=False, print_error=True)
    except cyclopts.CycloptsError:
        return 2
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    except WriteError as error:
        print(error, file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, head perhaps, has gone; what was run has its code
        pass
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        print(f"{shown(str(error.filename))}: no file has so long a name", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


@run_app.default
def run(
    experiment: Path,
    /,
    *,
    set_: Annotated[tuple[str, ...], Parameter(name="--set", negative=(), show_default=False)] = (),
    out: Path = Path("runs"),
    device: str = "auto",
    check: Annotated[bool, _SWITCH] = False,
    resume: Path | None = None,
    jobs: Annotated[int, Parameter(converter=_whole_number)] = 1,
    quiet: Annotated[bool, _SWITCH] = False,
    without: Without = (),
) -> int:
    """Run an experiment; a grid runs all its cells, skipping those already finished.

    Parameters
    ----------
    experiment
        The TOML file.
    set_
        Override one key: steps=20, quantize.format=E5M2, optimizer.lr=1e-3.
    out
        Where run folders go.
    device
        auto, cpu or cuda; goes before the file's train.device.
    check
        Only validate the file and print what it would run.
    resume
        Go on with this run folder.
    jobs
        Cells of a grid to run at the same time.
    quiet
        Print warnings and errors only.
    without
        Leave out this distribution's plugins.
    """
    from altgrad_core import price
    from altgrad_core.experiment_file import load_experiment

    _refuse_bad(device, jobs)
    price.price_per_hour()  # refused now, not when a run has ended
    file = load_experiment(experiment, set_, discover(without))
    if check:
        from altgrad_core import check_page

        return _print(check_page.check(file, out, device))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault(*SPINS)  # before torch loads its OpenMP
    if resume is None:
        from altgrad_core import data_set

        data_set.refuse_absent(file, out)
    from altgrad_core.commands import run_file

    return run_file(file, without=without, out=out, device=device, resume=resume, jobs=jobs, quiet=quiet)


def _refuse_bad(device: str, jobs: int) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device is auto, cpu or cuda, not {device!r}")
    if jobs < 1:
        raise UsageError(f"--jobs is 1 or more, not {jobs}")


def _print(lines: Iterable[str]) -> int:
    """Print lines, and return the exit code of a command that has done so."""
    for line in lines:
        print(line)
    return 0


@app.command
def plugins(
    *,
    kind: Annotated[str | None, Parameter(help=f"Only this kind: {listed(KINDS)}.")] = None,
    as_json: _Json = False,
    without: Without = (),
) -> int:
    """List what is installed; broken and conflicting plugins with the reason.

    Parameters
    ----------
    as_json
        Print JSON.
    without
        Leave out this distribution's plugins.
    """
    if kind is not None:
        _refuse_unknown_kind("--kind", kind)
    registry = discover(without)
    if as_json:
        return _print([json.dumps(registry.plain(kind), indent=1)])
    return _print(registry.lines(kind))


@app.command
def show(name: str, /, *, without: Without = ()) -> int:
    """Show one component: its options, its source, and a TOML snippet.

    Parameters
    ----------
    name
        NAME, or KIND/NAME where several kinds have the name.
    without
        Leave out this distribution's plugins.
    """
    from altgrad_core import component_page

    registry = discover(without)
    kind, _, bare = name.rpartition("/")
    if kind:
        _refuse_unknown_kind("the kind", kind)
    found = registry.find(kind, bare) if kind else _the_only_one(bare, registry.find_of_any_kind(bare))
    return _print(component_page.lines(found, registry))


@app.command
def formats(
    name: str | None = None,
    /,
    *,
    as_json: _Json = False,
    without: Without = (),
) -> int:
    """List the number formats; of one, show its values and pictures of its grid.

    Parameters
    ----------
    name
        A name, or a table as in an experiment file: '{exponent_bits = 4, mantissa_bits = 5, bias = 7}'.
    as_json
        Print JSON; of one format, all its values and codes.
    without
        Leave out this distribution's plugins.
    """
    import rich.console

    from altgrad_core import format_page, format_table

    registry = discover(without)
    page = format_table.overview(registry) if name is None else format_page.page(name, registry)
    if as_json:
        return _print([json.dumps(page.plain(), indent=1)])
    return _print(page.lines(rich.console.Console(highlight=False, emoji=False)))


@app.command
def diff(
    first: Path,
    second: Path,
    /,
    *,
    as_json: _Json = False,
) -> int:
    """Show two runs side by side: options, metrics and tensors; exits with 1 where they differ.

    Parameters
    ----------
    first
        A run folder.
    second
        Another one.
    as_json
        Print JSON.
    """
    from altgrad_core import diff, diff_page

    found = diff.compare(first, second)
    _print([json.dumps(found.plain(), indent=1)] if as_json else diff_page.lines(found))
    return int(found.differs)


@app.command
def new_plugin(
    name: str,
    /,
    *,
    kind: Annotated[str, Parameter(help=f"What it offers: {listed(KINDS)}.")],
    into: Path = Path(),
) -> int:
    """Write a package of your own with one component, ready to `pip install -e`; its tests pass.

    Parameters
    ----------
    name
        What pip is to call it, such as altgrad-eighths.
    into
        The folder in which the package's own folder is made.
    """
    from altgrad_core import new_plugin

    _refuse_unknown_kind("--kind", kind)
    folder = new_plugin.write(name, kind, into)
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        print(path)
    print(f"next: pip install -e '{folder}[test]' && pytest {folder} && altgrad check-plugin {name}")
    return 0


@app.command
def check_plugin(distribution: str, /) -> int:
    """Check every component of an installed plugin by the conformance kit; exits with 1 where one fails.

    Parameters
    ----------
    distribution
        What pip calls it, such as altgrad-eighths.
    """
    from altgrad_core.testing import plugins

    verdicts = []
    for verdict in plugins.check_plugin(distribution, discover()):
        print(verdict, flush=True)
        verdicts.append(verdict)
    return int(any(verdict.outcome == "failed" for verdict in verdicts))


def _the_only_one(name: str, found: Sequence[Registered]) -> Registered:
    if len(found) > 1:
        choices = " or ".join(f"altgrad show {entry.kind}/{name}" for entry in found)
        raise UsageError(f"{name!r} is the name of several components; say which: {choices}")
    return found[0]


def _refuse_unknown_kind(what: str, kind: str) -> None:
    if kind not in KINDS:
        raise UsageError(f"{what} is one of {listed(KINDS)}; not {kind!r}{suggestion(kind, KINDS)}")
